import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl import catalog, methods, nets
from sidactl.data.codec import decode_affine
from sidactl.engine import configure
from sidactl.engine import gradients as engine_gradients
from sidactl.engine import threads as engine_threads
from sidactl.errors import SidaError
from sidactl.methods import base, score_losses
from sidactl.methods import sid as methods_sid
from sidactl.nets import edm2
from sidactl.nets.denoiser import _channel_mean
from sidactl.recipes import Adversarial, Execution, NetSpec, SamplingForm, TeacherRecipe
from sidactl.store import Store
from sidactl.training import batches as training_batches
from sidactl.training import distillation as training_distillation
from sidactl.training import loop, updates
from sidactl.training import pretraining as training_pretraining
from sidactl.training import state as training_state
from tests.conftest import Forbid, instead_of
from tests.golden import golden
from tests.playback import Playback
from tests.worlds import (
    RECIPE,
    TINY,
    TINY_EDM2,
    InOrder,
    MadeUp,
    MadeUpLatents,
    compute_gradients,
    distillation,
    gradients_of,
    weights,
)


def test_ema_follows_the_golden_table_of_decays() -> None:
    for row in json.loads(golden("trajectory/ema_beta.json").read_text()):
        ema, net = (torch.nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2))
        torch.nn.init.ones_(ema.weight)
        torch.nn.init.zeros_(net.weight)
        updates.update_ema(
            ema,
            net,
            halflife_nimg=round(row["ema_halflife_kimg"] * 1000),
            rampup_ratio=row["ema_rampup_ratio"],
            nimg=row["cur_nimg_before_increment"],
            batch_size=row["batch_size"],
        )
        assert ema.weight.item() == pytest.approx(row["ema_beta"], rel=1e-9, abs=1e-12)


def test_stages_follow_the_images_seen_strictly() -> None:
    run = distillation()
    stages = []
    for _ in range(6):
        stages.append((run.nimg, run.stage(), sorted(run.step())))
    alone = ["discriminator_loss", "fake_score_loss"]
    sid = [*alone, "generator_sid_loss"]
    sida = [*alone, "generator_adversarial_loss", "generator_sid_loss"]
    assert stages == [
        (0, "fake score", alone),
        (8, "fake score", alone),
        (16, "fake score", alone),
        (24, "SiD", sid),
        (32, "SiD", sid),
        (40, "SiDA", sida),
    ]


def test_generator_is_not_touched_while_the_fake_score_trains_alone(forbidden: Forbid) -> None:
    run = distillation()
    before = weights(run.generator)
    with forbidden(methods.sid_generator_loss):
        run.step()
    assert torch.equal(weights(run.generator), before)
    assert all(p.grad is None for p in run.generator.parameters())
    states = run.modules()["generator_optimizer"].state_dict()["state"].values()
    assert states
    assert all(not tensor.any() for state in states for tensor in state.values())


def test_adversarial_pass_is_not_computed_before_it_counts(forbidden: Forbid) -> None:
    run = distillation(generator_from_nimg=None)
    with forbidden(methods.adversarial_generator_loss):
        run.step()
        run.nimg = 33
        with pytest.raises(pytest.fail.Exception):
            run.step()


def test_mode_sid_has_no_discriminator_and_no_gate() -> None:
    run = distillation(mode="sid", adversarial=None, generator_from_nimg=None)
    assert sorted(run.step()) == ["fake_score_loss", "generator_sid_loss"]


def test_fake_score_equal_to_the_teacher_gives_zero_generator_loss() -> None:
    run = distillation(fake_score_lr=1e-30, generator_from_nimg=None)
    assert float(run.step()["generator_sid_loss"]) == 0.0


def test_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    runs = [distillation(seed=seed) for seed in (5, 5, 6)]
    for run in runs:
        for _ in range(5):
            run.step()
    first, second, other = (weights(run.generator) for run in runs)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_dropout_masks_depend_on_position_and_leave_the_global_state_alone() -> None:
    state = torch.random.get_rng_state()
    runs = [distillation(dropout=0.2, generator_from_nimg=None) for _ in range(2)]
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    for run in runs:
        run.step()
        run.step()
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(runs[0].generator), weights(runs[1].generator))
    without = distillation(dropout=0.0, generator_from_nimg=None)
    without.step()
    without.step()
    assert not torch.equal(weights(runs[0].generator), weights(without.generator))
    torch.random.set_rng_state(state)


