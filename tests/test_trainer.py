import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl import losses, nets, pickles, teachers, trainer
from sidactl.diffusion import Preconditioned
from sidactl.recipe import Adversarial, NetSpec, Recipe, TeacherRecipe
from tests.golden import golden
from tests.playback import Playback

TRAJECTORIES = [
    "edm_sid_fresh_start",
    "edm_sid_from_states",
    "edm_sida_above_200k",
    "edm_sida_gate_100k",
    "edm_sida_gate_200k",
    "edm_sida_dropout_accum_beta09",
]
PRINTED = {
    "fake_score_loss": "fake_score_Loss",
    "discriminator_loss": "D_Loss",
    "generator_sid_loss": "G_Loss",
    "generator_adversarial_loss": "G_gan_Loss",
}


class GoldenBatches:
    """The recorded batches and draws of a trajectory. Implements `MicroBatches`."""

    def __init__(self, arrays: Any, num_rounds: int) -> None:
        self._arrays, self._num_rounds = arrays, num_rounds
        self.masks: list[Tensor] = []
        self.playbacks: list[Playback] = []

    def get(self, batch: int, round: int) -> trainer.MicroBatch:
        phase = "psi" if batch % 2 == 0 else "g"
        prefix = f"it{batch // 2}_{phase}" + (f"_round{round}" if self._num_rounds > 1 else "")
        names = sorted(n for n in self._arrays.files if n.startswith(f"{prefix}_draw"))
        self.masks += [torch.from_numpy(self._arrays[n]) for n in names if n.endswith("dropoutmask")]
        draws = Playback([self._arrays[n] for n in names if not n.endswith("dropoutmask")])
        self.playbacks.append(draws)
        images = torch.from_numpy(self._arrays[f"{prefix}_batch_images"]).float() / 127.5 - 1
        labels = torch.from_numpy(self._arrays[f"{prefix}_labels"])
        return trainer.MicroBatch(images, labels, draws, draws, draws, dropout_seed=0)


def start_state(path: str) -> dict[str, Tensor]:
    """Weights of a start state such as "losses/edm.npz psi_param/*" or "networks/sida_gen_edm.pkl"."""
    if path.endswith(".pkl"):
        return pickles.state_dict(pickles.read(golden(path))["ema"])
    file, prefix = path.split()
    arrays, prefix = np.load(golden(file)), prefix.removesuffix("*")
    return {k.removeprefix(prefix): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefix)}


def golden_distillation(tag: str) -> tuple[trainer.Distillation, Any, dict[str, Any], GoldenBatches]:
    settings = json.loads(golden(f"trajectory/{tag}.json").read_text())
    arrays = np.load(golden(f"trajectory/{tag}.npz"))
    batch_size, batch_gpu = 4, settings.get("batch_gpu", 4)
    recipe = Recipe(
        teacher=settings["teacher"],
        mode="sida" if settings["use_gan"] else "sid",
        dataset="recorded",
        alpha=settings["alpha"],
        batch_size=batch_size,
        num_accumulation_rounds=batch_size // batch_gpu,
        duration_nimg=10**9,
        fake_score_lr=settings["lr"],
        generator_lr=settings["glr"],
        generator_beta1=settings.get("g_beta1", 0.0),
        ema_halflife_nimg=round(settings.get("ema_halflife_kimg", 500) * 1000),
        ema_rampup_ratio=settings.get("ema_rampup_ratio", 0.05),
        generator_from_nimg=100_000 if settings["use_gan"] else None,
        adversarial=Adversarial() if settings["use_gan"] else None,
        augment_p=settings["aug_p"],
        dropout=settings.get("dropout", 0.0),
    )
    teacher = teachers.read_network(golden(f"networks/{settings['teacher']}.pkl"))
    batches = GoldenBatches(arrays, recipe.num_accumulation_rounds)
    run = trainer.Distillation(recipe, teacher, None, batches)
    files = settings["init_files"]
    if files:
        for net, name in ((run.fake_score, "psi"), (run.generator, "G"), (run.ema, "G_ema")):
            teachers.load_weights(net, net.state_dict() | start_state(files[name]))
    run.nimg = settings["cur_kimg"] * 1000
    return run, arrays, settings, batches


def is_key_bias(name: str, tensor: Tensor) -> Tensor:
    """True where an element's true gradient is zero: reference moves those by rounding noise (golden/README.md, 4)."""
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    if name.endswith("qkv.bias"):
        mask[1::3] = True
    return mask


