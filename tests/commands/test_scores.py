"""Scores of artifacts: what they are of, that they repeat, and the exact text of errors."""

import math
import re
import shutil
import statistics
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image

import sidactl
from sidactl import cli, detectors, metrics
from sidactl.cli import shown
from sidactl.commands import dataset_stats, features, moments, scorers, scores
from sidactl.commands import evaluation as commands_evaluation
from sidactl.commands import reference as commands_reference
from sidactl.commands import resolve as commands_resolve
from sidactl.commands.resolve import load_dataset, load_net, resolve
from sidactl.data import images as data_images
from sidactl.errors import SidaError
from sidactl.recipes import OneStepSpec, SamplingForm
from sidactl.store import Store, UnwritableError, rehash
from tests.conftest import Finished, Forbid, read_only

FD = "FD tiny-digits"


@pytest.fixture(scope="module")
def collapsed(finished: Finished) -> str:
    """Samples of a generator that draws one class alone, in the run directory of `finished`."""
    return sidactl.sample("tiny-digits", seeds=range(200), class_index=0, steps=10, run=finished.root).artifact.oid


@pytest.fixture(scope="module")
def diverse(finished: Finished) -> str:
    """Samples of all classes, as good as those of `collapsed`."""
    return sidactl.sample("tiny-digits", seeds=range(200), steps=10, run=finished.root).artifact.oid


def features_of(finished: Finished, ref: str) -> NDArray[np.float64]:
    store = Store.open(finished.root)
    dataset = load_dataset(store, store.resolve(ref))
    work = features.of_images(dataset, {"d": detectors.load("tiny-digits")}, keeps=["d"])
    return features.collect(work).features["d"].rows.double().numpy()


def test_a_dataset_against_itself_scores_zero(finished: Finished) -> None:
    score = sidactl.fid("dataset/tiny-digits", reference="dataset/tiny-digits", run=finished.root)
    assert score.value == pytest.approx(0, abs=1e-9)
    assert (score.num, score.seeds, {FD: score.subject}) == (1797, [], score.references)


def test_fid_is_the_frechet_distance_of_the_moments_of_both_sets(finished: Finished, collapsed: str) -> None:
    score = sidactl.fid(collapsed, run=finished.root)
    ours, theirs = features_of(finished, collapsed), features_of(finished, "dataset/tiny-digits")
    expected = metrics.frechet_distance(
        ours.mean(0), np.cov(ours, rowvar=False), theirs.mean(0), np.cov(theirs, rowvar=False)
    )
    assert score.values == {FD: [pytest.approx(expected, rel=1e-9)]}
    assert score.detectors == {FD: detectors.load("tiny-digits").identity}


@pytest.mark.parametrize("ref", ["generator/best", "tiny-digits"])
def test_scoring_a_net_equals_scoring_its_samples(finished: Finished, ref: str) -> None:
    drawn = sidactl.sample(ref, seeds=range(7, 67), run=finished.root).artifact
    direct = sidactl.fid(ref, num=60, first_seed=7, run=finished.root)
    assert sidactl.fid(drawn.oid, run=finished.root).value == pytest.approx(direct.value, rel=1e-9)
    assert direct.seeds == [[7, 67]]


def test_the_reference_is_the_dataset_that_the_subject_descends_from(finished: Finished, collapsed: str) -> None:
    store = Store.open(finished.root)
    dataset = store.resolve("dataset/tiny-digits").oid
    for ref in ("dataset/tiny-digits", "teacher/tiny-digits", "generator/best", collapsed):
        assert commands_reference.dataset_of(store, store.resolve(ref)).oid == dataset


