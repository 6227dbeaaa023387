"""Distillations on random weights and made-up data, a step at any stage of them, for whoever times or checks steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sidactl import catalog, nets
from sidactl.data.order import DataOrder
from sidactl.errors import SidaError
from sidactl.methods.base import Pairs
from sidactl.recipes import MODES, Execution, NetSpec, PairedRecipe, Recipe, SamplingForm, SidRecipe, override
from sidactl.training import batches as training_batches
from sidactl.training.distillation import Distillation

EAGER = SamplingForm()
"""float32 in the usual order of memory, operation by operation"""

STAGE_NIMG = {"fake score": 500_000, "SiD": 1_500_000, "SiDA": 2_500_000}
"""images seen, of the recipe that `recipe_of` makes, at which each stage is"""

_MADE_UP_IMAGES = 256


def recipe_of(
    teacher: str, mode: str, batch_size: int | None, num_rounds: int, num_steps: int, overrides: Mapping[str, Any]
) -> tuple[Recipe, NetSpec]:
    """The catalog's recipe with all stages in reach, in so many passes of so many images, and the teacher's net.

    batch_size: images per pass, by default the recipe's micro-batch. num_steps: is refused below one, too. Raises
    SidaError for counts below one, a teacher that the catalog does not have, or a mode without recipe.
    """
    for flag, count in (("--batch-size", batch_size), ("--rounds", num_rounds), ("--steps", num_steps)):
        if count is not None and count < 1:
            raise SidaError(f"{flag} must be >= 1, got {count}", f"Pass {flag} 1 or more.")
    known = {name: entry for name, entry in catalog.TEACHERS.items() if entry.recipes}
    if teacher not in known:
        raise SidaError(f"unknown teacher {teacher!r}", f"Use one of {', '.join(known)}.")
    recipes: Mapping[str, Recipe] = {str(name): recipe for name, recipe in known[teacher].recipes.items()}
    if mode in MODES and mode not in recipes:
        what = f"steps of mode {mode} are not timed here, those of {', '.join(recipes)} are"
        raise SidaError(what, "See examples/bench_methods.py for all modes side by side.")
    if mode not in recipes:
        raise SidaError(f"{teacher} has no recipe of mode {mode!r}", f"It has {', '.join(recipes)}.")
    recipe = override(recipes[mode], overrides)
    pass_size = batch_size or recipe.batch_size // recipe.num_accumulation_rounds
    reached = {"generator_from_nimg": 1_000_000} | (
        {"adversarial_from_nimg": 2_000_000} if isinstance(recipe, SidRecipe) and recipe.adversarial else {}
    )
    sizes = {"batch_size": pass_size * num_rounds, "num_accumulation_rounds": num_rounds}
    return override(recipe, reached | sizes), known[teacher].net


class _MadeUp(training_batches.ClassesAlone):
    """Images of noise, or latents, with classes in turn. Implements `ImageSource`."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__(spec.label_dim, [index % max(spec.label_dim, 1) for index in range(_MADE_UP_IMAGES)])
        self.is_latents = spec.img_channels == 4
        shape = (_MADE_UP_IMAGES, spec.img_channels * (2 if self.is_latents else 1), *[spec.img_resolution] * 2)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._items = pixels / 256 if self.is_latents else pixels

    def images(self, indices: Any) -> Tensor:
        return self._items[torch.as_tensor(indices)]


class _MadeUpPairs:
    """Images of noise beside other noise. Implements `PairSource`."""

    num_pairs = _MADE_UP_IMAGES

    def __init__(self, spec: NetSpec, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (self.num_pairs, spec.img_channels, spec.img_resolution, spec.img_resolution)
        self._noise, self._images = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self._labels = torch.zeros(self.num_pairs, spec.label_dim, device=device)
        self._labels[:, :1] = 1

    def pairs(self, indices: Tensor) -> Pairs:
        return Pairs(self._noise[indices], self._labels[indices], self._images[indices])


def in_setting(recipe: Recipe, setting: SamplingForm) -> tuple[Recipe, Execution]:
    """The recipe in this precision, and how it is carried out in this form."""
    execution = Execution(compile=setting.compile, channels_last=setting.channels_last)
    return override(recipe, {"precision": setting.precision}), execution


def batches_of(recipe: Recipe, spec: NetSpec, device: torch.device) -> training_batches.DatasetBatches:
    """Batches of the made-up images."""
    return training_batches.DatasetBatches(
        _MadeUp(spec),
        DataOrder(_MADE_UP_IMAGES, recipe.seed),
        batch_size=recipe.batch_size,
        num_rounds=recipe.num_accumulation_rounds,
        seed=recipe.seed,
        device=device,
        pairs=_MadeUpPairs(spec, device) if isinstance(recipe, PairedRecipe) else None,
    )


def distillation_of(recipe: Recipe, execution: Execution, spec: NetSpec, device: torch.device) -> Distillation:
    """From a teacher with random weights, none of which is zero, so that no kernel has it easier than in earnest."""
    with torch.device(device):
        teacher = nets.build(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
    teacher.set_dropout(0.0)
    return Distillation(recipe, teacher, None, batches_of(recipe, spec, device), execution)


def step(training: Distillation, stage: str) -> None:
    """A step at this stage of a recipe that `recipe_of` has made."""
    training.nimg = STAGE_NIMG[stage]
    assert training.stage() == stage
    training.step()