def test_micro_batches_depend_on_their_position_alone() -> None:
    def source() -> training_batches.DatasetBatches:
        return training_batches.DatasetBatches(
            MadeUp(), InOrder(), batch_size=8, num_rounds=2, seed=1, device=torch.device("cpu")
        )

    first, again, other = source().get(3, 1), source().get(3, 1), source().get(3, 0)
    assert torch.equal(source().images(3, 1), source().images(3, 1))
    assert torch.equal(first.latent.normal((4, 2)), again.latent.normal((4, 2)))
    assert not torch.equal(other.latent.normal((4, 2)), source().get(3, 1).latent.normal((4, 2)))
    streams = [first.latent, first.diffusion, first.augment]
    assert len({float(stream.normal((1,))) for stream in streams}) == 3


def test_two_rounds_without_adversarial_loss_add_up_to_one_large_batch() -> None:
    """Only the adversarial losses average over a micro-batch; with the same draws the others are plain sums."""

    class Fixed:
        def __init__(self, num_rounds: int) -> None:
            self._rounds = num_rounds

        def get(self, batch: int, round: int) -> training_batches.MicroBatch:
            generator = torch.Generator().manual_seed(batch)
            whole = {n: torch.randn(8, 1, 8, 8, generator=generator) for n in ("z", "noise")}
            level = torch.rand(8, 1, 1, 1, generator=generator)
            part = slice(round * 8 // self._rounds, (round + 1) * 8 // self._rounds)
            latent = Playback([whole["z"][part].numpy()])
            diffusion = Playback([level[part].numpy(), whole["noise"][part].numpy()])
            return training_batches.MicroBatch(
                torch.eye(10)[:8][part], latent, diffusion, latent, [0], lambda: pytest.fail("no images")
            )

    gradients = []
    for num_rounds in (1, 2):
        run = distillation(mode="sid", adversarial=None, num_accumulation_rounds=num_rounds)
        run._batches = Fixed(num_rounds)
        compute_gradients(run, "fake_score")
        gradients.append(torch.cat([p.grad.flatten() for p in run.fake_score.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def test_latents_are_drawn_anew_from_a_stream_of_their_own() -> None:
    def source(dataset: training_batches.ImageSource) -> training_batches.DatasetBatches:
        return training_batches.DatasetBatches(
            dataset, InOrder(), batch_size=40, num_rounds=1, seed=1, device=torch.device("cpu")
        )

    latents = source(MadeUpLatents())
    first, later = latents.images(0, 0), latents.images(1, 0)
    assert first.shape == (40, 4, 8, 8)
    assert torch.equal(first, source(MadeUpLatents()).images(0, 0))
    mean, std = MadeUpLatents().images(range(40)).chunk(2, dim=1)
    draws = [(decode_affine(x) - mean) / std.clamp(min=1e-3) for x in (first, later)]
    for draw in draws:
        assert float(draw[std > 1e-2].mean()) == pytest.approx(0, abs=0.05)
        assert float(draw[std > 1e-2].std()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(*draws)
    z = latents.get(0, 0).latent.normal(first.shape)
    assert float((draws[0] - z)[std > 1e-2].abs().mean()) > 0.5, "noise of the real latents is not the generator's"
    pixels = source(MadeUp()).get(0, 0)
    assert torch.equal(latents.get(0, 0).latent.normal((8,)), pixels.latent.normal((8,)))


def test_classes_alone_are_enough_for_mode_sid_and_not_for_the_others() -> None:
    classes = training_batches.ClassesAlone(10)
    run = distillation(TINY_EDM2, classes, mode="sid", adversarial=None, generator_from_nimg=None)
    stats = run.step()
    assert sorted(stats) == ["fake_score_loss", "generator_sid_loss"]
    assert all(bool(loss.isfinite().all()) for loss in stats.values())
    with pytest.raises(SidaError) as error:
        distillation(TINY_EDM2, classes).step()
    assert str(error.value) == "this mode needs real images, got classes alone. Pass --dataset REF."


@pytest.mark.parametrize(("label_dim", "num_images"), [(3, 3), (0, 1)])
def test_classes_alone_hold_every_class_once(label_dim: int, num_images: int) -> None:
    classes = training_batches.ClassesAlone(label_dim)
    assert classes.num_images == num_images
    one_hot = classes.one_hot([0] * 2)
    assert one_hot.shape == (2, label_dim)
    assert torch.equal(classes.one_hot(range(num_images)), torch.eye(label_dim).reshape(num_images, label_dim))


def test_mode_sid_never_fetches_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MadeUp, "images", None)
    distillation(mode="sid", adversarial=None, generator_from_nimg=None).step()


NORMALISED = [
    ("off", "sid", []),
    ("off", "sida", []),
    ("published", "sid", ["fake_score", "generator"]),
    ("published", "sida", ["generator"]),
    ("intended", "sid", ["fake_score", "generator"]),
    ("intended", "sida", ["fake_score", "generator"]),
]


@pytest.mark.parametrize(("forced", "mode", "expected"), NORMALISED)
def test_forced_normalization_touches_the_nets_that_the_recipe_says(
    forced: str, mode: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distillation(
        TINY_EDM2,
        mode=mode,
        adversarial=None if mode == "sid" else RECIPE.adversarial,
        generator_from_nimg=None,
        forced_normalization=forced,
        num_accumulation_rounds=2,
        fake_score_lr=1e-30,
        generator_lr=1e-30,
    )
    with torch.no_grad():
        for net in (run.fake_score, run.generator, run.ema):
            for parameter in net.parameters():
                parameter.mul_(0.5)
    touched: list[torch.nn.Module] = []
    force_normalize = edm2.force_normalize_
    instead_of(edm2.force_normalize_, lambda net: (touched.append(net), force_normalize(net)), monkeypatch)
    run.step()
    names = {id(net): name for name, net in run.modules().items()}
    assert [names[id(net)] for net in touched] == expected
    for name in ("fake_score", "generator"):
        weight = run.modules()[name].get_parameter("unet.out_conv.weight")  # type: ignore[union-attr]
        rms = float(weight.detach().square().mean().sqrt())
        assert rms == pytest.approx(1 if name in expected else 0.5, abs=0.05)


def test_published_normalization_reaches_the_ema_net_before_the_first_step_and_each_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touched: list[torch.nn.Module] = []
    instead_of(edm2.force_normalize_, touched.append, monkeypatch)
    run = distillation(TINY_EDM2, forced_normalization="published", evaluate_every_nimg=12, generator_from_nimg=10**6)
    counts = []
    for _ in range(4):
        counts.append((run.nimg, touched.count(run.ema)))
        run.step()
    assert counts == [(0, 1), (8, 1), (16, 2), (24, 3)]
    assert not any(net is run.generator for net in touched)


def test_uncertainty_head_belongs_to_the_fake_score_and_only_where_the_recipe_says() -> None:
    for logvar in (True, False):
        run = distillation(TINY_EDM2, logvar=logvar, generator_from_nimg=None)
        has_head = {name: "logvar_linear.weight" in net.state_dict() for name, net in run.modules().items()}
        assert has_head["fake_score"] == logvar
        assert not has_head["generator"]
        assert not has_head["ema"]
        assert run.generator.spec.logvar_channels == run.ema.spec.logvar_channels == 0
        assert run.teacher.spec.logvar_channels == 16
        assert all(bool(loss.isfinite().all()) for loss in run.step().values())


def test_real_image_that_is_not_finite_skips_the_update_of_the_fake_score_alone() -> None:
    latents = MadeUpLatents()
    latents._images[3, 0, 0, 0] = math.nan
    run = distillation(TINY_EDM2, latents, generator_from_nimg=None)
    before = weights(run.fake_score)
    run.step()
    assert run.skipped.total == {"fake_score": 1, "generator": 0}
    assert torch.equal(weights(run.fake_score), before)
    run.step()
    run.step()
    run.step()
    assert run.skipped.in_a_row == {"fake_score": 0, "generator": 0}
    assert run.skipped.total == {"fake_score": 1, "generator": 0}


def parameter_with_gradient(gradient: list[float]) -> tuple[torch.nn.Linear, torch.optim.Adam]:
    net = torch.nn.Linear(len(gradient), 1, bias=False)
    net.weight.grad = torch.tensor([gradient])
    return net, updates.adam({"net": (net, base.Optimisation(lr=0.1))})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_update_with_a_gradient_that_is_not_finite_is_skipped(bad: float) -> None:
    net, optimizer = parameter_with_gradient([1.0, bad])
    before = net.weight.detach().clone()
    assert not updates.apply_gradients(optimizer, None)
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None
    assert not any(tensor.any() for tensor in optimizer.state[net.weight].values())


def test_gradient_elements_are_clipped_only_where_the_recipe_says() -> None:
    for clip_value, expected in ((None, 9.0), (1.0, 1.0)):
        _, optimizer = parameter_with_gradient([3.0, 0.5])
        assert updates.apply_gradients(optimizer, clip_value)
        second_moments = optimizer.state_dict()["state"][0]["exp_avg_sq"] / 0.001
        assert second_moments.flatten().tolist() == [pytest.approx(expected, rel=1e-4), pytest.approx(0.25, rel=1e-4)]


def test_skipped_updates_are_counted_in_all_and_in_a_row() -> None:
    skipped = updates.SkippedSteps()
    for stepped in (True, False, False, True, False):
        skipped.count("generator", stepped)
    assert (skipped.total, skipped.in_a_row) == ({"generator": 3}, {"generator": 1})


def test_pretraining_lowers_the_denoising_loss() -> None:
    recipe = TeacherRecipe(dataset="made up", net=TINY, batch_size=20, duration_nimg=2000, lr_rampup_nimg=100)
    torch.manual_seed(0)
    stripes = MadeUp()
    stripes._images = torch.tensor([0, 255], dtype=torch.uint8).repeat(4).expand(40, 1, 8, 8)
    batches = training_batches.DatasetBatches(
        stripes, InOrder(), batch_size=20, num_rounds=1, seed=0, device=torch.device("cpu")
    )
    run = training_pretraining.Pretraining(recipe, nets.build(TINY), batches)
    values = [float(run.step()["denoising_loss"]) for _ in range(60)]
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
    assert run.nimg == 1200


def pretraining(
    spec: NetSpec, **changed: Any
) -> tuple[training_pretraining.Pretraining, training_batches.DatasetBatches]:
    recipe = TeacherRecipe(dataset="made up", net=spec, batch_size=20, lr=1e-2, lr_rampup_nimg=100)
    source = MadeUpLatents() if spec.img_channels == 4 else MadeUp()
    batches = training_batches.DatasetBatches(
        source, InOrder(), batch_size=20, num_rounds=1, seed=0, device=torch.device("cpu")
    )
    torch.manual_seed(0)
    return training_pretraining.Pretraining(dataclasses.replace(recipe, **changed), nets.build(spec), batches), batches


def drawn(
    run: training_pretraining.Pretraining, batches: training_batches.DatasetBatches, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Real images, noise and sigma of a step of pretraining."""
    images, draws = batches.images(step, 0), batches.get(step, 0).diffusion
    sigma = (run.recipe.P_std * draws.normal((len(images), 1, 1, 1)) + run.recipe.P_mean).exp()
    return images, draws.normal(images.shape), sigma


def test_pretraining_of_edm2_normalises_its_weights_and_no_others() -> None:
    # The rate of the first step is 0, so that what it changes is the normalisation.
    for spec, normalises in ((TINY_EDM2, True), (TINY, False)):
        run, _ = pretraining(spec)
        with torch.no_grad():
            for parameter in run.net.parameters():
                parameter.mul_(3)
        before = {name: p.clone() for name, p in run.net.named_parameters()}
        run.step()
        for name, parameter in run.net.named_parameters():
            if normalises and parameter.ndim > 1:
                assert parameter.detach().flatten(1).square().mean(1).sqrt().sub(1).abs().max() < 1e-3, name
            else:
                assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("logvar_channels", [16, 0])
def test_pretraining_of_edm2_weights_the_loss_by_its_uncertainty_where_it_has_a_head(logvar_channels: int) -> None:
    run, batches = pretraining(dataclasses.replace(TINY_EDM2, logvar_channels=logvar_channels))
    told = float(run.step()["denoising_loss"])
    y, noise, sigma = drawn(run, batches, 0)
    with torch.no_grad():
        error = (run.net(y + sigma * noise, sigma, batches.get(0, 0).labels) - y) ** 2
        weighted = error * (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        u = run.net.logvar(sigma) if logvar_channels else torch.zeros(())
        assert told == pytest.approx(float((weighted / u.exp() + u).mean()), rel=1e-5)


def test_the_uncertainty_head_of_edm2_learns_the_log_of_the_loss() -> None:
    run, batches = pretraining(TINY_EDM2, P_mean=0.0)

    def gap() -> float:
        gaps = []
        for level in (0.3, 0.6, 1.0):
            y, noise, _ = drawn(run, batches, 0)
            with torch.no_grad():
                error = (run.net(y + level * noise, level, batches.get(0, 0).labels) - y) ** 2
                loss = error.mean() * (level**2 + 0.25) / (0.5 * level) ** 2
                gaps.append(abs(float(run.net.logvar(level) - loss.log())))
        return max(gaps)

    before = gap()
    for _ in range(80):
        run.step()
    assert gap() < 0.25 * before


# How a recipe is carried out


@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
def test_several_micro_batches_at_a_time_give_the_gradients_of_one_after_the_other(spec: NetSpec) -> None:
    """Adversarial losses average over a micro-batch, not over what goes through the nets at a time."""
    recorded = []
    for at_once in (1, 2):
        run = distillation(spec, generator_from_nimg=None, num_accumulation_rounds=4)
        run.nimg = 10**6
        with torch.no_grad():  # away from the teacher, whose difference would be rounding noise alone
            for parameter in run.fake_score.parameters():
                parameter.mul_(1.1)
        run.passes = [range(start, start + at_once) for start in range(0, 4, at_once)]
        stats = compute_gradients(run, "fake_score")
        assert all(len(values) == 4 // at_once for values in stats.values())
        psi = gradients_of(run.fake_score)
        stats |= compute_gradients(run, "generator")
        recorded.append((psi, gradients_of(run.generator), {name: float(v.sum()) for name, v in stats.items()}))
    for one, two in zip(*(gradients[:2] for gradients in recorded), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    assert recorded[1][2] == pytest.approx(recorded[0][2], rel=1e-5)


@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
@pytest.mark.parametrize(("precision", "off"), [("tf32", 1e-6), ("fp16", 0.02), ("bf16", 0.1)])
def test_lower_precisions_give_nearly_the_losses_of_float32(spec: NetSpec, precision: str, off: float) -> None:
    """On a CPU TF32 is float32; the others carry 11 and 8 bits, and a loss is a sum of differences.

    The SiD loss has the signed products of f - g with f - x, which nearly cancel here: in bf16 it was 2% to 22% off by
    seed and by the processor's kernels, so three times as much is allowed.
    """
    exact = distillation(spec, generator_from_nimg=None)
    rough = distillation(spec, generator_from_nimg=None, precision=precision)
    for run in (exact, rough):
        run.nimg = 10**6
    wanted, got = exact.step(), rough.step()
    for name, values in wanted.items():
        allowed = 3 * off if name == "generator_sid_loss" else off
        assert float(got[name].sum()) == pytest.approx(float(values.sum()), rel=allowed)
    assert all(p.dtype == torch.float32 for p in rough.generator.parameters())
    assert rough.skipped.total == {"fake_score": 0, "generator": 0}


def test_the_teacher_may_have_a_precision_of_its_own() -> None:
    run = distillation(teacher_precision="bf16")
    assert run.teacher.compute_dtype == torch.bfloat16
    assert run.fake_score.compute_dtype == run.generator.compute_dtype == run.ema.compute_dtype == torch.float32


@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
def test_activations_computed_anew_give_the_same_bits_dropout_included(spec: NetSpec) -> None:
    changed = {"generator_from_nimg": None, "dropout": 0.1}
    runs = [distillation(spec, execution=e, **changed) for e in (None, Execution(checkpoint_activations=True))]
    for run in runs:
        run.step()
        run.step()
    assert torch.equal(weights(runs[0].fake_score), weights(runs[1].fake_score))


def gradients_of_a_step(monkeypatch: pytest.MonkeyPatch, spec: NetSpec, execution: Execution) -> list[Tensor]:
    """Losses of a step with all its terms, then the gradients that either optimiser gets, as vectors."""
    run = distillation(spec, execution=execution, generator_from_nimg=None, dropout=0.0)
    run.nimg = 40
    with torch.no_grad():  # at the start it equals the teacher, and the SiD loss is what rounding leaves
        for parameter in run.fake_score.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found: list[Tensor] = []

    def take(
        optimizer: torch.optim.Optimizer, clip_value: float | None, clip_norm: float | None, are_finite: bool = False
    ) -> bool:
        (group,) = optimizer.param_groups
        found.append(torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None]))
        optimizer.zero_grad()
        return True

    with monkeypatch.context() as patch:
        instead_of(updates.apply_gradients, take, patch)
        values = list(run.step().values())
    return [torch.cat(values), *found]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each vector within the tolerance of its own length: no optimiser is between that would blow up the last bit."""
    for own, other in zip(got, expected, strict=True):
        assert own.shape == other.shape
        assert float((own - other).norm() / other.norm()) < tolerance


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("share", [False, True])
def test_passes_in_threads_give_the_bits_of_passes_one_by_one(share: bool) -> None:
    seen: list[set[int]] = []
    runs: list[Any] = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        run = distillation(TINY, generator_from_nimg=None, num_accumulation_rounds=4, share_fakes=share)
        threads: set[int] = set()
        run.generator.register_forward_pre_hook(lambda *_, threads=threads: threads.add(threading.get_ident()))
        steps = [run.step() for _ in range(3)]
        runs.append((steps, weights(run.fake_score), weights(run.generator)))
        seen.append(threads)
    assert len(seen[0]) == 1 < len(seen[1])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


SETTINGS = pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
# torch's tracer looks at an attribute of tensors about which torch warns
TRACING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def trace_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the graphs that would be compiled operation by operation: the compiler itself takes minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic, options: compile_(function, dynamic=dynamic, backend="aot_eager")
    )


@SETTINGS
def test_channels_last_activations_give_the_same_gradients(spec: NetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, last = (gradients_of_a_step(monkeypatch, spec, Execution(channels_last=on)) for on in (False, True))
    assert not torch.equal(usual[1], last[1]), "the setting reaches the nets"
    assert_close(last, usual, 1e-5)


def test_weights_lie_in_channels_last_order_with_their_activations() -> None:
    run = distillation(execution=Execution(channels_last=True))
    for net in (run.teacher, run.fake_score, run.generator, run.ema):
        assert net.memory_format == torch.channels_last
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim == 4)


@TRACING
@pytest.mark.slow
@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
def test_traced_nets_give_the_same_gradients(spec: NetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_alone(monkeypatch)
    usual, traced = (gradients_of_a_step(monkeypatch, spec, Execution(compile=on)) for on in (False, True))
    assert_close(traced, usual, 1e-5)


@TRACING
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_compiled_nets_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Execution(compile=True, channels_last=True)
    usual, compiled = (gradients_of_a_step(monkeypatch, TINY, execution) for execution in (Execution(), fast))
    assert_close(compiled, usual, 1e-5)


@TRACING
def test_traced_nets_compute_no_gradients_of_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_alone(monkeypatch)
    run = distillation(execution=Execution(compile=True), generator_from_nimg=None)
    asked: list[bool] = []
    loss = methods.sid_generator_loss

    def noting(teacher: Any, fake_score: Any, *tensors: Tensor, **options: Any) -> methods_sid.SidLoss:
        asked.append(any(p.requires_grad for p in fake_score.parameters()))
        return loss(teacher, fake_score, *tensors, **options)

    instead_of(methods.sid_generator_loss, noting, monkeypatch)
    compute_gradients(run, "generator")
    assert asked == [False]
    assert all(p.requires_grad for p in run.fake_score.parameters())


@TRACING
def test_threads_that_need_a_graph_together_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_alone(monkeypatch)
    torch._dynamo.reset()  # nets of one shape share their graphs
    net = configure.configure_for_sampling(nets.build(TINY).eval().requires_grad_(False), SamplingForm(compile=True))
    x, before = torch.zeros(2, 1, 8, 8), configure.num_graphs()
    made = list(engine_threads.map_ordered(lambda _: net(x, 2.5), range(4), 2))
    assert configure.num_graphs() - before == 1
    assert all(torch.equal(each, made[0]) for each in made)


def test_compiled_nets_cannot_be_sharded() -> None:
    with pytest.raises(SidaError) as error:
        distillation(execution=Execution(compile=True, shard=True))
    assert str(error.value) == "compiled nets cannot be sharded, got both. Leave out --shard or --compile."


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("share", [False, True])
def test_both_updates_take_the_same_fakes_only_where_the_recipe_says(
    share: bool, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distillation(share_fakes=share, generator_from_nimg=0, num_accumulation_rounds=rounds, dropout=0.1)
    run.step()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"fake_score": [], "generator": []}
    passes = []
    step_loss, generator_loss, forward = methods.fake_score_loss, methods.sid_generator_loss, run.generator.forward

    def of_fake_score(
        net: Any, images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor, *rest: Any, **o: Any
    ) -> Any:
        seen["fake_score"].append((images.detach().clone(), noise))
        return step_loss(net, images, noise, sigma, labels, *rest, **o)

    def of_generator(teacher: Any, net: Any, images: Tensor, noise: Tensor, *rest: Any, **o: Any) -> Any:
        seen["generator"].append((images.detach().clone(), noise))
        return generator_loss(teacher, net, images, noise, *rest, **o)

    def counting(*tensors: Any) -> Tensor:
        passes.append(1)
        return forward(*tensors)

    instead_of(methods.fake_score_loss, of_fake_score, monkeypatch)
    instead_of(methods.sid_generator_loss, of_generator, monkeypatch)
    monkeypatch.setattr(run.generator, "forward", counting)
    run.step()
    pairs = list(zip(seen["fake_score"], seen["generator"], strict=True))
    assert len(pairs) == rounds
    assert [torch.equal(first[0], second[0]) for first, second in pairs] == [share] * rounds
    assert not any(torch.equal(first[1], second[1]) for first, second in pairs), "noise is drawn anew in any case"
    assert len(passes) == (1 if share and rounds == 1 else 2 * rounds)


def test_skipped_update_is_counted_without_being_asked_for() -> None:
    net, optimizer = parameter_with_gradient([1.0, math.inf])
    skipped = updates.SkippedSteps()
    skipped.count("generator", updates.apply_gradients(optimizer, None))
    assert isinstance(skipped._total["generator"], Tensor)
    net.weight.grad = torch.ones_like(net.weight)
    skipped.count("generator", updates.apply_gradients(optimizer, None))
    assert (skipped.total, skipped.in_a_row) == ({"generator": 1}, {"generator": 0})
    assert float(optimizer.state[net.weight]["step"]) == 1


# Loss scales of float16


def test_published_float16_runs_start_with_a_loss_scale_well_above_the_published_one() -> None:
    """The published code divided by an eighth of the batch; ours divides by all of it."""
    started = {}
    for name, teacher in catalog.TEACHERS.items():
        if "sida" not in teacher.recipes:
            continue
        recipe = teacher.recipes["sida"]
        scale = float(updates.LossScale(recipe.batch_size, torch.device("cpu")).value)
        assert math.log2(scale).is_integer()
        assert scale >= recipe.batch_size / 1024
        if recipe.precision == "fp16":
            started[name] = scale
    assert started["edm-imagenet64"] == 512
    assert started["edm-ffhq64"] == 32
    assert started["edm2-xs"] == 128


@pytest.mark.parametrize(
    ("precisions", "scaled"),
    [
        ({}, set()),
        ({"precision": "tf32"}, set()),
        ({"precision": "bf16"}, set()),
        ({"precision": "fp16"}, {"fake_score", "generator"}),
        ({"teacher_precision": "fp16"}, {"generator"}),
    ],
)
def test_losses_are_scaled_only_where_a_gradient_goes_through_float16(
    precisions: dict[str, Any], scaled: set[str]
) -> None:
    assert set(distillation(**precisions).skipped.loss_scales) == scaled


def test_a_loss_scale_halves_with_skipped_updates_and_doubles_after_a_thousand_good_ones() -> None:
    scale = updates.LossScale(64, torch.device("cpu"))
    seen = []
    for stepped, count in ((True, 1001), (False, 1), (False, 2), (True, 999), (True, 1), (False, 1), (True, 2100)):
        for _ in range(count):
            scale.follow(torch.tensor(stepped))
        seen.append(float(scale.value))
    assert seen == [4, 2, 1, 1, 2, 1, 4]


def test_a_loss_scale_asks_nothing_of_the_device() -> None:
    """A tensor on the meta device has no value that could be waited for."""
    scale = updates.LossScale(64, torch.device("meta"))
    for _ in range(3):
        scale.follow(torch.tensor(True, device="meta"))
    gradients = engine_gradients.GradientSum(torch.nn.Linear(2, 2, device="meta"), 1, scale.value)
    assert gradients.scaled(torch.ones((), device="meta")).shape == ()


def test_features_of_imagenet_64_get_a_gradient_that_float16_can_hold() -> None:
    """The logits are a mean over 768 channels, and the loss is divided by 8,192 images."""
    recipe = catalog.TEACHERS["edm-imagenet64"].recipes["sida"]
    assert recipe.adversarial is not None
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(32, 768, 8, 8, generator=generator)
    sigma = (recipe.P_std * torch.randn(16, 1, 1, 1, generator=generator) + recipe.P_mean).exp()
    own = float(updates.LossScale(recipe.batch_size, torch.device("cpu")).value)

    def gradient(dtype: torch.dtype, scale: float) -> Tensor:
        features = values.to(dtype).requires_grad_()
        logits = _channel_mean(features)
        score = score_losses.ScoreLoss(torch.zeros(()), logits[:16], None, logits[16:])
        loss = methods.discriminator_loss(score, sigma).sum() * (scale / recipe.batch_size)
        (found,) = torch.autograd.grad(loss, features)
        return found.to(torch.float64) / scale

    exact = gradient(torch.float32, 1.0)
    lost, kept = (gradient(torch.float16, scale) for scale in (1.0, own))
    assert float((lost - exact).norm() / exact.norm()) > 0.05
    assert float((kept - exact).norm() / exact.norm()) < 2e-3
    assert not bool((kept == 0).any())


ADM = NetSpec(
    architecture="DhariwalUNet",
    img_resolution=16,
    img_channels=3,
    label_dim=10,
    model_channels=8,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attn_resolutions=(8,),
)


class Colours(MadeUp):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)


def of_imagenet_64(precision: str, spec: NetSpec = ADM, **changed: Any) -> training_distillation.Distillation:
    """One micro-batch of 8 of a batch of 8,192, away from the teacher, in the stage with all terms."""
    # As small at every feature as where the logits are a mean over 768 channels and the loss one over 8x8 positions.
    features = spec.model_channels * spec.channel_mult[-1] / 768 * (2 * 2) / (8 * 8)
    adversarial = Adversarial(adversarial_from_nimg=0, discriminator_scale=features)
    options: dict[str, Any] = {
        "batch_size": 8192,
        "num_accumulation_rounds": 1024,
        "generator_from_nimg": None,
        "adversarial": adversarial,
        "precision": precision,
    }
    run = distillation(spec, Colours(), **options | changed)
    run.passes, run.nimg = [range(1)], 10**6
    with torch.no_grad():
        for parameter in run.fake_score.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return run


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def test_the_discriminators_gradient_in_float16_points_where_float32s_does(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = methods.fake_score_loss

    def without_denoising(*arguments: Any, **options: Any) -> score_losses.ScoreLoss:
        score = computed(*arguments, **options)
        return score._replace(per_pixel=torch.zeros_like(score.per_pixel))

    instead_of(methods.fake_score_loss, without_denoising, monkeypatch)
    found = {}
    for precision, scale in (("fp32", None), ("fp16", None), ("fp16", 1.0)):
        run = of_imagenet_64(precision)
        if scale:
            run.skipped.loss_scales["fake_score"].value.fill_(scale)
        compute_gradients(run, "fake_score")
        found[precision, scale] = gradients_of(run.fake_score)
    assert cosine(found["fp16", 1.0], found["fp32", None]) < 0.5
    assert cosine(found["fp16", None], found["fp32", None]) > 0.99


def test_the_generators_gradient_in_float16_goes_scaled_through_all_three_nets() -> None:
    """With a loss so small that without a scale nothing of it arrives."""
    small = dataclasses.replace(ADM, num_blocks=1, model_channels=4)
    found = {}
    for precision, scale in (("fp32", None), ("fp16", 2.0**20), ("fp16", 1.0)):
        run = of_imagenet_64(precision, small, lambda_sid=1e-5, adversarial=Adversarial(lambda_adv=0.0))
        if scale:
            run.skipped.loss_scales["generator"].value.fill_(scale)
        compute_gradients(run, "generator")
        found[precision, scale] = gradients_of(run.generator)
    exact, kept, lost = found.values()
    assert cosine(lost, exact) < 0.5
    assert cosine(kept, exact) > 0.99
    assert float(kept.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


SMALL = dataclasses.replace(TINY, model_channels=8, channel_mult=(1, 1), num_blocks=1)


def test_an_update_that_overflows_float16_is_skipped_and_the_next_has_half_the_scale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And so does a run that was interrupted in between, to the same bits."""
    monkeypatch.setattr(updates, "IMAGES_PER_LOSS_SCALE", 2.0**-11)
    schedule = training_state.Schedule(
        duration_nimg=48, evaluate_every_nimg=48, checkpoint_every_nimg=48, report_every_steps=1
    )

    def run(name: str, stops_at: int | None = None) -> tuple[training_distillation.Distillation, list[str]]:
        training = distillation(SMALL, precision="fp16", generator_from_nimg=None)
        with Store.open(tmp_path).live(name) as live:
            events = loop.run(
                training,
                schedule,
                live,
                evaluate=None,
                should_stop=lambda: training.nimg == stops_at,
                history=training_state.History(),
            )
            told = [str(event.values["message"]) for event in events if event.kind == "warning"]
        return training, told

    straight, told = run("straight")
    for name, scale in straight.skipped.loss_scales.items():
        assert 0 < straight.skipped.total[name] <= 6
        assert float(scale.value) == 2.0 ** (14 - straight.skipped.total[name])
        assert straight.skipped.made[name] == 6 - straight.skipped.total[name]
    assert bool(weights(straight.generator).isfinite().all())
    assert (
        "the generator had gradients that are not finite: their updates were skipped, and its loss scale fell from "
        "16384 to 8192"
    ) in told
    _, told_before = run("interrupted", stops_at=16)
    (state,) = tmp_path.glob("live/interrupted/checkpoint-*/state.json")
    saved = json.loads(state.read_text())
    assert saved["schema"] == 2
    assert saved["loss_scales"]["generator"] == {"value": 2.0**12, "good_updates": 0}
    again, told_again = run("interrupted")
    assert told_before + told_again == told
    assert torch.equal(weights(again.generator), weights(straight.generator))
    assert torch.equal(weights(again.fake_score), weights(straight.fake_score))
    assert again.skipped.total == straight.skipped.total