def test_trials_take_fresh_seeds_and_are_told_by_mean_deviation_and_minimum(finished: Finished) -> None:
    score = sidactl.fid("generator/best", num=30, trials=10, first_seed=100, run=finished.root)
    assert score.seeds == [[100 + 30 * t, 130 + 30 * t] for t in range(10)]
    values = score.values[FD]
    assert len(set(values)) == 10
    for t in (0, 9):
        single = sidactl.fid("generator/best", num=30, first_seed=100 + 30 * t, run=finished.root)
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
            "blind": False,  # it chose the best generator
            "reference": score.references[FD],
        }
    }
    assert score.value == told["scores"][FD]["value"]
    assert (told["num"], told["subject"], told["oid"]) == (30, finished.best.oid, score.oid)
    assert single.to_json()["scores"][FD]["std"] is None


def test_a_repeated_score_is_answered_from_the_run_directory_and_force_gives_the_same(
    finished: Finished, forbidden: Forbid
) -> None:
    first = sidactl.fid("generator/best", num=40, run=finished.root)
    ticks: list[tuple[int, int]] = []
    again = sidactl.fid("generator/best", num=40, force=True, run=finished.root, tick=lambda *t: ticks.append(t))
    assert again == first
    assert ticks == [(0, 40), (40, 40)]
    with forbidden(detectors.load):
        assert sidactl.fid("generator/best", num=40, run=finished.root) == first
    assert scores.score_of(Store.open(finished.root).get(first.oid)) == first


