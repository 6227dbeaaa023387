"""Memory estimates beside what is kept in earnest, part by part: tensors are counted, none is computed."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sidactl import catalog, nets
from sidactl.engine.configure import DTYPES
from sidactl.nets.edm2 import MPConv, holding
from sidactl.recipes import Execution, Memory, NetSpec
from sidactl.recipes.memory import kept_values
from tests.worlds import TINY, TINY_EDM2, distillation

TEACHERS = ["tiny-digits", "edm-cifar10-uncond", "edm-ffhq64", "edm-imagenet64", "edm2-xs", "edm2-m"]
OWN = {
    "narrow": {"model_channels": 64, "channel_mult": (1, 3), "num_blocks": 1, "attn_resolutions": ()},
    "deep": {"model_channels": 64, "channel_mult": (2, 2, 4), "num_blocks": 4, "attn_resolutions": (16,)},
}


def saved_bytes(spec: NetSpec, precision: str, num_images: int, *, is_trained: bool, dropout: float = 0.0) -> int:
    """What autograd keeps of a forward pass, without weights; a CPU's fused attention keeps what a GPU's does."""
    found: dict[int, tuple[int, Tensor]] = {}
    with FakeTensorMode():
        net = nets.build(spec).train().requires_grad_(is_trained)
        net.set_dropout(dropout)
        net.compute_dtype = DTYPES[precision]
        own = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers())}

        def kept(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage.nbytes(), tensor
            return tensor

        x = torch.zeros(num_images, spec.img_channels, *[spec.img_resolution] * 2, requires_grad=True)
        labels = torch.zeros(num_images, spec.label_dim) if spec.label_dim else None
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            net(x, torch.ones(num_images), labels)
    return sum(num_bytes for num_bytes, _ in found.values())


def per_image(*arguments: Any, **options: Any) -> float:
    return (saved_bytes(*arguments, 4, **options) - saved_bytes(*arguments, 2, **options)) / 2


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", TEACHERS)
def test_activations_are_within_5_percent_of_what_is_kept(name: str, is_trained: bool) -> None:
    spec = catalog.teacher(name).net
    precision = catalog.recipe_for(name, "sida").precision
    size = 2 if precision == "fp16" else 4
    kept = per_image(spec, precision, is_trained=is_trained)
    assert size * kept_values(spec, is_trained=is_trained) == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("shape", OWN)
@pytest.mark.parametrize("name", ["edm-cifar10-uncond", "edm-imagenet64", "edm2-xs"])
def test_activations_of_other_shapes_are_within_5_percent_as_well(name: str, shape: str) -> None:
    spec = dataclasses.replace(catalog.teacher(name).net, img_resolution=16, label_dim=0, augment_dim=0, **OWN[shape])
    kept = per_image(spec, "fp32", is_trained=True)
    assert 4 * kept_values(spec, is_trained=True) == pytest.approx(kept, rel=0.05)


def test_activations_with_dropout_are_within_5_percent() -> None:
    spec = catalog.teacher("edm-cifar10-uncond").net
    recipe = dataclasses.replace(catalog.recipe_for("edm-cifar10-uncond", "sida"), dropout=0.13)
    for_one = Execution(batch_per_device=recipe.batch_size // recipe.num_accumulation_rounds)
    estimate = Memory.of(recipe, spec, 0, for_one).activation_bytes / (for_one.batch_per_device or 1)
    trained, frozen = (per_image(spec, "fp32", is_trained=is_trained) for is_trained in (True, False))
    dropped = per_image(spec, "fp32", is_trained=True, dropout=0.13)
    assert estimate == pytest.approx(trained + dropped + frozen, rel=0.05)


@pytest.mark.parametrize("name", ["edm2-xs", "edm2-m", "edm2-xxl"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_what_edm2_holds_normalised_is_within_5_percent(name: str, precision: str) -> None:
    spec = catalog.teacher(name).net
    with torch.device("meta"):
        net = nets.build(spec)
    net.compute_dtype = DTYPES[precision]
    with holding(net):
        held = sum(m.held.nbytes for m in net.modules() if isinstance(m, MPConv) and m.held is not None)
    num_parameters = sum(p.numel() for p in net.parameters())
    recipe = dataclasses.replace(catalog.recipe_for(name, "sida"), precision=precision)
    estimated = [Memory.of(recipe, spec, number).activation_bytes for number in (0, num_parameters)]
    assert estimated[1] - estimated[0] == pytest.approx(3 * held, rel=0.05)


def num_bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
def test_states_and_gradients_are_within_5_percent(spec: NetSpec) -> None:
    run = distillation(spec, generator_from_nimg=None, num_accumulation_rounds=4)
    num_parameters = sum(p.numel() for p in run.teacher.parameters())
    estimate = Memory.of(run.recipe, spec, num_parameters)
    each = (run.teacher, run.fake_score, run.generator, run.ema)
    states = [s for side in run.sides.values() for state in side.optimizer.state.values() for s in state.values()]
    held = num_bytes(p for net in each for p in net.parameters()) + num_bytes(states)
    assert estimate.state_bytes == pytest.approx(held, rel=0.05)
    for net in each:
        assert num_bytes(net.parameters()) == pytest.approx(estimate.state_bytes / 8, rel=0.05)
    total, _ = run._gradients("generator", run.passes, None)
    sums = num_bytes(total._sums.values())
    total.finish()
    gradients = num_bytes(p.grad for p in run.generator.parameters() if p.grad is not None)
    assert estimate.gradient_bytes == pytest.approx(sums + gradients, rel=0.05)
    on_cpu = Memory.of(run.recipe, spec, num_parameters, Execution(ema_on_cpu=True))
    assert estimate.state_bytes - on_cpu.state_bytes == pytest.approx(num_bytes(run.ema.parameters()), rel=0.05)
