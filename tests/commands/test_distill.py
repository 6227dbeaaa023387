"""A distillation: what it leaves in the run directory under which names, of every mode, and what it refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sidactl
from sidactl import catalog
from sidactl.cli import shown
from sidactl.commands import evaluation, generators, resolve
from sidactl.commands import plan as commands_plan
from sidactl.commands import reference as commands_reference
from sidactl.errors import SidaError
from sidactl.recipes import MODES, Mode
from sidactl.store import Artifact, Store, UnwritableError, collect_garbage, digest
from sidactl.training import state
from tests.commands.conftest import AT_ITS_END, SHORT_SID, TEACHER, messages, never, nothing_is_wrong, one_step, refs
from tests.conftest import SHORT, Finished, instead_of, short_distill


def test_a_distillation_leaves_its_best_and_its_last_generator_under_their_names(finished: Finished) -> None:
    store, best = Store.open(finished.root), finished.best
    last = store.resolve("generator/last")
    names = ("best", "best-tiny-digits", "latest", "tiny-digits-sida")
    assert {f"generator/{name}" for name in names} <= {*store.names_of(best.oid)}
    history = best.results["scores"]
    assert isinstance(history, list)
    assert [nimg for nimg, _ in history] == [32, 64, 96]
    assert [best.results["images_seen"], best.results["selection_score"]] == min(history, key=lambda point: point[1])
    assert [last.results["images_seen"], last.results["selection_score"]] == history[-1]
    assert best.inputs == last.inputs
    assert {role: store.get(oid).kind for role, oid in best.inputs.items()} == {
        "teacher": "teacher",
        "dataset": "dataset",
    }
    (record,) = [a for a in store.artifacts() if a.kind == "run"]
    assert record.inputs == {"best": best.oid, "last": last.oid}
    assert nothing_is_wrong(finished.root)


def test_a_generator_carries_its_pictures(finished: Finished) -> None:
    store = Store.open(finished.root)
    assert sorted(finished.best.files) == ["curve.png", "grid.png", "model.safetensors"]
    for name in ("curve.png", "grid.png"):
        with Image.open(store.path(finished.best, name)) as picture:
            assert picture.format == "PNG"
    drawn = sidactl.sample(finished.best.oid, seeds=evaluation.PREVIEW_SEEDS, run=finished.root, device="cpu")
    assert store.read(drawn.artifact, "grid.png") == store.read(finished.best, "grid.png")


def test_events_tell_the_story_in_order(finished: Finished) -> None:
    # On a busy machine progress is told on the way, too.
    told = [event for event in finished.events if event.kind != "progress" or event.nimg == 96]
    assert [(event.kind, event.nimg) for event in told] == [
        ("started", 0),
        ("evaluation", 32),
        ("checkpoint", 32),
        ("evaluation", 64),
        ("checkpoint", 64),
        ("progress", 96),
        ("evaluation", 96),
        ("checkpoint", 96),
    ]
    assert finished.events[0].values["title"] == "distill tiny-digits sida"
    assert finished.events[0].values["duration_nimg"] == 96
    assert set(told[-3].values) == {
        "stage",
        "skipped_steps",
        "fake_score_loss",
        "discriminator_loss",
        "generator_sid_loss",
        "generator_adversarial_loss",
    }


def test_a_finished_run_leaves_its_events(finished: Finished) -> None:
    (path,) = finished.root.glob("logs/*/events.jsonl")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["nimg"]) for line in kept] == [(e.kind, e.nimg) for e in finished.events[1:]]


@pytest.mark.parametrize(
    ("mode", "alpha", "scores"),
    [
        ("sida", 1.0, {"FID": (1.516, 0.010, "paper")}),
        ("sida", 0.7, {}),
        ("sid", 1.0, {"FID": (2.028, 0.020, "paper")}),  # of which no file is published
    ],
)
def test_the_papers_scores_are_shown_beside_a_generator_trained_as_theirs(
    mode: Mode, alpha: float, scores: dict[str, tuple[float, float, str]], tmp_path: Path
) -> None:
    recipe = catalog.recipe_for("edm-cifar10-uncond", mode)
    params = {"name": f"edm-cifar10-uncond-{mode}", "recipe": replace(recipe, alpha=alpha).to_json()}
    made = Store(tmp_path).put("generator", {"model.safetensors": b""}, params=params)
    published = sidactl.show(made.oid, run=tmp_path).published
    assert {name: tuple(number) for name, number in published.items() if name == "FID"} == scores


def test_the_same_distillation_in_another_run_directory_has_the_same_oid(finished: Finished, fresh_run: Path) -> None:
    assert short_distill(fresh_run).oid == finished.best.oid


def test_how_often_is_evaluated_does_not_alter_the_last_weights(finished: Finished, fresh_run: Path) -> None:
    best = short_distill(fresh_run, evaluate_every_nimg=10**6, checkpoint_every_nimg=10**6)
    assert best.oid != finished.best.oid
    last = Store.open(finished.root).resolve("generator/last")
    assert best.files["model.safetensors"] == last.files["model.safetensors"]


def test_a_finished_command_is_answered_at_once_and_without_torch(finished: Finished) -> None:
    code = f"""
