"""Frozen descriptions of networks and of training runs, every number with its unit; no torch here, and no I/O."""

import bisect
import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union

from sidactl.errors import SidaError

Mode = Literal["sid", "sida", "sid2a"]
MODES: tuple[Mode, ...] = ("sid", "sida", "sid2a")
Precision = Literal["fp32", "tf32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")
HIGH_LR = 0.1
"""learning rates above it are warned of"""


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Conversion of a frozen dataclass to plain JSON values and back, strictly.

    Every field must be of its declared type, and within its bounds, of which each class knows its own.
    """

    _later: ClassVar[frozenset[str]] = frozenset()
    """fields that came later: left out of the JSON at their default, so that what was stored before keeps its oid"""

    def __post_init__(self) -> None:
        for name, declared in _types(type(self)).items():
            value = _typed(declared, getattr(self, name))
            if not _is_a(declared, value):
                raise _refusal(name, _called(declared), value)
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; nested dataclasses as objects, tuples as lists."""
        kept = [f for f in dataclasses.fields(self) if f.name not in self._later or getattr(self, f.name) != f.default]
        return {f.name: _plain(getattr(self, f.name)) for f in kept}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The dataclass written by `to_json`. Raises SidaError for a name that is not a field."""
        types = _types(cls)
        unknown = sorted(set(value) - set(types))
        if unknown:
            raise SidaError(f"unknown {cls.__name__} field {unknown[0]!r}", f"It has {', '.join(sorted(types))}.")
        return cls(**value)


def _plain(value: object) -> object:
    if isinstance(value, Plain):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _typed(declared: Any, value: Any) -> Any:
    for option in typing.get_args(declared) or (declared,):
        if isinstance(option, type) and issubclass(option, Plain) and isinstance(value, Mapping):
            return option.from_json(value)
    if not isinstance(value, bool) and isinstance(value, Real):
        return _number(typing.get_args(declared) or (declared,), value)
    return tuple(value) if isinstance(value, list) else value


def _number(kinds: Sequence[Any], value: Real) -> Any:
    """Python's own number of the field's type, of any other: 1 and 1.0 are one recipe, in Python and as JSON."""
    if int in kinds and isinstance(value, Integral):
        return int(value)
    try:
        return float(value) + 0.0 if float in kinds else value  # which makes -0.0 the 0.0 that it equals
    except OverflowError:
        return math.inf  # which no field takes


def _declared(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


_types: Callable[[Any], dict[str, Any]] = cache(_declared)
"""the declared types of a dataclass's fields"""


def _is_a(declared: Any, value: object) -> bool:
    """Whether a value is of a field's declared type: whole numbers are numbers, true and false are not."""
    origin, options = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(options[0], item) for item in value)
    if origin in (Union, UnionType):
        return any(_is_a(option, value) for option in options)
    if declared in (int, float):
        return isinstance(value, Integral if declared is int else Real) and not isinstance(value, bool)
    return isinstance(value, declared)


def _called(declared: Any) -> str:
    """A field's type, for people."""
    origin, options = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return f"one of {', '.join(options)}"
    if origin in (Union, UnionType):
        return " or ".join(_called(option) for option in options)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "none"}
    if origin is tuple and typing.get_origin(options[0]) is Literal:
        return f"some of {', '.join(typing.get_args(options[0]))}"
    return "whole numbers" if origin is tuple else names.get(declared, f"a {declared.__name__}")


def _refusal(name: str, what: str, got: object) -> SidaError:
    told = repr(got) if isinstance(got, str) else list(got) if isinstance(got, tuple) else got
    return SidaError(f"{name} must be {what}, got {told}", f"Pass another {flag_of(name)}.")


def flag_of(field: str) -> str:
    """The command-line option of a recipe's field, or of a sampler's."""
    return "--steps" if field == "num_steps" else "--" + field.removesuffix("_nimg").replace("_", "-").lower()


def _within(value: Plain, names: Sequence[str], what: str, holds: Callable[[Any], bool]) -> None:
    """Refuses the first of these fields for which it does not hold; None, where the type allows it, always does."""
    for name in names:
        got = getattr(value, name)
        if got is not None and not all(map(holds, got if isinstance(got, tuple) else [got])):
            raise _refusal(name, what, got)


