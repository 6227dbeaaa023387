"""How a recipe is carried out: speed and memory, never the method."""

from dataclasses import dataclass
from typing import Literal

from sidactl.errors import SidaError
from sidactl.recipes.fields import JsonFields, at_least

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
Form = Literal["fastest", "asked"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Execution(JsonFields):
    """How a recipe is carried out. It shapes speed and memory, never the method, so it is no part of the question."""

    batch_per_device: int | None = None
    """images that go through the nets at a time, a multiple of the micro-batch; None = as many as fit, by trying"""
    shard: bool = False
    """nets, EMA and optimiser states are split over the processes of a machine (FSDP2)"""
    checkpoint_activations: bool = False
    """the backward pass computes activations anew, block by block, instead of keeping them"""
    ema_on_cpu: bool = False
    """the averaged generator lies in the CPU's memory"""
    channels_last: bool = False
    """activations and weights lie in memory pixel by pixel instead of channel by channel"""
    compile: bool = False
    """torch.compile: minutes at the start (less the next time, from a cache), faster steps; other dropout masks"""
    form: Form = "fastest"
    """on a GPU: fastest = steps are timed without and with channels_last and compile (not with dropout), where neither
    is asked for, and the faster stays; asked = only what is asked for"""

    @property
    def is_form_open(self) -> bool:
        """Whether the form may be chosen by the clock."""
        return self.form == "fastest" and not (self.compile or self.channels_last or self.shard)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_per_device")
        if self.shard and self.compile:
            raise SidaError("compiled nets cannot be sharded, got both", "Leave out --shard or --compile.")


@dataclass(frozen=True, kw_only=True)
class SamplingForm(JsonFields):
    """How the same mathematics is carried out where nets alone are at work: in sampling, and in benchmarks."""

    precision: Precision = "fp32"
    """number format of the network: fp32, fp16 or bf16; tf32 is for bench alone"""
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
        """The part that changes the images, and so enters the question's key: the precision, unless it is float32.

        Raises SidaError for TF32, a setting of the device, which would reach the detector, too.
        """
        if self.precision == "tf32":
            raise SidaError("precision must be fp32, fp16 or bf16 here, got tf32", "Pass another --precision.")
        return {} if self.precision == "fp32" else {"precision": self.precision}
