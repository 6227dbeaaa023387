"""Operations by name: what they leave in the run directory, that they go on, and the exact text of errors."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import sidactl
from sidactl import catalog, metrics, sampling
from sidactl.cli import shown
from sidactl.commands import assemble, dataset_stats, distill, evaluation, resolve, running, sample, scorers, vae
from sidactl.commands import moments as commands_moments
from sidactl.commands import plan as commands_plan
from sidactl.commands import reference as commands_reference
from sidactl.commands import scores as commands_scores
from sidactl.commands.words import mapping
from sidactl.engine import devices, ranks
from sidactl.errors import SidaError
from sidactl.nets import Preconditioned
from sidactl.recipes import Execution, HeunSpec, Mode, OneStepSpec, SamplingForm
from sidactl.store import Artifact, Store, UnwritableError, collect_garbage, digest, rehash
from sidactl.training import loop, state, updates
from tests.conftest import SHORT, Finished, Forbid, instead_of, read_only, short_distill
from tests.playback import save_vae
from tests.processes import FORKS

AT_ITS_END = {"evaluate_every_nimg": 96, "checkpoint_every_nimg": 96}
"""for what does not ask how a run goes on: to write a checkpoint takes as long as a step"""
SHORT_SID = {name: value for name, value in SHORT.items() if name != "adversarial_from_nimg"} | AT_ITS_END


def nothing_is_wrong(root: Path) -> bool:
    return list(rehash(Store.open(root))) == [] and os.listdir(root / "live") == []


def refs(root: Path) -> dict[str, str]:
    return Store.open(root).refs()


# Several processes, several devices


def test_a_run_that_another_process_was_told_to_stop_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    instead_of(loop.run, lambda *arguments, **options: iter([state.Event("interrupted", 64)]), monkeypatch)
    schedule = state.Schedule(duration_nimg=640, evaluate_every_nimg=64, checkpoint_every_nimg=64)
    with Store(tmp_path).live("key") as live, pytest.raises(SidaError) as caught:
        running.run_training(cast(Any, SimpleNamespace(nimg=64)), schedule, live, None, None, {})
    assert caught.value.message == "interrupted at 64 of 640 images; the checkpoint is kept"
    assert caught.value.exit_code == 130


def test_the_images_at_a_time_are_tried_anew_with_other_processes_devices_and_settings(tmp_path: Path) -> None:
    gpu, num_tries = torch.device("cuda:0"), 0

    def fit() -> int:
        nonlocal num_tries
        num_tries += 1
        return 128

    def tries(size: int, memory: int, execution: Execution) -> int:
        before = num_tries
        training = SimpleNamespace(recipe=catalog.recipe_for("tiny-digits", "sida"), fit_batch_per_device=fit)
        with pytest.MonkeyPatch.context() as patch:
            instead_of(ranks.rank_and_size, lambda: (0, size), patch)
            instead_of(ranks.broadcast_from_rank0, lambda make: make(), patch)
            instead_of(devices.memory_of, lambda device: ["a GPU", memory], patch)
            assemble.find_batch_per_device(cast(Any, training), execution, live, gpu)
        return num_tries - before

    with Store(tmp_path).live("key") as live:
        assert [tries(1, 80, Execution()) for _ in range(2)] == [1, 0]
        assert tries(2, 80, Execution()) == 1
        assert tries(2, 40, Execution()) == 1
        assert tries(2, 40, Execution(checkpoint_activations=True)) == 1


# Distillation: what it leaves


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


def test_the_score_of_the_best_is_that_of_its_weights_on_the_selection_seeds(finished: Finished) -> None:
    score = sidactl.fid(
        finished.best.oid,
        num=SHORT["evaluate_num"],
        first_seed=evaluation.SELECTION_SEED,
        run=finished.root,
        device="cpu",
    )
    assert score.value == finished.best.results["selection_score"]
    teacher = sidactl.fid("tiny-digits", num=SHORT["evaluate_num"], run=finished.root)
    assert teacher.value == finished.best.results["teacher_score"]


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


def test_teacher_by_name_oid_or_ref_is_one_question(finished: Finished) -> None:
    oid = refs(finished.root)["teacher/tiny-digits"]
    for teacher in (oid, oid[:12], "teacher/tiny-digits"):
        again = sidactl.distill(teacher=teacher, mode="sida", run=finished.root, watch=never, **SHORT)
        assert again == finished.best


def never(event: state.Event) -> None:
    raise AssertionError(f"nothing must run, got {event}")


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

    def finish(score: float | None, dataset: str = "tiny-digits", detector: str = "tiny-digits", num: int = 100) -> str:
        generator = store.put(
            "generator",
            {},
            inputs={"dataset": data[dataset].oid},
            params={
                "name": f"{dataset}-sida",
                "dataset": dataset,
                "recipe": {"teacher": dataset, "mode": "sida", "evaluate_num": num},
            },
            results={"selection_score": score, "detector": detector if score is not None else None},
        )
        distill._name_generators(store, {"best": generator, "last": generator}, data[dataset], said.append)
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
        "generator/latest 0.41 is not better than generator/best 0.26 "
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


# Distillation: --force, interruptions, kills


def test_force_asks_again_and_gets_the_same(finished: Finished, fresh_run: Path) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    events: list[state.Event] = []
    assert short_distill(fresh_run, events.append, force=True) == finished.best
    kinds = [[e.kind for e in told if e.kind != "progress"] for told in (events, finished.events)]  # by the clock
    assert kinds[0] == kinds[1]
    assert nothing_is_wrong(fresh_run)


def interrupting(number: int, kind: str, nimg: int, seen: list[state.Event]) -> Callable[[state.Event], None]:
    """A watcher that sends this process a signal once, at an event."""

    def watch(event: state.Event) -> None:
        seen.append(event)
        if (event.kind, event.nimg) == (kind, nimg):
            os.kill(os.getpid(), number)

    return watch


@pytest.mark.parametrize(
    ("number", "kind", "nimg", "stops_at"),
    [
        (signal.SIGINT, "started", 0, 16),
        (signal.SIGTERM, "checkpoint", 32, 48),
        (signal.SIGINT, "evaluation", 64, 64),
        (signal.SIGTERM, "progress", 96, 96),
        (signal.SIGINT, "checkpoint", 96, 96),
    ],
)
def test_a_signal_ends_the_run_after_the_step_and_the_same_call_goes_on(
    finished: Finished, fresh_run: Path, number: int, kind: str, nimg: int, stops_at: int
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    seen: list[state.Event] = []
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, interrupting(number, kind, nimg, seen))
    assert caught.value.exit_code == 130
    assert str(caught.value) == (
        f"interrupted at {stops_at} of 96 images; the checkpoint is kept. Repeat the same command to go on."
    )
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert list(rehash(Store.open(fresh_run))) == []
    again: list[state.Event] = []
    assert short_distill(fresh_run, again.append) == finished.best
    assert [(e.kind, e.nimg) for e in again[:2]] == [("started", 0), ("resumed", stops_at)]
    assert nothing_is_wrong(fresh_run)


def test_a_second_signal_acts_as_usual(fresh_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(running.REPEATS_SEC, signal.SIGINT, 0.0)

    def watch(event: state.Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):  # the second one comes with the second event
        short_distill(fresh_run, watch, evaluate_every_nimg=16)


def test_sigterm_that_comes_twice_in_a_row_loses_no_checkpoint(finished: Finished, fresh_run: Path) -> None:
    """As where a cluster sends it to every process, and torchrun sends it on."""
    seen: list[state.Event] = []

    def watch(event: state.Event) -> None:
        seen.append(event)
        if event.nimg < 48:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SidaError, match=r"^interrupted at 16 of 96 images; the checkpoint is kept\. Repeat"):
        short_distill(fresh_run, watch)
    assert [(e.kind, e.nimg) for e in seen] == [("started", 0), ("checkpoint", 16), ("interrupted", 16)]
    assert short_distill(fresh_run) == finished.best


@pytest.mark.parametrize(("number", "repeats_sec"), [(signal.SIGTERM, 10.0), (signal.SIGINT, 1.0)])
def test_a_signal_acts_as_usual_once_it_is_no_repetition(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, repeats_sec: float
) -> None:
    now = iter([100.0, 100.0 + repeats_sec - 0.1, 100.0 + repeats_sec])
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(now)))
    usual = signal.signal(number, signal.default_int_handler)
    try:
        with running._stop_on_signals() as should_stop:
            for _ in range(2):
                os.kill(os.getpid(), number)
                assert should_stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, usual)


@pytest.mark.slow  # a CPU takes its time over float16; test_trainer does the same with a smaller net
def test_a_float16_run_goes_on_to_the_same_bits_with_a_loss_scale_that_was_falling(
    fresh_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So large a scale at the start that the first updates overflow.
    monkeypatch.setattr(updates, "IMAGES_PER_LOSS_SCALE", 2.0**-8)
    options = {"precision": "fp16", "duration_nimg": 64, "evaluate_every_nimg": 64, "evaluate_num": 2, "batch_size": 8}
    other = Path(shutil.copytree(fresh_run, tmp_path / "other"))
    straight = short_distill(fresh_run, **options)
    with pytest.raises(SidaError):
        short_distill(other, interrupting(signal.SIGINT, "started", 0, []), **options)
    (checkpoint,) = other.glob("live/*/checkpoint-0000000008-0")
    scales = json.loads((checkpoint / "state.json").read_text())["loss_scales"]
    assert scales["generator"] == {"value": 1024.0, "good_updates": 0}
    assert short_distill(other, **options).oid == straight.oid


def test_a_signal_during_an_evaluation_acts_at_once_and_the_evaluation_is_made_later(
    finished: Finished, fresh_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, batches = sampling.Samples.shared, []

    def interrupted(samples: sampling.Samples, first: int = 0) -> Any:
        for batch in shared(samples, first):
            batches.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch
            raise AssertionError("the evaluation goes on")

    seen: list[state.Event] = []
    with monkeypatch.context() as patched:
        patched.setattr(sampling.Samples, "shared", interrupted)
        with pytest.raises(SidaError, match=r"^interrupted at 32 of 96 images; the checkpoint is kept\."):
            short_distill(fresh_run, seen.append)
    assert len(batches) == 1
    assert "evaluation" not in {event.kind for event in seen}
    assert short_distill(fresh_run) == finished.best


def test_an_interrupted_force_goes_on_too_and_the_old_answer_stays_meanwhile(
    finished: Finished, fresh_run: Path
) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    with pytest.raises(SidaError):
        short_distill(fresh_run, interrupting(signal.SIGINT, "checkpoint", 64, []), force=True)
    assert short_distill(fresh_run, never) == finished.best
    seen: list[state.Event] = []
    assert short_distill(fresh_run, seen.append, force=True) == finished.best
    assert (seen[1].kind, seen[1].nimg) == ("resumed", 80)
    assert nothing_is_wrong(fresh_run)


def test_a_signal_while_the_teacher_is_scored_loses_nothing(fresh_run: Path) -> None:
    seen: list[state.Event] = []
    with pytest.raises(KeyboardInterrupt):
        short_distill(fresh_run, interrupting(signal.SIGINT, "note", 96, seen), evaluate_num=50)
    assert seen[-1].values == {"message": "scoring the teacher on 50 images (35 evaluations each) for comparison"}
    again: list[state.Event] = []
    short_distill(fresh_run, again.append, evaluate_num=50)
    assert [(e.kind, e.nimg) for e in again] == [("started", 0), ("note", 0), ("resumed", 96), ("note", 96)]
    assert again[1].values["message"] == (
        "at the end the teacher is scored, too, on 50 images of 35 evaluations each; --teacher-score none leaves that "
        "out"
    )
    assert nothing_is_wrong(fresh_run)


def test_other_recipe_values_are_another_question_and_leave_an_interrupted_run_alone(
    finished: Finished, fresh_run: Path
) -> None:
    with pytest.raises(SidaError):
        short_distill(fresh_run, interrupting(signal.SIGINT, "checkpoint", 32, []))
    (key,) = os.listdir(fresh_run / "live")
    before = sorted(path.name for path in (fresh_run / "live" / key).iterdir())
    seen: list[state.Event] = []
    other = short_distill(fresh_run, seen.append, generator_lr=1e-4, **AT_ITS_END)
    assert other.oid != finished.best.oid
    assert "resumed" not in {event.kind for event in seen}
    assert sorted(path.name for path in (fresh_run / "live" / key).iterdir()) == before
    assert short_distill(fresh_run) == finished.best


def test_the_same_distillation_twice_at_once_is_refused(fresh_run: Path) -> None:
    told: list[str] = []

    def watch(event: state.Event) -> None:
        with pytest.raises(SidaError) as caught:
            short_distill(fresh_run, never)
        key = Path(event.values["events"]).parent.name
        assert caught.value.exit_code == 1
        told.append(str(caught.value).replace(key[:12], "KEY"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short_distill(fresh_run, watch)
    assert told == [f"run KEY is already being worked on by process {os.getpid()}. Wait for it, or stop it first."]


def test_a_run_whose_gradients_are_not_finite_stops_and_names_the_step(fresh_run: Path) -> None:
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, fake_score_lr=1e30, stop_if_nan_steps=3, evaluate_every_nimg=96)
    assert str(caught.value) == (
        "3 updates in a row of the generator had a gradient that is not finite, the last at step 3 (48 images). "
        "The last checkpoint is kept; lower the learning rate or choose another precision."
    )
    assert caught.value.exit_code == 1


def test_a_score_that_is_not_finite_is_written_as_null_and_never_the_best(
    fresh_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 2.0, float("nan")])
    instead_of(metrics.frechet_distance, lambda *statistics: next(scores), monkeypatch)
    best = short_distill(fresh_run, checkpoint_every_nimg=96)
    last = Store.open(fresh_run).resolve("generator/last")
    assert best.results["scores"] == last.results["scores"] == [[32, 3.0], [64, 2.0], [96, None]]
    assert (best.results["images_seen"], best.results["selection_score"]) == (64, 2.0)
    assert (last.results["images_seen"], last.results["selection_score"]) == (96, None)


def test_a_run_without_a_finite_score_is_told_in_one_line(fresh_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of(metrics.frechet_distance, lambda *statistics: float("inf"), monkeypatch)
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, **AT_ITS_END)
    assert str(caught.value) == "no evaluation gave a finite score. Lower the learning rate."
    assert caught.value.exit_code == 1


def die_before(num_operations: int, root: Path) -> None:
    """Distills; dies by SIGKILL before it moves or removes its n-th file."""
    left = iter(range(num_operations))

    def mortal(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return operate

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, mortal(getattr(os, name)))
    short_distill(root)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a distillation that was trained to its end, but of which nothing is stored yet."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("trained") / "run"))
    with pytest.raises(SidaError):
        short_distill(root, interrupting(signal.SIGINT, "checkpoint", 96, []))
    return root


def assert_finishes_although_killed(finished: Finished, trained: Path, root: Path, num_operations: int) -> bool:
    """Kills one process in the last part of its work and repeats it; False once there was nothing left to kill."""
    shutil.copytree(trained, root)
    process = FORKS.Process(target=die_before, args=(num_operations, root))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    assert list(rehash(Store.open(root))) == []
    assert short_distill(root) == finished.best
    named = {k: v for k, v in refs(finished.root).items() if not k.startswith("detector/")}  # others' detectors, too
    assert named.items() <= refs(root).items()
    assert nothing_is_wrong(root)
    return process.exitcode != 0


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_anywhere_between_training_and_its_end_the_same_call_finishes(
    finished: Finished, trained: Path, tmp_path: Path, first: int
) -> None:
    step = 11 if first == 0 else 1
    n = first
    while assert_finishes_although_killed(finished, trained, tmp_path / str(n), n):
        n += step
    assert n > 30


def distill_quietly(root: Path) -> None:
    short_distill(root)


@pytest.mark.slow  # test_kill.py does the same to the command
@pytest.mark.parametrize("seed", range(15))
def test_killed_at_random_moments_the_same_call_goes_on_to_the_same_oid(
    finished: Finished, fresh_run: Path, seed: int
) -> None:
    moments = random.Random(seed)
    for _ in range(6):
        process = FORKS.Process(target=distill_quietly, args=(fresh_run,))
        process.start()
        process.join(moments.uniform(0.1, 2))
        process.kill()
        process.join()
        assert list(rehash(Store.open(fresh_run))) == []
    assert short_distill(fresh_run) == finished.best
    assert nothing_is_wrong(fresh_run)


# Distillation from a generator, and what cannot be distilled


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
    of_sid = changed(fresh_run, of_sida, recipe={**mapping(of_sida.params["recipe"]), "mode": "sid"})
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
            "mode must be one of sid, sida, sid2a, got 'sad'. Pass --mode sida.",
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
    with pytest.raises(SidaError, match=r"^unknown recipe field 'learning_rate'\. Fields are P_mean, .*tmax\.$"):
        sidactl.distill(teacher="tiny-digits", mode="sida", run=tmp_path / "run", learning_rate=1)
    assert not (tmp_path / "run").exists()


def test_a_generator_must_fit_the_teacher(finished: Finished, fresh_run: Path) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    hint = "Give a generator that was distilled from this teacher."
    net = mapping(finished.best.params["net"])
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


# What is refused before anything is computed, fetched or written


def planned(root: Path, **options: Any) -> commands_plan.Plan:
    """The plan of a distillation of tiny-digits; everything that plan refuses, distill refuses before it begins."""
    chosen: dict[str, Any] = {"teacher": "tiny-digits", "mode": "sida", "generator": None, "dataset": None}
    return commands_plan.plan(**(chosen | {"overrides": {}} | options), store=Store.open(root))


@pytest.mark.parametrize(
    ("mode", "overrides", "message"),
    [
        (
            "sida",
            {"duration_nimg": 2000},
            "the generator trains from 4,000 images on, the run ends at 2,000: it would return its teacher. "
            "Pass --generator-from 500 and --adversarial-from 1000, or a longer --duration.",
        ),
        (
            "sid",
            {"duration_nimg": 4096},
            "the generator trains from 4,000 images on, in steps of 128, the run ends at 4,096: it would return its "
            "teacher. Pass --generator-from 1024, or a longer --duration.",
        ),
        (
            "sid",
            {"duration_nimg": 100, "generator_from_nimg": 0},
            "the generator trains from 0 images on, in steps of 128, the run ends at 100: it would return its teacher. "
            "Pass --generator-from none, or a longer --duration.",
        ),
        (
            "sida",
            {"duration_nimg": 10_112},
            "the adversarial part counts from 10,000 images on, in steps of 128, the run ends at 10,112: it would be "
            "mode sid. Pass --adversarial-from 5056, or a longer --duration.",
        ),
        (
            "sida",
            {"duration_nimg": 128, "generator_from_nimg": None},
            "the adversarial part counts from 10,000 images on, the run ends at 128: it would be mode sid. "
            "Pass a longer --duration.",
        ),
    ],
)
def test_a_run_that_would_not_train_what_its_mode_is_for_is_refused(
    tmp_path: Path, mode: str, overrides: dict[str, Any], message: str
) -> None:
    for act in (
        lambda: planned(tmp_path / "run", mode=mode, overrides=overrides),
        lambda: sidactl.distill(teacher="tiny-digits", mode=mode, run=tmp_path / "run", **overrides),
    ):
        with pytest.raises(SidaError) as caught:
            act()
        assert (str(caught.value), caught.value.exit_code) == (message, 2)
    assert not (tmp_path / "run").exists()
    flag = re.search(r"Pass --(generator|adversarial)-from (\S+),", message)
    if flag:  # what it says to pass helps
        chosen = {f"{flag[1]}_from_nimg": None if flag[2] == "none" else int(flag[2])}
        rest = {"adversarial_from_nimg": 0} if mode == "sida" and flag[1] == "generator" else {}
        assert planned(tmp_path / "run", mode=mode, overrides=overrides | chosen | rest).recipe.untrained() == []
    planned(tmp_path / "run", mode=mode, overrides={"duration_nimg": 10_113})


def test_a_published_recipe_too_short_is_refused_by_its_own_numbers(tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        planned(tmp_path / "run", teacher="edm-cifar10-uncond", overrides={"duration_nimg": 2000})
    assert str(caught.value) == (
        "the generator trains from 100,000 images on, the run ends at 2,000: it would return its teacher. "
        "Pass --generator-from 500 and --adversarial-from 1000, or a longer --duration."
    )


def test_asked_for_a_run_that_trains_nothing_says_so_and_returns_the_teacher(
    fresh_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[state.Event] = []
    made = sidactl.distill(
        teacher="tiny-digits",
        mode="sida",
        run=fresh_run,
        watch=events.append,
        allow_untrained=True,
        **SHORT | {"duration_nimg": 32, "generator_from_nimg": 50},
    )
    told = "the generator trains from 50 images on, the run ends at 32: it would return its teacher"
    assert [e.values["message"] for e in events if e.kind == "warning"] == [told]
    assert made.results["untrained"] == ["generator", "adversarial part"]
    teacher, generator = (sidactl.load(ref, fresh_run).state_dict() for ref in ("tiny-digits", made.oid))
    assert all(torch.equal(teacher[name], generator[name]) for name in generator)
    shown.print_generator(made, as_json=False)
    assert capsys.readouterr().err.startswith(
        "warning: nothing of the generator was trained in the 32 images of this generator: "
        "it is its teacher, unchanged\nbest generator: FD tiny-digits "
    )


def test_another_duration_moves_the_stages_of_a_teacher_of_ones_own(edm2: tuple[Path, str], tmp_path: Path) -> None:
    root, oid = edm2
    usual, short = (planned(root, teacher=oid, overrides=o).recipe for o in ({}, {"duration_nimg": 7000}))
    assert usual.duration_nimg == 70_000
    assert short.untrained() == usual.untrained() == []
    assert (
        short.generator_from_nimg,
        short.evaluate_every_nimg,
        short.checkpoint_every_nimg,
        short.ema_halflife_nimg,
        short.adversarial and short.adversarial.adversarial_from_nimg,
    ) == (400, 1000, 1000, 2000, 1000)
    assert (usual.P_mean, usual.P_std) == (-1.2, 1.2)  # as the teacher was trained
    kept = planned(root, teacher=oid, overrides={"duration_nimg": 7000, "evaluate_every_nimg": 50}).recipe
    assert (kept.evaluate_every_nimg, kept.checkpoint_every_nimg) == (50, 1000)
    with pytest.raises(SidaError, match=r"^duration_nimg must be at least 1, got 0\. "):
        planned(root, teacher=oid, overrides={"duration_nimg": 0})


def test_what_shapes_no_generator_is_no_part_of_the_question(finished: Finished) -> None:
    again = short_distill(finished.root, never, checkpoint_every_nimg=7, stop_if_nan_steps=3)
    assert again == finished.best
    options: dict[str, Any] = {"teacher": "tiny-digits", "mode": "sida", "run": finished.root, "watch": never}
    assert sidactl.distill(**options, teacher_score="none", detector="tiny-digits", **SHORT) == finished.best


def test_the_question_of_the_default_recipe_is_what_it_was(finished: Finished) -> None:
    store = Store.open(finished.root)
    options = {"teacher": "tiny-digits", "mode": "sida", "generator": None, "dataset": None, "reference": None}
    more = {"score": True, "detector": None, "allow_untrained": False, "overrides": {}}
    asked_for = assemble.assembled(store, execution=Execution(), device=None, recheck=False, **options, **more)
    oids = {role: refs(finished.root)[f"{role}/tiny-digits"] for role in ("teacher", "dataset")}
    recipe = catalog.TEACHERS["tiny-digits"].recipes["sida"].to_json()
    assert asked_for.keys(store)["best"] == store.key("distill", {"recipe": recipe, "which": "best"}, oids)


def test_without_scores_the_last_generator_is_the_result_and_nothing_is_needed_for_them(
    finished: Finished, fresh_run: Path, forbidden: Forbid
) -> None:
    events: list[state.Event] = []
    with forbidden(scorers.load_detector):
        made = sidactl.distill(
            teacher="tiny-digits", mode="sida", score=False, run=fresh_run, watch=events.append, **SHORT
        )
    assert messages(events) == ["nothing is scored, and the last generator is the result"]
    assert {event.kind for event in events} == {"started", "note", "progress", "checkpoint"}
    assert (made.results["selection_score"], made.results["detector"], made.results["scores"]) == (None, None, [])
    last = Store.open(finished.root).resolve("generator/last")
    assert made.files["model.safetensors"] == last.files["model.safetensors"]
    for options, got in (({"reference": "tiny-digits"}, "--ref"), ({"detector": "inception"}, "--detector")):
        (value,) = options.values()
        with pytest.raises(SidaError) as caught:
            sidactl.distill(teacher="tiny-digits", mode="sida", score=False, run=fresh_run, **options)
        assert str(caught.value) == f"{got} is for scoring, got {value} and --no-score. Leave out one of the two."


FEW: dict[str, Any] = {
    "duration_nimg": 16,
    "batch_size": 8,
    "num_accumulation_rounds": 1,
    "generator_from_nimg": 0,
    "evaluate_every_nimg": 16,
    "evaluate_num": 4,
    "checkpoint_every_nimg": 16,
    "device": "cpu",
    "teacher_score": "none",
}


@dataclass(frozen=True)
class Latent:
    """A run directory with `dataset/lat`, latents of 8x8 by the VAE in the folder x, and `teacher/t` trained on them.

    The folder y holds another VAE, the mirror the usual one.
    """

    root: Path
    x: Path
    y: Path
    mirror: Path


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Latent:
    folder = tmp_path_factory.mktemp("latent")
    random = np.random.default_rng(0)
    for index in range(6):
        (folder / f"in/{index % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            folder / f"in/{index % 2}/{index}.png"
        )
    vaes = [save_vae(folder / name, seed) for seed, name in enumerate(("x", "y", "mirror/sd-vae-ft-mse"))]
    root = folder / "run"
    pixels = sidactl.prepare_data(str(folder / "in"), run=root)
    sidactl.prepare_data(pixels, latents=True, vae=vaes[0], name="lat", run=root, device="cpu")
    sidactl.train_teacher("lat", name="t", run=root, device="cpu", duration_nimg=16, batch_size=16)
    return Latent(root, vaes[0], vaes[1], folder / "mirror")


@pytest.fixture
def latent_run(latent: Latent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Latent:
    """The same, in a run directory of the test's own, offline, with the mirror."""
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    monkeypatch.setenv("SIDACTL_MIRROR", str(latent.mirror))
    return replace(latent, root=Path(shutil.copytree(latent.root, tmp_path / "run")))


