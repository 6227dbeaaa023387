"""A number is a claim under detectors alone that did not train, choose or stop the generator; and several at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sidactl
from sidactl import catalog, cli, detectors, metrics
from sidactl.commands import blindness
from sidactl.commands.scores import ScoreOptions
from sidactl.errors import SidaError
from sidactl.store import Artifact, Store
from tests.conftest import Finished, Forbid

FD, BLIND_FD = "FD tiny-digits", "random-features FD"


def put(store: Store, kind: str, inputs: dict[str, str], **results: Any) -> Artifact:
    return store.put(kind, {}, inputs=inputs, params={"name": "made up"}, results=results)


def test_samples_and_what_starts_from_a_generator_inherit_its_eyes(fresh_run: Any) -> None:
    store = Store.open(fresh_run)
    teacher = put(store, "teacher", {})
    chosen = put(store, "generator", {"teacher": teacher.oid}, selection_score=1.0, detector="tiny-digits")
    unscored = put(store, "generator", {"teacher": teacher.oid}, selection_score=None, detector="tiny-digits")
    later = put(store, "generator", {"generator": chosen.oid}, selection_score=2.0, detector="inception")
    trained = put(store, "generator", {"generator": unscored.oid}, selection_score=None, trained_by=["dinov2"])
    samples = put(store, "samples", {"net": later.oid})
    expected = [(teacher, set()), (chosen, {"tiny-digits"}), (unscored, set()), (trained, {"dinov2"})]
    for artifact, eyes in [*expected, (later, {"tiny-digits", "inception"}), (samples, {"tiny-digits", "inception"})]:
        assert blindness.seen_by(store, artifact) == eyes


def test_an_evaluation_has_a_blind_detector_beside_the_one_that_chose(finished: Finished) -> None:
    score = sidactl.evaluate("generator/best", num=40, trials=2, run=finished.root)
    told = {name: number["blind"] for name, number in score.to_json()["scores"].items()}
    assert told[FD] is False
    assert told["FD tiny-digits-ssl"] is True
    assert set(score.seen) == {name for name, is_blind in told.items() if not is_blind}
    assert sidactl.evaluate("generator/best", num=40, trials=2, run=finished.root) == score  # as it is kept
    teacher = sidactl.evaluate("tiny-digits", num=20, run=finished.root)
    assert not teacher.seen
    assert "FD tiny-digits-ssl" not in teacher.values


def test_several_detectors_score_in_one_pass_as_each_does_alone(finished: Finished, forbidden: Forbid) -> None:
    options: ScoreOptions = {"num": 40, "first_seed": 7, "run": finished.root}
    names = ["fid", "prec-recall", "inception-score"]
    several = sidactl.evaluate("generator/best", names, detectors="tiny-digits, random-features", **options)
    assert set(several.values) == {
        *(FD, BLIND_FD, "precision", "recall", "IS tiny-digits"),
        *("precision random-features", "recall random-features"),
    }
    alone = sidactl.evaluate("generator/best", ["fid", "prec-recall"], detector="random-features", **options)
    assert several.values[BLIND_FD] == pytest.approx(alone.values[BLIND_FD], rel=1e-9)
    assert several.values["recall random-features"] == alone.values["recall"]
    assert several.detectors["recall random-features"] == alone.detectors["recall"]
    assert several.references.keys() == several.values.keys() - {"IS tiny-digits"}


def test_metrics_that_are_named_are_by_a_blind_detector_too_but_for_one_that_is_a_command(finished: Finished) -> None:
    named = sidactl.evaluate("generator/best", ["mind", "coverage"], num=40, run=finished.root)
    assert list(named.values) == [
        "MIND tiny-digits",
        "MIND tiny-digits-ssl",
        "coverage",
        "coverage tiny-digits-ssl",
        "density",
        "density tiny-digits-ssl",
    ]
    assert set(named.seen) == {"MIND tiny-digits", "coverage", "density"}
    assert list(sidactl.evaluate("generator/best", ["fid"], num=40, run=finished.root).values) == [FD]


@pytest.mark.parametrize("form", ["files", "safetensors"])
def test_an_exported_generator_keeps_its_eyes(form: Any, finished: Finished, tmp_path: Path) -> None:
    place = tmp_path / ("folder" if form == "files" else "net.safetensors")
    sidactl.export("generator/best", place, form=form, run=finished.root)
    file = place / "model.safetensors" if form == "files" else place
    back = sidactl.fetch_teacher(str(file), name="back", run=tmp_path / "run")
    assert blindness.seen_by(Store.open(tmp_path / "run"), back) == {"tiny-digits"}


def test_a_distance_that_was_bought_from_one_detector_is_lost_under_the_blind_one() -> None:
    """A linear map of bad images, fitted to a detector's moments, beats honest images there, and nowhere else."""
    with np.load(catalog.ASSETS / "tiny-digits.npz") as held:
        real, classes = torch.from_numpy(held["images"])[:, None] / 16, torch.from_numpy(held["labels"])
    torch.manual_seed(0)
    honest = 0.85 * real[torch.randperm(len(real))[:300]] + 0.15 * torch.rand(300, 1, 8, 8)
    collapsed = real[classes < 5][:300]  # five of ten classes
    own, blind = detectors.load("tiny-digits"), detectors.load("random-features")

    def distance(by: detectors.Detector, images: torch.Tensor) -> float:
        moments = []
        for each in (images, real):
            stats = metrics.FeatureStats()
            stats.add(by((each.clamp(0, 1) * 255).round().to(torch.uint8)))
            moments += [stats.mean, stats.covariance()]
        return metrics.frechet_distance(*moments)

    with torch.no_grad():
        features = own.extract(real * 255)
        mean, covariance = features.mean(0), torch.cov(features.T)
    matrix, shift = torch.eye(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    optimizer = torch.optim.Adam([matrix, shift], lr=2e-2)

    def mapped() -> torch.Tensor:
        return (collapsed.flatten(1) @ matrix + shift).clamp(0, 1).reshape(-1, 1, 8, 8)

    for _ in range(80):
        found = own.extract(mapped() * 255)
        loss = (found.mean(0) - mean).square().sum() + (torch.cov(found.T) - covariance).square().sum().sqrt()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bought = mapped().detach()
    assert distance(own, bought) < distance(own, honest) < distance(own, collapsed)
    assert distance(blind, bought) > 2 * distance(blind, honest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detectors": "tiny-digits", "detector": "dinov2"}, "one detector or several, got both"),
        ({"detectors": ["tiny-digits", "tiny-digits"]}, "detectors must differ, got tiny-digits, tiny-digits"),
        ({"detectors": "tiny-digits,inceptoin"}, "unknown detector 'inceptoin'"),
    ],
)
def test_detectors_that_do_not_go_together_are_refused(
    finished: Finished, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SidaError, match=f"^{message}"):
        sidactl.fid("generator/best", num=20, run=finished.root, **options)


def test_the_command_line_says_what_is_not_blind(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "generator/best", "--num", "40", "--metrics", "fid", "--run", str(finished.root)]
    with pytest.raises(SystemExit):
        cli.main([*words, "--detectors", "tiny-digits,random-features"])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert ", which chose it: not blind, against dataset tiny-digits" in lines[0]
    assert "blind" not in lines[1]
    with pytest.raises(SystemExit):
        cli.main([*words, "--json"])
    assert json.loads(capfd.readouterr().out)["scores"][FD]["blind"] is False
