"""Everything that shapes a distillation run; the published value is the default where there is one."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from sidactl.errors import SidaError
from sidactl.recipes.execution import Execution, Precision
from sidactl.recipes.fields import (
    JsonFields,
    at_least,
    below_one,
    check_seed,
    finite,
    high_rates,
    in_unit_interval,
    not_negative,
    positive,
    refusal,
    within,
)
from sidactl.recipes.sid import Adversarial

Mode = Literal["sid", "sida", "sid2a"]

MODES: tuple[Mode, ...] = ("sid", "sida", "sid2a")

EvaluatedBy = Literal["fid", "mind", "kid"]

FEW_IMAGES = 5_000
"""images of an evaluation by another score than a Fréchet distance, where no number is asked for"""


@dataclass(frozen=True, kw_only=True)
class Recipe(JsonFields):
    """Everything that shapes a distillation run. The published value is the default where there is one.

    Counts of images end in `_nimg`. Modes are values: `sid` has no adversarial part, `sida` has one, `sid2a` has
    one and starts the generator from a generator.
    """

    _later = frozenset(
        {"evaluate_by", "evaluate_early_nimg", "evaluate_labels", "evaluate_also", "patience", "nonfinite"}
    )

    teacher: str
    mode: Mode
    dataset: str
    """name or oid of the dataset: real images (sida, sid2a) and labels"""
    alpha: float
    """weight of the second part of the SiD loss (eq. 6)"""
    batch_size: int
    """images of one step, over all processes"""
    duration_nimg: int
    """images to train on, in all"""
    fake_score_lr: float
    """Adam's learning rate for the fake score"""
    generator_lr: float
    """Adam's learning rate for the generator"""
    ema_halflife_nimg: int
    """half-life of the generator's exponential moving average"""
    adversarial: Adversarial | None
    generator_from_nimg: int | None = 100_000
    """train the generator only after more than this many images; none = from the start"""
    num_accumulation_rounds: int = 1
    """micro-batches that a batch is split into; part of the method, since the adversarial losses average over one"""
    sigma_init: float = 2.5
    """noise level of the generator's input, and its sigma argument"""
    tmax: int = 800
    """largest time, in thousandths of the noise schedule, at which the generator's output is diffused"""
    lambda_sid: float = 100.0
    """scale of the SiD term; 0 leaves the adversarial one alone"""
    P_mean: float = -1.2
    """mean of ln sigma in the fake-score loss"""
    P_std: float = 1.2
    """standard deviation of ln sigma in the fake-score loss"""
    fake_score_beta1: float = 0.0
    """Adam's momentum for the fake score"""
    generator_beta1: float = 0.0
    """Adam's momentum for the generator"""
    beta2: float = 0.999
    """Adam's average of squared gradients, of both nets"""
    adam_eps: float = 1e-8
    """Adam's epsilon (1e-8; 1e-6 with --precision fp16)"""
    ema_rampup_ratio: float | None = 0.05
    """the EMA half-life is at most this share of the images seen; None = no ramp-up"""
    augment_p: float = 0.0
    """probability of EDM's augmentation of the fake score's inputs"""
    dropout: float = 0.0
    """probability of dropout in fake score and generator as they train"""
    forced_normalization: Literal["off", "published", "intended"] = "off"
    """EDM2: overwrite weights by their normalised values before training passes, as published or of both nets"""
    logvar: bool = True
    """EDM2: whether the fake score keeps the teacher's uncertainty head, and the losses divide by exp(u)"""
    share_fakes: bool = False
    """both updates of a step take the same generated images, as Algorithm 1 prints; the published code draws twice"""
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
        positive(self, "fake_score_lr", "generator_lr", "sigma_init", "P_std", "adam_eps")
        not_negative(self, "ema_rampup_ratio", "lambda_sid")
        if not self.lambda_sid and not (self.adversarial and self.adversarial.lambda_adv):
            raise refusal("lambda_sid", "positive where no adversarial term trains the generator", self.lambda_sid)
        below_one(self, "fake_score_beta1", "generator_beta1", "beta2", "dropout")
        in_unit_interval(self, "augment_p")
        within(self, ["tmax"], "in (0, 1000]", lambda got: 0 < got <= 1000)
        finite(self, "alpha", "P_mean")
        check_seed(self)
        if self.batch_size % self.num_accumulation_rounds:
            raise SidaError(
                f"batch_size must be divisible by num_accumulation_rounds, got {self.batch_size} and "
                f"{self.num_accumulation_rounds}",
                "Change one of the two.",
            )
        assert (self.adversarial is None) == (self.mode == "sid"), "sid has no adversarial part, the others do"

    def lasting(self, duration_nimg: int) -> Self:
        """The recipe for another duration, by whose change all that is counted in images changes in proportion."""
        changed = dataclasses.replace(self, duration_nimg=duration_nimg)
        ratio = duration_nimg / self.duration_nimg

        def scaled(value: JsonFields, *names: str) -> dict[str, Any]:
            counts = {name: getattr(value, name) for name in names}
            return {name: n and max(round(n * ratio), 1) for name, n in counts.items()}

        adversarial = self.adversarial
        names = ("generator_from_nimg", "ema_halflife_nimg", "evaluate_every_nimg", "checkpoint_every_nimg")
        return dataclasses.replace(
            changed,
            **scaled(self, *names),
            adversarial=adversarial
            and dataclasses.replace(adversarial, **scaled(adversarial, "adversarial_from_nimg")),
        )

    def trains_generator(self, nimg: int) -> bool:
        """Whether the step that begins after so many images updates the generator, not the fake score alone."""
        return self.generator_from_nimg is None or nimg > self.generator_from_nimg

    def is_adversarial(self, nimg: int) -> bool:
        """Whether the generator's loss has its adversarial term in the step that begins after so many images."""
        return self.adversarial is not None and nimg > self.adversarial.adversarial_from_nimg

    def stages(self) -> dict[str, int | None]:
        """How many images were seen when each stage begins; None for one that the duration does not reach."""
        starts = range(0, self.duration_nimg, self.batch_size)

        def first(holds: Callable[[int], bool]) -> int | None:
            index = bisect.bisect_left(starts, True, key=holds)
            return starts[index] if index < len(starts) else None

        stages = {"fake score": first(lambda nimg: True), "generator": first(self.trains_generator)}
        if self.adversarial is not None:
            both = first(lambda nimg: self.trains_generator(nimg) and self.is_adversarial(nimg))
            stages["adversarial part"] = both
        return stages

    def untrained(self, nimg: int | None = None) -> list[str]:
        """What no step of the whole run, or of its first so many images, trains: "generator", "adversarial part"."""
        end = self.duration_nimg if nimg is None else nimg
        return [stage for stage, start in self.stages().items() if start is None or start >= end]

    def unusual(self) -> list[str]:
        """What is allowed and rarely meant, a line for each."""
        lines = high_rates(self, "fake_score_lr", "generator_lr")
        if not 0 <= self.alpha <= 2:
            lines.append(f"alpha is {self.alpha:g}; values from 0 to 2 are known, 1.0 and 1.2 the published ones")
        return lines


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