def label_of(folder: Path, root: Path) -> str:
    return vae.vae_label(vae.fetch_vae(Store.open(root), str(folder)))


def test_a_generator_remembers_the_vae_that_decodes_its_latents(latent_run: Latent, tmp_path: Path) -> None:
    root, x, y = latent_run.root, latent_run.x, latent_run.y
    told: list[str] = []
    made = sidactl.distill(teacher="t", mode="sid", run=root, say=told.append, **FEW)  # the teacher's own
    x_label, y_label = label_of(x, root), label_of(y, root)
    assert made.params["vae"] == Store.open(root).resolve("teacher/t").params["vae"] == x_label
    assert made.inputs["vae"] == vae.fetch_vae(Store.open(root), str(x)).oid
    assert sidactl.distill(teacher="t", mode="sid", vae=x, run=root, say=None, **FEW) == made

    def drawn(say: Any = None, **options: Any) -> Any:
        return sidactl.sample(made, num=2, run=root, device="cpu", say=say, **options).artifact

    own = drawn(told.append)
    assert not [line for line in told if "warning" in line]
    assert (own.params["vae"], own.inputs["vae"]) == (x_label, made.inputs["vae"])
    assert drawn(vae=x) == own
    other = drawn(told.append, vae=str(y))
    assert other.files["images.zip"] != own.files["images.zip"]
    assert told[-1] == f"warning: t-sid was made with the VAE {x_label}, latents are decoded by {y_label} here (--vae)"
    usual = drawn(told.append, vae="stabilityai/sd-vae-ft-mse")
    assert "vae" not in usual.params
    assert usual.files["images.zip"] not in (own.files["images.zip"], other.files["images.zip"])

    scored: dict[str, Any] = {"num": 4, "run": root, "device": "cpu", "say": None}
    score, by_x, by_y = (sidactl.fid(made, **scored, **more) for more in ({}, {"vae": x}, {"vae": y}))
    assert by_x.oid == score.oid
    assert score.settings["vae"] == x_label.partition("@")[2]
    assert f"t-sid was made with the VAE {x_label}, latents are decoded by {y_label} here (--vae)" in by_y.warnings
    assert float(by_y) != float(score)
    assert not [line for line in sidactl.fid(own, **scored | {"num": 2}).warnings if "VAE" in line]
    with pytest.raises(SidaError) as caught:
        sidactl.fid(own, vae=x, **scored)
    assert str(caught.value) == "a VAE is of a net that draws latents, got fixed images. Leave out --vae."