def test_a_score_does_not_depend_on_the_batch_size(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> list[float]:
        found = [
            sidactl.fid("generator/best", num=90, force=True, run=finished.root).value,
            *sidactl.prec_recall("generator/best", num=90, force=True, run=finished.root).values.values(),
        ]
        return [float(np.ravel(value)[0]) for value in found]

    whole = measured()
    monkeypatch.setattr(features, "MAX_BATCH_SIZE", 17)
    assert measured() == pytest.approx(whole, rel=1e-6)


def test_a_collapsed_generator_has_high_precision_and_low_recall_in_this_order(
    finished: Finished, collapsed: str, diverse: str
) -> None:
    def measured(ref: str) -> list[float]:
        score = sidactl.prec_recall(ref, run=finished.root)
        assert list(score.values) == ["precision", "recall"]
        return [values[0] for values in score.values.values()]

    (precision, recall), (diverse_precision, diverse_recall) = measured(collapsed), measured(diverse)
    assert abs(precision - diverse_precision) < 0.1
    assert min(precision, diverse_precision) > 0.5
    assert recall < 0.2
    assert diverse_recall > 0.9


def test_precision_and_recall_are_those_of_the_features(finished: Finished, diverse: str) -> None:
    real, ours = features_of(finished, "dataset/tiny-digits"), features_of(finished, diverse)
    for neighbours in (1, 3):
        score = sidactl.prec_recall(diverse, neighbours=neighbours, run=finished.root)
        expected = metrics.precision_recall(real, ours, neighbours, precision="float64")
        assert [score.values["precision"][0], score.values["recall"][0]] == pytest.approx(expected, abs=2e-3)


def test_features_are_taken_once_for_all_trials_and_metrics(finished: Finished, forbidden: Forbid) -> None:
    sidactl.prec_recall("generator/best", num=20, trials=3, first_seed=900, run=finished.root)
    with forbidden(commands_resolve.load_net, commands_resolve.load_dataset):
        metrics = ["fid", "prec-recall", "kid", "inception-score"]
        options: Any = {"num": 20, "trials": 2, "first_seed": 900, "detector": "tiny-digits", "run": finished.root}
        known = sidactl.evaluate("generator/best", metrics, **options)
    assert list(known.values) == [FD, "IS tiny-digits", "KID tiny-digits", "precision", "recall"]


def test_statistics_of_a_dataset_are_taken_once(finished: Finished) -> None:
    store = Store.open(finished.root)
    data = store.resolve("dataset/tiny-digits")
    sidactl.fid("dataset/tiny-digits", reference="dataset/tiny-digits", run=finished.root)
    stats = [a for a in store.artifacts(kind="stats") if a.inputs == {"dataset": data.oid}]
    assert len([a for a in stats if str(a.params["detector"]).startswith("tiny-digits@")]) == 1
    kept = moments.moments(store, data, detectors.load("tiny-digits"))
    assert kept
    expected = features_of(finished, "dataset/tiny-digits")
    np.testing.assert_allclose(kept.mean, expected.mean(0), rtol=1e-9)
    np.testing.assert_allclose(kept.covariance, np.cov(expected, rowvar=False), rtol=1e-7, atol=1e-12)


def test_a_score_in_another_precision_says_so_and_is_that_of_such_samples(finished: Finished) -> None:
    half = SamplingForm(precision="bf16")
    drawn = sidactl.sample("generator/best", seeds=range(50), setting=half, run=finished.root).artifact
    score = sidactl.fid("generator/best", num=50, setting=half, run=finished.root)
    assert score.value == pytest.approx(sidactl.fid(drawn.oid, run=finished.root).value, rel=1e-9)
    assert score.to_json()["settings"]["precision"] == "bf16"
    usual = sidactl.fid("generator/best", num=50, run=finished.root)
    assert "precision" not in usual.settings
    assert usual.value != score.value


def test_a_score_by_another_sampler_says_so_and_is_that_of_such_samples(finished: Finished) -> None:
    churned: dict[str, Any] = {"steps": 3, "heun": {"S_churn": 2, "sigma_max": 40}}
    drawn = sidactl.sample("tiny-digits", num=50, run=finished.root, **churned)
    score = sidactl.fid("tiny-digits", num=50, run=finished.root, **churned)
    assert score.value == pytest.approx(sidactl.fid(drawn, run=finished.root).value, rel=1e-9)
    assert score.to_json()["settings"]["sampler"] == drawn.artifact.params["sampler"]
    usual = sidactl.fid("tiny-digits", num=50, run=finished.root)
    assert "sampler" not in usual.settings
    assert usual.value != score.value
    assert sidactl.fid("tiny-digits", num=50, steps=18, run=finished.root).oid == usual.oid  # the teacher's own
    one = sidactl.fid("tiny-digits", num=50, sampler="one-step", run=finished.root)
    assert one.settings["sampler"] == {"num_steps": 1, "sigma_init": 2.5}


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        (
            "samples",
            {"steps": 0},
            "a sampler is of a net that draws images, got fixed ones. "
            "Score the network itself, or leave out --steps, --sampler and the settings of Heun's.",
        ),
        (
            "generator/best",
            {"num": 10, "heun": {"rho": 5}},
            "--rho is of the heun sampler of a teacher, got one-step. Leave out --rho.",
        ),
        (
            "samples",
            {"setting": SamplingForm(precision="bf16", compile=True)},
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
            {"num": 100, "subset_seed": -1},
            "the subset seed must be from 0 to 2147483647, got -1. Pass --subset-seed 0.",
        ),
        (
            "samples",
            {"subset_seed": 1},
            "a subset must have fewer than all 200 images, got a seed for one of 200. "
            "Pass a smaller --num, or leave out --subset-seed.",
        ),
        (
            "generator/best",
            {"num": 10, "subset_seed": 1},
            "a subset is of images that there are, got a net that draws them. Leave out --subset-seed: --first-seed "
            "chooses what a net draws.",
        ),
        (
            "generator/best",
            {"num": 10, "first_seed": -1},
            "seeds of all trials must be from 0 to 4294967295, got -1. Choose others.",
        ),
        (
            "generator/best",
            {"num": 10, "trials": 3, "first_seed": (1 << 32) - 29},
            "seeds of all trials must be from 0 to 4294967295, got 4294967296. Choose others.",
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
    score = sidactl.fid("dataset/tiny-digits", reference="dataset/tiny-digits", run=finished.root).oid
    subject = {"samples": collapsed, "score": score}.get(ref, ref)
    for command in (sidactl.fid, sidactl.prec_recall):
        with pytest.raises(SidaError) as caught:
            command(subject, **({"run": finished.root} | options))
        assert str(caught.value) == message.format(score=score, gpus=torch.cuda.device_count())
        assert caught.value.exit_code == 2


def test_one_image_is_too_few_for_a_covariance(finished: Finished) -> None:
    single = sidactl.sample("generator/best", seeds=[0], run=finished.root).artifact.oid
    with pytest.raises(SidaError) as caught:
        sidactl.fid(single, run=finished.root)
    assert str(caught.value) == "a covariance needs >= 2 images, got 1. Score more images."


def test_a_score_is_kept_with_what_it_was_made_from(finished: Finished, tmp_path: Path) -> None:
    store = Store.open(finished.root)
    score = sidactl.fid("generator/best", num=25, first_seed=3, run=finished.root)
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
        path = sidactl.export(collapsed, destination, form=form, run=finished.root)  # type: ignore[arg-type]
    score = sidactl.fid(str(path), reference="dataset/tiny-digits", run=finished.root)
    assert score.value == sidactl.fid(collapsed, run=finished.root).value


def test_classes_can_be_drawn_as_in_the_dataset(finished: Finished) -> None:
    uniform = sidactl.fid("generator/best", num=300, run=finished.root)
    as_real = sidactl.fid("generator/best", num=300, labels="dataset", run=finished.root)
    assert uniform.settings["labels"] == "uniform"
    assert as_real.settings["labels"] == "dataset"
    assert as_real.value != uniform.value
    with pytest.raises(SidaError) as caught:
        sidactl.fid("generator/best", num=300, labels="balanced", run=finished.root)
    assert str(caught.value) == "labels must be one of uniform, dataset, got 'balanced'. Pass another."


def test_the_seeded_detector_scores_anything_by_its_own_name(finished: Finished, collapsed: str, diverse: str) -> None:
    options: dict[str, Any] = {"detector": "random-features", "run": finished.root}
    score = sidactl.evaluate(diverse, **options)
    assert list(score.values) == ["KID random-features", "precision", "random-features FD", "recall"]
    distance = sidactl.fid(diverse, **options)
    assert list(distance.values) == ["random-features FD"]
    assert distance.value < sidactl.fid(collapsed, **options).value
    assert distance.detectors == {"random-features FD": detectors.load("random-features").identity}
    with pytest.raises(SidaError, match=r"^the inception score needs classes, detector random-features gives none\."):
        sidactl.inception_score(diverse, **options)


def test_fewer_images_than_there_are_are_drawn_by_seed(finished: Finished) -> None:
    """The first of a set sorted by class are all of one class."""
    store = Store.open(finished.root)
    dataset = load_dataset(store, store.resolve("dataset/tiny-digits"))
    assert dataset.labels is not None
    found = features_of(finished, "dataset/tiny-digits")
    real = found.mean(0), np.cov(found, rowvar=False)
    options: dict[str, Any] = {"reference": "dataset/tiny-digits", "num": 120, "run": finished.root}
    for seed in (0, 5):
        order = np.arange(1797)
        np.random.RandomState(seed).shuffle(order)
        rows = found[np.sort(order[:120])]
        expected = metrics.frechet_distance(rows.mean(0), np.cov(rows, rowvar=False), *real)
        score = sidactl.fid("dataset/tiny-digits", subset_seed=seed, **options)
        assert score.value == pytest.approx(expected, rel=1e-9)
        assert score.to_json()["settings"] | {"subset_seed": seed, "subset_of": 1797} == score.settings
        assert score.num == 120
    assert sidactl.fid("dataset/tiny-digits", **options) == sidactl.fid("dataset/tiny-digits", subset_seed=0, **options)
    assert shown.score_lines(score, scores.against(score, finished.root)) == [
        f"{FD} {score.value:.4g}; 120 of 1,797 images, drawn by seed 5, {score.detectors[FD]}, against dataset "
        "tiny-digits"
    ]
    whole = sidactl.fid("dataset/tiny-digits", **options | {"num": 1797})
    assert not {"subset_seed", "subset_of"} & set(whole.settings)


def test_numbers_of_images_in_parts_depend_on_the_images_alone(
    finished: Finished, diverse: str, tmp_path: Path
) -> None:
    """As samples in the order of seeds, and as a folder by class, an npz and a zip in reverse."""
    folder = sidactl.export(diverse, tmp_path / "folder", form="png", run=finished.root)
    by_class = load_dataset(Store.open(finished.root), resolve(Store.open(finished.root), str(folder), ["dataset"]))
    assert by_class.labels is not None
    assert (np.diff(by_class.labels) >= 0).all()
    npz, images = tmp_path / "shuffled.npz", by_class.images(range(by_class.num_images))
    order = np.random.RandomState(0).permutation(len(images))
    np.savez(npz, arr_0=images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()[order])
    reversed_zip = tmp_path / "reversed.zip"
    with zipfile.ZipFile(reversed_zip, "w") as archive:
        for index, image in enumerate(images.flip(0)):
            archive.writestr(f"{index:05d}.png", data_images.encode_png(image.permute(1, 2, 0).squeeze(2).numpy()))
    options: dict[str, Any] = {"reference": "dataset/tiny-digits", "run": finished.root}
    subjects = [diverse, str(folder), str(npz), str(reversed_zip)]
    found = [sidactl.evaluate(ref, ["inception-score", "kid"], **options) for ref in subjects]
    assert [score.values for score in found[1:]] == [found[0].values] * 3
    assert {score.settings["order"] for score in found} == {"content"}
    # The order is none of a file's, by which a part is certain of its one class, and as good as drawn.
    detector = detectors.load("tiny-digits")
    logits, rng = detector.logits(detector(images)), np.random.RandomState(0)
    score = sidactl.inception_score(diverse, **options)
    assert metrics.inception_score(logits)[0] < 0.7 * score.value
    drawn = [metrics.inception_score(logits[torch.from_numpy(rng.permutation(200))])[0] for _ in range(20)]
    assert min(drawn) - 0.2 < score.value < max(drawn) + 0.2


def test_the_convention_sid_takes_images_in_the_order_of_their_seeds(finished: Finished, tmp_path: Path) -> None:
    drawn = sidactl.sample("generator/best", seeds=range(60), run=finished.root).artifact.oid
    options: dict[str, Any] = {"convention": "sid", "run": finished.root}
    expected, _ = metrics.inception_score(
        detectors.load("tiny-digits").logits(torch.tensor(features_of(finished, drawn)).float())
    )
    for score in (
        sidactl.inception_score("generator/best", num=60, **options),
        sidactl.inception_score(drawn, **options),
    ):
        assert score.value == pytest.approx(expected, rel=1e-9)
        assert "order" not in score.settings
    assert sidactl.inception_score(drawn, run=finished.root).value != pytest.approx(expected, rel=1e-9)


def test_features_that_an_older_version_kept_are_taken_anew(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(tensors: dict[str, torch.Tensor], **options: Any) -> bytes:
        return save({name: tensor for name, tensor in tensors.items() if name != "digests"}, **options)

    save = safetensors.torch.save
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save", older)
        sidactl.prec_recall("generator/best", num=33, run=finished.root)
    score = sidactl.inception_score("generator/best", num=33, run=finished.root)
    assert score == sidactl.inception_score("generator/best", num=33, run=finished.root, force=True)


def test_an_evaluation_is_by_the_detector_of_its_reference(finished: Finished, diverse: str, tmp_path: Path) -> None:
    folder = str(sidactl.export(diverse, tmp_path / "mine", form="png", run=finished.root))
    score = sidactl.evaluate(folder, reference="tiny-digits", run=finished.root)
    assert list(score.values) == [FD, "IS tiny-digits", "KID tiny-digits", "precision", "recall"]
    assert set(score.detectors.values()) == {detectors.load("tiny-digits").identity}
    alone = sidactl.inception_score(folder, reference="tiny-digits", run=finished.root)
    assert alone.values == {"IS tiny-digits": score.values["IS tiny-digits"]}
    assert float(alone) == alone.value == statistics.fmean(alone.values["IS tiny-digits"])
    with pytest.raises(SidaError, match=f"^a score of several numbers has no one value: {FD}, IS tiny-digits, "):
        float(score)


def test_few_reference_images_are_warned_of(finished: Finished, diverse: str) -> None:
    few = sidactl.sample("tiny-digits", seeds=range(50), steps=4, run=finished.root).artifact.oid
    assert sidactl.fid(diverse, run=finished.root).warnings == []
    images = str(Store.open(finished.root).path(Store.open(finished.root).get(few), "images.zip"))
    reference = sidactl.prepare_data(_copy(images, finished.root.parent / "few.zip"), run=finished.root).oid
    told = (
        "50 reference images are few for 64 features: the distance is far too high by their number alone; compare only "
        "with scores against the same ones, better take more"
    )
    assert sidactl.fid(diverse, reference=reference, run=finished.root).warnings == [told]
    stats = dataset_stats.dataset_stats(reference, run=finished.root).oid
    assert sidactl.fid(diverse, reference=stats, run=finished.root).warnings == [told]
    assert sidactl.prec_recall(diverse, reference=reference, run=finished.root).warnings == []


def _copy(source: str, destination: Path) -> str:
    return str(shutil.copy(source, destination))


def test_more_reference_images_than_are_taken_are_told(
    finished: Finished, diverse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "MAX_REAL_IMAGES", 150)
    score = sidactl.prec_recall(diverse, reference="dataset/tiny-digits", num=190, run=finished.root)
    assert score.warnings == ["150 of 1,797 reference images, drawn by seed 0, stand for all of them"]


def images_of(width: int, height: int, num: int = 150) -> NDArray[np.uint8]:
    """Uint8 [num, height, width, 3], each of one shade with some grain."""
    rng = np.random.RandomState(width * height)
    shades = rng.randint(40, 200, (num, 1, 1, 3))
    return (shades + rng.randint(-20, 20, (num, height, width, 3))).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(28, 28), (12, 20), (130, 130)])
def test_images_of_any_one_size_are_scored(finished: Finished, tmp_path: Path, width: int, height: int) -> None:
    images = images_of(width, height, 150 if width < 100 else 12)
    npz, folder = tmp_path / "mine.npz", tmp_path / "mine"
    np.savez(npz, arr_0=images)
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    options: dict[str, Any] = {"detector": "random-features", "run": finished.root}
    score = sidactl.fid(str(folder), reference=str(npz), **options)
    assert score.value == pytest.approx(0, abs=1e-6)
    assert sidactl.fid("dataset/tiny-digits", reference=str(npz), **options).value > 1
    store = Store.open(finished.root)
    results = store.get(score.subject).results
    assert (results["resolution"], results.get("width")) == (height, None if width == height else width)
    with pytest.raises(SidaError) as caught:
        sidactl.train_teacher(score.subject, name="mine", run=finished.root)
    side = {28: 32, 12: 16, 130: 128}[width]
    assert str(caught.value) == (
        f"images to train on must be square with a side that is a power of two, got {width}x{height}. "
        f"Make a dataset of them with: sidactl prepare-data PATH --resolution {side}x{side}"
    )


def test_a_folder_that_is_fit_for_training_is_one_dataset_for_scores_too(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for index, image in enumerate(images_of(16, 16, 20)):
        Image.fromarray(image).save(folder / f"{index:02d}.png")
    scored = sidactl.fid(str(folder), reference=str(folder), detector="random-features", run=finished.root)
    assert scored.subject == sidactl.prepare_data(str(folder), run=finished.root).oid


def test_images_of_a_size_that_the_detector_does_not_take_are_told_what_does(
    finished: Finished, tmp_path: Path
) -> None:
    npz = tmp_path / "mine.npz"
    np.savez(npz, arr_0=images_of(28, 28))
    with pytest.raises(SidaError) as caught:
        sidactl.fid(str(npz), reference="tiny-digits", run=finished.root)
    assert str(caught.value) == (
        "detector tiny-digits needs grey uint8 images of 8x8 pixels, got torch.uint8 [150, 3, 28, 28]. "
        "Score these images with --detector random-features or inception."
    )
    with pytest.raises(SidaError) as caught:
        sidactl.prepare_data(str(npz), run=finished.root)
    assert str(caught.value).endswith(
        "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    )


def changed(finished: Finished, ref: str, factor: float) -> str:
    """A net whose last biases are multiplied; by NaN it is one that an older version may have stored."""
    store = Store.open(finished.root)
    artifact = store.resolve(ref)
    weights = safetensors.torch.load(store.read(artifact, "model.safetensors"))
    for name in weights:
        if name.endswith("aux_conv.bias"):
            weights[name] = weights[name] * factor
    files: dict[str, Path | bytes] = {"model.safetensors": safetensors.torch.save(weights)}
    return store.put(artifact.kind, files, inputs=dict(artifact.inputs), params=dict(artifact.params)).oid


def test_an_image_that_is_not_finite_ends_a_command_by_its_seed(finished: Finished) -> None:
    oid = changed(finished, "generator/best", math.nan)
    store = Store.open(finished.root)

    def kept() -> list[str]:
        return [artifact.kind for artifact in store.artifacts() if oid in artifact.inputs.values()]

    for act in (
        lambda: sidactl.sample(oid, seeds=[17, 18], run=finished.root),
        lambda: sidactl.fid(oid, num=20, first_seed=17, run=finished.root),
        lambda: sidactl.evaluate(oid, num=20, first_seed=17, run=finished.root),
    ):
        with pytest.raises(SidaError) as caught:
            act()
        assert str(caught.value) == (
            "the image of seed 17 is not finite. Take another network or precision, or less --guidance."
        )
        assert caught.value.exit_code == 1
    assert kept() == []
    guide = changed(finished, "teacher/tiny-digits", 0.5)
    with pytest.raises(SidaError, match=r"^the image of seed 0 is not finite\."):
        sidactl.sample("tiny-digits", seeds=[0], guide=guide, guidance=1e308, steps=3, run=finished.root)


@pytest.mark.parametrize("seeds", [[-1], [3, 1 << 32], range(-5, 3)])
def test_samples_of_seeds_beyond_32_bits_are_refused(finished: Finished, seeds: Any) -> None:
    with pytest.raises(SidaError) as caught:
        sidactl.sample("tiny-digits", seeds=seeds, run=finished.root)
    assert str(caught.value).startswith("seeds must be from 0 to 4294967295, got ")
    assert caught.value.exit_code == 2


def test_an_evaluation_while_training_of_images_that_are_not_finite_is_no_number(finished: Finished) -> None:
    store = Store.open(finished.root)
    detector = detectors.load("tiny-digits")
    reference = moments.moments(store, store.resolve("dataset/tiny-digits"), detector)
    assert reference
    evaluate = commands_evaluation.evaluation_of(
        [commands_evaluation.Eye("fid", detector, reference)], OneStepSpec(), 300
    )
    sound = evaluate(load_net(store, finished.best, "cpu"), lambda: False)
    assert sound
    assert (sound.score > 0, sound.warning) == (True, None)
    evaluation = evaluate(
        load_net(store, store.get(changed(finished, "generator/best", math.nan)), "cpu"), lambda: False
    )
    assert evaluation
    assert (math.isnan(evaluation.score), evaluation.preview) == (True, None)
    assert evaluation.warning == "no score after these updates: the image of seed 2147483648 is not finite"


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
        unkept = sidactl.prec_recall("generator/best", num=36, run=finished.root)
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
        return sidactl.evaluate(subject, metric, reference=reference, num=num, run=fresh_run, force=force).values

    store = Store.open(fresh_run)
    expected = None if kind == "dataset" else measured(30)
    harm(store, kind)
    with pytest.raises(SidaError) as caught:
        measured(31)
    assert re.match(rf"object \w{{12}} of {kind} \w{{12}} \(.*\) is damaged: its content", str(caught.value))
    assert str(caught.value).endswith(hint)
    if kind == "teacher":
        sidactl.fetch_teacher("tiny-digits", run=fresh_run, force=True)
    elif kind == "dataset":
        sidactl.prepare_data("tiny-digits", run=fresh_run, force=True)
    else:
        assert measured(30, force=True) == expected
    assert list(rehash(store)) == []


def test_force_derives_damaged_inputs_of_the_catalog_again(fresh_run: Path) -> None:
    store = Store.open(fresh_run)
    expected = sidactl.fid("teacher/tiny-digits", num=30, run=fresh_run)
    harm(store, "teacher", "dataset", "detector", "stats")
    assert sidactl.fid("teacher/tiny-digits", num=30, run=fresh_run, force=True) == expected
    assert list(rehash(store)) == []


def test_a_truncated_ref_of_a_detector_is_written_again(fresh_run: Path) -> None:
    ref = fresh_run / "refs/detector/tiny-digits"
    whole = ref.read_text()
    ref.write_text(whole[:20])
    sidactl.fid("tiny-digits", num=33, run=fresh_run)
    assert ref.read_text() == whole


def test_grey_pictures_in_three_channels_are_no_other_images(finished: Finished, tmp_path: Path) -> None:
    drawn = sidactl.sample("tiny-digits", num=12, run=finished.root, device="cpu")
    folder = sidactl.export(drawn.artifact.oid, tmp_path / "grey", form="png", run=finished.root)
    options: dict[str, Any] = {"detector": "random-features", "reference": "tiny-digits", "run": finished.root}
    by_folder, by_samples = (sidactl.fid(subject, **options) for subject in (folder, drawn.artifact))
    assert float(by_folder) == pytest.approx(float(by_samples), rel=1e-12)  # the order of a sum
    assert [warning for warning in by_folder.warnings if "the reference's" in warning] == []


def test_an_inception_score_without_its_detector_proposes_none_that_cannot_give_it(
    fresh_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDACTL_MIRROR", str(fresh_run))
    for score, is_proposed in ((sidactl.inception_score, False), (sidactl.fid, True)):
        with pytest.raises(SidaError, match="mirror has neither") as caught:
            score("tiny-digits", num=10, detector="inception", run=fresh_run)
        assert ("random-features" in str(caught.value)) == is_proposed


def test_images_of_another_shape_than_the_reference_are_warned_of(finished: Finished, tmp_path: Path) -> None:
    """One number of both, however it came, would be told as if they compared."""
    folder = tmp_path / "colour"
    folder.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    options: dict[str, Any] = {"detector": "random-features", "run": finished.root}
    told = "the images are 8x8x1, the reference's 16x16x3: the distance is of that, too"
    for subject in ("generator/best", "dataset/tiny-digits"):
        assert told in sidactl.fid(subject, reference=str(folder), num=20, **options).warnings
    assert not [w for w in sidactl.fid("generator/best", num=20, **options).warnings if "of that, too" in w]


def test_a_network_of_ones_own_dataset_is_scored_by_the_detector_of_its_runs(tmp_path: Path) -> None:
    """Without a network to fetch Inception by."""
    folder, run = tmp_path / "mine", tmp_path / "run"
    folder.mkdir()
    for seed in range(6):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    data = sidactl.prepare_data(str(folder), name="mine", run=run)
    net = {"img_channels": 3, "img_resolution": 8}
    weights = {"model.safetensors": b"x"}
    generator = Store.open(run).put("generator", weights, params={"net": net}, inputs={"dataset": data.oid})
    for options, expected in (({}, "random-features"), ({"reference": data.oid}, "inception")):
        assert scorers.default_detector(generator, data, options) == expected
    assert scorers.default_detector(data, data, {}) == "inception"
