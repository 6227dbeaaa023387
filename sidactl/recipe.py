"""Frozen descriptions of networks and of training runs, every number with its unit; no torch here, and no I/O."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from sidactl.errors import SidaError

Mode = Literal["sid", "sida", "sid2a"]
MODES: tuple[Mode, ...] = ("sid", "sida", "sid2a")
Precision = Literal["fp32", "tf32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Conversion of a frozen dataclass to plain JSON values and back, strictly."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; nested dataclasses as objects, tuples as lists."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The dataclass written by `to_json`. Raises SidaError for a name that is not a field."""
        types = typing.get_type_hints(cls)
        unknown = sorted(set(value) - set(types))
        if unknown:
            raise SidaError(f"unknown {cls.__name__} field {unknown[0]!r}", f"It has {', '.join(sorted(types))}.")
        return cls(**{name: _typed(types[name], item) for name, item in value.items()})


def _plain(value: object) -> object:
    if isinstance(value, Plain):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _typed(declared: Any, value: Any) -> Any:
    for option in typing.get_args(declared) or (declared,):
        if isinstance(option, type) and issubclass(option, Plain) and isinstance(value, Mapping):
            return option.from_json(value)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class NetSpec(Plain):
    """The shape of a denoiser: all that is needed to build it, without its weights.

    `architecture` is the U-Net; options that it does not have are ignored by it and stay at their default.
    """

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

    def __post_init__(self) -> None:
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

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps


@dataclass(frozen=True, kw_only=True)
class HeunSpec(Plain):
    """Settings of a teacher's multi-step sampler. Source: EDM (2206.00364), Algorithm 2."""

    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    convention: Literal["edm", "edm2"] = "edm"
    """edm: float64, and with churn noise is drawn in every step; edm2: float32, drawn where it is used"""

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
        for name in ("lambda_adv", "discriminator_scale", "joint_weight"):
            _must_be(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite", getattr(self, name))
        clip_value = self.clip_gradient_value
        _must_be("clip_gradient_value", clip_value is None or clip_value > 0, "positive or none", clip_value)


@dataclass(frozen=True, kw_only=True)
class Recipe(Plain):
    """Everything that shapes a distillation run. The published value is the default where there is one.

    Counts of images end in `_nimg`. Modes are values: `sid` has no adversarial part, `sida` has one, `sid2a` has
    one and starts the generator from a generator.
    """

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
    """scale of the SiD term"""
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
    checkpoint_every_nimg: int = 500_000
    """images trained from one checkpoint to the next; the published runs saved theirs four times as seldom"""
    stop_if_nan_steps: int = 20
    """so many updates in a row with a non-finite gradient stop the run"""

    @property
    def joins_micro_batches(self) -> bool:
        """Whether a pass may hold several: not with dropout and augmentation, which depend on all of a pass."""
        return not self.dropout and not self.augment_p

    def __post_init__(self) -> None:
        for name in ("batch_size", "duration_nimg", "num_accumulation_rounds", "evaluate_every_nimg"):
            _must_be(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("checkpoint_every_nimg", "stop_if_nan_steps"):
            _must_be(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _must_be("evaluate_num", self.evaluate_num >= 2, "at least 2", self.evaluate_num)
        _must_be("ema_halflife_nimg", self.ema_halflife_nimg >= 0, "at least 0", self.ema_halflife_nimg)
        _must_be("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}", self.precision)
        known = (None, *PRECISIONS[:1], *PRECISIONS[2:])  # TF32 is a setting of the device, not of one net
        _must_be("teacher_precision", self.teacher_precision in known, "fp32, fp16 or bf16", self.teacher_precision)
        for name in ("fake_score_lr", "generator_lr", "lambda_sid", "sigma_init", "P_std", "adam_eps"):
            _must_be(name, 0 < getattr(self, name) < math.inf, "positive and finite", getattr(self, name))
        for name in ("fake_score_beta1", "generator_beta1", "beta2", "dropout"):
            _must_be(name, 0 <= getattr(self, name) < 1, "in [0, 1)", getattr(self, name))
        _must_be("augment_p", 0 <= self.augment_p <= 1, "in [0, 1]", self.augment_p)
        _must_be("tmax", 0 < self.tmax <= 1000, "in (0, 1000]", self.tmax)
        _must_be("mode", self.mode in MODES, f"one of {', '.join(MODES)}", self.mode)
        forced = self.forced_normalization
        is_known = forced in ("off", "published", "intended")
        _must_be("forced_normalization", is_known, "one of off, published, intended", forced)
        _must_be("alpha", math.isfinite(self.alpha), "finite", self.alpha)
        _must_be("seed", self.seed >= 0, "at least 0", self.seed)
        if self.batch_size % self.num_accumulation_rounds:
            raise SidaError(
                f"batch_size must be divisible by num_accumulation_rounds, got {self.batch_size} and "
                f"{self.num_accumulation_rounds}",
                "Change one of the two.",
            )
        assert (self.adversarial is None) == (self.mode == "sid"), "sid has no adversarial part, the others do"


def _must_be(name: str, holds: bool, what: str, got: object) -> None:
    if not holds:
        flag = "--" + name.removesuffix("_nimg").replace("_", "-").lower()
        raise SidaError(f"{name} must be {what}, got {got}", f"Pass another {flag}.")


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


@dataclass(frozen=True, kw_only=True)
class Setting(Plain):
    """How the same mathematics is carried out where nets alone are at work: in sampling, and in benchmarks."""

    precision: Precision = "fp32"
    """of the network's arithmetic: fp32, fp16 or bf16; in benchmarks tf32, too"""
    channels_last: bool = False
    """activations and weights lie in memory pixel by pixel instead of channel by channel"""
    compile: bool = False
    """torch.compile: seconds to minutes at the start (less the next time, from a cache), then faster"""

    def __post_init__(self) -> None:
        _must_be("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}", self.precision)

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
        for name in ("batch_size", "duration_nimg"):
            _must_be(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _must_be("lr", 0 < self.lr < math.inf, "positive and finite", self.lr)
        _must_be("seed", self.seed >= 0, "at least 0", self.seed)


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
