"""Micro-batches that go through the nets together, with the dropout and augmentation that each would have alone."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sidactl.data.augment import augmentation
from sidactl.nets import edm
from sidactl.nets.dropout import dropout, masks_of, replayed
from sidactl.noise import JoinedDraws
from sidactl.recipes import Execution, NetSpec
from sidactl.training.batches import SeededDraws
from tests.worlds import TINY, TINY_EDM2, compute_gradients, distillation, gradients_of, weights

CPU = torch.device("cpu")
ORDERS = [torch.contiguous_format, torch.channels_last]


def alone(x: Tensor, seeds: list[int], size: int, layers: int) -> list[list[Tensor]]:
    """Of each micro-batch, what some layers of dropout make of it by itself."""
    parts, found = x.split(size), []
    for index, seed in enumerate(seeds):
        torch.manual_seed(seed)
        own = torch.cat(parts[index :: len(seeds)])
        found.append([torch.nn.functional.dropout(own, 0.3) for _ in range(layers)])
    return found


@pytest.mark.parametrize("order", ORDERS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_masks_are_those_of_each_micro_batch_by_itself(repeats: int, order: torch.memory_format) -> None:
    """repeats: 2 where reals lie behind the fakes of all micro-batches."""
    seeds, size = [5, 6, 7], 2
    x = torch.randn(repeats * 3 * size, 4, 6, 6).to(memory_format=order)
    expected = alone(x, seeds, size, layers=2)
    with masks_of(seeds, size, CPU):
        for layer in range(2):
            got = dropout(x, 0.3, True)
            assert got.is_contiguous(memory_format=order)
            for index in range(3):
                assert torch.equal(torch.cat(got.split(size)[index::3]), expected[index][layer])
        assert dropout(x, 0.3, False) is x


def test_masks_are_replayed_where_activations_are_computed_anew() -> None:
    weight = torch.randn(6, 4, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return dropout(dropout(x * weight, 0.5, True).exp(), 0.5, True)

    found = []
    for anew in (False, True):
        with torch.random.fork_rng(devices=[]), masks_of([1, 2, 3], 2, CPU):
            x = torch.ones(6, 4)
            for _ in range(2):
                x = checkpoint(layer, x, use_reentrant=False, context_fn=replayed) if anew else layer(x)
            found.append(torch.autograd.grad(x.sum(), weight)[0])
    assert torch.equal(*found)


def test_augmentation_is_that_of_each_micro_batch_by_itself() -> None:
    """Fakes and then reals, of the same streams."""
    spec = dataclasses.replace(TINY, augment_dim=9)
    pipe, images = augmentation(0.5, spec), [torch.randn(6, 1, 8, 8) for _ in range(2)]
    joined = JoinedDraws([SeededDraws(seed, CPU) for seed in (1, 2, 3)])
    together = [pipe(each, joined) for each in images]
    by_itself = [SeededDraws(seed, CPU) for seed in (1, 2, 3)]
    for (got, labels), each in zip(together, images, strict=True):
        found = [pipe(part, draws) for part, draws in zip(each.split(2), by_itself, strict=True)]
        assert torch.equal(got, torch.cat([part for part, _ in found]))
        assert labels is not None
        assert torch.equal(labels, torch.cat([own for _, own in found if own is not None]))


@pytest.mark.parametrize("changed", [{"dropout": 0.3}, {"augment_p": 0.5}], ids=["dropout", "augmentation"])
@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
@pytest.mark.parametrize("anew", [False, True])
def test_gradients_do_not_depend_on_how_many_micro_batches_share_a_pass(
    spec: NetSpec, changed: dict[str, Any], anew: bool
) -> None:
    recorded = []
    for at_once in (1, 2, 4):
        options = {"generator_from_nimg": None, "num_accumulation_rounds": 4} | changed
        execution = Execution(batch_per_device=2 * at_once, checkpoint_activations=anew)
        run = distillation(spec, execution=execution, **options)
        assert len(run.passes) == 4 // at_once
        run.nimg = 10**6
        with torch.no_grad():  # away from the teacher, whose difference would be rounding noise alone
            for parameter in run.fake_score.parameters():
                parameter.mul_(1.1)
        compute_gradients(run, "fake_score")
        psi = gradients_of(run.fake_score)
        compute_gradients(run, "generator")
        recorded.append((psi, gradients_of(run.generator)))
    for other in recorded[1:]:
        for one, several in zip(recorded[0], other, strict=True):
            assert float((several - one).norm()) < 1e-5 * float(one.norm())


def test_a_step_with_dropout_leaves_the_random_state_alone() -> None:
    run = distillation(generator_from_nimg=None, num_accumulation_rounds=4, dropout=0.2)
    run.passes = [range(4)]
    before, state = weights(run.generator), torch.get_rng_state()
    run.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(weights(run.generator), before)


def test_dropout_is_compiled_as_one_graph_with_the_net() -> None:
    torch._dynamo.reset()
    block = edm.UNetBlock(TINY, 8, 8, 8)
    block.dropout = 0.5
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert compiled(torch.randn(2, 8, 4, 4), torch.randn(2, 8)).shape == (2, 8, 4, 4)