def test_a_generator_whose_vae_is_not_there_says_which_one(latent_run: Latent, tmp_path: Path) -> None:
    made = sidactl.distill(teacher="t", mode="sid", run=latent_run.root, score=False, say=None, **FEW)
    sidactl.export(made, tmp_path / "g.safetensors", run=latent_run.root)
    elsewhere = tmp_path / "elsewhere"
    sidactl.fetch_teacher(tmp_path / "g.safetensors", run=elsewhere)
    label = label_of(latent_run.x, latent_run.root)
    with pytest.raises(SidaError) as caught:
        sidactl.sample("g", num=2, run=elsewhere, device="cpu")
    assert str(caught.value) == (
        f"g was made with the VAE {label}, which is not in {elsewhere}. Pass it as --vae PATH or OWNER/NAME, or --vae "
        "stabilityai/sd-vae-ft-mse for the usual one."
    )
    told: list[str] = []
    by_x = sidactl.sample("g", num=2, vae=latent_run.x, run=elsewhere, device="cpu", say=told.append)
    assert not told
    assert sidactl.sample("g", num=2, run=elsewhere, device="cpu").artifact == by_x.artifact
    card = (sidactl.export(made, tmp_path / "out", run=latent_run.root) / "README.md").read_text()
    assert f"- its latents are decoded by the VAE {label}" in card


