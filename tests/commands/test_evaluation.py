"""Scores of a run: which detector gives them, further ones, and what is refused before the first step."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sidactl
from sidactl import catalog
from sidactl.cli import shown
from sidactl.commands import dataset_stats, evaluation, fetch, preflight, scorers
from sidactl.commands import moments as commands_moments
from sidactl.commands import scores as commands_scores
from sidactl.errors import SidaError
from sidactl.recipes import OneStepSpec
from sidactl.store import Store
from sidactl.training import state
from tests.commands.conftest import AT_ITS_END, SHORT_SID, never, planned
from tests.conftest import SHORT, Finished, instead_of, short_distill


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


@pytest.mark.parametrize("error", [SidaError("no answer", "Wait."), MemoryError()])
def test_a_teacher_that_cannot_be_scored_costs_no_generator(
    fresh_run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise error

    instead_of(sidactl.evaluate, fails, monkeypatch)
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


def test_force_fetches_a_detector_of_timm_anew(fresh_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights of timm's are not to be had in a test; others stand for them.
    asked: list[tuple[str, bool]] = []
    fetches, loads, own = fetch.fetch_detector, scorers.load_detector, "random-features"

    def fetched(name: str, **options: Any) -> Any:
        asked.append((name, options.get("recheck", False)))
        return fetches(own, **options)

    instead_of(fetches, fetched, monkeypatch)
    instead_of(loads, lambda store, name, device: loads(store, own, device), monkeypatch)
    instead_of(preflight.check_detector, lambda *words: [], monkeypatch)
    options: dict[str, Any] = AT_ITS_END | {"detector": "timm:any", "teacher_score": "none"}
    short_distill(fresh_run, **options)
    assert ("timm:any", True) not in asked
    short_distill(fresh_run, force=True, **options)
    assert ("timm:any", True) in asked
