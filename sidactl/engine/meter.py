"""What work takes, and what a machine can do: seconds, operations and memory, and the peak that they are held against.

Nothing here knows what the work is.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sidactl.engine import configure, devices
from sidactl.recipes import Precision

Clock = Callable[[], float]
"""seconds since some moment in the past"""
Work = Callable[[], object]
Shape = Sequence[int]
_PEAK_TRIES = 5
_BUSY_SECONDS = 0.1


def when_done(clock: Clock, device: torch.device) -> float:
    """What the clock says once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def seconds_of(work: Work, clock: Clock) -> float:
    start = clock()
    work()
    return clock() - start


def operation_counter() -> FlopCounterMode:
    """Counts floating-point operations within a `with` block; torch knows no count of a CPU's fused attention."""

    def forward(query: Shape, key: Shape, value: Shape, *rest: object, **options: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *rest: object, **options: object) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    of_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=of_cpu)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most floating-point operations per second that a product and a convolution reach here in one precision."""

    matrix_product: float
    convolution: float

    @property
    def flop_per_sec(self) -> float:
        return max(self.matrix_product, self.convolution)


def peak_of(precision: Precision, device: torch.device, clock: Clock) -> Peak:
    """Measures a matrix product and a convolution, large enough to keep the device busy, with the threads of now."""
    sides, nums = ((256, 512, 1024, 2048), (1, 4, 16)) if device.type == "cpu" else ((8192,), (512,))
    devices.allow_tf32(precision == "tf32")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(configure.DTYPES[precision])

    def product(side: int) -> tuple[Work, int]:
        return partial(torch.mm, random(side, side), random(side, side)), 2 * side**3

    def convolution(order: torch.memory_format, num: int) -> tuple[Work, int]:
        x, w = (t.contiguous(memory_format=order) for t in (random(num, 256, 32, 32), random(256, 256, 3, 3)))
        return partial(functional.conv2d, x, w, padding=1), 2 * x.numel() * w[0].numel()

    with torch.no_grad():
        orders = torch.contiguous_format, torch.channels_last
        return Peak(
            matrix_product=_highest_rate(map(product, sides), clock),
            convolution=max(_highest_rate(map(partial(convolution, order), nums), clock) for order in orders),
        )


def _highest_rate(growing: Iterable[tuple[Work, int]], clock: Clock) -> float:
    """The most operations per second; ends at a size that keeps the device busy, since some lack fast bf16 or fp16."""
    highest = 0.0
    for work, flop in growing:
        seconds = [seconds_of(work, clock)]
        while len(seconds) <= _PEAK_TRIES and seconds[-1] < _BUSY_SECONDS * _PEAK_TRIES:
            seconds.append(seconds_of(work, clock))
        highest = max(highest, flop / min(seconds))
        if min(seconds) > _BUSY_SECONDS:
            break
    return highest


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most bytes that tensors of this thread hold at a time beyond those that are there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _no_native_messages(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    assert profile.kineto_results is not None
    events = sorted((e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


@contextmanager
def _no_native_messages() -> Iterator[None]:
    """Within the block nothing reaches stderr: torch's profiler writes there without being asked."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
