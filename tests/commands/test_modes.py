"""Every method through `distill`: it trains, goes on to the same bits, and says what it needs."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sidactl
from sidactl import catalog, cli, detectors, sampling
from sidactl.commands import export, plan, running
from sidactl.commands import pairs as commands_pairs
from sidactl.errors import SidaError
from sidactl.foreign import perceptual
from sidactl.methods.base import TrainingDetector
from sidactl.methods.dmd import Matching
from sidactl.noise import sigma_of_time
from sidactl.recipes import (
    FROM_GENERATOR,
    MODES,
    SID_MODES,
    Execution,
    MatchingRecipe,
    Memory,
    Recipe,
    flag_of,
    names_of,
    override,
)
from sidactl.store import Artifact, Store
from sidactl.training import made_up
from sidactl.training.distillation import Distillation
from tests.commands.conftest import refs
from tests.conftest import SHORT, Forbid
from tests.golden import golden_objectives
from tests.processes import told

FURTHER = [mode for mode in MODES if mode not in SID_MODES]


def quick_ones(*quick: str) -> list[Any]:
    """All further modes; those that stand for the others' ways alone are not slow."""
    return [mode if mode in quick else pytest.param(mode, marks=pytest.mark.slow) for mode in FURTHER]


def short(mode: str, run: Path, **overrides: Any) -> Artifact:
    options = {name: value for name, value in SHORT.items() if name in names_of(mode)} | {"device": "cpu"}
    if mode in FROM_GENERATOR:
        options["generator"] = "generator/tiny-digits-diff-instruct"
    if "generator_every" in names_of(mode) and mode != "diff-instruct":
        options["generator_every"] = 2
    if mode == "dmd":
        options["num_pairs"] = 40
    return sidactl.distill(
        teacher="tiny-digits", mode=mode, run=run, teacher_score="none", **({"say": None} | options | overrides)
    )