import sys, time
started = time.process_time()
import sidactl
short, run = {SHORT!r}, {str(finished.root)!r}
oid = sidactl.distill(teacher="tiny-digits", mode="sida", run=run, **short).oid
sidactl.fid("tiny-digits", num={SHORT["evaluate_num"]}, run=run)
duration_sec = time.process_time() - started
print(oid, duration_sec, *sorted({{"torch", "numpy", "scipy", "PIL", "safetensors"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    oid, duration_sec, *heavy = done.stdout.split()
    assert (oid, heavy) == (finished.best.oid, [])
    assert float(duration_sec) < 1


def test_of_two_runs_both_stay_and_an_answer_from_the_run_directory_moves_no_name(
    finished: Finished, fresh_run: Path
) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    before, said = refs(fresh_run), list[str]()
    other = short_distill(fresh_run, seed=1, say=said.append, **AT_ITS_END)
    scores = [artifact.results["selection_score"] for artifact in (other, finished.best)]
    better = other if scores[0] < scores[1] else finished.best  # type: ignore[operator]
    assert refs(fresh_run)["generator/latest"] == refs(fresh_run)["generator/tiny-digits-sida"] == other.oid
    assert refs(fresh_run)["generator/best"] == refs(fresh_run)["generator/best-tiny-digits"] == better.oid
    assert len(said) == (better != other)
    now = refs(fresh_run)
    assert short_distill(fresh_run, never, name="mine", say=said.append) == finished.best
    assert refs(fresh_run) == now | {"generator/mine": finished.best.oid}
    assert said[-1].startswith("answered from the run directory, asked on 20")
    assert len([name for name in now if name.startswith("run/")]) == 1 + len(
        [n for n in before if n.startswith("run/")]
    )
    collect_garbage(Store.open(fresh_run), grace_sec=-1)
    assert short_distill(fresh_run, never, seed=1, **AT_ITS_END) == other
    assert nothing_is_wrong(fresh_run)


def test_best_moves_to_a_better_generator_of_the_same_dataset_detector_and_reference_alone(tmp_path: Path) -> None:
    store, said = Store.open(tmp_path / "run"), list[str]()
    results = {"resolution": 8, "num_channels": 1, "kind": "pixels"}
    data = {name: store.put("dataset", {}, params={"name": name}, results=results) for name in ("tiny-digits", "other")}

    def finish(
        score: float | None,
        dataset: str = "tiny-digits",
        detector: str = "tiny-digits",
        num: int = 100,
        by: str = "fid",
    ) -> str:
        generator = store.put(
            "generator",
            {},
            inputs={"dataset": data[dataset].oid},
            params={
                "name": f"{dataset}-sida",
                "dataset": dataset,
                "recipe": {"teacher": dataset, "mode": "sida", "evaluate_num": num, "evaluate_by": by},
            },
            results={"selection_score": score, "detector": detector if score is not None else None},
        )
        generators._name_generators(store, {"best": generator, "last": generator}, data[dataset], said.append)
        assert refs(store.root)["generator/latest"] == generator.oid
        return generator.oid

    def best(name: str = "best") -> str | None:
        return refs(store.root).get(f"generator/{name}")

    unscored = finish(None)
    assert best() == unscored
    good = finish(0.26)
    assert (best(), best("best-tiny-digits"), said) == (good, good, [])
    finish(0.41)
    assert (best(), best("best-tiny-digits")) == (good, good)
    assert said.pop() == (
        "generator/latest, FD tiny-digits 0.41, is not better than generator/best, FD tiny-digits 0.26 "
        f"(tiny-digits-sida, {good[:12]}); generator/best stays"
    )
    # A score of fewer images is no match, however low; one of more replaces it.
    finish(0.1, num=10)
    assert (best(), len(said)) == (good, 1)
    better = finish(0.3, num=1000)
    assert (best(), best("best-tiny-digits"), len(said)) == (better, better, 1)
    said.clear()
    elsewhere = finish(0.2, "other")
    assert (best(), best("best-other")) == (better, elsewhere)
    assert said == [
        f"generator/best stays {better[:12]} (tiny-digits-sida, of tiny-digits), which does not compare with this run; "
        "the best of its dataset is generator/best-other"
    ]
    by_kid = finish(0.001, num=1000, by="kid")
    assert (best(), best("best-tiny-digits"), best("best-tiny-digits-by-kid")) == (better, better, by_kid)
    by_another = finish(0.2, detector="inception", num=1000)
    assert (best(), best("best-tiny-digits"), best("best-tiny-digits-inception")) == (better, better, by_another)
    finish(None)
    assert (best(), best("best-tiny-digits")) == (better, better)


def test_an_answer_that_lost_a_file_is_worked_out_again(finished: Finished, fresh_run: Path) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    store = Store.open(fresh_run)
    store.path(finished.best, "model.safetensors").unlink()
    assert short_distill(fresh_run) == finished.best
    assert nothing_is_wrong(fresh_run)


def test_sid2a_starts_from_a_generator_and_says_so(finished: Finished, fresh_run: Path) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    options = SHORT | {"duration_nimg": 32, "adversarial_from_nimg": 0, "generator_lr": 1e-12}
    tuned = sidactl.finetune_sid2a(
        teacher="tiny-digits", generator="generator/last", name="tuned", run=fresh_run, device="cpu", **options
    )
    store = Store.open(fresh_run)
    start = store.resolve("generator/tuned")
    assert tuned == start
    assert set(tuned.inputs) == {"teacher", "dataset", "generator"}
    assert tuned.params["name"] == "tiny-digits-sid2a"
    before, after = (sidactl.load(oid, fresh_run).state_dict() for oid in (tuned.inputs["generator"], tuned.oid))
    assert all(bool((before[name] - after[name]).abs().max() < 1e-6) for name in before)


def changed(root: Path, artifact: Artifact, **params: Any) -> str:
    """The oid of a copy of an artifact with other parameters."""
    store = Store.open(root)
    files = {name: store.read(artifact, name) for name in artifact.files}
    return store.put(artifact.kind, files, inputs=artifact.inputs, params={**artifact.params, **params}).oid


def test_sid2a_says_where_its_generator_is_not_of_mode_sid(finished: Finished, fresh_run: Path) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    store = Store.open(fresh_run)
    of_sida = store.resolve("generator/last")
    of_sid = changed(fresh_run, of_sida, recipe={**of_sida.params["recipe"], "mode": "sid"})
    planned: dict[str, Any] = {"teacher": "tiny-digits", "mode": "sid2a", "dataset": None, "overrides": {}}
    notes = [commands_plan.plan(generator=name, store=store, **planned).notes for name in (of_sid, "generator/last")]
    line = "SiD2A starts from a generator of mode sid, generator/last is one of mode sida"
    assert (notes[0], notes[1]) == ([], [line])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher": "tiny-digit", "mode": "sid"},
            "unknown teacher 'tiny-digit'. Did you mean 'tiny-digits'?",
        ),
        (
            {"mode": "sad"},
            f"mode must be one of {', '.join(MODES)}, got 'sad'. Pass --mode sida.",
        ),
        (
            {"mode": "sid2a"},
            "mode sid2a starts from a generator, got none. Pass --generator REF: distill one with --mode sid first.",
        ),
        (
            {"mode": "sid", "generator": "generator/best"},
            "mode sid starts from the teacher, got generator 'generator/best'. Use --mode sid2a for it.",
        ),
        (
            {"mode": "sid", "lambda_adv": 0.1},
            "lambda_adv belongs to the adversarial loss, which mode sid does not have. "
            "Use --mode sida, or leave it out.",
        ),
        (
            {"duration_nimg": 0},
            "duration_nimg must be at least 1, got 0. Pass another --duration.",
        ),
        (
            {"mode": "sid2a", "generator": "generator/none"},
            "no ref 'generator/none' in {root}. See what there is with: sidactl ls",
        ),
        (
            {"mode": "sid2a", "generator": "dataset/tiny-digits"},
            "'dataset/tiny-digits' must be of kind generator, got dataset. See what there is with: sidactl ls",
        ),
        (
            {"device": "cuda:99"},
            "device cuda:99 is not there: torch sees {gpus} GPUs. Pass --device cpu.",
        ),
        (
            {"device": "abacus"},
            "device must be cpu, cuda or cuda:N, got 'abacus'. Pass --device cpu.",
        ),
    ],
)
def test_distill_refuses_what_it_cannot_do(fresh_run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SidaError) as caught:
        sidactl.distill(**({"teacher": "tiny-digits", "mode": "sida", "run": fresh_run} | options))
    assert str(caught.value) == message.format(root=fresh_run, gpus=torch.cuda.device_count())
    assert caught.value.exit_code == 2
    assert nothing_is_wrong(fresh_run)


def test_an_unknown_recipe_field_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        SidaError, match=r"^unknown recipe field 'learning_rate'\. Fields of mode sida are P_mean, .*tmax\.$"
    ):
        sidactl.distill(teacher="tiny-digits", mode="sida", run=tmp_path / "run", learning_rate=1)
    assert not (tmp_path / "run").exists()