def test_a_run_that_decodes_by_another_vae_than_its_inputs_were_made_with_is_told(latent_run: Latent) -> None:
    root, x, y = latent_run.root, latent_run.x, latent_run.y
    x_label, y_label = label_of(x, root), label_of(y, root)
    events: list[state.Event] = []
    made = sidactl.distill(teacher="t", mode="sid", vae=y, run=root, watch=events.append, say=None, **FEW)
    told = f"was made with the VAE {x_label}, latents are decoded by {y_label} here (--vae)"
    warned = [event.values["message"] for event in events if event.kind == "warning"]
    assert warned == [f"t {told}", f"lat {told}"]
    assert made.params["vae"] == y_label
    plan = planned(root, teacher="t", mode="sid2a", generator=made.oid)
    told = f"t-sid was made with the VAE {y_label}, latents are decoded by {x_label} here (--vae)"
    assert told in plan.warnings
    pixels = Store.open(root).resolve("dataset/lat").inputs["dataset"]
    sidactl.prepare_data(pixels, latents=True, name="usual", run=root, device="cpu")
    plan = planned(root, teacher="t", mode="sid", dataset="usual")
    told = f"usual was made with the VAE stabilityai/sd-vae-ft-mse, latents are decoded by {x_label} here (--vae)"
    assert told in plan.warnings


