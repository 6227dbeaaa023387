"""Steps of the trainer held against the recorded ones of Diff-Instruct's and DMD2's published code."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl import catalog
from sidactl.foreign import networks
from sidactl.methods.dmd import Matching
from sidactl.recipes import MatchingRecipe
from sidactl.training.batches import MicroBatch
from sidactl.training.distillation import Distillation
from tests.golden import golden
from tests.methods.test_dmd import Arrays, adm
from tests.playback import Playback
from tests.test_trajectory import is_key_bias


class Recorded:
    """The draws of a trajectory: those of a step's update of the fake score, and those of the generator's."""

    def __init__(self, arrays: Arrays, label_dim: int) -> None:
        self.arrays, self.label_dim = arrays, label_dim
        self.playbacks: list[Playback] = []

    def draws(self, names: Sequence[str], least: int = 0) -> Playback:
        """least: what whole numbers were drawn from."""
        arrays = [
            self.arrays.arrays[n].reshape(-1, 1, 1, 1) - least if "randint" in n else self.arrays.arrays[n]
            for n in names
        ]
        self.playbacks.append(Playback(arrays))
        return self.playbacks[-1]

    def names(self, step: int) -> list[str]:
        return sorted(n for n in self.arrays.arrays.files if n.startswith(f"it{step}_draw"))


class OfDiffInstruct(Recorded):
    def get(self, batch: int, round: int) -> MicroBatch:
        step, is_generators = divmod(batch, 2)
        draws = self.draws(self.names(step)[3:] if is_generators else self.names(step)[:3])
        labels = self.arrays[f"batch{step}_labels"]
        return MicroBatch(labels, draws, draws, draws, [0], partial(torch.zeros, 0))


class OfDmd2(Recorded):
    def get(self, batch: int, round: int) -> MicroBatch:
        step, is_generators = divmod(batch, 2)
        names = self.names(step)
        has_turn, one_hot = len(names) == 12, partial(F.one_hot, num_classes=self.label_dim)
        if is_generators:
            direction, adversarial = self.draws(names[2:4], least=20), self.draws(names[4:6])
            diffusion = Playback([*direction.left, *adversarial.left])
        else:
            diffusion = self.draws(names[6 if has_turn else 2 :])
        reals = self.arrays[f"it{step}_real_images_01"] * 2 - 1
        return MicroBatch(
            one_hot(self.arrays[names[1]]).float(),
            self.draws(names[:1]),
            diffusion,
            diffusion,
            [0],
            lambda: reals,
            labels_of_reals=one_hot(self.arrays[f"it{step}_real_labels"]).float(),
        )


def moved(
    net: torch.nn.Module, start: Mapping[str, Tensor], arrays: Arrays, name: str, lr: float, beta1: float
) -> None:
    """What training has changed, against the recorded change."""
    final, state = arrays.net(f"final_{name}"), net.state_dict()
    kept = {k: ~is_key_bias(k, v) for k, v in final.items() if k in state}
    assert kept
    ours, theirs = (
        torch.cat([(tensors[k] - start[k])[kept[k]].flatten().double() for k in kept]) for tensors in (state, final)
    )
    jumped = (ours - theirs).abs() > lr / 2  # by Adam's sign where a gradient is rounding noise
    assert float(jumped.float().mean()) <= (1e-3 if beta1 == 0 else 5e-4)
    assert float((ours - theirs)[~jumped].norm()) <= 1e-3 * float(theirs.norm())


def recipe(mode: Any, settings: Mapping[str, Any], **changes: Any) -> MatchingRecipe:
    made = catalog.recipe_for("tiny-digits", mode)
    assert isinstance(made, MatchingRecipe)
    numbers = {
        "batch_size": settings["B"],
        "num_accumulation_rounds": 1,
        "fake_score_lr": settings["glr"] if mode == "dmd2" else settings["lr"],
        "generator_lr": settings["lr"] if mode == "dmd2" else settings["glr"],
        "generator_from_nimg": None,
        "duration_nimg": 10**9,
    }
    return replace(made, **(numbers | changes))


Named = Mapping[str, torch.nn.Module]
Losses = list[dict[str, Tensor]]


def state_of(nets: Named) -> dict[str, dict[str, Tensor]]:
    return {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets.items()}


def run_from(
    begin: Callable[[], tuple[Distillation, Named]], starts: Mapping[str, Mapping[str, Tensor]], num_steps: int
) -> tuple[Distillation, Named, dict[str, dict[str, Tensor]], Losses]:
    """A run of so many steps, its nets, what they started from, and the losses of each step."""
    run, nets = begin()
    for name, start in starts.items():
        nets[name].load_state_dict(nets[name].state_dict() | start)
    before = state_of(nets)
    return run, nets, before, [run.step() for _ in range(num_steps)]


def recovered_starts(
    begin: Callable[[], tuple[Distillation, Named]], arrays: Arrays, names: Sequence[str], num_steps: int
) -> dict[str, dict[str, Tensor]]:
    """What these nets must have started from to end where they did.

    The files hold the final weights under start_, too: what was kept was not copied. So a start is the end less what
    the steps from that start change, found by iteration; that it is the right one is seen in the losses of each step.
    """
    final = {name: arrays.net(f"final_{name}") for name in names}
    for name in names:
        assert all(torch.equal(v, final[name][k]) for k, v in arrays.net(f"start_{name}").items())
    starts = final
    for _ in range(8):
        _, nets, before, _ = run_from(begin, starts, num_steps)
        after = state_of(nets)
        starts = {n: {k: final[n][k] - (after[n][k] - before[n][k]) for k in final[n]} for n in names}
    return starts


def assert_same_losses(losses: Losses, arrays: Arrays, told: Mapping[str, tuple[str, float]]) -> None:
    """told: the recorded name of each loss, and the factor that ours has."""
    for step, found in enumerate(losses):
        for name, value in found.items():
            recorded, factor = told[name]
            expected = arrays[f"it{step}_stat_{recorded}"].float().reshape(1) * factor
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_diff_instruct_takes_the_published_steps() -> None:
    arrays = Arrays("trajectory_diff_instruct_fresh.npz")
    settings = json.loads(arrays.text("settings"))
    teacher = networks.read_network(golden(f"networks/{settings['teacher']}.pkl"))
    made = recipe("diff-instruct", settings, sigma_init=settings["init_sigma"], fake_score_beta1=0.0)
    batches = OfDiffInstruct(arrays, 4)

    def begin() -> tuple[Distillation, Named]:
        run = Distillation(made, teacher, None, batches)
        return run, {"psi": run.fake_score, "G": run.generator}

    _, nets, before, losses = run_from(begin, {}, settings["iters"])
    told = {"fake_score_loss": "SgLoss_loss", "generator_matching_loss": "GLoss_loss"}
    assert_same_losses(losses, arrays, {ours: (theirs, 1 / settings["B"]) for ours, theirs in told.items()})
    # A step asks for its first batch again, whose labels its second one shares.
    assert [playback.exhausted() for playback in batches.playbacks[-3:]] == [True, True, False]
    for name, net in nets.items():  # not the average: it has a constant rate there, where we have a half-life
        moved(net, before[name], arrays, name, 1e-3, 0.0)


UNUSABLE = ["diff_instruct_states", "uni_instruct_forward_kl", "uni_instruct_jeffrey_kl"]


@pytest.mark.parametrize("tag", UNUSABLE)
def test_runs_whose_first_weights_are_not_kept_cannot_be_repeated(tag: str) -> None:
    """Their start_ holds the final weights, and with Adam's momentum of 0 no iteration finds those that it began with.

    If a file is made anew this fails, and its steps can be taken as those of the others.
    """
    arrays = Arrays(f"trajectory_{tag}.npz")
    for name in ("psi", "G", "G_ema"):
        start, final = arrays.net(f"start_{name}"), arrays.net(f"final_{name}")
        assert all(torch.equal(value, final[key]) for key, value in start.items())


def dmd2_begin(arrays: Arrays, settings: Mapping[str, Any]) -> tuple[Distillation, Named]:
    made = recipe(
        "dmd2",
        settings,
        discriminator_lr=settings["glr"],
        generator_every=settings["ratio"],
        lr_warmup_nimg=settings["warmup"] * settings["B"],
    )
    run = Distillation(made, adm(arrays.net("start_teacher")), None, OfDmd2(arrays, settings["K"]))
    assert isinstance(run.method, Matching)
    assert run.method.heads
    return run, {"psi": run.fake_score, "G": run.generator, "head": run.method.heads.heads[0]}


def test_dmd2_takes_the_published_steps() -> None:
    arrays = Arrays("trajectory_dmd2_states_warmup.npz")
    settings = json.loads(arrays.text("settings"))
    begin, num_steps = partial(dmd2_begin, arrays, settings), settings["iters"]
    starts = recovered_starts(begin, arrays, ["psi", "G", "head"], num_steps)
    run, _, _, losses = run_from(begin, starts, num_steps)
    made = run.recipe
    assert isinstance(made, MatchingRecipe)
    told = {
        "fake_score_loss": ("loss_fake_mean", 1.0),
        "discriminator_loss": ("guidance_cls_loss", made.discriminator_scale),
        "generator_matching_loss": ("loss_dm", 1.0),
        "generator_adversarial_loss": ("gen_cls_loss", made.lambda_adv),
    }
    assert_same_losses(losses, arrays, told)
    assert [len(found) for found in losses] == [4 if i % settings["ratio"] == 0 else 2 for i in range(num_steps)]
    own, averaged = run.generator.state_dict(), run.ema.state_dict()
    assert all(torch.equal(averaged[name], value) for name, value in own.items())  # no EMA


def test_dmd2_starts_where_the_published_run_does() -> None:
    """Of the run from a fresh start the head's first weights are not kept, so that its later steps cannot be had."""
    arrays = Arrays("trajectory_dmd2_fresh.npz")
    settings = json.loads(arrays.text("settings"))
    run, _ = dmd2_begin(arrays, settings)
    losses = run.step()
    assert float(losses["generator_matching_loss"]) == float(arrays["it0_stat_loss_dm"]) == 0  # psi is the teacher yet
    torch.testing.assert_close(losses["fake_score_loss"], arrays["it0_stat_loss_fake_mean"].float().reshape(1))