def override(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields replaced; names of Adversarial fields reach into its adversarial part.

    Raises SidaError for a name that is no field, or that belongs to the adversarial part of a recipe without one.
    """
    own = {f.name for f in dataclasses.fields(Recipe)}
    adversarial = {f.name for f in dataclasses.fields(Adversarial)}
    for name in overrides:
        if name not in own | adversarial:
            raise SidaError(
                f"unknown recipe field {name!r}",
                f"Fields are {', '.join(sorted((own | adversarial) - {'adversarial'}))}.",
            )
        if name in adversarial and recipe.adversarial is None:
            raise SidaError(
                f"{name} belongs to the adversarial loss, which mode {recipe.mode} does not have",
                "Use --mode sida, or leave it out.",
            )
    changed_part = recipe.adversarial
    if changed_part is not None:
        changed_part = dataclasses.replace(changed_part, **{k: v for k, v in overrides.items() if k in adversarial})
    changed = {k: v for k, v in overrides.items() if k in own}
    if (precision := changed.get("precision", recipe.precision)) != recipe.precision and "adam_eps" not in changed:
        changed["adam_eps"] = 1e-6 if precision == "fp16" else 1e-8
    if changed.get("evaluate_by", "fid") != "fid" and "evaluate_num" not in changed:
        changed["evaluate_num"] = min(recipe.evaluate_num, FEW_IMAGES)
    return dataclasses.replace(recipe, **({"adversarial": changed_part} | changed))
