"""Recipe of post-training on a Fréchet distance."""

from dataclasses import dataclass

from sidactl.recipes.distillation import FurtherRecipe
from sidactl.recipes.fields import below_one


@dataclass(frozen=True, kw_only=True)
class FdLossRecipe(FurtherRecipe, modes=("fd-loss",)):
    """A finished generator goes on by the Fréchet distance of its own features. Source: FD-loss (2604.28190).

    It is here to keep everybody honest: the score it trains on, and most others by that detector, it wins without
    merit. What it makes is marked as trained on its detector.
    """

    loss_detector: str = "inception"
    """whose features the distance is of"""
    moments_rate: float = 0.9
    """how much mean and covariance of the generated features keep of themselves with every batch"""

    first_stage = "generator"

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self, "moments_rate")

    @property
    def graphs(self) -> tuple[int, int]:
        return 1, 0

    @property
    def trained_on(self) -> str:
        return self.loss_detector

    @property
    def needs_images(self) -> bool:
        return False
