"""An estimate of the memory that a recipe needs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from sidactl.recipes.distillation import FakeScoreRecipe, Recipe
from sidactl.recipes.execution import Execution
from sidactl.recipes.networks import NetSpec

BASE_BYTES = 250_000_000
"""of a process that has loaded torch, on the CPU"""

_DEVICES_OF_A_MACHINE = 8
"""over which networks are split, whatever the number of machines"""

_SAVED_VALUES: Mapping[str, float] = {"SongUNet": 11, "DhariwalUNet": 15.5, "EDM2": 13}
"""values kept for the backward pass per channel and pixel of a U-Net block, where one block is kept at a time"""


@dataclass(frozen=True)
class _Kept:
    """Values kept for the backward pass, per channel and pixel, as counted in our networks with fused attention."""

    num_in: float
    """of a block's input, where it changes no resolution"""
    num_out: float
    down: float
    """of a block that halves the resolution, per pixel of its output; `up`: of one that doubles it"""
    up: float
    attention: float
    base: float
    """per channel and pixel of the first layer, outside of blocks"""

    def values(self, net: NetSpec) -> float:
        """Of an image that goes through the network."""
        return (
            sum(
                pixels * (self.attention * has_attention * num_out + self._of_block(kind, num_in, num_out))
                for kind, num_in, num_out, pixels, has_attention in _blocks(net)
            )
            + self.base * net.model_channels * net.img_resolution**2
        )

    def _of_block(self, kind: str, num_in: int, num_out: int) -> float:
        if kind == "plain":
            return self.num_in * num_in + self.num_out * num_out
        return (self.down if kind == "down" else self.up) * num_out


_TRAINED: Mapping[str, _Kept] = {
    "SongUNet": _Kept(1.72, 4.86, 19.05, 6.25, 6.05, 2.85),
    "DhariwalUNet": _Kept(0.0, 8.77, 26.81, 5.64, 6.92, 0.23),
    "EDM2": _Kept(3.12, 2.84, 11.82, 5.63, 9.09, 0.0),
}
_FROZEN: Mapping[str, _Kept] = {
    "SongUNet": _Kept(1.75, 4.83, 19.23, 6.14, 6.03, 2.66),
    "DhariwalUNet": _Kept(0.0, 7.77, 25.79, 4.66, 6.92, 0.17),
    "EDM2": _Kept(3.13, 1.83, 10.81, 4.64, 9.09, 0.0),
}
"""of networks whose weights need no gradient, such as the teacher"""


def _blocks(net: NetSpec) -> Iterator[tuple[str, int, int, int, bool]]:
    """Of each block: plain, down or up; channels in and out; pixels of its output; whether it has attention."""
    widths, last = [net.model_channels * mult for mult in net.channel_mult], len(net.channel_mult) - 1
    channels = net.model_channels if net.architecture == "SongUNet" else widths[0]
    skips: list[int] = []
    for level, width in enumerate(widths):
        side = net.img_resolution >> level
        if level:
            yield "down", channels, channels, side**2, False
        skips.append(channels)
        for _ in range(net.num_blocks):
            yield "plain", channels, width, side**2, side in net.attn_resolutions
            channels = width
            skips.append(channels)
    for level in range(last, -1, -1):
        side, width = net.img_resolution >> level, widths[level]
        if level == last:
            yield "plain", channels, channels, side**2, True
            yield "plain", channels, channels, side**2, False
        else:
            yield "up", channels, channels, side**2, False
        for index in range(net.num_blocks + 1):
            attends = side in net.attn_resolutions and (net.architecture != "SongUNet" or index == net.num_blocks)
            yield "plain", channels + skips.pop(), width, side**2, attends
            channels = width


def kept_values(net: NetSpec, *, is_trained: bool) -> float:
    """Values that an image leaves in a network for its backward pass; dropout, if any, keeps more."""
    return (_TRAINED if is_trained else _FROZEN)[net.architecture].values(net)


def _dropped_values(net: NetSpec) -> int:
    """Values that dropout keeps of an image."""
    return sum(num_out * pixels for _, _, num_out, pixels, _ in _blocks(net))


@dataclass(frozen=True)
class Memory:
    """An estimate of what training needs on one device, in bytes."""

    num_parameters: int
    state_bytes: int
    """teacher, generator, its average and a fake score where one trains, and two moments of Adam of what trains; the
    device's share where they are sharded"""
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
        guide_parameters: int = 0,
    ) -> Self:
        """The estimate for a recipe that so many devices carry out together; heads and detectors are not counted.

        guide_parameters: of a network that guides the teacher.
        """
        execution = execution or Execution()
        levels = [
            (2 * net.num_blocks + 1, (net.img_resolution >> level) ** 2 * net.model_channels * mult)
            for level, mult in enumerate(net.channel_mult)
        ]
        micro_batch = recipe.batch_size // recipe.num_accumulation_rounds
        at_once = execution.batch_per_device or micro_batch
        saved, size = _SAVED_VALUES[net.architecture], 2 if recipe.precision in ("fp16", "bf16") else 4
        trained, frozen = recipe.graphs
        if isinstance(recipe, FakeScoreRecipe) and recipe.step_graphs == "all":
            trained += len(recipe.levels) - 1
        if isinstance(recipe, FakeScoreRecipe):
            frozen *= 1 + (recipe.teacher_guidance != 1)
            trained += recipe.score_guidance != 1
        num_graphs, has_fake_score = trained + frozen, isinstance(recipe, FakeScoreRecipe)
        if execution.checkpoint_activations:
            # Kept are the inputs of blocks, with skips in the decoder; and of one block at a time, in the fake score's
            # pass over fakes and reals, all values and their gradients.
            inputs, largest = sum(2 * count * each for count, each in levels), max(each for _, each in levels)
            kept = float(num_graphs) * inputs + 4 * saved * largest
        else:
            kept = trained * kept_values(net, is_trained=True) + frozen * kept_values(net, is_trained=False)
            kept += _dropped_values(net) if recipe.dropout else 0
        activation_bytes = size * kept * at_once
        if net.architecture == "EDM2":  # weights that are held normalised, those of no convolution in float32
            activation_bytes += (2 + has_fake_score) * num_parameters * (size + (0.1 if size < 4 else 0))
        elif size < 4:
            activation_bytes += (2 + has_fake_score) * num_parameters * size
        shares = min(num_devices, _DEVICES_OF_A_MACHINE) if execution.shard else 1
        has_sums = num_devices > 1 or at_once < recipe.batch_size
        num_blocks = sum(count for count, _ in levels)
        gathered = 2 * num_parameters // num_blocks if execution.shard else 0
        return cls(
            num_parameters,
            4 * ((5 + 3 * has_fake_score - execution.ema_on_cpu) * num_parameters // shares + gathered)
            + 4 * guide_parameters // shares,
            (4 + 8 * has_sums) * num_parameters,
            round(activation_bytes),
        )