def _at_least(value: Plain, least: int, *names: str) -> None:
    _within(value, names, f"at least {least}", lambda got: got >= least)


def _finite(value: Plain, *names: str) -> None:
    _within(value, names, "finite", math.isfinite)


def _positive(value: Plain, *names: str) -> None:
    _within(value, names, "positive and finite", lambda got: 0 < got < math.inf)


def _not_negative(value: Plain, *names: str) -> None:
    _within(value, names, "at least 0 and finite", lambda got: 0 <= got < math.inf)


def _below_one(value: Plain, *names: str) -> None:
    _within(value, names, "in [0, 1)", lambda got: 0 <= got < 1)


def _share(value: Plain, *names: str) -> None:
    _within(value, names, "in [0, 1]", lambda got: 0 <= got <= 1)


def _moderate(value: Plain, *names: str) -> None:
    """Noise levels and their like, whose squares float32 must hold."""
    _within(value, names, "from 1e-9 to 1e9", lambda got: 1e-9 <= got <= 1e9)


def _at_most(value: Plain, most: int, *names: str) -> None:
    _within(value, names, f"at most {most:,}", lambda got: got <= most)


def _seed(value: Plain) -> None:
    _at_least(value, 0, "seed")
    _within(value, ["seed"], "at most 2^63 - 1", lambda got: got < 1 << 63)


@dataclass(frozen=True, kw_only=True)
class NetSpec(Plain):
    """The shape of a denoiser: all that is needed to build it, without its weights.

    `architecture` is the U-Net; options that it does not have are ignored by it and stay at their default.
    """

    _later = frozenset({"res_balance", "attn_balance", "clip_act", "sigma_min", "sigma_max"})

    architecture: Literal["SongUNet", "DhariwalUNet", "EDM2"]
    img_resolution: int
    """pixels, or latents, in height and width"""
    img_channels: int
    """1, 3, or 4 of latents"""
    model_channels: int
    """channels at the highest resolution, times channel_mult"""
    channel_mult: tuple[int, ...]
    """channels of each resolution, as multiples of model_channels, from the highest on; each next one has half"""
    num_blocks: int
    """residual blocks per resolution"""
    attn_resolutions: tuple[int, ...]
    """resolutions whose blocks have self-attention"""
    label_dim: int = 0
    """number of classes; 0 = unconditional"""
    channel_mult_emb: int | None = 4
    """EDM2: None = the largest of channel_mult"""
    channel_mult_noise: int | None = 1
    """EDM2: None = the smallest of channel_mult"""
    dropout: float = 0.0
    """probability of dropout in training"""
    resample_filter: tuple[int, ...] = (1, 1)
    """taps of the filter between resolutions"""
    sigma_data: float = 0.5
    """standard deviation of the data, for the preconditioning"""
    augment_dim: int = 0
    """SongUNet and DhariwalUNet: number of augmentation labels"""
    embedding_type: Literal["positional", "fourier"] = "positional"
    """SongUNet: positional or fourier"""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    """SongUNet: standard, skip or residual"""
    decoder_type: Literal["standard", "skip"] = "standard"
    """SongUNet: standard or skip"""
    channels_per_head: int = 64
    """DhariwalUNet and EDM2: channels of an attention head"""
    logvar_channels: int = 0
    """EDM2 only: width of the uncertainty head u(sigma); 0 = the net has none"""
    label_balance: float = 0.5
    """EDM2: share of the class in its sum with the noise level"""
    concat_balance: float = 0.5
    """EDM2: share of the encoder's features in their concatenation with the decoder's"""
    res_balance: float = 0.3
    """EDM2: share of a block's residual branch in its sum with the main one"""
    attn_balance: float = 0.3
    """EDM2: share of the attention in its sum with the main branch"""
    clip_act: float | None = 256.0
    """EDM2: largest magnitude of activations; None = no limit"""
    sigma_min: float = 0.0
    """lowest noise level that the net takes; Heun's sampler of convention edm keeps to it"""
    sigma_max: float = math.inf
    """highest noise level that the net takes, likewise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "img_resolution", "img_channels", "model_channels", "num_blocks", "channels_per_head")
        _at_least(self, 1, "channel_mult", "channel_mult_emb", "channel_mult_noise", "attn_resolutions")
        _at_least(self, 0, "label_dim", "augment_dim", "logvar_channels")
        # Ten times what any published network has: whatever says more is no network, and costs hours to lay out.
        _at_most(self, 100, "num_blocks", "channel_mult", "channel_mult_emb", "channel_mult_noise")
        _at_most(self, 100_000, "img_resolution", "img_channels", "model_channels", "augment_dim", "logvar_channels")
        _at_most(self, 1_000_000, "label_dim", "channels_per_head", "attn_resolutions")
        if len(self.resample_filter) > 100:
            raise _refusal("resample_filter", "100 taps or fewer", f"{len(self.resample_filter):,}")
        for name in ("channel_mult", "resample_filter"):
            if not getattr(self, name):
                raise _refusal(name, "one number or more", [])
        if len(self.resample_filter) % 2 or sum(self.resample_filter) <= 0:
            what = "an even number of taps with a positive sum"
            raise _refusal("resample_filter", what, list(self.resample_filter))
        _below_one(self, "dropout")
        _positive(self, "sigma_data", "clip_act")
        _moderate(self, "sigma_data", "clip_act")
        _share(self, "label_balance", "concat_balance", "res_balance", "attn_balance")
        _not_negative(self, "sigma_min")
        if not self.sigma_min < self.sigma_max:
            raise _refusal("sigma_max", f"above sigma_min, {self.sigma_min:g}", self.sigma_max)
        depth = len(self.channel_mult) - 1
        if self.img_resolution % (1 << depth):
            raise SidaError(
                f"img_resolution must be divisible by {1 << depth}, got {self.img_resolution}",
                "Use fewer entries in channel_mult.",
            )
        if self.architecture != "EDM2":
            for channels in {self.model_channels * mult for mult in self.channel_mult}:
                groups = min(32, channels // 4)
                if groups == 0 or channels % groups:
                    raise SidaError(
                        f"channel counts must be divisible by their GroupNorm groups, got {channels} channels",
                        "Choose model_channels such as 16, 32, 64 or 128.",
                    )


@dataclass(frozen=True, kw_only=True)
class OneStepSpec(Plain):
    """Settings of sampling from a distilled generator. Source: SiDA (2410.14919), eq. 1, with a_t = 1."""

    num_steps: int = 1
    sigma_init: float = 2.5
    """noise level of the input, and the sigma argument; step k of N uses sigma_init (N - k) / N"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_steps")
        _positive(self, "sigma_init")
        _moderate(self, "sigma_init")

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps


