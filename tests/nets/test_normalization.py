"""EDM2's weights are normalised once for many passes, and gradients go back through the normalisation once."""

import copy
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl.engine.gradients import GradientSum
from sidactl.nets import edm2
from sidactl.recipes import Execution
from sidactl.training import distillation as training_distillation
from tests.worlds import TINY_EDM2, distillation, gradients_of, weights


class Wide(torch.nn.Module):
    """A block with what `holding` asks of a net, in float64."""

    compute_dtype = torch.float64

    def __init__(self) -> None:
        super().__init__()
        self.block = edm2.Block(TINY_EDM2, 8, 16, 8, side="decoder", attention=True)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y: Tensor = self.block(x, emb)
        return y


@pytest.mark.parametrize("num_passes", [1, 3])
def test_gradients_through_held_weights_are_those_through_weights_in_float64(num_passes: int) -> None:
    torch.manual_seed(0)
    net = Wide().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    inputs = [(torch.randn(2, 8, 8, 8).double(), torch.randn(2, 8).double()) for _ in range(num_passes)]
    found = []
    for held in (False, True):
        with edm2.holding(net, trains=True) if held else nullcontext():  # type: ignore[arg-type]  # a part of a net
            gradients = GradientSum(net, num_passes)
            for x, emb in inputs:
                gradients.add(gradients.of(net(x, emb).square().sum()))
        gradients.finish()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == dict(net.named_parameters()).keys()
    for name, usual in found[0].items():
        assert float((found[1][name] - usual).norm()) <= 1e-12 * float(usual.norm()), name


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[edm2.MPConv]:
    """Every layer whose weights are normalised, each time that they are."""
    found: list[edm2.MPConv] = []
    usual = edm2.MPConv.prepared

    def noting(module: edm2.MPConv, dtype: torch.dtype) -> Tensor:
        found.append(module)
        return usual(module, dtype)

    monkeypatch.setattr(edm2.MPConv, "prepared", noting)
    return found


@pytest.mark.parametrize("share", [False, True])
def test_weights_are_normalised_once_an_update_and_the_teachers_once_for_ever(
    share: bool, prepared: list[edm2.MPConv]
) -> None:
    run = distillation(TINY_EDM2, generator_from_nimg=None, num_accumulation_rounds=4, share_fakes=share)
    nets = {"teacher": run.teacher, "fake_score": run.fake_score, "generator": run.generator}
    owner = {module: name for name, net in nets.items() for module in net.modules()}

    def per_layer() -> set[tuple[str, int]]:
        return {(owner[module], count) for module, count in Counter(prepared).items()}

    assert per_layer() == {("teacher", 1)}
    prepared.clear()
    run.step()
    assert per_layer() == {("fake_score", 2), ("generator", 1 if share else 2)}
    assert all(m.held is None for net in (run.fake_score, run.generator) for m in net.modules() if m in owner_of(net))


def owner_of(net: torch.nn.Module) -> set[edm2.MPConv]:
    return {m for m in net.modules() if isinstance(m, edm2.MPConv)}


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [
        ({}, 0.0),
        ({"share_fakes": True}, 0.0),
        ({"precision": "bf16"}, 0.0),
        ({"num_accumulation_rounds": 4}, 1e-6),
        ({"num_accumulation_rounds": 4, "share_fakes": True}, 1e-6),
    ],
)
def test_updates_have_the_gradients_that_they_had_when_every_pass_normalised(
    changed: dict[str, Any], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one pass to the bit; sums of several go back in float64 instead of one by one in float32."""
    found = []
    for held in (False, True):
        with monkeypatch.context() as patch:
            if not held:
                patch.setattr(training_distillation, "holding", lambda net, trains=False: nullcontext())
            run = distillation(TINY_EDM2, generator_from_nimg=None, forced_normalization="intended", **changed)
            run.nimg = 10**6
            with torch.no_grad():  # away from the teacher, whose difference would be rounding noise alone
                for parameter in run.fake_score.parameters():
                    parameter.mul_(1.1).add_(0.05 * torch.randn(parameter.shape))
            gradients: list[Tensor] = []
            for side in run.sides.values():
                net = side.modules[side.name]
                side.optimizer.register_step_pre_hook(
                    lambda *_, net=net, gradients=gradients: gradients.append(gradients_of(net))
                )
            run.step()
            found.append(gradients)
    assert len(found[0]) == len(found[1]) == 2
    for usual, once in zip(*found, strict=True):
        assert float((once - usual).norm()) <= tolerance * float(usual.norm())


def test_a_copy_of_a_net_whose_weights_are_held_has_weights_of_its_own() -> None:
    run = distillation(TINY_EDM2)
    assert all(m.held is not None for m in owner_of(run.teacher))
    assert all(m.held is None for m in owner_of(copy.deepcopy(run.teacher)))


def test_activations_computed_anew_take_what_was_held() -> None:
    options: dict[str, Any] = {"generator_from_nimg": None, "share_fakes": True}
    runs = [distillation(TINY_EDM2, execution=e, **options) for e in (None, Execution(checkpoint_activations=True))]
    for run in runs:
        run.step()
        run.step()
    assert torch.equal(weights(runs[0].generator), weights(runs[1].generator))