@pytest.fixture(scope="module")
def started(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a generator to start from; to be copied."""
    root = tmp_path_factory.mktemp("modes") / "run"
    shutil.copytree(prepared, root)
    short("diff-instruct", root)
    return root


@pytest.mark.parametrize("mode", quick_ones("f-distill", "add", "fd-loss"))
def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(mode: str, started: Path, tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(started, tmp_path / name)) for name in ("whole", "stopped")]
    seed = {"seed": 7}  # the fixture's own run is of another
    whole = short(mode, runs[0], **seed)
    assert Recipe.from_json(whole.params["recipe"]).mode == mode

    def stop(event: Any) -> None:
        if event.kind == "checkpoint" and event.nimg == 48:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SidaError, match="interrupted at"):
        short(mode, runs[1], **seed, checkpoint_every_nimg=48, watch=stop)
    assert short(mode, runs[1], **seed).oid == whole.oid


@pytest.mark.parametrize("mode", quick_ones("f-distill", "diffusion-gan"))
def test_as_many_images_at_a_time_as_one_likes(mode: str, started: Path, tmp_path: Path) -> None:
    """Whole batches or micro-batches in turn: the same draws, and gradients up to the rounding of sums."""
    found = []
    for name, execution in (("apart", {}), ("joined", {"batch_per_device": 16})):
        run = Path(shutil.copytree(started, tmp_path / name))
        made = short(
            mode, run, seed=7, num_accumulation_rounds=2, duration_nimg=32, evaluate_every_nimg=32, **execution
        )
        found.append(made.results["selection_score"])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", FURTHER)
def test_two_processes_come_to_the_generator_of_one(mode: str, started: Path, tmp_path: Path) -> None:
    names = names_of(mode)
    numbers: dict[str, Any] = {name: value for name, value in SHORT.items() if name in names and value is not None}
    numbers |= {"batch_size": 32, "num_accumulation_rounds": 4, "num_pairs": 40, "generator_from_nimg": 0}
    words = ["distill", "--teacher", "tiny-digits", "--mode", mode, "--teacher-score", "none"]
    words += [f"{flag_of(name)}={value}" for name, value in numbers.items() if name in names]
    words += ["--generator", "generator/tiny-digits-diff-instruct"] if mode in FROM_GENERATOR else []
    found = []
    for num_processes in (1, 2):
        run = Path(shutil.copytree(started, tmp_path / str(num_processes)))
        found.append(told(num_processes, run, *words))
    assert found[0] == found[1]


def test_what_was_trained_on_a_detector_is_not_blind_to_it(started: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    made = short("add", run, discriminator_detector="random-features")
    assert made.results["trained_by"] == ["random-features"]
    score = sidactl.evaluate(made, ["fid"], detectors="random-features,tiny-digits-ssl", num=64, run=run)
    by = {n["detector"].partition("@")[0]: n["blind"] for n in score.to_json()["scores"].values()}
    assert by == {"random-features": False, "tiny-digits-ssl": True}


@pytest.mark.slow
def test_a_score_that_was_trained_on_is_won_under_its_detector_and_lost_under_a_blind_one(tmp_path: Path) -> None:
    """What blindness is for: half a minute of FD-loss after one of SiD."""
    options: dict[str, Any] = {"evaluate_num": 1000, "teacher_score": "none", "say": None, "run": tmp_path}
    honest = sidactl.distill(teacher="tiny-digits", mode="sid", duration="20k", **options)
    more = options | {"duration": "10k", "evaluate_every": "10k"}
    bought = sidactl.distill(teacher="tiny-digits", mode="fd-loss", generator=honest, **more)
    last = Store.open(tmp_path).resolve("generator/last")
    assert bought.inputs["generator"] == honest.oid
    scores = [
        sidactl.evaluate(net, ["fid"], detectors="tiny-digits,random-features", num=5000, run=tmp_path, say=None)
        for net in (honest, last)
    ]
    (own, blind), (own_after, blind_after) = (
        [score.values[name][0] for name in ("FD tiny-digits", "random-features FD")] for score in scores
    )
    assert own_after < 0.8 * own
    assert blind_after > blind
    assert set(scores[1].seen) == {"FD tiny-digits"}


def test_add_is_sampled_at_the_levels_that_it_was_trained_at(started: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    made = short("add", run)
    assert made.params["sampler"]["levels"][0] == made.params["sampler"]["sigma_init"] == 80
    one, four = (sidactl.sample(made, num=4, steps=steps, run=run).oid for steps in (1, 4))
    assert one != four
    with pytest.raises(SidaError, match=r"num_steps must be at most 4"):
        sidactl.sample(made, num=4, steps=5, run=run)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("fd-loss", {}, "mode fd-loss starts from a generator, got none"),
        ("dmd2", {"f_divergence": "made-up"}, "f_divergence must be one of"),
        ("dmd2", {"f_divergence": "forward-kl"}, "discriminator_time must be shared"),
        ("diff-instruct", {"f_divergence": "forward-kl"}, "where no discriminator tells density ratios"),
        ("dmd2", {"discriminator_features": "detector"}, "none, fake-score or teacher in mode dmd2"),
        ("dmd2", {"lambda_sid": 1.0}, "--lambda-sid is no setting of mode dmd2, but of sid, sida, sid2a"),
        ("dmd2", {"generator_time": "uniform:3"}, "generator_time must be uniform:A,B"),
        ("dmd2", {"generator_every": 0}, "generator_every must be at least 1"),
        ("add", {"distillation_weight": "nfsd"}, "nfsd needs a negative condition"),
        ("add", {"discriminator_features": "none"}, "teacher or detector in mode add"),
        ("add", {"discriminator_detector": "inception"}, "heads see the maps of dinov2"),
        ("add", {"student_times": (0.5, 1.0)}, "student_times must be falling from 1"),
        ("ladd", {"discriminator_time": "none"}, "noisy images where the teacher's features are seen"),
        ("ladd", {"batch_size": 24}, "heads normalise 8 images together"),
        ("dmd", {"num_pairs": 0}, "num_pairs must be at least 1"),
        ("dmd", {"dropout": 0.1}, "dropout must be 0 in mode dmd"),
        ("dmd", {"discriminator_features": "teacher"}, "--discriminator-features is no setting of mode dmd, but of"),
        ("dmd", {"lambda_reg": 0.0}, "lambda_reg must be positive"),
        ("diffusion-gan", {"augment_p": 0.9}, "--augment-p is no setting of mode diffusion-gan, but of"),
        ("diffusion-gan", {"teacher_guidance": 2.0}, "--teacher-guidance is no setting of mode diffusion-gan"),
        ("diffusion-gan", {"sign_target": 5.0}, "sign_target must be from -1 to 1"),
        ("diffusion-gan", {"adapt_kimg": float("inf")}, "adapt_kimg must be positive and finite"),
        ("dmd2", {"clip_gradient_norm": float("inf")}, "clip_gradient_norm must be positive and finite, or none"),
        ("dmd2", {"direction_dropout": True}, "--direction-dropout counts for nothing with --dropout 0"),
        ("dmd2", {"generator_time": "lognormal:500,1"}, "generator_time must be uniform:A,B"),
        ("dmd2", {"discriminator_maps": 1}, "nothing with --discriminator-features fake-score"),
        ("add", {"beta1": 1.5}, "beta1 must be in [0, 1)"),
        ("add", {"lambda_adv": 0.0, "lambda_distill": 0.0}, "above 0 with --lambda-distill 0, or nothing is trained"),
        ("ladd", {"lambda_adv": 0.0}, "above 0 with --lambda-distill 0, or nothing is trained"),
        ("add", {"sigma_init": 1.0}, "sigma_init must be above the noise level of the second of student_times"),
        ("add", {"discriminator_detector": ""}, "heads see the maps of dinov2"),
        ("dmd", {"regression": "psnr"}, "regression must be one of mse, lpips"),
        ("dmd2", {"num_pairs": 5}, "--num-pairs is no setting of mode dmd2, but of dmd"),
        ("uni-instruct", {}, "--joint-weight 1"),
        ("diff-instruct", {"alpha": 7.0}, "--alpha counts for nothing with --direction kl"),
        ("diff-instruct", {"direction": "sid", "generator_weight": "one"}, "counts for nothing with --direction sid"),
        (
            "dmd2",
            {"discriminator_features": "none", "discriminator_scale": 5.0},
            "--discriminator-scale counts for nothing with --discriminator-features none",
        ),
        ("f-distill", {"f_divergence": "reverse-kl", "ratio_rate": 0.5}, "nothing with --f-divergence reverse-kl"),
        ("dmd2-fastgen", {"share": "images"}, "--share counts for nothing with --alternate"),
        ("dmd2-fastgen", {"generator_every": 1}, "generator_every must be at least 2 with --alternate"),
        ("ladd", {"distillation_weight": "sds"}, "nothing with --lambda-distill 0"),
    ],
)
def test_what_does_not_fit_a_mode_is_refused(
    mode: str, options: dict[str, Any], message: str, tmp_path: Path, forbidden: Forbid
) -> None:
    with forbidden(running.run_training), pytest.raises(SidaError) as caught:
        sidactl.distill(teacher="tiny-digits", mode=mode, run=tmp_path / "run", **options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run" / "objects").exists() or not list((tmp_path / "run" / "live").glob("*"))


def test_dmd_trains_on_what_the_teachers_ode_draws_of_seeds_apart(
    started: Path, tmp_path: Path, forbidden: Forbid
) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    made = short("dmd", run)
    store = Store.open(run)
    pairs = store.get(made.inputs["pairs"])
    teacher = store.get(made.inputs["teacher"])
    assert pairs.inputs["net"] == teacher.oid
    assert (pairs.params["seeds"], pairs.params["sampler"]["S_churn"]) == ({"first": 3 << 30, "count": 40}, 0.0)
    assert Recipe.from_json(made.params["recipe"]).needs == "pairs"
    source = commands_pairs.pair_source(store, teacher, pairs, torch.device("cpu"))
    noise, labels, images = source.pairs(torch.tensor([3, 39, 3]))
    spec = commands_pairs.ode_of(teacher)
    net = sidactl.load(teacher.oid, run)
    drawn = sampling.heun(net, noise, labels, spec, sampling.SeededNoise([0, 0, 0], torch.device("cpu")))
    assert bool(((drawn.clamp(-1, 1) - images).abs() <= 1.01 / 127.5).all())
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    with forbidden(sampling.heun):  # another run regresses on the same pairs
        assert short("dmd", run, seed=1).inputs["pairs"] == pairs.oid


def test_a_distance_that_is_not_installed_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SidaError, match=r"lpips and torchvision, which are not installed"):
        sidactl.distill(teacher="tiny-digits", mode="dmd", regression="lpips", run=tmp_path / "run")


def test_lpips_sees_grey_images_in_three_channels_at_224_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("vgg", False)

        def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            assert images.shape == others.shape == (2, 3, 224, 224)
            return (images - others).square().mean(dim=(1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS = Net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(perceptual, "check_lpips", lambda: None)
    images = torch.zeros(2, 1, 8, 8, requires_grad=True)
    found = perceptual.lpips_distance(torch.device("cpu"))(images, torch.ones(2, 1, 8, 8))
    torch.testing.assert_close(found, torch.ones(2))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert bool((gradient < 0).all())


def test_fd_loss_by_its_own_detector_is_no_best(started: Path, tmp_path: Path) -> None:
    run, lines = Path(shutil.copytree(started, tmp_path / "run")), list[str]()
    before = refs(run)["generator/best"]
    made = short("fd-loss", run, say=lines.append)
    assert refs(run)["generator/best"] == before != made.oid
    assert refs(run)["generator/best-tiny-digits-trained-on-it"] == made.oid
    assert any("tiny-digits trained this generator and scores it" in line for line in lines)
    card = export.model_card(Store.open(run), made, "files", "model.safetensors")
    assert "trained on the features of tiny-digits: scores by them are no claim" in card


def test_a_card_of_add_says_that_no_code_of_it_is_published(started: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    card = export.model_card(Store.open(run), short("add", run), "files", "model.safetensors")
    assert "- no training code of ADD is published: its scores are ours" in card
    assert "- trained on the features of tiny-digits-ssl: scores by them are no claim" in card


def test_fd_loss_without_images_or_statistics_is_refused_by_the_plan(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    classes = sidactl.prepare_data(None, classes=10, run=run)
    generator = "generator/tiny-digits-diff-instruct"
    words = ["distill", "--teacher", "tiny-digits", "--mode", "fd-loss", "--generator", generator, "--no-score"]
    with pytest.raises(SystemExit) as error:
        cli.main([*words, "--dataset", classes.oid, "--dry-run", "--run", str(run)])
    assert error.value.code == 2
    assert "on classes alone" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["f-distill", "fd-loss"])
def test_what_is_not_finite_in_one_step_is_forgotten_in_the_next(
    mode: Any, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = catalog.recipe_for("tiny-digits", mode)
    recipe = dataclasses.replace(recipe, batch_size=4, num_accumulation_rounds=1, generator_from_nimg=None)
    found = detectors.load("tiny-digits")
    moments = torch.zeros(64, dtype=torch.float64), torch.eye(64, dtype=torch.float64)
    trained_on = TrainingDetector(found.differentiable, found.differentiable_maps, found.widths, *moments)
    net = sidactl.load("tiny-digits", started)
    batches = made_up.batches_of(recipe, net.spec, torch.device("cpu"))
    run = Distillation(recipe, net, None, batches, trained_on=trained_on if mode == "fd-loss" else None)
    generate = run.method.generate
    monkeypatch.setattr(run.method, "generate", lambda *seen: generate(*seen) * torch.nan)
    run.step()
    monkeypatch.setattr(run.method, "generate", generate)
    assert run.skipped.total["generator"] == 1
    for _ in range(5):
        run.step()
    assert run.skipped.total["generator"] == 1
    assert all(bool(buffer.isfinite().all()) for buffer in run.method.buffers())


@pytest.mark.parametrize("mode", MODES)
def test_each_modes_help_has_an_example_of_its_own(mode: str) -> None:
    shown = CliRunner().invoke(cli.app, ["distill", "--mode", mode, "--help"]).output
    (example,) = (line for line in shown.splitlines() if "Example: sidactl distill" in line)
    assert f"--mode {mode} " in example
    assert ("--generator" in example) == (mode in FROM_GENERATOR)


def test_dmds_noise_levels_are_those_that_were_recorded() -> None:
    arrays = np.load(golden_objectives("dmd.npz"))
    recipe = catalog.recipe_for("tiny-digits", "dmd")
    table = torch.from_numpy(arrays["sigmas_descending_with_zero"]).flip(0)[1:]
    assert recipe.sigma_init == pytest.approx(float(arrays["generator_sigma"].flat[0]), abs=5e-3)
    assert recipe.sigma_init == pytest.approx(float(table[998]), abs=5e-3)
    assert isinstance(recipe, MatchingRecipe)
    # Times 20 to 979 and 1 to 999 of a table whose first level is 0.
    assert (recipe.generator_time, recipe.score_time) == ("grid:19,978", "grid:0,998")
    torch.testing.assert_close(table.float(), sigma_of_time(torch.arange(1000) / 999), rtol=1e-4, atol=0)


def test_fastgens_imagenet_run_has_one_head_and_passes_of_its_own() -> None:
    recipe, spec = catalog.recipe_for("edm-imagenet64", "f-distill"), catalog.TEACHERS["edm-imagenet64"].net
    assert isinstance(recipe, MatchingRecipe)
    assert (recipe.discriminator_maps, recipe.batch_size // recipe.num_accumulation_rounds) == (1, 32)
    small = dataclasses.replace(spec, model_channels=16)
    for maps, num_heads in ((1, 1), (0, 4)):
        with torch.device("meta"):
            method = Matching(dataclasses.replace(recipe, discriminator_maps=maps), small)
        assert method.heads
        assert len(method.heads.heads) == num_heads


def test_latents_have_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(SidaError, match=r"edm2-s draws latents.*--mode dmd2"):
        sidactl.distill(teacher="edm2-s", mode="dmd", run=tmp_path / "run")


def test_latents_are_not_what_a_detector_sees(tmp_path: Path) -> None:
    with pytest.raises(SidaError, match=r"edm2-s draws latents.*--mode ladd"):
        sidactl.distill(teacher="edm2-s", mode="add", run=tmp_path / "run")


def test_numbers_are_the_published_runs_or_said_not_to_be() -> None:
    dmd2 = catalog.recipe_for("edm-imagenet64", "dmd2").to_json()
    assert (dmd2["batch_size"], dmd2["duration_nimg"], dmd2["lr_warmup_nimg"]) == (280, 56_000_000, 140_000)
    assert (dmd2["generator_lr"], dmd2["precision"], dmd2["ema_halflife_nimg"]) == (2e-6, "bf16", 0)
    fastgen = catalog.recipe_for("edm-cifar10-cond", "f-distill").to_json()
    assert (fastgen["f_divergence"], fastgen["batch_size"], fastgen["generator_lr"]) == ("forward-kl", 2048, 1e-4)
    assert 0.5 ** (2048 / fastgen["ema_halflife_nimg"]) == pytest.approx(0.9999, abs=1e-9)
    assert catalog.recipe_for("edm-imagenet64", "f-distill").to_json()["f_divergence"] == "jensen-shannon"
    assert catalog.published_run("dmd2", "edm-imagenet64")
    assert not catalog.published_run("dmd2", "edm-cifar10-cond")
    for mode in MODES:
        for teacher in ("tiny-digits", "edm-ffhq64", "edm2-xs"):
            recipe = catalog.recipe_for(teacher, mode)
            assert Recipe.from_json(recipe.to_json()) == recipe


def test_memory_is_asked_for_what_a_method_holds() -> None:
    """Against SiD: no fake score is two moments and a network less, no way back through two networks two graphs."""
    estimates = {
        mode: Memory.of(catalog.recipe_for("edm-cifar10-cond", mode), TEACHER.net, 1_000_000, FOUR_AT_ONCE)
        for mode in MODES
    }
    sid = estimates["sid"]
    assert {m: round(e.state_bytes / 4e6) for m, e in estimates.items()} == {
        mode: 5 if mode in ("add", "ladd", "fd-loss") else 8 for mode in MODES
    }
    assert estimates["diff-instruct"].activation_bytes < 0.4 * sid.activation_bytes
    assert 0.55 * sid.activation_bytes < estimates["dmd2"].activation_bytes < 0.7 * sid.activation_bytes


TEACHER = catalog.TEACHERS["edm-cifar10-cond"]
FOUR_AT_ONCE = Execution(batch_per_device=4)


def test_add_is_planned_beside_statistics_that_are_not_by_its_detector(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "run")
    planned = plan.plan(teacher="edm-cifar10-cond", mode="add", generator=None, dataset=None, store=store, overrides={})
    assert planned.scoring
    assert planned.scoring.detector == "inception"
    assert any("dinov2" in need.what for need in planned.needs)


def test_levels_of_the_student_are_numbers_on_the_command_line(tmp_path: Path) -> None:
    words = ["distill", "--teacher", "tiny-digits", "--mode", "add", "--dry-run", "--run", str(tmp_path / "run")]
    done = CliRunner().invoke(cli.app, [*words, "--student-times", "1,0.5"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"]["student_times"] == [1.0, 0.5]


def test_a_generator_that_is_stepped_once_is_told_of(tmp_path: Path) -> None:
    recipe = override(catalog.recipe_for("tiny-digits", "dmd2"), {"generator_every": 100_000})
    assert "the generator is stepped once: in one of 100,000 steps" in recipe.unusual()[0]
