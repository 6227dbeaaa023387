"""Recipe of Diffusion-GAN: the adversarial part alone, at noise levels whose maximum adapts."""

from dataclasses import dataclass
from typing import Literal

from sidactl.recipes.distillation import FakeScoreRecipe, FurtherRecipe
from sidactl.recipes.fields import at_least, positive, within


@dataclass(frozen=True, kw_only=True)
class DiffusionGanRecipe(FakeScoreRecipe, FurtherRecipe, modes=("diffusion-gan",)):
    """No distillation: the generator against a discriminator of noisy images alone. Source: 2206.02262.

    The discriminator is the encoder of what would be the fake score, as in SiDA; its decoder does not train.
    """

    time_priority: Literal["priority", "uniform"] = "priority"
    """of the times that images are diffused to: later ones more often, or all alike; half of all stay 0"""
    sign_target: float = 0.6
    """the share of real images told as real, less that told as fake, above which the largest time grows"""
    adapt_every: int = 4
    """steps from one adaptation of the largest time to the next"""
    adapt_kimg: float = 100.0
    """thousands of images in which the largest time can go from its least, 10, to its most, 1000"""

    first_stage = "discriminator"

    # There is no denoising loss and no teacher in it.
    _hidden = frozenset({"augment_p", "logvar", "teacher_guidance", "score_guidance", "guidance_interval"}) | {
        "score_label_dropout"
    }

    @property
    def graphs(self) -> tuple[int, int]:
        return 2, 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "adapt_every")
        within(self, ["sign_target"], "from -1 to 1", lambda got: -1 <= got <= 1)
        positive(self, "adapt_kimg")
