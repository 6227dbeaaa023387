"""Scores of artifacts: what they are of, that they repeat, and the exact text of errors."""

import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sidactl import cli, detectors, inventory, metrics, ops, references, scores
from sidactl.artifacts import load_dataset
from sidactl.errors import SidaError
from sidactl.recipe import Setting
from sidactl.store import Store, UnwritableError
from tests.conftest import Finished, read_only

FD = "FD tiny-digits"


@pytest.fixture(scope="module")
def collapsed(finished: Finished) -> str:
    """Samples of a generator that draws one class alone, in the run directory of `finished`."""
    return ops.sample("tiny-digits", seeds=range(200), class_index=0, steps=10, run=finished.root).artifact.oid


@pytest.fixture(scope="module")
def diverse(finished: Finished) -> str:
    """Samples of all classes, as good as those of `collapsed`."""
    return ops.sample("tiny-digits", seeds=range(200), steps=10, run=finished.root).artifact.oid


def features(finished: Finished, ref: str) -> NDArray[np.float64]:
    store = Store.open(finished.root)
    dataset = load_dataset(store, store.resolve(ref))
    return detectors.features_of(detectors.load("tiny-digits"), references.dataset_images(dataset)).double().numpy()


def test_a_dataset_against_itself_scores_zero(finished: Finished) -> None:
    score = scores.fid("dataset/tiny-digits", reference="dataset/tiny-digits", run=finished.root)
    assert score.value == pytest.approx(0, abs=1e-9)
    assert (score.num, score.seeds, {FD: score.subject}) == (1797, [], score.references)


def test_fid_is_the_frechet_distance_of_the_moments_of_both_sets(finished: Finished, collapsed: str) -> None:
    score = scores.fid(collapsed, run=finished.root)
    ours, theirs = features(finished, collapsed), features(finished, "dataset/tiny-digits")
    expected = metrics.frechet_distance(
        ours.mean(0), np.cov(ours, rowvar=False), theirs.mean(0), np.cov(theirs, rowvar=False)
    )
    assert score.values == {FD: [pytest.approx(expected, rel=1e-9)]}
    assert score.detectors == {FD: detectors.load("tiny-digits").identity}


@pytest.mark.parametrize("ref", ["generator/best", "tiny-digits"])
def test_scoring_a_net_equals_scoring_its_samples(finished: Finished, ref: str) -> None:
    drawn = ops.sample(ref, seeds=range(7, 67), run=finished.root).artifact
    direct = scores.fid(ref, num=60, first_seed=7, run=finished.root)
    assert scores.fid(drawn.oid, run=finished.root).value == pytest.approx(direct.value, rel=1e-9)
    assert direct.seeds == [[7, 67]]


def test_the_reference_is_the_dataset_that_the_subject_descends_from(finished: Finished, collapsed: str) -> None:
    store = Store.open(finished.root)
    dataset = store.resolve("dataset/tiny-digits").oid
    for ref in ("dataset/tiny-digits", "teacher/tiny-digits", "generator/best", collapsed):
        assert references.dataset_of(store, store.resolve(ref)).oid == dataset


def test_trials_take_fresh_seeds_and_are_told_by_mean_deviation_and_minimum(finished: Finished) -> None:
    score = scores.fid("generator/best", num=30, trials=10, first_seed=100, run=finished.root)
    assert score.seeds == [[100 + 30 * t, 130 + 30 * t] for t in range(10)]
    values = score.values[FD]
    assert len(set(values)) == 10
    for t in (0, 9):
        single = scores.fid("generator/best", num=30, first_seed=100 + 30 * t, run=finished.root)
        assert single.value == pytest.approx(values[t], rel=1e-9)
    told = score.to_json()
    assert told["scores"] == {
        FD: {
            "name": FD,
            "value": statistics.fmean(values),
            "std": statistics.stdev(values),
            "minimum": min(values),
            "trials": list(values),
            "detector": detectors.load("tiny-digits").identity,
            "reference": score.references[FD],
        }
    }
    assert score.value == told["scores"][FD]["value"]
    assert (told["num"], told["subject"], told["oid"]) == (30, finished.best.oid, score.oid)
    assert single.to_json()["scores"][FD]["std"] is None