def test_a_generator_must_fit_the_teacher(finished: Finished, fresh_run: Path) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    hint = "Give a generator that was distilled from this teacher."
    net = finished.best.params["net"]
    for params, message in (
        ({"dataset": "cifar10"}, "the generator must be of the teacher's dataset 'tiny-digits', got one of 'cifar10'"),
        (
            {"net": net | {"model_channels": 32}},
            "the generator must have the teacher's network, got model_channels 32 for 16",
        ),
    ):
        with pytest.raises(SidaError) as caught:
            sidactl.finetune_sid2a(
                teacher="tiny-digits", generator=changed(fresh_run, finished.best, **params), run=fresh_run
            )
        assert str(caught.value) == f"{message}. {hint}"


def test_a_dataset_must_fit_the_teacher(fresh_run: Path) -> None:
    store = Store.open(fresh_run)
    data = store.resolve("dataset/tiny-digits")
    files = {"images.zip": store.path(data, "images.zip")}
    results = dict(data.results)
    for wrong in ({"resolution": 16}, {"num_channels": 3}, {"label_dim": 5}):
        other = store.put("dataset", files, params={"name": "other"}, results=results | wrong)
        got = results | wrong
        with pytest.raises(SidaError) as caught:
            sidactl.distill(teacher="tiny-digits", mode="sid", dataset=other.oid, run=fresh_run)
        assert str(caught.value) == (
            "the dataset must fit the teacher (resolution, channels, classes = 8, 1, 10), "
            f"got {got['resolution']}, {got['num_channels']}, {got['label_dim']}. "
            "Pass another --dataset, or prepare this one to fit."
        )


