"""An estimate of the memory that a recipe needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from sidactl.recipes.distillation import Recipe
from sidactl.recipes.execution import Execution
from sidactl.recipes.networks import NetSpec

BASE_BYTES = 250_000_000
"""of a process that has loaded torch, on the CPU"""

_DEVICES_OF_A_MACHINE = 8
"""over which networks are split, whatever the number of machines"""

_GRAPHS = 3
"""networks whose activations a generator step holds at once: generator, fake score, teacher"""

_SAVED_VALUES: Mapping[str, float] = {"SongUNet": 11, "DhariwalUNet": 15.5, "EDM2": 13}
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
            kept = _GRAPHS * sum(2 * count * each for count, each in levels) + 4 * saved * max(v for _, v in levels)
        else:
            kept = _GRAPHS * saved * sum(count * each for count, each in levels)
        values = round(kept * at_once)
        if net.architecture == "EDM2" or size < 4:
            values += _GRAPHS * num_parameters
        shares = min(num_devices, _DEVICES_OF_A_MACHINE) if execution.shard else 1
        has_sums = num_devices > 1 or at_once < recipe.batch_size
        num_blocks = sum(count for count, _ in levels)
        gathered = 2 * num_parameters // num_blocks if execution.shard else 0
        return cls(
            num_parameters,
            4 * ((4 + 4) * num_parameters // shares + gathered),
            (4 + 8 * has_sums) * num_parameters,
            size * values,
        )
