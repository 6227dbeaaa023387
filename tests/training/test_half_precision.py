"""Float16 gradients at the batch and shapes of every recipe that trains in it do not vanish."""

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl import catalog
from sidactl.recipes import Execution, NetSpec, Recipe, override
from sidactl.training import made_up
from sidactl.training.updates import IMAGES_PER_LOSS_SCALE, LossScale
from tests.worlds import compute_gradients

CPU = torch.device("cpu")
NUM_IMAGES = 4
SIDE = 16


def recipes() -> dict[str, tuple[Recipe, NetSpec]]:
    """Of each combination of batch, shape and weights of the losses in the catalog one teacher, with its recipe."""
    found: dict[Any, tuple[str, Recipe, NetSpec]] = {}
    for teacher in catalog.TEACHERS.values():
        for mode, recipe in teacher.recipes.items():
            if recipe.precision == "fp16" and mode != "sid2a":
                net = teacher.net
                loss = recipe.adversarial, recipe.lambda_sid, recipe.alpha
                shape = net.architecture, net.img_resolution, net.model_channels, net.channel_mult, net.sigma_data
                key = mode, recipe.batch_size, shape, repr(loss)
                found.setdefault(key, (f"{teacher.name}-{mode}", recipe, net))
    return {name: (recipe, net) for name, recipe, net in found.values()}


RECIPES = recipes()
QUICK = [next(n for n in RECIPES if n.startswith(of) and n.endswith("sida")) for of in ("edm-imagenet64", "edm2-s")]
"""one of each architecture; the others are slow"""


def test_scales_are_powers_of_two_from_the_batch() -> None:
    for recipe, _ in RECIPES.values():
        scale = float(LossScale(recipe.batch_size, CPU).value)
        assert math.log2(scale).is_integer()
        assert 1 <= scale * IMAGES_PER_LOSS_SCALE / recipe.batch_size < 2


@cache
def gradient(name: str, turn: Any, precision: str) -> Tensor:
    """Of one pass of an update at the recipe's loss scale, of a narrow net whose losses are divided by as much.

    The batch is as much larger than the published one as the narrow net's deepest features are fewer.
    """
    published, net = RECIPES[name]
    sizes: dict[str, Any] = {"img_resolution": SIDE, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
    sizes |= {"model_channels": 32, "channels_per_head": 32, "label_dim": min(10, net.label_dim), "dropout": 0.0}
    narrow = dataclasses.replace(net, **sizes)
    deepest = (net.img_resolution >> (len(net.channel_mult) - 1)) ** 2 * net.model_channels * net.channel_mult[-1]
    fewer = max(1, deepest // ((SIDE // 2) ** 2 * 32 * 2))
    batch = {"batch_size": published.batch_size * fewer, "precision": precision, "dropout": 0.0, "augment_p": 0.0}
    batch |= {"num_accumulation_rounds": published.batch_size * fewer // NUM_IMAGES}
    reached = {"generator_from_nimg": 1} | ({"adversarial_from_nimg": 2} if published.adversarial else {})
    torch.manual_seed(0)
    run = made_up.distillation_of(override(published, batch | reached), Execution(), narrow, CPU)
    run.passes, run.nimg = [range(1)], 10**7
    with torch.no_grad():  # away from the teacher, or the losses would be differences of nothing
        for parameter in run.fake_score.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for scale in run.skipped.loss_scales.values():
        scale.value.fill_(float(LossScale(published.batch_size, CPU).value))
    compute_gradients(run, turn)
    found = [p.grad for module in run.sides[turn].modules.values() for p in module.parameters() if p.grad is not None]
    return torch.cat([each.flatten().double() for each in found])


@pytest.mark.parametrize("turn", ["fake_score", "generator"])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES])
def test_a_gradient_in_float16_points_where_float32s_does(name: str, turn: str) -> None:
    exact, half = gradient(name, turn, "fp32"), gradient(name, turn, "fp16")
    assert torch.isfinite(half).all()
    assert float(torch.nn.functional.cosine_similarity(exact, half, dim=0)) > 0.95
    vanished = (half == 0) & (exact != 0)
    assert float(exact[vanished].norm() / exact.norm()) < 0.01
