"""Devices: where the arithmetic happens. Several processes and other precisions get their room here."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from sidactl.diffusion import Denoiser, Preconditioned
from sidactl.errors import SidaError

SMALL_NET = 1 << 25
"""parameters times pixels below which a net on the CPU is run by one thread"""

In = TypeVar("In")
Out = TypeVar("Out")


def pick_device(name: str | None = None) -> torch.device:
    """The named device ("cpu", "cuda", "cuda:1"), or a GPU where there is one. Raises SidaError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SidaError(f"device must be cpu, cuda or cuda:N, got {name!r}", "Pass --device cpu.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SidaError(
            f"device {name} is not there: torch sees {torch.cuda.device_count()} GPUs", "Pass --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise SidaError(f"device must be cpu, cuda or cuda:N, got {name!r}", "Pass --device cpu.")
    return device


def is_small(net: Denoiser) -> bool:
    """Whether the net is on the CPU and so small that threads sharing its work would mostly wait for each other."""
    if not isinstance(net, Preconditioned) or any(p.device.type != "cpu" for p in net.parameters()):
        return False
    return sum(p.numel() for p in net.parameters()) * net.spec.img_resolution**2 < SMALL_NET


@contextmanager
def fitting_threads(net: Denoiser) -> Iterator[None]:
    """Within the block a small net is run by one thread: the same bits on any number of cores, however busy."""
    usual = torch.get_num_threads()
    if is_small(net):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def batches_of(net: Denoiser, make: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`make` of each item, in order; with a small net every core makes one of its own, with others all share in one."""
    if not is_small(net):
        yield from map(make, items)
        return
    usual = torch.get_num_threads()
    try:
        yield from in_order(make, items, usual, initializer=partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(usual)  # what a worker sets holds for threads that are still to come


def in_order(
    make: Callable[[In], Out], items: Iterable[In], num_threads: int, *, initializer: Callable[[], None] | None = None
) -> Generator[Out]:
    """`make` of each item, in the order of `items`, a few of them ahead in other threads."""
    if num_threads == 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(num_threads, initializer=initializer) as pool:
        pending: deque[Future[Out]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(make, item))
                if len(pending) > 4 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
