"""The adversarial part of the SiD family; what all methods share is in distillation.py."""

from dataclasses import dataclass

from sidactl.recipes.fields import JsonFields, at_least, not_negative, within


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
