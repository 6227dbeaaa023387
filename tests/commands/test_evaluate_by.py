"""Runs whose best generator is chosen by MIND or KID of few images instead of a Fréchet distance."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sidactl
from sidactl import catalog
from sidactl.cli import shown
from sidactl.commands import evaluation
from sidactl.errors import SidaError
from sidactl.recipes import Recipe, override
from sidactl.store import Store
from sidactl.training import state
from tests.commands.conftest import planned
from tests.conftest import SHORT, Finished, short_distill


@pytest.mark.parametrize("metric", ["mind", "kid"])
def test_the_best_is_chosen_by_the_score_that_was_asked_for(
    fresh_run: Path, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[state.Event] = []
    best = short_distill(fresh_run, events.append, evaluate_by=metric)
    results: Any = best.results
    options: Any = {"num": SHORT["evaluate_num"], "run": fresh_run, "detector": "tiny-digits"}
    measured = sidactl.evaluate(best, [metric], first_seed=evaluation.SELECTION_SEED, **options)
    assert results["selection_score"] == pytest.approx(measured.value, rel=1e-6)
    assert results["selection_score"] == min(score for _, score in results["scores"])
    assert results["teacher_score"] == pytest.approx(sidactl.evaluate("tiny-digits", [metric], **options).value)
    called = f"{metric.upper()} tiny-digits"
    assert events[0].values["score_name"] == called
    shown.print_generator(best, as_json=False)
    assert f"best generator: {called} {results['selection_score']:.4g} after " in capsys.readouterr().err
    # The detector chose it, by whichever score: no score by it is blind.
    assert set(measured.seen) == {called}
    assert not sidactl.fid(best, **(options | {"detector": "tiny-digits-ssl"})).seen


def test_runs_by_different_scores_do_not_compare(finished: Finished, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "run"))
    before = Store.open(root).resolve("generator/best").oid
    said: list[str] = []
    made = sidactl.distill(
        teacher="tiny-digits", mode="sida", run=root, device="cpu", say=said.append, evaluate_by="mind", **SHORT
    )
    assert Store.open(root).resolve("generator/best").oid == before != made.oid
    assert any("generator/best stays" in line and "does not compare with this run" in line for line in said)


def test_few_images_do_and_what_was_stored_before_keeps_its_name() -> None:
    recipe = catalog.TEACHERS["tiny-digits"].recipes["sida"]
    assert "evaluate_by" not in recipe.to_json()
    assert override(recipe, {"evaluate_by": "fid"}) == recipe
    for metric in ("mind", "kid"):
        changed = override(recipe, {"evaluate_by": metric})
        assert (changed.evaluate_num, recipe.evaluate_num) == (5_000, 10_000)
        assert Recipe.from_json(changed.to_json()) == changed != recipe
    assert override(recipe, {"evaluate_by": "mind", "evaluate_num": 7_000}).evaluate_num == 7_000


def test_statistics_are_no_images_to_compare_with(tmp_path: Path) -> None:
    path = tmp_path / "moments.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(SidaError) as caught:
        planned(tmp_path / "run", reference=str(path), detector="inception", overrides={"evaluate_by": "mind"})
    assert (str(caught.value), caught.value.exit_code) == (
        f"--evaluate-by mind compares with real images, the reference {path} is statistics. "
        "Pass --ref dataset/NAME or a folder of images, or --evaluate-by fid.",
        2,
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"evaluate_by": "is"}, "evaluate_by must be one of fid, mind, kid, got 'is'. Pass another --evaluate-by."),
        (
            {"evaluate_by": "mind", "score": False},
            "--evaluate-by is for runs that are scored, this one is not. Leave it out.",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fresh_run: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, **options)
    assert str(caught.value) == told