@pytest.mark.parametrize("tag", TRAJECTORIES)
def test_training_steps_follow_the_golden_trajectory(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, arrays, settings, batches = golden_distillation(tag)

    def recorded_dropout(x: Tensor, p: float, training: bool) -> Tensor:
        return x * batches.masks.pop(0) / (1 - p) if training else x

    monkeypatch.setattr(F, "dropout", recorded_dropout)
    start = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets_of(run).items()}
    for i in range(settings["iters"]):
        stats = run.step()
        # A gradient is recorded where a step happened; a loss is printed even where nothing came of it.
        assert ("generator_sid_loss" in stats) == (f"it{i}_g_gradmax" in arrays)
        for name, loss in stats.items():
            recorded = arrays[f"it{i}_stat_{PRINTED[name]}"]
            assert float(loss[-1]) == pytest.approx(float(recorded), rel=1e-3)
    assert all(draws.exhausted() for draws in batches.playbacks)
    assert not batches.masks
    for name, net in nets_of(run).items():
        assert_same_update(name, net, start[name], arrays, settings)


def nets_of(run: trainer.Distillation) -> dict[str, Preconditioned]:
    return {"psi": run.fake_score, "G": run.generator, "G_ema": run.ema}


def assert_same_update(
    name: str, net: Preconditioned, start: dict[str, Tensor], arrays: Any, settings: dict[str, Any]
) -> None:
    final = {k: torch.from_numpy(arrays[f"final_{name}/{k}"]) for k in start if f"final_{name}/{k}" in arrays}
    lr = settings["lr"] if name == "psi" else settings["glr"]
    if final:
        kept = {k: ~is_key_bias(k, v) for k, v in final.items()}
        ours, theirs = (
            torch.cat([(tensors[k] - start[k])[kept[k]].flatten() for k in final])
            for tensors in (net.state_dict(), final)
        )
        # Adam with beta1 = 0 steps by lr * sign(g): where g is rounding noise an element may jump by 2 lr.
        jumped = (ours - theirs).abs() > lr / 2
        assert float(jumped.float().mean()) <= 1e-3
        assert float((ours - theirs)[~jumped].norm()) <= 1e-3 * float(theirs.norm())
    names = settings["tolerance"][name]["names"]
    norms = torch.stack([net.state_dict()[k].double().norm() for k in names])
    expected = torch.from_numpy(arrays[f"final_{name}_paramnorm"]).double()
    without_key_biases = torch.tensor([not k.endswith("qkv.bias") for k in names])
    torch.testing.assert_close(norms[without_key_biases], expected[without_key_biases], rtol=1e-4, atol=1e-5)


def test_ema_follows_the_golden_table_of_decays() -> None:
    for row in json.loads(golden("trajectory/ema_beta.json").read_text()):
        ema, net = (torch.nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2))
        torch.nn.init.ones_(ema.weight)
        torch.nn.init.zeros_(net.weight)
        trainer.update_ema(
            ema,
            net,
            halflife_nimg=round(row["ema_halflife_kimg"] * 1000),
            rampup_ratio=row["ema_rampup_ratio"],
            nimg=row["cur_nimg_before_increment"],
            batch_size=row["batch_size"],
        )
        assert ema.weight.item() == pytest.approx(row["ema_beta"], rel=1e-9, abs=1e-12)


TINY = NetSpec(
    architecture="SongUNet",
    img_resolution=8,
    img_channels=1,
    label_dim=10,
    model_channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
)
RECIPE = Recipe(
    teacher="tiny",
    mode="sida",
    dataset="made up",
    alpha=1.0,
    batch_size=8,
    duration_nimg=10**6,
    fake_score_lr=1e-3,
    generator_lr=1e-3,
    ema_halflife_nimg=100,
    adversarial=Adversarial(adversarial_from_nimg=32),
    generator_from_nimg=16,
)


class MadeUp:
    """Forty images of noise with classes, as a dataset."""

    num_images = 40

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)

    def images(self, indices: Any) -> Tensor:
        return self._images[torch.as_tensor(indices)]

    def one_hot(self, indices: Any) -> Tensor:
        return torch.eye(10)[torch.as_tensor(indices) % 10]


class InOrder:
    def indices(self, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count) % MadeUp.num_images


def distillation(**changed: Any) -> trainer.Distillation:
    recipe = dataclasses.replace(RECIPE, **changed)
    torch.manual_seed(0)
    teacher = nets.build(TINY)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batches = trainer.DatasetBatches(
        MadeUp(),
        InOrder(),
        batch_size=recipe.batch_size,
        num_rounds=recipe.num_accumulation_rounds,
        seed=recipe.seed,
        device=torch.device("cpu"),
    )
    return trainer.Distillation(recipe, teacher, None, batches)