def test_a_teacher_of_unknown_dataset_needs_one(fresh_run: Path) -> None:
    teacher = changed(fresh_run, Store.open(fresh_run).resolve("teacher/tiny-digits"), dataset=None)
    with pytest.raises(SidaError) as caught:
        sidactl.distill(teacher=teacher, mode="sid", run=fresh_run)
    assert str(caught.value) == f"teacher {teacher} does not say what it was trained on. Pass --dataset REF."


def test_a_prefix_of_two_artifacts_is_ambiguous(tmp_path: Path) -> None:
    def oid(number: int) -> str:
        """What the run directory will name the run with this number."""
        return digest(
            {"files": {}, "inputs": {}, "kind": "generator", "params": {"n": number}, "results": {}, "schema": 1}
        )

    seen: dict[str, int] = {}
    number = next(n for n in range(10**4) if seen.setdefault(oid(n)[:4], n) != n)
    twins = [seen[oid(number)[:4]], number]
    store = Store.open(tmp_path / "run")
    oids = sorted(store.put("generator", {}, params={"n": n}).oid for n in twins)
    with pytest.raises(SidaError) as caught:
        sidactl.sample(oids[0][:4], seeds=[0], run=store.root)
    assert str(caught.value) == (
        f"'{oids[0][:4]}' fits 2 artifacts: {oids[0][:12]} (generator), {oids[1][:12]} (generator). Give more digits."
    )