def test_a_vae_is_checked_before_a_run_begins(
    latent_run: Latent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = latent_run.root
    (latent_run.root.parent / "v").mkdir()
    for options, message in (
        (
            {"teacher": "t", "mode": "sid", "vae": str(root.parent / "v")},
            f"{root.parent}/v must hold config.json and diffusion_pytorch_model.safetensors, config.json is missing. "
            "Give a folder that diffusers saved, or a name such as stabilityai/sd-vae-ft-mse.",
        ),
        (
            {"vae": "stabilityai/sd-vae-ft-ema"},
            "--vae is for networks of latents, tiny-digits draws pixels. Leave out --vae.",
        ),
    ):
        with pytest.raises(SidaError) as caught:
            planned(root, **options)
        assert (str(caught.value), caught.value.exit_code) == (message, 2)
    with pytest.raises(
        SidaError, match=r"^the mirror has neither file://.*\. Put the file there, or unset SIDACTL_MIRROR"
    ):
        planned(root, teacher="t", mode="sid", vae="stabilityai/sd-vae-ft-ema")
    shutil.copytree(latent_run.x, tmp_path / "mirror/sd-vae-ft-ema")
    monkeypatch.setenv("SIDACTL_MIRROR", str(tmp_path / "mirror"))
    (need,) = planned(root, teacher="t", mode="sid", vae="stabilityai/sd-vae-ft-ema").needs
    assert (need.what, need.how, need.size_bytes) == ("the VAE stabilityai/sd-vae-ft-ema", "downloaded", None)
    monkeypatch.delenv("SIDACTL_MIRROR")
    with pytest.raises(SidaError) as caught:
        planned(root, teacher="t", mode="sid", vae="stabilityai/sd-vae-ft-ema")
    assert str(caught.value) == (
        "the VAE stabilityai/sd-vae-ft-ema must be downloaded from https://huggingface.co/stabilityai/sd-vae-ft-ema/"
        "resolve/main/diffusion_pytorch_model.safetensors, which offline forbids. Allow it, or set SIDACTL_MIRROR to a "
        "folder that holds the file."
    )
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SidaError) as caught:
        planned(root, teacher="t", mode="sid")
    assert str(caught.value) == (
        "decoding latents needs the VAE of diffusers, which is not installed. Install it with: pip install "
        "'sidactl[vae]', or pass --no-score."
    )
    told: list[str] = []
    made = sidactl.distill(teacher="t", mode="sid", score=False, run=root, say=told.append, **FEW)
    assert "grid.png" not in made.files
    assert told == [
        "warning: there is no picture of the generator: decoding latents needs the VAE of diffusers, which is not "
        "installed"
    ]


@pytest.fixture(scope="module")
def colourful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with 40 colour pictures of 16x16 pixels in two classes, `dataset/mine`, and `teacher/own`."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index in range(40):
        (folder / f"{index % 2}").mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index % 2}" / f"{index}.png")
    root = tmp_path_factory.mktemp("colourful") / "run"
    sidactl.prepare_data(str(folder), name="mine", run=root)
    sidactl.train_teacher("mine", name="own", run=root, duration_nimg=64, batch_size=32, model_channels=8)
    return root


def test_a_teacher_of_ones_own_is_distilled_and_scored_offline(
    colourful: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    made = sidactl.distill(
        teacher="own", mode="sida", run=colourful, **SHORT | {"duration_nimg": 48, "adversarial_from_nimg": 16}
    )
    assert made.results["detector"] == "random-features"
    assert made.results["teacher_score"]
    shown.print_generator(made, as_json=False)
    told = capsys.readouterr().err
    assert f"best generator: random-features FD {made.results['selection_score']:.4g} after " in told
    assert "FID" not in told
    scoring = planned(colourful, teacher="own").scoring
    assert scoring
    assert (scoring.detector, scoring.score_name) == ("random-features", "random-features FD")
    with pytest.raises(SidaError) as caught:
        planned(colourful, teacher="own", detector="inception")
    assert caught.value.message.startswith("detector inception must be downloaded from https://github.com/")


def test_another_detector_is_another_question(finished: Finished, fresh_run: Path) -> None:
    options = SHORT | {"checkpoint_every_nimg": 96}
    made = sidactl.distill(
        teacher="tiny-digits", mode="sida", detector="random-features", run=fresh_run, teacher_score="none", **options
    )
    assert (made.results["detector"], made.results["teacher_score"]) == ("random-features", None)
    assert made.results["scores"] != finished.best.results["scores"]
    last = Store.open(fresh_run).resolve("generator/last")
    assert (
        last.files["model.safetensors"]
        == (Store.open(finished.root).resolve("generator/last").files["model.safetensors"])
    )


@pytest.mark.parametrize("name", ["cifar10", "imagenet64", "tiny-digits"])
def test_a_dataset_of_the_catalog_keeps_its_detector(tmp_path: Path, name: str) -> None:
    for params in ({"name": name}, {"name": "mine.zip", "preset": name}):
        results: dict[str, Any] = {"resolution": 32, "num_channels": 3, "kind": "pixels"}
        data = Store(tmp_path).put("dataset", {}, params=params, results=results)
        assert commands_moments.training_detector(data) == catalog.DATASETS[name].detector


def test_what_the_detector_cannot_take_is_refused_before_the_first_step(colourful: Path) -> None:
    sidactl.fetch_teacher("tiny-digits", run=colourful)
    sidactl.prepare_data("tiny-digits", run=colourful)
    digits = dataset_stats.dataset_stats("tiny-digits", run=colourful)
    for options, message in (
        (
            {"reference": "tiny-digits"},
            "detector tiny-digits needs grey images of 8x8 pixels, the generator draws 3 channels of 16x16. "
            "Pass --detector random-features, or another --ref.",
        ),
        (
            {"reference": digits.oid, "detector": "random-features"},
            f"{digits.oid} holds statistics by tiny-digits, not by random-features. Pass another --ref, or --detector.",
        ),
        ({"detector": "inseption"}, "unknown detector 'inseption'. Did you mean 'inception'?"),
        (
            {"detector": "nothing.safetensors"},
            "nothing.safetensors: no such file. Check the path, or use --detector inception.",
        ),
        ({"reference": "nowhere.npz"}, "nowhere.npz: no such file. Check the path."),
        (
            {"dataset": "tiny-digits"},
            "the dataset must fit the teacher (resolution, channels, classes = 16, 3, 2), got 8, 1, 10. "
            "Pass another --dataset, or prepare this one to fit.",
        ),
    ):
        with pytest.raises(SidaError) as caught:
            planned(colourful, teacher="own", **options)
        assert (str(caught.value), caught.value.exit_code) == (message, 2)
        with pytest.raises(SidaError) as caught:
            sidactl.distill(teacher="own", mode="sida", run=colourful, watch=never, **options)
        assert str(caught.value) == message
    # Where features do not say by whom they are, two images do.
    random = scorers.load_detector(Store.open(colourful), "random-features", torch.device("cpu"))
    wrong = commands_moments.Moments(np.zeros(64), np.eye(64))
    with pytest.raises(SidaError) as caught:
        evaluation.try_scoring(random, wrong, sidactl.load("own", colourful), OneStepSpec())
    assert str(caught.value) == (
        "the reference has 64 features, detector random-features gives 128. Pass another --ref, or --detector."
    )


def test_statistics_of_another_width_are_refused_by_their_header(tmp_path: Path) -> None:
    for width, count in ((64, "64"), (1024, "1,024")):
        path = tmp_path / f"{width}.npz"
        np.savez(path, mu=np.zeros(width), sigma=np.eye(width))
        with pytest.raises(SidaError) as caught:
            planned(tmp_path / "run", reference=str(path))
        assert str(caught.value) == (
            f"{path} holds statistics of {count} features, which are taken for Inception's 2,048, "
            "inception gives 2,048. Pass another --ref."
        )


def test_words_that_name_nothing_are_refused_by_a_plan_as_by_a_run(finished: Finished) -> None:
    root = finished.root
    nothing = f"no ref 'nowhere' in {root}, and no such file or folder. See what there is with: sidactl ls"
    for options, message in (
        ({"dataset": "nowhere"}, nothing),
        ({"reference": "nowhere"}, nothing),
        ({"mode": "sid2a", "generator": "nowhere"}, nothing.replace(", and no such file or folder", "")),
        (
            {"mode": "sid2a", "generator": "nowhere.pkl"},
            "nowhere.pkl: no such file or folder. Check the path, or see sidactl ls for names.",
        ),
        (
            {"dataset": "nowhere.zip"},
            "nowhere.zip: no such file or folder. Check the path, or see sidactl ls for names.",
        ),
        ({"dataset": "generator/best"}, "'generator/best' must be of kind dataset, got generator. See what"),
        ({"teacher_score": "foo"}, "the teacher's score must be one of published, measure, none, got 'foo'. "),
        ({"teacher_score": "published"}, "no FD tiny-digits of tiny-digits against this reference is published. "),
        ({"device": "abacus"}, "device must be cpu, cuda or cuda:N, got 'abacus'. Pass --device cpu."),
        (
            {"mode": "sid2a", "generator": "sid/cifar10-uncond-alpha1"},
            "no file of sid/cifar10-uncond-alpha1 is published, its scores alone are. Distill it: sidactl distill ",
        ),
        (
            {"mode": "sid2a", "generator": "scd/edm2-s"},
            "no file of scd/edm2-s is in the catalog, its published scores alone are. ",
        ),
        (
            {"mode": "sid2a", "generator": "sid/cifar10-uncond"},
            "the generator must be of the teacher's dataset 'tiny-digits', got one of 'cifar10'. ",
        ),
        (
            {"execution": Execution(batch_per_device=100)},
            "batch-per-device must be one of 64, 128 (micro-batches of 64), got 100. ",
        ),
    ):
        with pytest.raises(SidaError) as caught:
            planned(root, **options)
        assert str(caught.value).startswith(message)


def test_a_plan_names_what_is_fetched_first_and_what_only_the_user_can_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path / "run", teacher="edm-cifar10-uncond", mode="sid")
    assert [(need.what, need.size_bytes) for need in plan.needs] == [
        ("teacher edm-cifar10-uncond", None),
        ("statistics cifar10", None),
        ("detector inception", 95_628_359),
    ]
    assert plan.notes == [
        "dataset cifar10: mode sid needs no images, training on classes alone",
        "scored against the published statistics cifar10, as the published runs were; --ref takes others",
    ]
    sida = planned(tmp_path / "run", teacher="edm-cifar10-uncond")
    assert [astuple(need) for need in sida.needs][1] == (
        "dataset cifar10",
        "downloaded and prepared",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        170_498_071,
    )
    assert sida.missing == []
    asked = planned(tmp_path / "run", teacher="edm-cifar10-uncond", mode="sid", dataset="cifar10")
    assert [need.what for need in asked.needs][1] == "dataset cifar10"
    faces = planned(tmp_path / "run", teacher="edm-ffhq64")
    assert [error.message for error in faces.missing] == ["dataset ffhq64 must be prepared from its files"]
    with pytest.raises(SidaError, match=r"^dataset ffhq64 must be prepared from its files\. "):
        sidactl.distill(teacher="edm-ffhq64", mode="sida", run=tmp_path / "run")
    with pytest.raises(SidaError, match=r"^the dataset must fit the teacher .* = 64, 3, 0\), got 32, 3, 10\. "):
        planned(tmp_path / "run", teacher="edm-ffhq64", dataset="cifar10")
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    with pytest.raises(SidaError, match=r"^teacher edm-cifar10-uncond must be downloaded from .*, which offline forb"):
        planned(tmp_path / "run", teacher="edm-cifar10-uncond", mode="sid")
    assert not (tmp_path / "run").exists()