def test_a_repeated_score_is_answered_from_the_run_directory_and_force_gives_the_same(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scores.fid("generator/best", num=40, run=finished.root)
    ticks: list[tuple[int, int]] = []
    again = scores.fid("generator/best", num=40, force=True, run=finished.root, tick=lambda *t: ticks.append(t))
    assert again == first
    assert ticks == [(0, 40), (40, 40)]
    monkeypatch.setattr(detectors, "load", None)
    assert scores.fid("generator/best", num=40, run=finished.root) == first
    assert scores.score_of(Store.open(finished.root).get(first.oid)) == first


def test_a_score_does_not_depend_on_the_batch_size(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> list[float]:
        found = [
            scores.fid("generator/best", num=90, force=True, run=finished.root).value,
            *scores.prec_recall("generator/best", num=90, force=True, run=finished.root).values.values(),
        ]
        return [float(np.ravel(value)[0]) for value in found]

    whole = measured()
    monkeypatch.setattr(references, "MAX_BATCH_SIZE", 17)
    assert measured() == pytest.approx(whole, rel=1e-6)


def test_a_collapsed_generator_has_high_precision_and_low_recall_in_this_order(
    finished: Finished, collapsed: str, diverse: str
) -> None:
    def measured(ref: str) -> list[float]:
        score = scores.prec_recall(ref, run=finished.root)
        assert list(score.values) == ["precision", "recall"]
        return [values[0] for values in score.values.values()]

    (precision, recall), (diverse_precision, diverse_recall) = measured(collapsed), measured(diverse)
    assert abs(precision - diverse_precision) < 0.1
    assert min(precision, diverse_precision) > 0.5
    assert recall < 0.2
    assert diverse_recall > 0.9


def test_precision_and_recall_are_those_of_the_features(finished: Finished, diverse: str) -> None:
    real, ours = features(finished, "dataset/tiny-digits"), features(finished, diverse)
    for neighbours in (1, 3):
        score = scores.prec_recall(diverse, neighbours=neighbours, run=finished.root)
        expected = metrics.precision_recall(real, ours, neighbours, precision="float64")
        assert [score.values["precision"][0], score.values["recall"][0]] == pytest.approx(expected, abs=2e-3)


def test_features_are_taken_once_for_all_trials_and_metrics(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores.prec_recall("generator/best", num=20, trials=3, first_seed=900, run=finished.root)
    monkeypatch.setattr(scores, "load_net", None)
    monkeypatch.setattr(scores, "load_dataset", None)
    known = scores.evaluate("generator/best", num=20, trials=2, first_seed=900, run=finished.root)
    assert list(known.values) == [FD, "IS tiny-digits", "KID tiny-digits", "precision", "recall"]


def test_statistics_of_a_dataset_are_taken_once(finished: Finished) -> None:
    store = Store.open(finished.root)
    data = store.resolve("dataset/tiny-digits")
    scores.fid("dataset/tiny-digits", reference="dataset/tiny-digits", run=finished.root)
    stats = [artifact for artifact in store.artifacts() if artifact.kind == "stats"]
    assert [artifact.inputs for artifact in stats] == [{"dataset": data.oid}]
    kept = references.moments(store, data, detectors.load("tiny-digits"))
    expected = features(finished, "dataset/tiny-digits")
    np.testing.assert_allclose(kept.mean, expected.mean(0), rtol=1e-9)
    np.testing.assert_allclose(kept.covariance, np.cov(expected, rowvar=False), rtol=1e-7, atol=1e-12)


def test_a_score_in_another_precision_says_so_and_is_that_of_such_samples(finished: Finished) -> None:
    half = Setting(precision="bf16")
    drawn = ops.sample("generator/best", seeds=range(50), setting=half, run=finished.root).artifact
    score = scores.fid("generator/best", num=50, setting=half, run=finished.root)
    assert score.value == pytest.approx(scores.fid(drawn.oid, run=finished.root).value, rel=1e-9)
    assert score.to_json()["settings"]["precision"] == "bf16"
    usual = scores.fid("generator/best", num=50, run=finished.root)
    assert "precision" not in usual.settings
    assert usual.value != score.value


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        (
            "samples",
            {"setting": Setting(precision="bf16", compile=True)},
            "precision and form are those of a net that draws images, got bf16 compiled and fixed samples. "
            "Score the generator itself, or leave out --precision, --channels-last and --compile.",
        ),
        ("generator/best", {"num": 0}, "sample count must be >= 2, got 0. Pass --num 2 or more."),
        ("generator/best", {"num": 1}, "sample count must be >= 2, got 1. Pass --num 2 or more."),
        ("generator/best", {"trials": 0}, "the number of trials must be >= 1, got 0. Pass --trials 1 or more."),
        (
            "samples",
            {"num": 201},
            "sample count must be <= 200, the number of these samples, got 201. Pass a smaller --num, or sample more.",
        ),
        (
            "samples",
            {"trials": 2},
            "trials need images drawn anew, got 2 trials of fixed samples. "
            "Score the generator itself, or leave out --trials.",
        ),
        (
            "dataset/tiny-digits",
            {"trials": 10},
            "trials need images drawn anew, got 10 trials of fixed images of a dataset. "
            "Score the generator itself, or leave out --trials.",
        ),
        (
            "score",
            {},
            "'{score}' must be of kind teacher or generator or dataset or samples, got score. "
            "See what there is with: sidactl ls",
        ),
        (
            "generator/best",
            {"reference": "generator/best"},
            "a reference must be a dataset or statistics, got generator/best, which is a network. Swap the two.",
        ),
        (
            "generator/best",
            {"num": 9, "device": "cuda:99"},
            "device cuda:99 is not there: torch sees {gpus} GPUs. Pass --device cpu.",
        ),
    ],
)
def test_fid_and_prec_recall_refuse_what_they_cannot_do(
    finished: Finished, collapsed: str, ref: str, options: dict[str, Any], message: str
) -> None:
    score = scores.fid("dataset/tiny-digits", reference="dataset/tiny-digits", run=finished.root).oid
    subject = {"samples": collapsed, "score": score}.get(ref, ref)
    for command in (scores.fid, scores.prec_recall):
        with pytest.raises(SidaError) as caught:
            command(subject, **({"run": finished.root} | options))
        assert str(caught.value) == message.format(score=score, gpus=torch.cuda.device_count())
        assert caught.value.exit_code == 2


def test_one_image_is_too_few_for_a_covariance(finished: Finished) -> None:
    single = ops.sample("generator/best", seeds=[0], run=finished.root).artifact.oid
    with pytest.raises(SidaError) as caught:
        scores.fid(single, run=finished.root)
    assert str(caught.value) == "a covariance needs >= 2 images, got 1. Score more images."


def test_a_score_is_kept_with_what_it_was_made_from(finished: Finished, tmp_path: Path) -> None:
    store = Store.open(finished.root)
    score = scores.fid("generator/best", num=25, first_seed=3, run=finished.root)
    kept = store.get(score.oid)
    assert kept.kind == "score"
    identity = detectors.load("tiny-digits").identity
    assert kept.params["metrics"] == ["fid"]
    assert (kept.params["num"], kept.params["seeds"], kept.params["detectors"]) == (25, [[3, 28]], {FD: identity})
    assert kept.inputs == {"subject": finished.best.oid, f"reference {FD}": finished.best.inputs["dataset"]}
    assert kept.results["values"] == {FD: list(score.values[FD])}
    assert scores.score_of(kept) == score


@pytest.mark.parametrize("form", ["png", "npz", "zip"])
def test_folders_zips_and_npz_files_score_as_the_samples_that_they_hold(
    finished: Finished, collapsed: str, tmp_path: Path, form: str
) -> None:
    if form == "zip":
        path = Store.open(finished.root).path(Store.open(finished.root).get(collapsed), "images.zip")
        path = Path(shutil.copy(path, tmp_path / "mine.zip"))
    else:
        destination = tmp_path / ("mine.npz" if form == "npz" else "mine")
        path = inventory.export(collapsed, destination, form=form, run=finished.root)  # type: ignore[arg-type]
    score = scores.fid(str(path), reference="dataset/tiny-digits", run=finished.root)
    assert score.value == scores.fid(collapsed, run=finished.root).value


def test_classes_can_be_drawn_as_in_the_dataset(finished: Finished) -> None:
    uniform = scores.fid("generator/best", num=300, run=finished.root)
    as_real = scores.fid("generator/best", num=300, labels="dataset", run=finished.root)
    assert uniform.settings["labels"] == "uniform"
    assert as_real.settings["labels"] == "dataset"
    assert as_real.value != uniform.value
    with pytest.raises(SidaError) as caught:
        scores.fid("generator/best", num=300, labels="balanced", run=finished.root)
    assert str(caught.value) == "labels must be one of uniform, dataset, got 'balanced'. Pass another."


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    streams = capsys.readouterr()
    return int(caught.value.code or 0), streams.out, streams.err


def test_an_old_answer_says_so_once_and_since_when(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fid", "generator/best", "--num", "35", "--run", str(finished.root)]
    first, again = told(arguments, capsys), told(arguments, capsys)
    assert again[:2] == first[:2]
    line = r"answered from the run directory, asked on \d{4}-\d\d-\d\d \d\d:\d\d \S+; --force does it again"
    assert not re.search(line, first[2])
    assert len(re.findall(line, again[2])) == 1
    assert not re.search(line, told([*arguments, "--force"], capsys)[2])


def test_a_score_in_a_read_only_run_directory_is_warned_of_first_and_told(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["prec-recall", "generator/best", "--num", "36", "--run", str(finished.root)]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_writing", read_only)
        code, out, err = told(arguments, capsys)
        unkept = scores.prec_recall("generator/best", num=36, run=finished.root)
    assert code == 0
    warning = "cannot be written: Read-only file system: the score will be told, but not kept"
    assert err.startswith(f"warning: the run directory {finished.root} {warning}\n")
    assert (unkept.oid, unkept.to_json()["oid"]) == ("", None)
    code, expected, _ = told(arguments, capsys)
    assert out == expected


def test_a_score_that_finds_no_room_at_the_end_is_told_and_fails(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["prec-recall", "generator/best", "--num", "37", "--run", str(finished.root)]

    def full(*arguments: object, **options: object) -> None:
        raise UnwritableError("the run directory cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", full)
        code, out, err = told(arguments, capsys)
    assert code == 1
    assert "error: the score above is not kept: the run directory cannot be written: No space left on device." in err
    assert told(arguments, capsys)[:2] == (0, out)


def harm(store: Store, *kinds: str) -> None:
    """Flips a bit in every file of all artifacts of these kinds."""
    for artifact in store.artifacts():
        for name in artifact.files if artifact.kind in kinds else ():
            path = store.path(artifact, name)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o644)
            path.write_bytes(data)


REPEAT = "Repeat the command that scores or trains with it, with --force."


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("detector", REPEAT),
        ("stats", REPEAT),
        ("features", REPEAT),
        ("teacher", "Repeat sidactl fetch-teacher tiny-digits with --force."),
        ("dataset", "Repeat sidactl prepare-data for tiny-digits with its options, with --force."),
    ],
)
def test_what_is_damaged_is_named_with_the_command_that_repairs_it(fresh_run: Path, kind: str, hint: str) -> None:
    subject = "dataset/tiny-digits" if kind == "dataset" else "teacher/tiny-digits"
    metric = ["prec-recall" if kind in ("features", "dataset") else "fid"]

    def measured(num: int, force: bool = False) -> Any:
        reference = "dataset/tiny-digits"
        return scores.evaluate(subject, metric, reference=reference, num=num, run=fresh_run, force=force).values

    store = Store.open(fresh_run)
    expected = None if kind == "dataset" else measured(30)
    harm(store, kind)
    with pytest.raises(SidaError) as caught:
        measured(31)
    assert re.match(rf"object \w{{12}} of {kind} \w{{12}} \(.*\) is damaged: its content", str(caught.value))
    assert str(caught.value).endswith(hint)
    if kind == "teacher":
        ops.fetch_teacher("tiny-digits", run=fresh_run, force=True)
    elif kind == "dataset":
        ops.prepare_data("tiny-digits", run=fresh_run, force=True)
    else:
        assert measured(30, force=True) == expected
    assert list(store.verify()) == []


def test_force_derives_damaged_inputs_of_the_catalog_again(fresh_run: Path) -> None:
    store = Store.open(fresh_run)
    expected = scores.fid("teacher/tiny-digits", num=30, run=fresh_run)
    harm(store, "teacher", "dataset", "detector", "stats")
    assert scores.fid("teacher/tiny-digits", num=30, run=fresh_run, force=True) == expected
    assert list(store.verify()) == []


def test_a_truncated_ref_of_a_detector_is_written_again(fresh_run: Path) -> None:
    ref = fresh_run / "refs/detector/tiny-digits"
    whole = ref.read_text()
    ref.write_text(whole[:20])
    scores.fid("tiny-digits", num=33, run=fresh_run)
    assert ref.read_text() == whole
