"""The methods of distillation, a file for each paper and for what they share. No optimiser, no checkpoint."""

from collections.abc import Callable

import torch

from sidactl.methods.add import Add
from sidactl.methods.base import Distance, Method, TrainingDetector
from sidactl.methods.diffusion_gan import DiffusionGan
from sidactl.methods.discriminator import discriminator_loss
from sidactl.methods.dmd import Matching, Paired
from sidactl.methods.fd_loss import FdLoss
from sidactl.methods.score_losses import fake_score_loss
from sidactl.methods.sid import Sid, adversarial_generator_loss, sid_generator_loss
from sidactl.recipes import Mode, NetSpec, Recipe

__all__ = ["Method", "adversarial_generator_loss", "discriminator_loss", "fake_score_loss", "of", "sid_generator_loss"]

METHODS: dict[Mode, Callable[..., Method]] = {
    "sid": Sid,
    "sida": Sid,
    "sid2a": Sid,
    "diff-instruct": Matching,
    "dmd": Paired,
    "dmd2": Matching,
    "dmd2-fastgen": Matching,
    "f-distill": Matching,
    "add": Add,
    "ladd": Add,
    "diffusion-gan": DiffusionGan,
    "fd-loss": FdLoss,
}
"""by the mode that names them"""


def of(recipe: Recipe, spec: NetSpec, trained_on: TrainingDetector | Distance | None = None) -> Method:
    """The method of a recipe's mode for a teacher of this shape; its heads start from the recipe's seed.

    trained_on: the detector of a recipe that trains on one, or the distance of one that regresses by it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return METHODS[recipe.mode](recipe, spec, *([trained_on] if trained_on else []))