def test_edm2_end_to_end_in_every_mode(edm2: tuple[Path, str]) -> None:
    root, teacher = edm2
    made = {"sid": sidactl.distill(teacher=teacher, mode="sid", run=root, device="cpu", **SHORT_SID)}
    made["sid2a"] = sidactl.finetune_sid2a(
        teacher=teacher, generator=made["sid"].oid, run=root, device="cpu", **SHORT | AT_ITS_END
    )
    for mode, generator in made.items():
        recipe = generator.params["recipe"]
        assert (recipe["mode"], recipe["forced_normalization"]) == (mode, "published")
        assert generator.params["net"]["logvar_channels"] == 0
        drawn = sidactl.sample(generator.oid, seeds=range(50), run=root)
        assert drawn.images.shape == (50, 8, 8, 1)
        score = sidactl.fid(drawn.artifact.oid, run=root)
        assert score.value == sidactl.fid(generator.oid, num=50, run=root).value
        assert score.value > 0
    assert made["sid2a"].inputs["generator"] == made["sid"].oid


def test_mode_sid_needs_classes_alone_and_is_scored_against_the_teachers_dataset(edm2: tuple[Path, str]) -> None:
    root, teacher = edm2
    classes = sidactl.prepare_data(None, classes=10, run=root)
    made = sidactl.distill(teacher=teacher, mode="sid", dataset=classes.oid, run=root, device="cpu", **SHORT_SID)
    store = Store.open(root)
    assert made.inputs["dataset"] == classes.oid
    assert made.inputs["reference"] == store.resolve("dataset/tiny-digits").oid
    with pytest.raises(SidaError, match=r"^images are needed, got dataset [0-9a-f]{12} of classes alone\. "):
        sidactl.distill(teacher=teacher, mode="sida", dataset=classes.oid, run=root, **SHORT)


def moved_away(root: Path, oid: str, dataset: str) -> str:
    """The oid of a copy of a teacher that is of another dataset, and does not descend from one that is stored."""
    store = Store.open(root)
    known = store.get(oid)
    files = {"model.safetensors": store.path(known, "model.safetensors")}
    return store.put("teacher", files, params={**known.params, "dataset": dataset}).oid


def test_mode_sid_falls_back_on_classes_where_the_dataset_is_not_there(edm2: tuple[Path, str]) -> None:
    root, oid = edm2
    far, store, events = moved_away(root, oid, "imagenet512"), Store.open(root), list[state.Event]()
    options = {"reference": "tiny-digits", "run": root, "device": "cpu"}
    made = sidactl.distill(teacher=far, mode="sid", watch=events.append, **options, **SHORT_SID)
    assert made.params["dataset"] == "imagenet512"
    assert store.get(made.inputs["dataset"]).results["kind"] == "labels"
    assert messages(events)[0] == (
        "dataset imagenet512: mode sid needs no images, training on classes alone, each as often; "
        "--dataset imagenet512-labels downloads the published ones"
    )
    with pytest.raises(SidaError, match=r"^dataset imagenet512 must be prepared from its files\. "):
        sidactl.distill(teacher=far, mode="sida", **options, **SHORT)