def weights(net: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


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


def test_generator_is_not_touched_while_the_fake_score_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = distillation()
    before = weights(run.generator)
    monkeypatch.setattr(losses, "sid_generator_loss", None)
    run.step()
    assert torch.equal(weights(run.generator), before)
    assert all(p.grad is None for p in run.generator.parameters())
    assert not run.modules()["generator_optimizer"].state_dict()["state"]


def test_adversarial_pass_is_not_computed_before_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = distillation(generator_from_nimg=None)
    monkeypatch.setattr(losses, "adversarial_generator_loss", None)
    run.step()
    run.nimg = 33
    with pytest.raises(TypeError):
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
    def source() -> trainer.DatasetBatches:
        return trainer.DatasetBatches(
            MadeUp(), InOrder(), batch_size=8, num_rounds=2, seed=1, device=torch.device("cpu")
        )

    first, again, other = source().get(3, 1), source().get(3, 1), source().get(3, 0)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.latent.normal((4, 2)), again.latent.normal((4, 2)))
    assert not torch.equal(other.latent.normal((4, 2)), source().get(3, 1).latent.normal((4, 2)))
    streams = [first.latent, first.diffusion, first.augment]
    assert len({float(stream.normal((1,))) for stream in streams}) == 3


def test_two_rounds_without_adversarial_loss_add_up_to_one_large_batch() -> None:
    """Only the adversarial losses average over a micro-batch; with the same draws the others are plain sums."""

    class Fixed:
        def __init__(self, num_rounds: int) -> None:
            self._rounds = num_rounds

        def get(self, batch: int, round: int) -> trainer.MicroBatch:
            generator = torch.Generator().manual_seed(batch)
            whole = {n: torch.randn(8, 1, 8, 8, generator=generator) for n in ("image", "z", "noise")}
            level = torch.rand(8, 1, 1, 1, generator=generator)
            part = slice(round * 8 // self._rounds, (round + 1) * 8 // self._rounds)
            latent = Playback([whole["z"][part].numpy()])
            diffusion = Playback([level[part].numpy(), whole["noise"][part].numpy()])
            return trainer.MicroBatch(whole["image"][part], torch.eye(10)[:8][part], latent, diffusion, latent, 0)

    gradients = []
    for num_rounds in (1, 2):
        run = distillation(mode="sid", adversarial=None, num_accumulation_rounds=num_rounds)
        run._batches = Fixed(num_rounds)
        run._fake_score_gradients()
        gradients.append(torch.cat([p.grad.flatten() for p in run.fake_score.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def parameter_with_gradient(gradient: list[float]) -> tuple[torch.nn.Linear, torch.optim.Adam]:
    net = torch.nn.Linear(len(gradient), 1, bias=False)
    net.weight.grad = torch.tensor([gradient])
    return net, trainer.adam(net, lr=0.1, beta1=0.0, beta2=0.999, eps=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_update_with_a_gradient_that_is_not_finite_is_skipped(bad: float) -> None:
    net, optimizer = parameter_with_gradient([1.0, bad])
    before = net.weight.detach().clone()
    assert not trainer.apply_gradients(optimizer, None)
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None
    assert not optimizer.state_dict()["state"]


def test_gradient_elements_are_clipped_only_where_the_recipe_says() -> None:
    for clip_value, expected in ((None, 9.0), (1.0, 1.0)):
        _, optimizer = parameter_with_gradient([3.0, 0.5])
        assert trainer.apply_gradients(optimizer, clip_value)
        second_moments = optimizer.state_dict()["state"][0]["exp_avg_sq"] / 0.001
        assert second_moments.flatten().tolist() == [pytest.approx(expected, rel=1e-4), pytest.approx(0.25, rel=1e-4)]


def test_skipped_updates_are_counted_in_all_and_in_a_row() -> None:
    skipped = trainer.SkippedSteps()
    for stepped in (True, False, False, True, False):
        skipped.count("generator", stepped)
    assert (skipped.total, skipped.in_a_row) == ({"generator": 3}, {"generator": 1})


def test_pretraining_lowers_the_denoising_loss() -> None:
    recipe = TeacherRecipe(dataset="made up", net=TINY, batch_size=20, duration_nimg=2000, lr_rampup_nimg=100)
    torch.manual_seed(0)
    stripes = MadeUp()
    stripes._images = torch.tensor([0, 255], dtype=torch.uint8).repeat(4).expand(40, 1, 8, 8)
    batches = trainer.DatasetBatches(
        stripes, InOrder(), batch_size=20, num_rounds=1, seed=0, device=torch.device("cpu")
    )
    run = trainer.Pretraining(recipe, nets.build(TINY), batches)
    values = [float(run.step()["denoising_loss"]) for _ in range(60)]
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
    assert run.nimg == 1200
