"""Recipes of SiD, SiDA and SiD2A; what all methods share is in distillation.py."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from sidactl.recipes.distillation import SID_MODES, FakeScoreRecipe
from sidactl.recipes.fields import JsonFields, at_least, finite, not_negative, positive, refusal, within


@dataclass(frozen=True, kw_only=True)
class Adversarial(JsonFields):
    """The adversarial part of SiDA. Source: SiDA (2410.14919), eqs. 7-10, and the published run scripts."""

    lambda_adv: float = 0.01
    """scale of the generator's adversarial term"""
    discriminator_scale: float = 1.0
    """scale of the discriminator loss; 100 in the EDM2 runs"""
    adversarial_from_nimg: int = 200_000
    """use the adversarial terms only after more than this many images"""
    joint_weight: float = 0.5
    """factor on both generator terms while the adversarial one is in use (eq. 8)"""
    clip_gradient_value: float | None = 1.0
    """each element of the fake score's gradient is clipped to +- this; EDM runs only, not in the paper"""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "lambda_adv", "discriminator_scale", "joint_weight")
        at_least(self, 0, "adversarial_from_nimg")
        within(self, ["clip_gradient_value"], "positive or none", lambda got: got > 0)


@dataclass(frozen=True, kw_only=True)
class SidRecipe(FakeScoreRecipe, modes=SID_MODES):
    """Of the SiD family: `sid` has no adversarial part, `sida` has one, `sid2a` too, and starts from a generator."""

    alpha: float
    """weight of the second part of the SiD loss (eq. 6)"""
    adversarial: Adversarial | None
    tmax: int = 800
    """largest time, in thousandths of the noise schedule, at which the generator's output is diffused"""
    lambda_sid: float = 100.0
    """scale of the SiD term; 0 leaves the adversarial one alone"""
    P_mean: float = -1.2
    """mean of ln sigma in the fake-score loss"""
    P_std: float = 1.2
    """standard deviation of ln sigma in the fake-score loss"""
    share_fakes: bool = False
    """both updates of a step take the same generated images, as Algorithm 1 prints; the published code draws twice"""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "P_std")
        not_negative(self, "lambda_sid")
        if not self.lambda_sid and not (self.adversarial and self.adversarial.lambda_adv):
            raise refusal("lambda_sid", "positive where no adversarial term trains the generator", self.lambda_sid)
        within(self, ["tmax"], "in (0, 1000]", lambda got: 0 < got <= 1000)
        finite(self, "alpha", "P_mean")
        assert (self.adversarial is None) == (self.mode == "sid"), "sid has no adversarial part, the others do"

    @property
    def needs_images(self) -> bool:
        return self.adversarial is not None

    def with_noise_of(self, P_mean: float, P_std: float) -> Self:
        return dataclasses.replace(self, P_mean=P_mean, P_std=P_std)

    def lasting(self, duration_nimg: int) -> Self:
        changed = super().lasting(duration_nimg)
        if (part := self.adversarial) is None:
            return changed
        from_nimg = part.adversarial_from_nimg
        scaled = from_nimg and max(round(from_nimg * duration_nimg / self.duration_nimg), 1)
        return dataclasses.replace(changed, adversarial=dataclasses.replace(part, adversarial_from_nimg=scaled))

    def is_adversarial(self, nimg: int) -> bool:
        """Whether the generator's loss has its adversarial term in the step that begins after so many images."""
        return self.adversarial is not None and nimg > self.adversarial.adversarial_from_nimg

    def stages(self) -> dict[str, int | None]:
        if self.adversarial is None:
            return super().stages()
        both = self._first(lambda nimg: self.trains_generator(nimg) and self.is_adversarial(nimg))
        return super().stages() | {"adversarial part": both}

    def unusual(self) -> list[str]:
        lines = super().unusual()
        if not 0 <= self.alpha <= 2:
            lines.append(f"alpha is {self.alpha:g}; values from 0 to 2 are known, 1.0 and 1.2 the published ones")
        return lines
