"""Everything that shapes a distillation run; the published value is the default where there is one."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from sidactl.errors import SidaError
from sidactl.recipes.execution import Execution, Precision
from sidactl.recipes.fields import (
    JsonFields,
    at_least,
    at_most,
    below_one,
    check_seed,
    high_rates,
    in_unit_interval,
    not_negative,
    positive,
    refusal,
    within,
)
from sidactl.recipes.samplers import OneStepSpec

Mode = Literal[
    "sid",
    "sida",
    "sid2a",
    "diff-instruct",
    "dmd",
    "dmd2",
    "dmd2-fastgen",
    "f-distill",
    "add",
    "ladd",
    "diffusion-gan",
    "fd-loss",
]

MODES: tuple[Mode, ...] = get_args(Mode)

SID_MODES: tuple[Mode, ...] = ("sid", "sida", "sid2a")

FROM_GENERATOR: frozenset[Mode] = frozenset({"sid2a", "fd-loss"})
"""modes that start from a generator, not from the teacher"""

EvaluatedBy = Literal["fid", "mind", "kid"]

GUIDANCE_INTERVAL = "two noise levels, the lower first, that reach into 0.002 to 80"


def is_guidance_interval(levels: Sequence[float]) -> bool:
    """Whether these are what GUIDANCE_INTERVAL says."""
    low, high = (*levels, math.nan, math.nan)[:2]
    return len(levels) == 2 and 0 <= low < high < math.inf and low < 80 and high > 0.002


FEW_IMAGES = 5_000
"""images of an evaluation by another score than a Fréchet distance, where no number is asked for"""


@dataclass(frozen=True, kw_only=True)
class Recipe(JsonFields):
    """What shapes a distillation run by any method. The published value is the default where there is one.

    Counts of images end in `_nimg`. The class of a mode adds its method's numbers; `from_json` finds it by the mode.
    """

    _later = frozenset(
        {"evaluate_by", "evaluate_early_nimg", "evaluate_labels", "evaluate_also", "patience", "nonfinite"}
    )

    _counted: ClassVar[Sequence[str]] = (
        "generator_from_nimg",
        "ema_halflife_nimg",
        "evaluate_every_nimg",
        "checkpoint_every_nimg",
    )
    """what another duration changes in proportion"""

    _classes: ClassVar[dict[str, type["Recipe"]]] = {}
    """of each mode"""

    first_stage: ClassVar[str] = "fake score"
    """what trains alone before the generator's time has come"""

    teacher: str
    mode: Mode
    dataset: str
    """name or oid of the dataset: real images (sida, sid2a) and labels"""
    batch_size: int
    """images of one step, over all processes"""
    duration_nimg: int
    """images to train on, in all"""
    generator_lr: float
    """Adam's learning rate for the generator"""
    ema_halflife_nimg: int
    """half-life of the generator's exponential moving average"""
    generator_from_nimg: int | None = 100_000
    """train the generator only after more than this many images; none = from the start"""
    num_accumulation_rounds: int = 1
    """micro-batches that a batch is split into; part of the method, since the adversarial losses average over one"""
    sigma_init: float = 2.5
    """noise level of the generator's input, and its sigma argument"""
    generator_beta1: float = 0.0
    """Adam's momentum for the generator"""
    beta2: float = 0.999
    """Adam's average of squared gradients, of both nets"""
    adam_eps: float = 1e-8
    """Adam's epsilon (1e-8; 1e-6 with --precision fp16)"""
    ema_rampup_ratio: float | None = 0.05
    """the EMA half-life is at most this share of the images seen; None = no ramp-up"""
    dropout: float = 0.0
    """probability of dropout in fake score and generator as they train"""
    forced_normalization: Literal["off", "published", "intended"] = "off"
    """EDM2: overwrite weights by their normalised values before training passes, as published or of both nets"""
    seed: int = 0
    """seed of all random numbers of the run"""
    precision: Precision = "fp32"
    """type of the U-Nets' arithmetic; preconditioning, losses, weights and their updates are float32 in any case"""
    teacher_precision: Precision | None = None
    """the teacher's own; None = as all nets"""
    evaluate_every_nimg: int = 500_000
    """images trained from one evaluation in the loop to the next"""
    evaluate_num: int = 50_000
    """generated images per evaluation in the loop; by mind or kid 5,000 where no number is asked for"""
    evaluate_by: EvaluatedBy = "fid"
    """the score that chooses the best generator: fid (a Fréchet distance, by any detector), or mind or kid, for which
    fewer images are asked for, and which compare with real images, not with published statistics; on tiny-digits they
    rank late checkpoints worse than fid of as many images"""
    evaluate_early_nimg: tuple[int, ...] = ()
    """further evaluations, at so many images each"""
    evaluate_labels: Literal["uniform", "dataset"] = "uniform"
    """classes of the images of an evaluation, drawn uniformly or by their share of the dataset"""
    evaluate_also: tuple[Literal["inception-score", "fd-dinov2"], ...] = ()
    """further scores of an evaluation, inception-score or fd-dinov2; the best generator is by the first score alone"""
    patience: int | None = None
    """the run ends after so many evaluations without a better score, those before its last stage apart; None = never"""
    checkpoint_every_nimg: int = 500_000
    """images trained from one checkpoint to the next; the published runs saved theirs four times as seldom"""
    stop_if_nan_steps: int = 20
    """so many updates in a row with a non-finite gradient stop the run"""
    nonfinite: Literal["skip", "zero"] = "skip"
    """of a gradient that is not finite: skip its update, or zero: 0 for NaN, +-1e5 for infinity, as published"""

    _hidden: ClassVar[frozenset[str]] = frozenset()
    """fields that a mode inherits and has no use for"""

    def joins_micro_batches(self, execution: Execution) -> bool:
        """Whether micro-batches may share a pass. Not with compiled dropout, which draws the masks of a whole pass."""
        return not (self.dropout and execution.compile)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size", "duration_nimg", "num_accumulation_rounds", "evaluate_every_nimg")
        at_least(self, 1, "checkpoint_every_nimg", "stop_if_nan_steps", "evaluate_early_nimg", "patience")
        at_least(self, 2, "evaluate_num")
        if len(set(self.evaluate_also)) < len(self.evaluate_also):
            raise refusal("evaluate_also", "each score once", self.evaluate_also)
        at_least(self, 0, "ema_halflife_nimg", "generator_from_nimg")
        if self.teacher_precision == "tf32":  # a setting of the device, not of one net
            raise refusal("teacher_precision", "fp32, fp16 or bf16", self.teacher_precision)
        positive(self, "generator_lr", "sigma_init", "adam_eps")
        not_negative(self, "ema_rampup_ratio")
        below_one(self, "generator_beta1", "beta2", "dropout")
        check_seed(self)
        if self.batch_size % self.num_accumulation_rounds:
            raise SidaError(
                f"batch_size must be divisible by num_accumulation_rounds, got {self.batch_size} and "
                f"{self.num_accumulation_rounds}",
                "Change one of the two.",
            )

    def __init_subclass__(cls, modes: Sequence[Mode] = ()) -> None:
        super().__init_subclass__()
        Recipe._classes.update(dict.fromkeys(modes, cls))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The recipe that `to_json` wrote, of the class of its mode. Raises SidaError for what is not its field."""
        known: Any = Recipe._classes.get(str(value.get("mode"))) if cls is Recipe else None
        if cls is Recipe and known is None:
            raise SidaError(f"unknown mode {value.get('mode')!r} of a recipe", f"Modes are {', '.join(MODES)}.")
        found: Self = known.from_json(value) if known else super().from_json(value)
        return found

    @property
    def needs_images(self) -> bool:
        """Whether real images are trained on, or classes alone."""
        return True

    @property
    def needs(self) -> str:
        """What training asks for beside the teacher, in a word."""
        return "images" if self.needs_images else "classes"

    @property
    def graphs(self) -> tuple[int, int]:
        """Networks whose activations a step holds at once, at most: of those that train, and of the teacher."""
        return 2, 1

    @property
    def trained_on(self) -> str | None:
        """The detector on whose features the generator is trained, and which is not blind to it."""
        return None

    def sampler(self) -> OneStepSpec:
        """How its generators are sampled."""
        return OneStepSpec(sigma_init=self.sigma_init)

    @property
    def generator_nimg_share(self) -> float:
        """Images that the generator is stepped with, of those of all steps."""
        return 1.0

    def idle(self) -> dict[str, str]:
        """Settings that count for nothing as the others are, by name, each with what makes it so."""
        return {}

    def with_noise_of(self, P_mean: float, P_std: float) -> Self:
        """The recipe with the fake score trained at a teacher's own noise levels, where they are of that kind."""
        return self

    def lasting(self, duration_nimg: int) -> Self:
        """The recipe for another duration, by whose change all that is counted in images changes in proportion."""
        changed = dataclasses.replace(self, duration_nimg=duration_nimg)
        ratio = duration_nimg / self.duration_nimg

        counts = {name: getattr(self, name) for name in self._counted}
        return dataclasses.replace(changed, **{name: n and max(round(n * ratio), 1) for name, n in counts.items()})

    def trains_generator(self, nimg: int) -> bool:
        """Whether the step that begins after so many images updates the generator, not the fake score alone."""
        return self.generator_from_nimg is None or nimg > self.generator_from_nimg

    def stages(self) -> dict[str, int | None]:
        """How many images were seen when each stage begins; None for one that the duration does not reach."""
        return {self.first_stage: 0, "generator": self._first(self.trains_generator)}

    def _first(self, holds: Callable[[int], bool]) -> int | None:
        """The images seen before the first step for which it holds; None where the duration has none."""
        starts = range(0, self.duration_nimg, self.batch_size)
        index = bisect.bisect_left(starts, True, key=holds)
        return starts[index] if index < len(starts) else None

    def generator_nimg(self, nimg: int) -> int:
        """Images that the generator was stepped with in the first so many of a run."""
        start, every = self.stages()["generator"], round(1 / self.generator_nimg_share)
        if start is None:
            return 0
        first, end = start // self.batch_size, -(-nimg // self.batch_size)
        return self.batch_size * max(-(-end // every) + -first // every, 0)

    def untrained(self, nimg: int | None = None) -> list[str]:
        """What no step of the whole run, or of its first so many images, trains: "generator", "adversarial part"."""
        end = self.duration_nimg if nimg is None else nimg
        return [stage for stage, start in self.stages().items() if start is None or start >= end]

    def unusual(self) -> list[str]:
        """What is allowed and rarely meant, a line for each."""
        return high_rates(self, *(f.name for f in dataclasses.fields(self) if f.name.endswith("_lr")))


_MOST_LATER = 10
"""noise level of a later step, above which it is said to be unusual"""


@dataclass(frozen=True, kw_only=True)
class FakeScoreRecipe(Recipe):
    """What all methods have that train a fake score."""

    fake_score_lr: float
    """Adam's learning rate for the fake score"""
    fake_score_beta1: float = 0.0
    """Adam's momentum for the fake score"""
    augment_p: float = 0.0
    """probability of EDM's augmentation of the fake score's inputs"""
    logvar: bool = True
    """EDM2: whether the fake score keeps the teacher's uncertainty head, and the losses divide by exp(u)"""
    steps: int = 1
    """steps of the generator, at evenly falling noise levels from sigma_init; one of them is trained at a time"""
    step_levels: tuple[float, ...] = ()
    """the noise levels of the steps, falling from sigma_init, in place of evenly falling ones"""
    step_noise: Literal["fresh", "fixed", "ddim"] = "fresh"
    """what an image gets between steps: fresh noise, the first step's again, or the noise that it was seen to have"""
    step_graphs: Literal["last", "all"] = "last"
    """whether a step's gradient goes back into the steps before it (all), or not (last)"""

    teacher_guidance: float = 1.0
    """how far the teacher moves away from its guide, or, without --guide, from itself without labels; 1 = not at all"""
    score_guidance: float = 1.0
    """likewise the fake score from itself without labels, where it trains and where it is used (long-short guidance)"""
    guidance_interval: tuple[float, ...] = ()
    """the lowest and the highest noise level at which both are guided; none = all"""
    score_label_dropout: float = 0.1
    """share of the fake score's images whose label it does not see, with --score-guidance"""

    _later = Recipe._later | {
        *("steps", "step_levels", "step_noise", "step_graphs"),
        *("teacher_guidance", "score_guidance", "guidance_interval", "score_label_dropout"),
    }

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise level of each step."""
        return self.step_levels or tuple(self.sigma_init * (self.steps - k) / self.steps for k in range(self.steps))

    def unusual(self) -> list[str]:
        lines = super().unusual()
        if len(self.levels) > 1 and self.levels[1] > _MOST_LATER:
            what = f"the second step begins at noise level {self.levels[1]:g}, which leaves little of the first's image"
            lines.append(f"{what}: see --step-levels")
        return lines

    def sampler(self) -> OneStepSpec:
        num, noise = len(self.levels), self.step_noise
        return OneStepSpec(sigma_init=self.sigma_init, num_steps=num, levels=self.step_levels, noise=noise)

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if len(self.levels) == 1:
            found |= dict.fromkeys(("step_noise", "step_graphs"), "--steps 1")
        if self.score_guidance == 1:
            found["score_label_dropout"] = "--score-guidance 1"
            if self.teacher_guidance == 1:
                found["guidance_interval"] = "--teacher-guidance 1"
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps")
        positive(self, "fake_score_lr")
        within(self, ["teacher_guidance", "score_guidance"], "from -1000 to 1000", lambda got: -1000 <= got <= 1000)
        at_most(self, 1000, "steps")
        below_one(self, "score_label_dropout")
        if self.guidance_interval and not is_guidance_interval(self.guidance_interval):
            raise refusal("guidance_interval", GUIDANCE_INTERVAL, self.guidance_interval)
        if self.dropout and self.score_guidance != 1:
            raise refusal("dropout", "0 with --score-guidance, which asks twice in a pass", self.dropout)
        if self.step_levels:
            falls = all(a > b > 0 for a, b in itertools.pairwise((math.inf, *self.step_levels)))
            if not falls or self.step_levels[0] != self.sigma_init:
                wanted = f"falling from sigma_init, {self.sigma_init:g}, and above 0"
                raise refusal("step_levels", wanted, self.step_levels)
            if self.steps not in (1, len(self.step_levels)):
                raise refusal("steps", f"left out, or {len(self.step_levels)} as there are levels", self.steps)
        below_one(self, "fake_score_beta1")
        in_unit_interval(self, "augment_p")

    def fake_score_updates(self, nimg: int) -> int:
        """How often the fake score was stepped in the first so many images of a run."""
        return -(-nimg // self.batch_size)


def passes_of(recipe: Recipe, execution: Execution, rank: int = 0, num_processes: int = 1) -> list[Sequence[int]]:
    """The accumulation rounds of a process, in groups that go through the nets at once.

    Raises SidaError where the processes cannot share the rounds evenly, or where the images at a time do not fit them.
    """
    num_rounds, micro_batch = recipe.num_accumulation_rounds, recipe.batch_size // recipe.num_accumulation_rounds
    if num_rounds % num_processes:
        raise SidaError(
            f"the {num_rounds} micro-batches of a batch must be shared evenly, got {num_processes} processes",
            "Start as many processes as divide it, or pass another --num-accumulation-rounds.",
        )
    rounds = range(rank, num_rounds, num_processes)
    images = execution.batch_per_device or micro_batch
    if images % micro_batch or len(rounds) % (images // micro_batch):
        fitting = [micro_batch * n for n in range(1, len(rounds) + 1) if len(rounds) % n == 0]
        near = max([n for n in fitting if n <= images and recipe.joins_micro_batches(execution)] or fitting[:1])
        raise SidaError(
            f"batch-per-device must be one of {', '.join(map(str, fitting))} (micro-batches of {micro_batch}), "
            f"got {images}",
            f"Pass --batch-per-device {near}: for less memory add --checkpoint-activations, or change the recipe with "
            "--num-accumulation-rounds.",
        )
    at_once = images // micro_batch
    if at_once > 1 and not recipe.joins_micro_batches(execution):
        raise SidaError(
            f"with compiled dropout a pass holds one micro-batch of {micro_batch}, got --batch-per-device {images}",
            f"Pass --batch-per-device {micro_batch}, or leave it out.",
        )
    return [rounds[start : start + at_once] for start in range(0, len(rounds), at_once)]


@dataclass(frozen=True, kw_only=True)
class FurtherRecipe(Recipe):
    """What the methods beside the SiD family may set of their optimisers."""

    weight_decay: float = 0.0
    """AdamW's decay, of all that trains, as a share of the learning rate; 0 = Adam"""
    lr_warmup_nimg: int = 0
    """images over which learning rates grow from 0 in a straight line"""
    clip_gradient_norm: float | None = None
    """the gradients of an update are scaled so that their norm is at most this"""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "weight_decay")
        at_least(self, 0, "lr_warmup_nimg")
        within(self, ["clip_gradient_norm"], "positive and finite, or none", lambda got: 0 < got < math.inf)

    _counted = (*Recipe._counted, "lr_warmup_nimg")


@dataclass(frozen=True, kw_only=True)
class HeadsRecipe(FurtherRecipe):
    """What methods have that may train a discriminator on the features of another network."""

    discriminator_features: Literal["none", "fake-score", "teacher", "detector"] = "none"
    """whose features the discriminator sees: of the fake score, the teacher or a detector; none = no discriminator"""
    discriminator_loss: Literal["softplus", "hinge"] = "softplus"
    """of generator and discriminator: softplus (non-saturating cross-entropy) or hinge"""
    discriminator_lr: float = 1e-4
    """Adam's learning rate for the discriminator's heads"""
    lambda_adv: float = 0.0
    """scale of the generator's adversarial term"""
    discriminator_scale: float = 1.0
    """scale of the discriminator loss"""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "discriminator_lr")
        not_negative(self, "lambda_adv", "discriminator_scale")

    @property
    def needs_images(self) -> bool:
        return self.discriminator_features != "none"