def test_published_labels_are_fetched_first_for_mode_sid_alone(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    labels = {"teacher": "edm2-xs", "dataset": "imagenet512-labels"}
    plan = planned(tmp_path / "run", mode="sid", **labels)
    assert [need.what for need in plan.needs][:3] == [
        "teacher edm2-xs",
        "dataset imagenet512-labels",
        "statistics imagenet512",
    ]
    told = "scored against the published statistics imagenet512, as the published runs were; --ref takes others"
    assert plan.notes == [told]
    with pytest.raises(SidaError) as caught:
        planned(tmp_path / "run", mode="sida", **labels)
    assert str(caught.value) == (
        "images are needed, imagenet512-labels is of classes alone. Give a dataset with images."
    )


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**12, 0, 10**10) if hasattr(shutil, "_ntuple_diskusage") else None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SidaError) as caught:
        planned(tmp_path / "run", teacher="edm2-s", mode="sid", score=False)
    assert str(caught.value) == (
        f"the run needs about 29.1 GB in the run directory {tmp_path / 'run'}, where 10.0 GB are free. "
        "Free some space or choose another with --run DIR."
    )
    assert planned(tmp_path / "run").free_bytes == 10**10


@pytest.mark.parametrize("error", [SidaError("no answer", "Wait."), MemoryError()])
def test_a_teacher_that_cannot_be_scored_costs_no_generator(
    fresh_run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise error

    instead_of(sidactl.fid, fails, monkeypatch)
    events: list[state.Event] = []
    made = sidactl.distill(
        teacher="tiny-digits", mode="sid", run=fresh_run, watch=events.append, **SHORT_SID | {"duration_nimg": 32}
    )
    reason = "MemoryError()" if isinstance(error, MemoryError) else "no answer"
    assert events[-1].kind == "warning"
    assert events[-1].values["message"] == (
        f"the teacher could not be scored ({reason}); the generator is kept without that comparison"
    )
    assert made.results["teacher_score"] is None
    assert made.results["selection_score"]
    shown.print_generator(made, as_json=False)
    assert "its teacher: not scored. Look at it: " in capsys.readouterr().err


def test_what_is_rarely_meant_is_warned_of(fresh_run: Path) -> None:
    events: list[state.Event] = []
    overrides = SHORT_SID | {"duration_nimg": 16, "alpha": -3.0, "fake_score_lr": 0.5}
    sidactl.distill(teacher="tiny-digits", mode="sid", score=False, run=fresh_run, watch=events.append, **overrides)
    assert [event.values["message"] for event in events if event.kind == "warning"] == [
        "fake_score_lr is 0.5; Adam's rates above 0.1 rarely train anything",
        "alpha is -3; values from 0 to 2 are known, 1.0 and 1.2 the published ones",
    ]


def test_a_plan_writes_nothing_and_needs_no_run_directory(tmp_path: Path) -> None:
    planned = commands_plan.plan(
        teacher="tiny-digits",
        mode="sida",
        generator=None,
        dataset=None,
        store=Store.open(tmp_path / "run"),
        overrides={"tmax": 700},
    )
    assert planned.inputs == {"teacher": "tiny-digits", "dataset": "tiny-digits"}
    assert (planned.recipe.tmax, planned.recipe.dataset) == (700, "tiny-digits")
    assert not (tmp_path / "run").exists()


def test_a_plan_for_a_foreign_file_asks_to_import_it_first(tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        commands_plan.plan(
            teacher="net.pkl",
            mode="sid",
            generator=None,
            dataset=None,
            store=Store.open(tmp_path / "run"),
            overrides={},
        )
    assert (
        str(caught.value) == "teacher net.pkl must be imported before it can be planned with. Import it first: sidactl "
        "fetch-teacher net.pkl"
    )


# Teachers of one's own

TEACHER = {"duration_nimg": 96, "batch_size": 32, "model_channels": 4, "channel_mult": (1,), "attn_resolutions": ()}


def test_a_trained_teacher_can_be_sampled_scored_and_distilled(fresh_run: Path) -> None:
    teacher = sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, device="cpu", **TEACHER)
    assert refs(fresh_run)["teacher/mine"] == teacher.oid
    assert mapping(teacher.params["net"])["label_dim"] == 10
    assert sidactl.sample("mine", seeds=range(2), steps=2, run=fresh_run).images.shape == (2, 8, 8, 1)
    generator = sidactl.distill(teacher="mine", mode="sid", run=fresh_run, device="cpu", **one_step(SHORT))
    assert (generator.params["name"], generator.inputs["teacher"]) == ("mine-sid", teacher.oid)
    assert refs(fresh_run)["generator/mine-sid"] == generator.oid


def one_step(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "adversarial_from_nimg"} | {"duration_nimg": 16}


def test_an_interrupted_teacher_goes_on_to_the_same_oid(fresh_run: Path, tmp_path: Path) -> None:
    straight = sidactl.train_teacher("tiny-digits", name="mine", run=tmp_path / "other", device="cpu", **TEACHER)
    with pytest.raises(SidaError, match=r"^interrupted at 64 of 96 images"):
        sidactl.train_teacher(
            "tiny-digits",
            name="mine",
            run=fresh_run,
            device="cpu",
            watch=interrupting(signal.SIGINT, "checkpoint", 32, []),
            **TEACHER,
        )
    assert sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, device="cpu", **TEACHER) == straight
    again = sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, watch=never, **TEACHER)
    assert again == straight
    assert nothing_is_wrong(fresh_run)


def test_a_teacher_may_leave_classes_out_but_not_differ_in_size(fresh_run: Path) -> None:
    teacher = sidactl.train_teacher("tiny-digits", name="plain", run=fresh_run, device="cpu", label_dim=0, **TEACHER)
    assert mapping(teacher.params["net"])["label_dim"] == 0
    assert sidactl.sample("plain", seeds=range(2), steps=1, run=fresh_run).labels is None
    with pytest.raises(SidaError) as caught:
        sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, img_resolution=16)
    assert str(caught.value) == (
        "the dataset must fit the network (resolution, channels, classes = 16, 1, 10), got 8, 1, 10. "
        "Pass another --dataset, or prepare this one to fit."
    )
    with pytest.raises(SidaError, match=r"^unknown recipe field 'colour'\. Fields are P_mean, "):
        sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, colour=1)


