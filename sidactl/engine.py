"""Where the arithmetic happens: devices, threads, and the processes that torchrun starts."""

import atexit
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from sidactl.diffusion import Denoiser, Preconditioned
from sidactl.errors import SidaError

SMALL_NET = 1 << 25
"""parameters times pixels below which a net on the CPU is run by one thread"""

In = TypeVar("In")
Out = TypeVar("Out")


def pick_device(name: str | None = None) -> torch.device:
    """The named device ("cpu", "cuda", "cuda:1"), or a GPU where there is one; raises SidaError if it is not there.

    Of the processes that torchrun starts on a machine each gets a GPU of its own.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
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


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; joins those that torchrun started. (0, 1) without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend)
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def share(items: Sequence[In]) -> Sequence[In]:
    """The items that fall to this process: every n-th of n processes."""
    rank, size = rank_and_size()
    return items[rank::size]


def joined(shared: Iterable[Out], num_items: int) -> Iterator[Out]:
    """What all processes made of their shares of `num_items` items, in order, on rank 0; on the others nothing.

    Every process must read it to its end.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield from shared
        return
    mine = iter(shared)
    for start in range(0, num_items, size):
        made = next(mine) if start + rank < num_items else None
        everyone: list[Out] | None = [made] * size if rank == 0 else None  # type: ignore[list-item]  # filled below
        dist.gather_object(made, everyone)
        yield from (everyone or [])[: num_items - start]


def agreed(make: Callable[[], str]) -> str:
    """What rank 0 makes, on all processes; an error of rank 0 ends the others, too."""
    rank, size = rank_and_size()
    told: list[str | None] = [make() if rank == 0 else None]
    if size > 1:
        dist.broadcast_object_list(told)
    assert told[0] is not None
    return told[0]
