"""Recipes of distribution matching: Diff-Instruct, DMD, DMD2 (as published, and FastGen's), f-distill."""

from dataclasses import dataclass, fields, replace
from typing import Literal, Self

from sidactl.recipes.distillation import FakeScoreRecipe, FurtherRecipe, HeadsRecipe
from sidactl.recipes.fields import at_least, below_one, finite, positive, refusal
from sidactl.recipes.noise_levels import NoiseLevels

Divergence = Literal["reverse-kl", "forward-kl", "jensen-shannon", "softened-rkl", "hellinger", "jeffreys", "neyman"]

SHARED = "shared"
"""in place of noise levels of its own, a discriminator sees the noisy images of the other losses"""

MOST_PAIRS = 1 << 29
"""as many seeds are kept apart for them"""


@dataclass(frozen=True, kw_only=True)
class MatchingRecipe(FakeScoreRecipe, HeadsRecipe, modes=("diff-instruct", "dmd2", "dmd2-fastgen", "f-distill")):
    """The generator's images move along a direction made of what teacher and fake score make of them.

    Direction kl is weight (g - f), detached, with f and g the images denoised by teacher and fake score.
    """

    direction: Literal["kl", "sid"] = "kl"
    """kl: g - f, without a backward pass through teacher or fake score; sid: the gradient of the SiD loss"""
    alpha: float = 1.0
    """of --direction sid: weight of the second part of the SiD loss"""
    generator_weight: Literal["one", "inverse", "inverse-eps", "inverse-floor"] = "inverse"
    """of each image's direction: one, or over its mean |x - f|, as it is, + 1e-6, or at least 1e-5"""
    loss_unit: Literal["sum", "mean"] = "mean"
    """losses are averaged over pixels, or summed; their gradients differ by that factor, and clipping knows"""
    score_weight: Literal["edm", "x0", "eps"] = "edm"
    """of the fake score's squared error: edm's weight, x0: 1, eps: 1 / sigma^2"""
    generator_time: str = "grid:20,980"
    """noise levels of the direction: uniform:A,B of time, lognormal:MEAN,STD of sigma, or grid:A,B of 0 to 999"""
    score_time: str = "grid:0,999"
    """noise levels of the fake score's loss"""
    discriminator_time: str = SHARED
    """noise levels of the discriminator's images; shared = those of the direction and of the fake score's loss"""
    f_divergence: Divergence = "reverse-kl"
    """its weight on the direction, from the density ratio that the discriminator tells; reverse-kl is none"""
    ratio_rate: float = 0.0
    """how much the mean density ratio of each tenth of the noise levels keeps of its value from step to step"""
    generator_every: int = 1
    """the generator is stepped in one of so many steps"""
    order: Literal["score-first", "generator-first"] = "score-first"
    """which of its two updates a step begins with"""
    alternate: bool = False
    """the fake score rests in the steps of the generator"""
    share: Literal["nothing", "labels", "images"] = "nothing"
    """what both updates of a step see alike"""
    direction_dropout: bool = False
    """teacher and fake score have dropout in the direction, too, under one mask"""
    discriminator_maps: int = 0
    """of the teacher's features how many, from the coarsest on, have a head; 0 = all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "generator_every")
        at_least(self, 0, "discriminator_maps")
        finite(self, "alpha")
        if self.alternate and self.generator_every == 1:
            raise refusal("generator_every", "at least 2 with --alternate, or the fake score never trains", 1)
        below_one(self, "ratio_rate")
        for field in ("generator_time", "score_time", "discriminator_time"):
            if (text := getattr(self, field)) != SHARED or field != "discriminator_time":
                NoiseLevels.parse(text, field)
        if self.f_divergence != "reverse-kl" and self.discriminator_features == "none":
            raise refusal("f_divergence", "reverse-kl where no discriminator tells density ratios", self.f_divergence)
        if self.f_divergence != "reverse-kl" and self.discriminator_time != SHARED:
            raise refusal("discriminator_time", "shared, so that its ratios are of the same images", "its own")
        if self.discriminator_features == "detector":
            raise refusal("discriminator_features", f"none, fake-score or teacher in mode {self.mode}", "detector")
        if self.augment_p and self.discriminator_features != "none":
            raise refusal("augment_p", "0 beside a discriminator, which sees images as they are", self.augment_p)
        if self.direction_dropout and self.dropout and self.teacher_guidance != 1:
            raise refusal("direction_dropout", "off with --teacher-guidance", True)
        if self.direction == "sid" and self.direction_dropout:
            raise refusal("direction_dropout", "off with --direction sid", True)

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if self.direction == "kl":
            found["alpha"] = "--direction kl"
        else:
            found |= dict.fromkeys(("generator_weight", "direction_dropout"), "--direction sid")
        if self.discriminator_features == "none":
            names = "discriminator_loss", "discriminator_lr", "discriminator_scale", "discriminator_time", "lambda_adv"
            found |= dict.fromkeys(names, "--discriminator-features none")
        if self.discriminator_features != "teacher":
            found["discriminator_maps"] = f"--discriminator-features {self.discriminator_features}"
        if not self.dropout:
            found.setdefault("direction_dropout", "--dropout 0")
        if self.f_divergence == "reverse-kl":
            found["ratio_rate"] = "--f-divergence reverse-kl"
        if self.alternate:
            found |= dict.fromkeys(("order", "share"), "--alternate")
        return found

    def unusual(self) -> list[str]:
        lines, num_steps = super().unusual(), self.duration_nimg // self.batch_size
        if self.generator_every > 1 and num_steps <= self.generator_every:
            lines.append(f"the generator is stepped once: in one of {self.generator_every:,} steps, of {num_steps:,}")
        return lines

    def with_noise_of(self, P_mean: float, P_std: float) -> Self:
        levels = f"lognormal:{P_mean:g},{P_std:g}"
        return replace(self, score_time=levels) if self.score_time.startswith("lognormal") else self

    @property
    def graphs(self) -> tuple[int, int]:
        # No graph goes back through the networks that a detached direction is made of, but to what heads see.
        if self.direction == "sid":
            return 2, 1
        return {"none": (1, 0), "fake-score": (2, 0), "teacher": (1, 1)}[self.discriminator_features]

    def fake_score_updates(self, nimg: int) -> int:
        resting = self.generator_nimg(nimg) // self.batch_size if self.alternate else 0
        return super().fake_score_updates(nimg) - resting

    @property
    def generator_nimg_share(self) -> float:
        return 1 / self.generator_every


@dataclass(frozen=True, kw_only=True)
class PairedRecipe(MatchingRecipe, modes=("dmd",)):
    """Distribution matching, and a regression on pairs of noise and what the teacher's ODE makes of it (DMD)."""

    regression: Literal["mse", "lpips"] = "mse"
    """distance of the generator's image to the teacher's: mse, or lpips (package lpips), of images at 224 pixels"""
    lambda_reg: float = 0.25
    """weight of that distance"""
    num_pairs: int = 10_000
    """images that the teacher draws first, far from the seeds of scores"""

    _hidden = frozenset(f.name for f in fields(HeadsRecipe)) - frozenset(f.name for f in fields(FurtherRecipe)) | {
        *("discriminator_time", "discriminator_maps", "f_divergence", "ratio_rate"),
        *("steps", "step_levels", "step_noise", "step_graphs"),
        *("teacher_guidance", "score_guidance", "guidance_interval", "score_label_dropout"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_pairs")
        positive(self, "lambda_reg")
        if self.num_pairs > MOST_PAIRS:
            raise refusal("num_pairs", f"at most {MOST_PAIRS}", self.num_pairs)
        if self.dropout:
            raise refusal("dropout", "0 in mode dmd, where the generator draws twice as many images", self.dropout)

    @property
    def needs(self) -> str:
        return "pairs"

    @property
    def needs_images(self) -> bool:
        return False

    @property
    def graphs(self) -> tuple[int, int]:
        own, frozen = super().graphs
        return own + 1, frozen