# Sampling


def test_an_image_depends_on_its_seed_alone(finished: Finished) -> None:
    many = sidactl.sample("generator/best", seeds=range(600), run=finished.root, device="cpu")
    few = sidactl.sample("generator/best", seeds=[599, 3, 501], run=finished.root, device="cpu")
    assert many.images.dtype == np.uint8
    assert many.images.shape == (600, 8, 8, 1)
    assert np.array_equal(few.images, many.images[[599, 3, 501]])
    assert many.labels is not None
    assert few.labels is not None
    assert few.labels.tolist() == many.labels[[599, 3, 501]].tolist()
    assert (list(many.seeds), list(few.seeds)) == (list(range(600)), [599, 3, 501])
    assert many.artifact.results == {"num_images": 600, "nfe": 1}


def test_a_class_can_be_chosen_and_leaves_the_noise_alone(finished: Finished) -> None:
    free = sidactl.sample("generator/best", seeds=range(40), run=finished.root)
    assert free.labels is not None
    fixed = sidactl.sample("generator/best", seeds=range(40), class_index=3, run=finished.root)
    assert fixed.labels is not None
    assert set(fixed.labels) == {3}
    same = free.labels == 3
    assert same.any()
    assert np.array_equal(free.images[same], fixed.images[same])


def test_a_repeated_sample_is_answered_from_the_run_directory(finished: Finished, forbidden: Forbid) -> None:
    first = sidactl.sample("generator/best", seeds=range(10), run=finished.root)
    with forbidden(resolve.load_net):
        again = sidactl.sample("generator/best", seeds=range(10), name="ten", run=finished.root)
    assert again.artifact == first.artifact
    assert refs(finished.root)["samples/ten"] == first.artifact.oid


def test_force_samples_again_and_gets_the_same(finished: Finished) -> None:
    ticks: list[tuple[int, int]] = []
    first = sidactl.sample("generator/best", seeds=[5, 9], run=finished.root)
    again = sidactl.sample(
        "generator/best", seeds=[5, 9], force=True, run=finished.root, tick=lambda *done: ticks.append(done)
    )
    assert again.artifact == first.artifact
    assert ticks == [(2, 2)]


def test_steps_and_sampler_are_those_of_the_net_unless_asked_for(finished: Finished) -> None:
    def nfe(ref: str, **options: Any) -> object:
        return sidactl.sample(ref, seeds=[0], run=finished.root, **options).artifact.results["nfe"]

    assert nfe("tiny-digits") == 35
    assert nfe("tiny-digits", steps=4) == 7
    assert nfe("tiny-digits", sampler="heun", steps=1) == 1
    assert nfe("tiny-digits", sampler="one-step") == 1
    assert nfe("generator/best") == 1
    assert nfe("generator/best", steps=3) == 3


def test_settings_of_heuns_sampler_take_the_place_of_the_teachers_own(finished: Finished) -> None:
    heun: dict[str, float] = {"sigma_min": 0.01, "sigma_max": 40, "rho": 5, "S_churn": 3, "S_min": 0.1, "S_max": 20}

    def drawn(**options: Any) -> sample.Sampled:
        return sidactl.sample("tiny-digits", num=2, run=finished.root, **options)

    made = drawn(steps=4, heun=heun | {"S_noise": 1.01})
    spec = HeunSpec(
        num_steps=4, sigma_min=0.01, sigma_max=40.0, rho=5.0, S_churn=3.0, S_min=0.1, S_max=20.0, S_noise=1.01
    )
    assert made.artifact.params["sampler"] == spec.to_json()
    net = sidactl.load("tiny-digits", finished.root)
    (batch,) = sampling.generate(net, range(2), spec, device=torch.device("cpu"))
    assert np.array_equal(made.images, batch.images.permute(0, 2, 3, 1).numpy())
    assert drawn(steps=4).oid != made.oid
    assert drawn(steps=4, heun={"rho": 7}).oid == drawn(steps=4).oid  # the teacher's own


def test_another_precision_is_another_question_and_another_form_is_not(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.memory_format]] = []
    generate = sampling.generate

    def noting(net: Preconditioned, *arguments: Any, **options: Any) -> sampling.Samples:
        seen.append((net.compute_dtype, net.memory_format))
        return generate(net, *arguments, **options)

    instead_of(sampling.generate, noting, monkeypatch)

    def images(force: bool = False, **setting: Any) -> sample.Sampled:
        return sidactl.sample(
            "generator/best", seeds=range(80), setting=SamplingForm(**setting), force=force, run=finished.root
        )

    usual, half, by_pixel = images(force=True), images(precision="bf16"), images(force=True, channels_last=True)
    assert seen == [
        (torch.float32, torch.contiguous_format),
        (torch.bfloat16, torch.contiguous_format),
        (torch.float32, torch.channels_last),
    ]
    assert "precision" not in usual.artifact.params
    assert half.artifact.params["precision"] == "bf16"
    apart = {
        name: np.abs(other.images.astype(int) - usual.images) for name, other in (("bf16", half), ("form", by_pixel))
    }
    assert 0 < apart["bf16"].mean() < 1
    assert apart["form"].max() <= 1
    assert images(channels_last=True).artifact == images().artifact
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        (
            "generator/best",
            {"setting": SamplingForm(precision="tf32")},
            "precision must be fp32, fp16 or bf16 here, got tf32. Pass another --precision.",
        ),
        ("generator/best", {"seeds": []}, "sample count must be >= 1, got 0. Pass --num 1 or more."),
        (
            "generator/best",
            {"class_index": 10},
            "the class must be between 0 and 9, got 10. Pass another --class, or none.",
        ),
        (
            "generator/best",
            {"class_index": -1},
            "the class must be between 0 and 9, got -1. Pass another --class, or none.",
        ),
        ("generator/best", {"steps": 0}, "the number of steps must be >= 1, got 0. Pass --steps 1 or more."),
        (
            "generator/best",
            {"sampler": "heun"},
            "the heun sampler needs a teacher, got a one-step generator. Leave out --sampler: --steps takes more than "
            "one.",
        ),
        (
            "tiny-digits",
            {"sampler": "ddim"},
            "the sampler must be one-step or heun, got 'ddim'. Pass --sampler heun.",
        ),
        (
            "generator/best",
            {"heun": {"S_churn": 1}},
            "--s-churn is of the heun sampler of a teacher, got one-step. Leave out --s-churn.",
        ),
        (
            "tiny-digits",
            {"heun": {"rho": 5}, "sampler": "one-step"},
            "--rho is of the heun sampler of a teacher, got one-step. Leave out --rho.",
        ),
        (
            "tiny-digits",
            {"heun": {"S_noise": 1.1}},
            "--s-noise counts with churn alone, got --s-churn 0. Pass --s-churn, such as 40.",
        ),
        (
            "tiny-digits",
            {"heun": {"sigma_min": 90}},
            "sigma_min must be below sigma_max, 80, got 90.0. Pass another --sigma-min.",
        ),
        (
            "tiny-digits",
            {"heun": {"S_churn": -1.0}},
            "S_churn must be at least 0 and finite, got -1.0. Pass another --s-churn.",
        ),
        (
            "tiny-digits",
            {"heun": {"num_steps": 4}},
            "unknown setting 'num_steps' of Heun's sampler. "
            "It has sigma_min, sigma_max, rho, S_churn, S_min, S_max, S_noise.",
        ),
        ("generator/none", {}, "no ref 'generator/none' in {root}. See what there is with: sidactl ls"),
        (
            "dataset/tiny-digits",
            {},
            "'dataset/tiny-digits' must be of kind teacher or generator, got dataset. "
            "See what there is with: sidactl ls",
        ),
        (
            "generator/best",
            {"device": "cuda:99"},
            "device cuda:99 is not there: torch sees {gpus} GPUs. Pass --device cpu.",
        ),
    ],
)
def test_sample_refuses_what_it_cannot_do(finished: Finished, ref: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SidaError) as caught:
        sidactl.sample(ref, **({"seeds": range(3), "run": finished.root, "force": True} | options))
    assert str(caught.value) == message.format(root=finished.root, gpus=torch.cuda.device_count())
    assert caught.value.exit_code == 2


