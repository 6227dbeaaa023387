"""Recipes of Adversarial Diffusion Distillation (ADD), and of its latent form (LADD)."""

from dataclasses import dataclass
from typing import Literal

from sidactl.errors import SidaError
from sidactl.recipes.distillation import HeadsRecipe
from sidactl.recipes.fields import below_one, not_negative, refusal, within
from sidactl.recipes.noise_levels import NoiseLevels, sigma_at
from sidactl.recipes.samplers import OneStepSpec

IMAGES_TOGETHER = 8
"""images whose features a head normalises together, at most"""


@dataclass(frozen=True, kw_only=True)
class AddRecipe(HeadsRecipe, modes=("add", "ladd")):
    """The generator denoises real images at a few noise levels; a discriminator and the teacher judge what it makes.

    No training code of either method is published: the formulas are the papers', the numbers ours.
    """

    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """times of the noise levels that the generator starts from, the first one pure noise; sampling goes through them"""
    lambda_distill: float = 2.5
    """scale of the distillation term"""
    distillation_weight: Literal["exponential", "sds", "sds-flat", "nfsd"] = "exponential"
    """of the distillation term, by noise level: exponential or score distillation (sds, sds-flat)"""
    generator_time: str = "uniform:0,1"
    """noise levels at which the teacher judges, as time, ln sigma or a grid: see --discriminator-time"""
    discriminator_time: str = "none"
    """noise levels of what the discriminator sees: uniform:A,B, lognormal:MEAN,STD or grid:A,B; none = clean images"""
    discriminator_detector: str = "dinov2"
    """of --discriminator-features detector: whose features; what is trained on them is not blind to it"""
    r1_gamma: float = 1e-5
    """weight of the penalty on the gradient of the heads' logits of real images at their features"""
    beta1: float = 0.0
    """Adam's momentum for the heads"""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "lambda_distill", "r1_gamma")
        below_one(self, "beta1")
        if not self.lambda_distill and not self.lambda_adv:
            raise refusal("lambda_adv", "above 0 with --lambda-distill 0, or nothing is trained", self.lambda_adv)
        within(self, ["student_times"], "in (0, 1]", lambda got: 0 < got <= 1)
        falling = sorted(set(self.student_times), reverse=True)
        if not self.student_times or list(self.student_times) != falling or self.student_times[0] != 1:
            raise refusal("student_times", "falling from 1", self.student_times)
        if len(self.levels) > 1 and self.sigma_init <= self.levels[1]:
            wanted = f"above the noise level of the second of student_times, {self.levels[1]:.3g}"
            raise refusal("sigma_init", wanted, self.sigma_init)
        if self.distillation_weight == "nfsd":
            raise SidaError(
                "nfsd needs a negative condition, which a network of classes has not: without one it is guidance alone",
                "Pass --distillation-weight exponential, or sds.",
            )
        if self.discriminator_features not in ("teacher", "detector"):
            raise refusal(
                "discriminator_features", f"teacher or detector in mode {self.mode}", self.discriminator_features
            )
        NoiseLevels.parse(self.generator_time, "generator_time")
        if self.discriminator_time != "none":
            NoiseLevels.parse(self.discriminator_time, "discriminator_time")
        if self.discriminator_features == "teacher" and self.discriminator_time == "none":
            raise refusal("discriminator_time", "of noisy images where the teacher's features are seen", "none")
        micro_batch = self.batch_size // self.num_accumulation_rounds
        if micro_batch % self.images_together:
            raise SidaError(
                f"heads normalise {IMAGES_TOGETHER} images together, got micro-batches of {micro_batch}",
                f"Choose --batch-size over --num-accumulation-rounds divisible by {IMAGES_TOGETHER}.",
            )

    first_stage = "heads"

    def idle(self) -> dict[str, str]:
        found = {}
        if self.discriminator_features == "teacher":
            found["discriminator_detector"] = "--discriminator-features teacher"
        if not self.lambda_distill:
            found |= dict.fromkeys(("distillation_weight", "generator_time"), "--lambda-distill 0")
        return found

    @property
    def images_together(self) -> int:
        return min(IMAGES_TOGETHER, self.batch_size // self.num_accumulation_rounds)

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels of `student_times`, the first of them sigma_init."""
        return (self.sigma_init, *(sigma_at(time) for time in self.student_times[1:]))

    @property
    def graphs(self) -> tuple[int, int]:
        return 1, int(self.discriminator_features == "teacher")

    @property
    def trained_on(self) -> str | None:
        return self.discriminator_detector if self.discriminator_features == "detector" else None

    def sampler(self) -> OneStepSpec:
        return OneStepSpec(sigma_init=self.sigma_init, levels=self.levels)
