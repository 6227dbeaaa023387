"""Metrics beside the published ones: what they say of good, of copied and of collapsed images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sidactl
from sidactl import cli
from sidactl.catalog import ASSETS
from sidactl.cli import shown
from sidactl.commands import scores as commands_scores
from sidactl.errors import SidaError
from tests.conftest import Finished

LABEL = "tiny-digits"


def folder(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:04}.png")
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Digits to train on, others held out, fresh ones as a good generator draws, copies, and one class alone."""
    root = tmp_path_factory.mktemp("parts")
    with np.load(ASSETS / "tiny-digits.npz") as held:
        images, classes = (held["images"].astype(np.float32) * 255 / 16).astype(np.uint8), held["labels"]
    order = np.random.RandomState(0).permutation(len(images))
    images, classes = images[order], classes[order]
    train = images[:600]
    return {
        "train": folder(root / "train", train),
        "held_out": folder(root / "held_out", images[600:1000]),
        "fresh": folder(root / "fresh", images[1000:1300]),
        "copies": folder(root / "copies", train[:300]),
        "collapsed": folder(root / "collapsed", images[1300:][classes[1300:] == 3]),
    }


def scores(parts: dict[str, Path], which: str, metrics: list[str], run: Path, **options: Any) -> dict[str, float]:
    if {"fdr", "memorisation"} & set(metrics):
        options["held_out"] = parts["held_out"]
    score = sidactl.evaluate(parts[which], metrics, reference=parts["train"], detector=LABEL, run=run, **options)
    return {name: values[0] for name, values in score.values.items()}


def test_copies_score_well_by_distance_and_are_caught_by_the_memorisation_figures(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    metrics = ["fid", "mind", "memorisation", "fdr"]
    fresh, copies = (scores(parts, which, metrics, tmp_path) for which in ("fresh", "copies"))
    assert copies["FD tiny-digits"] < fresh["FD tiny-digits"]
    assert copies[f"MIND {LABEL}"] < fresh[f"MIND {LABEL}"]
    assert copies["AuthPct"] == 0
    assert fresh["AuthPct"] > 40
    assert copies["FLD gap"] < 5 * min(fresh["FLD gap"], -1)
    assert copies[f"FDr {LABEL}"] < fresh[f"FDr {LABEL}"]


def test_held_out_images_that_were_trained_on_are_told(parts: dict[str, Path], tmp_path: Path) -> None:
    options: Any = {"reference": parts["train"], "detector": LABEL, "run": tmp_path}
    leaked = sidactl.evaluate(parts["fresh"], ["memorisation"], held_out=parts["copies"], **options)
    assert any("300 of the 300 held-out images are among the reference's" in warning for warning in leaked.warnings)
    clean = sidactl.evaluate(parts["fresh"], ["memorisation"], held_out=parts["held_out"], **options)
    assert not any("among the reference's" in warning for warning in clean.warnings)


def test_a_collapsed_generator_is_caught_by_coverage_and_by_the_vendi_score(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    fresh, collapsed = (scores(parts, which, ["coverage", "vendi"], tmp_path) for which in ("fresh", "collapsed"))
    assert collapsed["coverage"] < 0.3 < 0.7 < fresh["coverage"]
    assert 1 <= collapsed[f"Vendi {LABEL}"] < fresh[f"Vendi {LABEL}"]


def test_the_ratio_of_distances_is_averaged_over_detectors(finished: Finished, parts: dict[str, Path]) -> None:
    options: Any = {"reference": parts["train"], "held_out": parts["held_out"], "run": finished.root, "num": 300}
    score = sidactl.evaluate("generator/best", ["fdr"], detectors=[LABEL, "random-features"], **options)
    ratios = [score.values[f"FDr {name}"][0] for name in (LABEL, "random-features")]
    assert score.values["FDr"][0] == pytest.approx(np.mean(ratios))
    assert "FDr" in score.seen  # one of them chose this generator
    assert "FDr random-features" not in score.seen


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (["memorisation"], {}, "memorisation needs real images that were not trained on, got none"),
        (["fid"], {"held_out": "dataset/tiny-digits"}, "no metric here needs them, got dataset/tiny-digits"),
        (["fdr"], {"held_out": "dataset/tiny-digits"}, "held-out images must not be the reference itself"),
        (["fdr"], {"held_out": "generator/best"}, "generator/best"),
    ],
)
def test_held_out_images_that_are_missing_or_of_no_use_are_refused(
    finished: Finished, metrics: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SidaError) as error:
        sidactl.evaluate("generator/best", metrics, num=20, run=finished.root, **options)
    assert message in str(error.value)


def test_kid_has_a_command_of_its_own(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["kid", "generator/best", "--num", "60", "--run", str(finished.root)])
    score = sidactl.evaluate("generator/best", ["kid"], num=60, run=finished.root)
    assert float(capfd.readouterr().out) == pytest.approx(score.value, rel=1e-5)


def test_a_gap_of_copies_is_told_in_words_and_kept_as_it_is() -> None:
    gap = "FLD gap"
    assert commands_scores.told(gap, -1.23e15, 4e14) == commands_scores.told(gap, -1001.0) == "below -1000 (copies)"
    assert commands_scores.told(gap, -999.0, 2.0) == "-999 +- 2"
    assert commands_scores.told("KID", -1.23e15) == "-1.23e+15"
    score = commands_scores.Score({gap: [-1e15, -2e15]}, 10, [], {gap: "x"}, {}, {}, {}, [], "ab" * 32, "")
    assert shown.score_lines(score, {}) == [f"{gap} below -1000 (copies) (minimum below -1000 (copies)); 10 images, x"]
    assert score.to_json()["scores"][gap]["value"] == -1.5e15