@dataclass(frozen=True, kw_only=True)
class HeunSpec(Plain):
    """Settings of a teacher's multi-step sampler. Source: EDM (2206.00364), Algorithm 2."""

    num_steps: int = 18
    sigma_min: float = 0.002
    """of Heun's sampler: lowest noise level before 0"""
    sigma_max: float = 80.0
    """of Heun's sampler: noise level that it starts from"""
    rho: float = 7.0
    """of Heun's sampler: how much closer together its noise levels are at the low end; 1 = evenly spaced"""
    S_churn: float = 0.0
    """of Heun's sampler: how much noise is added anew in all steps together; 0 = none"""
    S_min: float = 0.0
    """of Heun's sampler: lowest noise level at which noise is added anew"""
    S_max: float = math.inf
    """of Heun's sampler: highest noise level at which noise is added anew"""
    S_noise: float = 1.0
    """of Heun's sampler: standard deviation of the noise that is added anew"""
    convention: Literal["edm", "edm2"] = "edm"
    """edm: float64, and with churn noise is drawn in every step; edm2: float32, drawn where it is used"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_steps")
        _positive(self, "sigma_min", "sigma_max", "rho")
        _moderate(self, "sigma_min", "sigma_max", "rho")
        _not_negative(self, "S_churn", "S_min", "S_noise")
        _within(self, ["S_max"], "at least 0", lambda got: got >= 0)
        if self.sigma_min >= self.sigma_max:
            raise _refusal("sigma_min", f"below sigma_max, {self.sigma_max:g}", self.sigma_min)

    @property
    def nfe(self) -> int:
        """Network evaluations per image: two per step, one in the last."""
        return 2 * self.num_steps - 1

    def to_json(self) -> dict[str, Any]:
        """As `Plain.to_json`; an infinite S_max is written as null, which JSON can hold."""
        return super().to_json() | {"S_max": None if math.isinf(self.S_max) else self.S_max}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """As `Plain.from_json`; reads a null S_max as infinite."""
        return super().from_json({k: math.inf if k == "S_max" and v is None else v for k, v in value.items()})


@dataclass(frozen=True, kw_only=True)
class Adversarial(Plain):
    """The adversarial part of SiDA. Source: SiDA (2410.14919), eqs. 7-10, and the published run scripts."""

    lambda_adv: float = 0.01
    """scale of the generator's adversarial term"""
    discriminator_scale: float = 1.0
    """scale of the discriminator loss; 100 in the EDM2 runs"""
    adversarial_from_nimg: int = 200_000
    """the adversarial term counts once more than this many images were seen (strictly)"""
    joint_weight: float = 0.5
    """weight of both generator terms from then on (eq. 8)"""
    clip_gradient_value: float | None = 1.0
    """each element of the fake score's gradient is clipped to +- this; EDM runs only, not in the paper"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "lambda_adv", "discriminator_scale", "joint_weight")
        _at_least(self, 0, "adversarial_from_nimg")
        _within(self, ["clip_gradient_value"], "positive or none", lambda got: got > 0)


@dataclass(frozen=True, kw_only=True)
class Recipe(Plain):
    """Everything that shapes a distillation run. The published value is the default where there is one.

    Counts of images end in `_nimg`. Modes are values: `sid` has no adversarial part, `sida` has one, `sid2a` has
    one and starts the generator from a generator.
    """

    _later = frozenset({"evaluate_early_nimg", "evaluate_labels", "evaluate_also", "patience"})

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
    """the generator is stepped once more than this many images were seen (strictly); None = from the start"""
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
    """1e-6 in fp16, unless another is given"""
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
    """of every random number of the run"""
    precision: Precision = "fp32"
    """type of the U-Nets' arithmetic; preconditioning, losses, weights and their updates are float32 in any case"""
    teacher_precision: Precision | None = None
    """the teacher's own; None = as all nets"""
    evaluate_every_nimg: int = 500_000
    """images trained from one evaluation in the loop to the next"""
    evaluate_num: int = 50_000
    """generated images per evaluation in the loop"""
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

    @property
    def joins_micro_batches(self) -> bool:
        """Whether a pass may hold several: not with dropout and augmentation, which depend on all of a pass."""
        return not self.dropout and not self.augment_p

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "batch_size", "duration_nimg", "num_accumulation_rounds", "evaluate_every_nimg")
        _at_least(self, 1, "checkpoint_every_nimg", "stop_if_nan_steps", "evaluate_early_nimg", "patience")
        _at_least(self, 2, "evaluate_num")
        if len(set(self.evaluate_also)) < len(self.evaluate_also):
            raise _refusal("evaluate_also", "each score once", self.evaluate_also)
        _at_least(self, 0, "ema_halflife_nimg", "generator_from_nimg")
        if self.teacher_precision == "tf32":  # a setting of the device, not of one net
            raise _refusal("teacher_precision", "fp32, fp16 or bf16", self.teacher_precision)
        _positive(self, "fake_score_lr", "generator_lr", "sigma_init", "P_std", "adam_eps")
        _not_negative(self, "ema_rampup_ratio", "lambda_sid")
        if not self.lambda_sid and not (self.adversarial and self.adversarial.lambda_adv):
            raise _refusal("lambda_sid", "positive where no adversarial term trains the generator", self.lambda_sid)
        _below_one(self, "fake_score_beta1", "generator_beta1", "beta2", "dropout")
        _share(self, "augment_p")
        _within(self, ["tmax"], "in (0, 1000]", lambda got: 0 < got <= 1000)
        _finite(self, "alpha", "P_mean")
        _seed(self)
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

        def scaled(value: Plain, *names: str) -> dict[str, Any]:
            counts = {name: getattr(value, name) for name in names}
            return {name: n and max(round(n * ratio), 1) for name, n in counts.items()}

        part = self.adversarial
        names = ("generator_from_nimg", "ema_halflife_nimg", "evaluate_every_nimg", "checkpoint_every_nimg")
        return dataclasses.replace(
            changed,
            **scaled(self, *names),
            adversarial=part and dataclasses.replace(part, **scaled(part, "adversarial_from_nimg")),
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
        lines = _high_rates(self, "fake_score_lr", "generator_lr")
        if not 0 <= self.alpha <= 2:
            lines.append(f"alpha is {self.alpha:g}; values from 0 to 2 are known, 1.0 and 1.2 the published ones")
        return lines


def _high_rates(recipe: Plain, *names: str) -> list[str]:
    return [
        f"{name} is {getattr(recipe, name):g}; Adam's rates above {HIGH_LR:g} rarely train anything"
        for name in names
        if getattr(recipe, name) > HIGH_LR
    ]


@dataclass(frozen=True, kw_only=True)
class Execution(Plain):
    """How a recipe is carried out. It shapes speed and memory, never the method, so it is no part of the question."""

    batch_per_device: int | None = None
    """images that go through the nets at a time, a multiple of the micro-batch; None = as many as fit, by trying"""
    shard: bool = False
    """nets, EMA and optimiser states are split over the processes (FSDP2)"""
    checkpoint_activations: bool = False
    """the backward pass computes activations anew, block by block, instead of keeping them"""
    ema_on_cpu: bool = False
    """the averaged generator lies in the CPU's memory"""
    channels_last: bool = False
    """activations and weights lie in memory pixel by pixel instead of channel by channel"""
    compile: bool = False
    """torch.compile: minutes at the start (less the next time, from a cache), faster steps; other dropout masks"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "batch_per_device")
        if self.shard and self.compile:
            raise SidaError("compiled nets cannot be sharded, got both", "Leave out --shard or --compile.")


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
        near = max([n for n in fitting if n <= images and recipe.joins_micro_batches] or fitting[:1])
        raise SidaError(
            f"batch-per-device must be one of {', '.join(map(str, fitting))} (micro-batches of {micro_batch}), "
            f"got {images}",
            f"Pass --batch-per-device {near}: for less memory add --checkpoint-activations, or change the recipe with "
            "--num-accumulation-rounds.",
        )
    at_once = images // micro_batch
    if at_once > 1 and not recipe.joins_micro_batches:
        what = "dropout" if recipe.dropout else "augmentation"
        raise SidaError(
            f"with {what} a pass holds one micro-batch of {micro_batch}, got --batch-per-device {images}",
            f"Pass --batch-per-device {micro_batch}, or leave it out.",
        )
    return [rounds[start : start + at_once] for start in range(0, len(rounds), at_once)]


@dataclass(frozen=True, kw_only=True)
class Setting(Plain):
    """How the same mathematics is carried out where nets alone are at work: in sampling, and in benchmarks."""

    precision: Precision = "fp32"
    """of the network's arithmetic: fp32, fp16 or bf16; tf32 is for bench alone"""
    channels_last: bool = False
    """activations and weights lie in memory pixel by pixel instead of channel by channel"""
    compile: bool = False
    """torch.compile: seconds to minutes at the start (less the next time, from a cache), then faster"""

    @property
    def name(self) -> str:
        """For people, such as "bf16 channels-last compiled"."""
        words = [self.precision, "channels-last" * self.channels_last, "compiled" * self.compile]
        return " ".join(filter(None, words))

    def of_images(self) -> dict[str, str]:
        """What of it shapes images, for the question that they answer: a precision that is not float32's.

        Raises SidaError for TF32, a setting of the device, which would reach the detector, too.
        """
        if self.precision == "tf32":
            raise SidaError("precision must be fp32, fp16 or bf16 here, got tf32", "Pass another --precision.")
        return {} if self.precision == "fp32" else {"precision": self.precision}


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(Plain):
    """How a teacher is trained from scratch with the EDM loss. Source: EDM (2206.00364), eq. 2 and table 1."""

    dataset: str
    net: NetSpec
    batch_size: int = 128
    """images of one step"""
    duration_nimg: int = 50_000
    """images to train on, in all"""
    lr: float = 1e-3
    """Adam's learning rate"""
    lr_rampup_nimg: int = 10_000
    """images over which the learning rate grows from 0"""
    ema_halflife_nimg: int = 20_000
    """half-life of the teacher's exponential moving average"""
    ema_rampup_ratio: float | None = 0.05
    """the EMA half-life is at most this share of the images seen; none = no ramp-up"""
    P_mean: float = -1.2
    """mean of ln sigma in the loss"""
    P_std: float = 1.2
    """standard deviation of ln sigma in the loss"""
    beta1: float = 0.9
    """Adam's momentum"""
    beta2: float = 0.999
    """Adam's average of squared gradients"""
    adam_eps: float = 1e-8
    """Adam's epsilon"""
    augment_p: float = 0.0
    """probability of EDM's augmentation, for nets with augmentation labels"""
    seed: int = 0
    """of every random number of the run"""
    stop_if_nan_steps: int = 20
    """so many updates in a row with a non-finite gradient stop the run"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "batch_size", "duration_nimg", "stop_if_nan_steps")
        _at_least(self, 0, "lr_rampup_nimg", "ema_halflife_nimg")
        _positive(self, "lr", "P_std", "adam_eps")
        _not_negative(self, "ema_rampup_ratio")
        _below_one(self, "beta1", "beta2")
        _share(self, "augment_p")
        _finite(self, "P_mean")
        _seed(self)

    def unusual(self) -> list[str]:
        """What is allowed and rarely meant, a line for each."""
        return _high_rates(self, "lr")


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
    part = recipe.adversarial
    if part is not None:
        part = dataclasses.replace(part, **{k: v for k, v in overrides.items() if k in adversarial})
    changed = {k: v for k, v in overrides.items() if k in own}
    if (precision := changed.get("precision", recipe.precision)) != recipe.precision and "adam_eps" not in changed:
        changed["adam_eps"] = 1e-6 if precision == "fp16" else 1e-8
    return dataclasses.replace(recipe, **({"adversarial": part} | changed))


BASE_BYTES = 250_000_000
"""of a process that has loaded torch, on the CPU"""
_GRAPHS = 3
"""networks whose activations a generator step holds at once: generator, fake score, teacher"""
_SAVED_VALUES = {"SongUNet": 11, "DhariwalUNet": 21, "EDM2": 13}
"""values kept for the backward pass per channel and pixel of a U-Net block, as counted in our networks"""


@dataclass(frozen=True)
class Memory:
    """An estimate of what training needs on one device, in bytes."""

    num_parameters: int
    state_bytes: int
    """four networks and two Adam states with two moments each; the device's share where they are sharded"""
    gradient_bytes: int
    """of one network, and their sum over passes and processes in float64 where there are several"""
    activation_bytes: int
    """of the images that go through the networks at a time; weights cast or normalised for them included"""

    @property
    def total_bytes(self) -> int:
        """All of it, with what torch itself takes."""
        return BASE_BYTES + self.state_bytes + self.gradient_bytes + self.activation_bytes

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        net: NetSpec,
        num_parameters: int,
        execution: Execution | None = None,
        *,
        num_devices: int = 1,
    ) -> Self:
        """The estimate for a recipe that so many devices carry out together."""
        execution = execution or Execution()
        levels = [
            (2 * net.num_blocks + 1, (net.img_resolution >> level) ** 2 * net.model_channels * mult)
            for level, mult in enumerate(net.channel_mult)
        ]
        micro_batch = recipe.batch_size // recipe.num_accumulation_rounds
        at_once = execution.batch_per_device or micro_batch
        saved, size = _SAVED_VALUES[net.architecture], 2 if recipe.precision in ("fp16", "bf16") else 4
        if execution.checkpoint_activations:
            # Kept are the inputs of blocks, with skips in the decoder; and of one block at a time, in the fake score's
            # pass over fakes and reals, all values and their gradients.
            values = _GRAPHS * sum(2 * count * each for count, each in levels) + 4 * saved * max(v for _, v in levels)
        else:
            values = _GRAPHS * sum(saved * count * each for count, each in levels)
        values *= at_once
        if net.architecture == "EDM2" or size < 4:
            values += _GRAPHS * num_parameters
        shares = num_devices if execution.shard else 1
        has_sums = num_devices > 1 or at_once < recipe.batch_size
        num_blocks = sum(count for count, _ in levels)
        gathered = 2 * num_parameters // num_blocks if execution.shard else 0
        return cls(
            num_parameters,
            4 * ((4 + 4) * num_parameters // shares + gathered),
            (4 + 8 * has_sums) * num_parameters,
            size * values,
        )
