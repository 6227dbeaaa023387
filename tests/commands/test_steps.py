"""Generators of several steps through the commands: trained, gone on with, sampled, scored, started from."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import sidactl
from sidactl import sampling
from sidactl.commands import plan
from sidactl.errors import SidaError
from sidactl.recipes import OneStepSpec, Recipe, names_of
from sidactl.store import Artifact, Store
from tests.conftest import SHORT, Finished
from tests.processes import told


def planned(mode: str, run: Path, generator: str, **overrides: Any) -> Recipe:
    words: dict[str, Any] = {"dataset": None, "overrides": overrides}
    return plan.plan(teacher="tiny-digits", mode=mode, generator=generator, store=Store.open(run), **words).recipe


def short(run: Path, mode: str = "sida", **overrides: Any) -> Artifact:
    options = {name: value for name, value in SHORT.items() if name in names_of(mode)}
    options |= {"teacher_score": "none", "say": None, "device": "cpu", "run": run, "steps": 3} | overrides
    return sidactl.distill(teacher="tiny-digits", mode=mode, **options)


@pytest.fixture(scope="module")
def started(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a generator of three steps; to be copied."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("steps") / "run"))
    short(root, "sid")
    return root


def test_a_generator_keeps_its_steps_and_is_sampled_and_scored_by_them(started: Path) -> None:
    generator = sidactl.show("generator/latest", run=started).artifact
    sampler = OneStepSpec.from_json(generator.params["sampler"])
    assert (sampler.num_steps, sampler.nfe) == (3, 3)
    drawn = sidactl.sample("generator/latest", num=4, run=started)
    assert drawn.artifact.results["nfe"] == 3
    net = sidactl.load("generator/latest", run=started)
    with torch.no_grad():
        images, _ = sampling.sample_batch(net, sampler, range(4), torch.device("cpu"))
    expected = (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (drawn.images == expected).all()
    of_net = sidactl.fid("generator/latest", num=40, run=started)
    of_samples = sidactl.fid(sidactl.sample("generator/latest", num=40, run=started), run=started)
    assert of_net.value == pytest.approx(of_samples.value, rel=1e-6)


def test_other_steps_than_those_that_were_trained_are_told(started: Path, finished: Finished) -> None:
    lines: list[str] = []
    sidactl.sample("generator/latest", num=5, steps=3, run=started, say=lines.append)
    assert lines == []
    sidactl.sample("generator/latest", num=4, steps=2, run=started, say=lines.append)
    assert "tiny-digits-sid was trained for 3 steps, not for 2" in lines[0]
    score = sidactl.fid("generator/best", num=40, steps=4, run=finished.root)
    assert any("was trained for one step, not for 4" in warning for warning in score.warnings)


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("diff-instruct", {"step_noise": "ddim"}),
        pytest.param("sida", {}, marks=pytest.mark.slow),
        pytest.param("sida", {"step_graphs": "all", "share_fakes": True}, marks=pytest.mark.slow),
        pytest.param("dmd2", {"step_noise": "fixed"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_of_several_steps_goes_on_to_the_same_bits(
    mode: str, more: dict[str, Any], started: Path, tmp_path: Path
) -> None:
    runs = [Path(shutil.copytree(started, tmp_path / name)) for name in ("whole", "stopped")]
    whole = short(runs[0], mode, seed=7, **more)

    def stop(event: Any) -> None:
        if event.kind == "checkpoint" and event.nimg == 48:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SidaError, match="interrupted at"):
        short(runs[1], mode, seed=7, **more, checkpoint_every_nimg=48, watch=stop)
    assert short(runs[1], mode, seed=7, **more).oid == whole.oid


@pytest.mark.slow
def test_two_processes_train_several_steps_as_one(started: Path, tmp_path: Path) -> None:
    words = ["distill", "--teacher", "tiny-digits", "--mode", "sida", "--teacher-score", "none", "--steps", "3"]
    words += ["--duration=96", "--batch-size=32", "--num-accumulation-rounds=4", "--generator-from=0"]
    words += ["--adversarial-from=32", "--evaluate-every=96", "--evaluate-num=64"]
    found = [told(n, Path(shutil.copytree(started, tmp_path / str(n))), *words) for n in (1, 2)]
    assert found[0] == found[1]


def test_what_starts_from_a_generator_has_its_steps(started: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    options = SHORT | {
        "teacher_score": "none",
        "say": None,
        "device": "cpu",
        "duration_nimg": 48,
        "adversarial_from_nimg": 0,
    }
    tuned = sidactl.finetune_sid2a(teacher="tiny-digits", generator="generator/latest", run=run, **options)
    assert Recipe.from_json(tuned.params["recipe"]).sampler().num_steps == 3
    plan_of = partial(planned, "sid2a", run, "generator/latest")
    assert plan_of(sigma_init=3.0).sampler().num_steps == 3
    assert plan_of(step_noise="ddim").sampler().noise == "ddim"
    assert plan_of(steps=2).sampler().num_steps == 2
    with pytest.raises(SidaError, match=r"^mode fd-loss trains generators of one step, got one of 3"):
        sidactl.distill(teacher="tiny-digits", mode="fd-loss", generator="generator/latest", sigma_init=2.5, run=run)
    with pytest.raises(SidaError, match=r"^mode fd-loss trains generators of one step, got one of 3"):
        sidactl.distill(teacher="tiny-digits", mode="fd-loss", generator="generator/latest", run=run)
