"""Distillations of guided teachers: trained, gone on with, refused."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sidactl
from sidactl import catalog, cli
from sidactl.commands import running
from sidactl.errors import SidaError
from sidactl.nets.guided import Guided
from sidactl.recipes import Execution, Memory, Recipe, names_of, override
from sidactl.store import Artifact, Store
from sidactl.training import made_up
from tests.conftest import SHORT, Forbid
from tests.processes import told


@pytest.fixture(scope="module")
def started(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a weaker teacher, and one without classes; to be copied."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("guided") / "run"))
    for name, more in (("weak", {"label_dropout": 0.25}), ("uncond", {"label_dim": 0})):
        options: dict[str, Any] = {"model_channels": 16, "duration_nimg": 256, "batch_size": 64}
        sidactl.train_teacher("tiny-digits", name=name, run=root, say=None, **(options | more))
    return root


def short(run: Path, mode: str = "sid", **overrides: Any) -> Artifact:
    options = {name: value for name, value in SHORT.items() if name in names_of(mode)}
    options |= {"teacher_score": "none", "say": None, "device": "cpu", "run": run} | overrides
    return sidactl.distill(teacher="tiny-digits", mode=mode, **options)


CASES: list[Any] = [
    ("sid", {"guide": "teacher/weak", "teacher_guidance": 1.5, "guidance_interval": (0.1, 3.0)}),
    pytest.param("sida", {"teacher_guidance": 2.0, "score_guidance": 2.0}, marks=pytest.mark.slow),
    pytest.param(
        "dmd2", {"guide": "teacher/weak", "teacher_guidance": 1.5, "score_guidance": 1.5}, marks=pytest.mark.slow
    ),
    pytest.param(
        "sid", {"guide": "teacher/weak", "teacher_guidance": 1.5, "precision": "bf16"}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("mode", "options"), CASES)
def test_a_guided_run_goes_on_to_the_same_bits(
    mode: str, options: dict[str, Any], started: Path, tmp_path: Path
) -> None:
    runs = [Path(shutil.copytree(started, tmp_path / name)) for name in ("whole", "stopped")]
    whole = short(runs[0], mode, **options)
    assert Recipe.from_json(whole.params["recipe"]).to_json()["teacher_guidance"] == options["teacher_guidance"]
    assert ("guide" in whole.inputs) == ("guide" in options)

    def stop(event: Any) -> None:
        if event.kind == "checkpoint" and event.nimg == 48:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SidaError, match="interrupted at"):
        short(runs[1], mode, **options, checkpoint_every_nimg=48, watch=stop)
    assert short(runs[1], mode, **options).oid == whole.oid


@pytest.mark.slow
def test_two_processes_train_a_guided_generator_as_one(started: Path, tmp_path: Path) -> None:
    words = ["distill", "--teacher", "tiny-digits", "--mode", "sida", "--teacher-score", "none"]
    words += ["--guide", "teacher/weak", "--teacher-guidance=1.5", "--score-guidance=1.5"]
    words += ["--duration=96", "--batch-size=32", "--num-accumulation-rounds=4", "--generator-from=0"]
    words += ["--adversarial-from=32", "--evaluate-every=96", "--evaluate-num=64"]
    found = [told(n, Path(shutil.copytree(started, tmp_path / str(n))), *words) for n in (1, 2)]
    assert found[0] == found[1]


def test_a_guide_is_named_by_the_generator_and_shapes_it(started: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    plain, guided = short(run), short(run, guide="teacher/weak", teacher_guidance=1.5)
    assert guided.inputs["guide"] == Store.open(run).resolve("teacher/weak").oid
    assert plain.oid != guided.oid
    assert "teacher_guidance" not in plain.params["recipe"]


def test_edm2_with_its_uncertainty_head_is_guided_too() -> None:
    spec = catalog.TEACHERS["edm2-xs"].net
    small = {
        "img_resolution": 8,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    }
    net = type(spec).from_json(spec.to_json() | small | {"label_dim": 4})
    recipe = override(catalog.recipe_for("edm2-xs", "sida"), {
        "batch_size": 4, "num_accumulation_rounds": 1, "teacher_guidance": 1.4, "score_guidance": 1.4, "dropout": 0.0,
        "precision": "fp32", "generator_from_nimg": 0, "adversarial_from_nimg": 0,
    })  # fmt: skip
    run = made_up.distillation_of(recipe, Execution(), net, torch.device("cpu"))
    nets = run._nets("generator", None)
    assert isinstance(nets.teacher, Guided)
    assert isinstance(nets.fake_score, Guided)
    before = [parameter.clone() for parameter in run.generator.parameters()]
    run.step()  # of the output gain, which is 0 at first
    losses = run.step()
    assert all(bool(value.isfinite().all()) for value in losses.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, run.generator.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "teacher/weak"}, "guide teacher/weak counts for nothing with --teacher-guidance 1"),
        ({"guide": "nothere", "teacher_guidance": 2.0}, "no ref"),
        ({"guide": "edm2-xs-uncond", "teacher_guidance": 2.0}, "the guide must fit the teacher"),
        ({"teacher": "teacher/uncond", "teacher_guidance": 2.0}, "--teacher-guidance needs classes"),
        ({"teacher": "teacher/uncond", "score_guidance": 2.0}, "--score-guidance needs classes"),
        ({"guidance_interval": (0.2, 3.0)}, "--guidance-interval counts for nothing with --teacher-guidance 1"),
        ({"teacher_guidance": 2.0, "guidance_interval": (3.0, 0.2)}, "guidance_interval must be two noise levels"),
        ({"teacher_guidance": 2.0, "guidance_interval": (3.0,)}, "guidance_interval must be two noise levels"),
        (
            {"teacher_guidance": 2.0, "guidance_interval": (0.2, float("inf"))},
            "guidance_interval must be two noise levels",
        ),
        ({"teacher_guidance": 2.0, "guidance_interval": (1e5, 1e6)}, "guidance_interval must be two noise levels"),
        ({"teacher_guidance": float("nan")}, "teacher_guidance must be from -1000 to 1000"),
        ({"guide": "tiny-digits", "teacher_guidance": 2.0}, "a teacher that is its own guide is not guided"),
        ({"mode": "dmd", "teacher_guidance": 2.0}, "--teacher-guidance is no setting of mode dmd"),
        (
            {"teacher": "edm2-s-guided", "guide": "edm2-xs-uncond", "teacher_guidance": 1.0},
            "guide edm2-xs-uncond counts for nothing with --teacher-guidance 1",
        ),
        ({"score_label_dropout": 0.2}, "--score-label-dropout counts for nothing with --score-guidance 1"),
        ({"score_guidance": 2.0, "score_label_dropout": 1.0}, "score_label_dropout must be"),
        ({"score_guidance": 2.0, "dropout": 0.1}, "dropout must be 0 with --score-guidance"),
        ({"mode": "ladd", "guide": "teacher/weak"}, "mode ladd takes no guide"),
        ({"mode": "ladd", "teacher_guidance": 2.0}, "--teacher-guidance is no setting of mode ladd"),
        (
            {"teacher": "edm2-s-guided"},
            "edm2-s-guided is for guided sampling, got no guide. Pass --guide edm2-xs-uncond",
        ),
    ],
)
def test_guidance_that_cannot_be_is_refused(
    options: dict[str, Any], message: str, started: Path, forbidden: Forbid
) -> None:
    words = {"teacher": "tiny-digits", "mode": "sid"} | options
    with forbidden(running.run_training), pytest.raises(SidaError) as error:
        sidactl.distill(run=started, **words)
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_a_teacher_that_guides_itself_untrained_is_told(started: Path) -> None:
    words = ["distill", "--mode", "sid", "--dry-run", "--teacher-guidance", "1.5", "--run", str(started)]
    done = CliRunner().invoke(cli.app, [*words, "--teacher", "tiny-digits"])
    assert "guides itself by what it draws without labels, which it was not trained to do" in done.stderr
    trained = CliRunner().invoke(cli.app, [*words, "--teacher", "teacher/weak"])
    assert trained.exit_code == 0
    assert "guides itself" not in trained.stderr


def test_the_published_pair_of_edm2_comes_with_its_guidance(tmp_path: Path) -> None:
    words = ["distill", "--teacher", "edm2-s-guided", "--mode", "sida", "--guide", "edm2-xs-uncond", "--dry-run"]
    done = CliRunner().invoke(cli.app, [*words, "--run", str(tmp_path)])
    assert done.exit_code == 0
    assert "guided by edm2-xs-uncond, with the published guidance, 1.4" in done.stderr
    assert '"teacher_guidance": 1.4' in done.stdout
    assert '"guide": "edm2-xs-uncond"' in done.stdout


def test_a_guide_counts_in_the_memory_estimate() -> None:
    recipe, net = catalog.recipe_for("edm2-s", "sid"), catalog.TEACHERS["edm2-s"].net
    plain = Memory.of(recipe, net, 280_000_000)
    guided = Memory.of(override(recipe, {"teacher_guidance": 1.4}), net, 280_000_000, guide_parameters=125_000_000)
    assert guided.state_bytes - plain.state_bytes == 4 * 125_000_000
    assert guided.activation_bytes > plain.activation_bytes


@pytest.mark.parametrize(
    "flags",
    [
        ["--teacher-guidance=2"],
        ["--steps=2"],
        ["--steps=2", "--teacher-guidance=2", "--score-guidance=2", "--dropout=0"],
    ],
)
def test_the_published_pace_is_not_that_of_guided_teachers_or_several_steps(flags: list[str], tmp_path: Path) -> None:
    words = ["distill", "--teacher", "edm-cifar10-cond", "--mode", "sida", "--dry-run", "--run", str(tmp_path)]
    plain, other = (json.loads(CliRunner().invoke(cli.app, [*words, *more]).stdout) for more in ([], flags))
    assert plain["estimate"]["hours"] > 0
    assert other["estimate"]["hours"] is None
