"""Several items at once in threads of this process, in order and with the same bits."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import torch

from sidactl.nets import Denoiser, Preconditioned

SMALL_NET = 1 << 25
"""parameters times pixels below which a net on the CPU is run by one thread"""

In = TypeVar("In")

Out = TypeVar("Out")


def _settle_kernels() -> None:
    """Calls each vector function of MKL that we use once, while no other thread does.

    MKL chooses a function's kernel at its first call; of two threads that make that call together one may be given a
    coarser kernel for it, off by up to thousands of units in the last place. Source: PyTorch, issue 188792.
    """
    for function in (torch.sqrt, torch.exp, torch.log, torch.cos, torch.sin):
        for dtype in (torch.float32, torch.float64):
            function(torch.ones(1, dtype=dtype))


_settle_kernels()  # here, since whatever starts threads imports this


def is_small(net: Denoiser) -> bool:
    """Whether the net is on the CPU and so small that threads sharing its work would mostly wait for each other."""
    if not isinstance(net, Preconditioned) or any(p.device.type != "cpu" for p in net.parameters()):
        return False
    return sum(p.numel() for p in net.parameters()) * net.spec.img_resolution**2 < SMALL_NET


@contextmanager
def one_thread_if(is_small: bool) -> Iterator[None]:
    """Within the block what is small is run by one thread: the same bits on any number of cores, however busy."""
    usual = torch.get_num_threads()
    if is_small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def threads_for(net: Denoiser) -> int:
    """How many passes of a net run at once. Small net: one per core. Large net: one at a time on all cores."""
    return torch.get_num_threads() if is_small(net) else 1


def map_ordered(make: Callable[[In], Out], items: Iterable[In], num_threads: int) -> Generator[Out]:
    """Yields make(item) in order; `num_threads` items are computed at once, each by a single torch thread.

    A few are computed ahead. With one thread nothing is, and torch keeps its threads.
    """
    if num_threads == 1:
        yield from map(make, items)
        return
    usual = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        pending: deque[Future[Out]] = deque()
        try:
            for item in items:
                # torch keeps settings in the context, such as how many graphs it compiles.
                pending.append(pool.submit(copy_context().run, make, item))
                if len(pending) > 4 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            torch.set_num_threads(usual)  # set_num_threads in a worker also changes the default of threads made later