def test_load_gives_the_denoiser_ready_for_use(finished: Finished) -> None:
    net = sidactl.load("generator/best", finished.root)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert net(torch.zeros(2, 1, 8, 8), 2.5, torch.tensor([0, 9])).shape == (2, 1, 8, 8)


# ---- EDM2 ----


@pytest.fixture(scope="module")
def edm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run directory with a tiny EDM2 teacher, and its oid."""
    root = tmp_path_factory.mktemp("edm2") / "run"
    return root, sidactl.train_teacher(
        "tiny-digits", name="e", net="edm2", duration_nimg=512, batch_size=64, run=root
    ).oid


def test_an_edm2_teacher_has_its_uncertainty_head_its_rate_and_its_sampler(edm2: tuple[Path, str]) -> None:
    root, oid = edm2
    teacher = Store.open(root).get(oid)
    assert mapping(teacher.params["net"])["logvar_channels"] == 16
    assert mapping(teacher.params["sampler"])["convention"] == "edm2"
    assert mapping(teacher.params["recipe"])["lr"] == 1e-2
    assert sidactl.load(oid, run=root).logvar(torch.tensor([0.01, 10.0])).shape == (2, 1, 1, 1)


def test_edm2_end_to_end_in_every_mode(edm2: tuple[Path, str]) -> None:
    root, teacher = edm2
    made = {"sid": sidactl.distill(teacher=teacher, mode="sid", run=root, device="cpu", **SHORT_SID)}
    made["sid2a"] = sidactl.finetune_sid2a(
        teacher=teacher, generator=made["sid"].oid, run=root, device="cpu", **SHORT | AT_ITS_END
    )
    for mode, generator in made.items():
        recipe = mapping(generator.params["recipe"])
        assert (recipe["mode"], recipe["forced_normalization"]) == (mode, "published")
        assert mapping(generator.params["net"])["logvar_channels"] == 0
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


def messages(events: list[state.Event]) -> list[str]:
    return [event.values["message"] for event in events if event.kind == "note"]


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


def test_samples_that_could_not_be_kept_are_not_drawn(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, forbidden: Forbid
) -> None:
    monkeypatch.setattr(Store, "_writing", read_only)
    with (
        forbidden(resolve.load_net),
        pytest.raises(SidaError, match=r"^the run directory .* cannot be written: Read-only file system\."),
    ):
        sidactl.sample("generator/best", seeds=range(777), run=finished.root)


def test_mode_sid_of_a_teacher_without_classes_needs_no_dataset_either(edm2: tuple[Path, str]) -> None:
    root, _ = edm2
    plain = sidactl.train_teacher("tiny-digits", name="plain", run=root, device="cpu", label_dim=0, **TEACHER).oid
    made = sidactl.distill(
        teacher=moved_away(root, plain, "elsewhere"), mode="sid", run=root, device="cpu", **one_step(SHORT)
    )
    assert mapping(made.params["net"])["label_dim"] == 0
    assert sidactl.sample(made.oid, seeds=range(2), run=root).labels is None


@pytest.mark.parametrize("form", ["ncsnpp", "adm"])
def test_a_teacher_of_every_form_can_be_trained(tmp_path: Path, form: str) -> None:
    made = sidactl.train_teacher(
        "tiny-digits", name="x", net=form, duration_nimg=64, batch_size=32, run=tmp_path / "run"
    )
    assert len(sidactl.sample(made.oid, seeds=[0], run=tmp_path / "run").images) == 1
    with pytest.raises(SidaError) as caught:
        sidactl.train_teacher("tiny-digits", name="y", net="unet", run=tmp_path / "run")
    assert str(caught.value) == "the net must be one of ddpmpp, ncsnpp, adm, edm2, got 'unet'. Pass --net ddpmpp."


# ---- guidance ----


def test_guidance_moves_away_from_the_guide(edm2: tuple[Path, str], finished: Finished) -> None:
    root, _ = edm2
    weak = sidactl.train_teacher("tiny-digits", name="weak", duration_nimg=64, batch_size=32, run=root).oid
    plain = sidactl.sample("tiny-digits", seeds=range(4), steps=4, run=root)
    same = sidactl.sample("tiny-digits", seeds=range(4), steps=4, guide=weak, guidance=1.0, run=root)
    guided = sidactl.sample("tiny-digits", seeds=range(4), steps=4, guide=weak, guidance=2.0, run=root)
    assert (same.images == plain.images).all()
    assert (guided.images != plain.images).any()
    assert guided.artifact.inputs["guide"] == weak
    assert guided.artifact.params["guidance"] == 2.0
    for options, message in (
        ({"guidance": 2.0}, "guidance 2 needs a second net, got none. Pass --guide REF."),
        (
            {"guide": weak, "sampler": "one-step"},
            "guidance needs the heun sampler, got a one-step generator. Leave out --guide, or sample a teacher.",
        ),
        ({"guide": weak, "guidance": float("nan")}, "guidance must be finite, got nan. Pass another --guidance."),
        ({"guidance": float("inf")}, "guidance must be finite, got inf. Pass another --guidance."),
    ):
        with pytest.raises(SidaError) as caught:
            sidactl.sample("tiny-digits", seeds=[0], run=root, **options)  # type: ignore[arg-type]
        assert str(caught.value) == message


def test_a_one_step_generator_does_not_guide(finished: Finished) -> None:
    with pytest.raises(SidaError) as caught:
        sidactl.sample("tiny-digits", seeds=[0], guide="generator/best", guidance=2.0, run=finished.root)
    assert str(caught.value) == (
        "'generator/best' must be of kind teacher, got generator. See what there is with: sidactl ls"
    )


def test_an_evaluation_gives_further_scores_which_a_resumed_run_keeps(fresh_run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(fresh_run, tmp_path / "again"))
    events: list[state.Event] = []
    best = short_distill(fresh_run, events.append, evaluate_also="inception-score")
    name, first_seed = "IS tiny-digits", evaluation.SELECTION_SEED
    measured = sidactl.inception_score(best, num=SHORT["evaluate_num"], first_seed=first_seed, run=fresh_run)
    also: Any = best.results["also"]
    assert dict(also[name])[best.results["images_seen"]] == pytest.approx(measured.value, rel=1e-6)
    assert [nimg for nimg, _ in also[name]] == [32, 64, 96]
    assert [event.values[name] for event in events if event.kind == "evaluation"] == [v for _, v in also[name]]

    def stop(event: state.Event) -> None:
        if event.kind == "checkpoint" and event.nimg == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short_distill(again, stop, evaluate_also=["inception-score"])
    assert short_distill(again, evaluate_also=("inception-score",)).oid == best.oid


def test_a_further_distance_is_by_its_own_detector(fresh_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # DINOv2 is too large for a test; another distance stands for it.
    other = replace(commands_scores.METRICS["fd-dinov2"], detector="random-features")
    monkeypatch.setitem(commands_scores.METRICS, "fd-dinov2", other)
    best = short_distill(fresh_run, evaluate_also="fd-dinov2", **AT_ITS_END)
    scored: Any = best.results["also"]
    options: Any = {"num": SHORT["evaluate_num"], "first_seed": evaluation.SELECTION_SEED, "run": fresh_run}
    measured = sidactl.fid(best, detector="random-features", **options)
    assert dict(scored["random-features FD"])[best.results["images_seen"]] == pytest.approx(measured.value, rel=1e-6)
    assert sidactl.fid(best, **options).value == pytest.approx(best.results["selection_score"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"evaluate_also": "inception-score", "detector": "random-features"},
            "the inception score needs classes, detector random-features gives none. Pass --detector inception.",
        ),
        (
            {"evaluate_also": "inception-score", "evaluate_num": 9},
            "the inception score needs at least 10 images. Pass a larger --evaluate-num.",
        ),
        (
            {"evaluate_also": "inception-score", "score": False},
            "--evaluate-also is for runs that are scored, this one is not. Leave it out.",
        ),
        (
            {"evaluate_also": "kid"},
            "evaluate_also must be some of inception-score, fd-dinov2, got ['kid']. Pass another --evaluate-also.",
        ),
    ],
)
def test_further_scores_that_a_run_cannot_have_are_refused(fresh_run: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, **options)
    assert str(caught.value) == told