def test_mode_sid_without_images_and_without_a_reference_ends_in_the_last_generator(
    edm2: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, oid = edm2
    far, events = moved_away(root, oid, "elsewhere"), list[state.Event]()
    made = sidactl.distill(teacher=far, mode="sid", run=root, device="cpu", watch=events.append, **SHORT_SID)
    assert messages(events) == [
        "dataset elsewhere: mode sid needs no images, training on classes alone",
        "nothing is scored, and the last generator is the result: the network is of dataset 'elsewhere', which is no "
        f"name of the catalog and no ref in {root}",
    ]
    assert {event.kind for event in events} == {"started", "note", "progress", "checkpoint"}
    assert made.oid == refs(root)["generator/latest"] == refs(root)["generator/last"]
    assert made.results == {
        "images_seen": 96,
        "selection_score": None,
        "teacher_score": None,
        "detector": None,
        "scores": [],
        "skipped_updates": 0,
    }
    assert sorted(made.files) == ["grid.png", "model.safetensors"]
    assert sidactl.distill(teacher=far, mode="sid", run=root, watch=never, **SHORT_SID) == made
    shown.print_generator(made, as_json=False)
    told = capsys.readouterr()
    assert told.out == f"{made.oid}\n"
    assert told.err.splitlines()[-1].startswith("last generator, not scored: 96 images, one step. Look at it: ")
    # The scores do not steer the training: with them the last generator has the same weights.
    sidactl.distill(teacher=far, mode="sid", reference="tiny-digits", run=root, device="cpu", **SHORT_SID)
    assert Store.open(root).resolve("generator/last").files["model.safetensors"] == made.files["model.safetensors"]


def test_what_was_asked_for_and_cannot_be_had_stays_an_error_in_mode_sid(
    edm2: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, oid = edm2
    far = moved_away(root, oid, "elsewhere")
    for options in ({"reference": "nowhere"}, {"dataset": "nowhere"}):
        with pytest.raises(SidaError) as caught:
            sidactl.distill(teacher=far, mode="sid", run=root, device="cpu", **options, **SHORT_SID)
        assert str(caught.value) == (
            f"no ref 'nowhere' in {root}, and no such file or folder. See what there is with: sidactl ls"
        )

    def broken(*arguments: object, recheck: bool) -> Artifact:
        raise SidaError("the download broke off", "Try again later.", exit_code=1)

    instead_of(commands_reference.find, broken, monkeypatch)
    with pytest.raises(SidaError, match=r"^the download broke off\. Try again later\.$"):
        sidactl.distill(teacher=far, mode="sid", run=root, device="cpu", **SHORT_SID)


def test_a_dataset_that_cannot_be_written_is_not_taken_for_one_that_is_not_there(
    edm2: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, oid = edm2

    def full(*arguments: object, **options: object) -> Artifact:
        raise UnwritableError("the run directory cannot be written: No space left on device", "Free some space.")

    instead_of(resolve.dataset_called, full, monkeypatch)
    with pytest.raises(SidaError, match=r"No space left on device\. Free some space\.$"):
        sidactl.distill(teacher=moved_away(root, oid, "imagenet512"), mode="sid", run=root, device="cpu", **SHORT_SID)


def test_mode_sid_of_a_teacher_without_classes_needs_no_dataset_either(edm2: tuple[Path, str]) -> None:
    root, _ = edm2
    plain = sidactl.train_teacher("tiny-digits", name="plain", run=root, device="cpu", label_dim=0, **TEACHER).oid
    made = sidactl.distill(
        teacher=moved_away(root, plain, "elsewhere"), mode="sid", run=root, device="cpu", **one_step(SHORT)
    )
    assert made.params["net"]["label_dim"] == 0
    assert sidactl.sample(made.oid, seeds=range(2), run=root).labels is None
