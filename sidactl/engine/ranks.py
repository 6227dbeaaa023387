"""The processes that torchrun starts: who they are, and what they tell one another."""

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sidactl.engine.heartbeat import LONGEST, Watch
from sidactl.engine.threads import In, Out


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; joins those that torchrun started. (0, 1) without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    join()
    return dist.get_rank(), dist.get_world_size()


def join(**where: Any) -> None:
    if dist.is_initialized():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_own = local_rank < torch.cuda.device_count()
    if has_own:
        torch.cuda.set_device(local_rank)  # NCCL takes the current one for its own work
    watch = None
    if not where:
        store, rank, size = next(rendezvous("env://", timeout=LONGEST))
        watch, where = Watch(rank, size), {"store": store, "rank": rank, "world_size": size}
    # One process may prepare or download for hours while the others wait; of one that ends they hear at once, and of
    # one that hangs by the watch.
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_own else "gloo", timeout=LONGEST, **where)
    atexit.register(_leave, watch)


def _leave(watch: Watch | None) -> None:
    if watch:
        watch.end()
    gc.collect()  # sharded tensors must be gone before the connections that they use
    dist.destroy_process_group()


def share(items: Sequence[In]) -> Sequence[In]:
    """The items that fall to this process: every n-th of n processes."""
    rank, size = rank_and_size()
    return items[rank::size]


def joined(shared: Iterable[Out], num_items: int, *, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Out]:
    """What all processes made of their shares of `num_items` items, in order, on rank 0; on the others nothing.

    Every process must read it to its end, which comes early once should_stop() is true in one of them.
    """
    rank, size = rank_and_size()
    mine = iter(shared)
    for start in range(0, num_items, size):
        if any_process(should_stop()):
            return
        made = next(mine) if start + rank < num_items else None
        everyone: list[Out] | None = [made] * size if rank == 0 else None  # type: ignore[list-item]  # filled below
        if size > 1:
            dist.gather_object(made, everyone)
        yield from (everyone or [])[: num_items - start]


def handed_out(make: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`make` of each item of rank 0, which all processes share, in order, on rank 0; on the others nothing.

    Every process must read it to its end; on the others `items` are none.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield from map(make, items)
        return
    waiting, num_taken = iter(items), size
    while num_taken == size:
        taken = list(islice(waiting, size))
        parts = [(len(taken), item) for item in [*taken, *[None] * (size - len(taken))]]
        payload: list[Any] = [None]
        dist.scatter_object_list(payload, parts if rank == 0 else None)
        num_taken, item = payload[0]
        yield from joined(map(make, [item] if rank < num_taken else []), num_taken)


def agreed(make: Callable[[], str]) -> str:
    """What rank 0 makes, on all processes; an error of rank 0 ends the others, too."""
    rank, size = rank_and_size()
    payload: list[str | None] = [make() if rank == 0 else None]
    if size > 1:
        dist.broadcast_object_list(payload)
    assert payload[0] is not None
    return payload[0]


@contextmanager
def first_alone() -> Iterator[None]:
    """Within the block the first of several processes is alone; the others come after it, and find what it left."""
    if rank_and_size()[0] > 0:
        agreed(str)
        yield
    else:
        yield
        agreed(str)


def any_process(holds: bool) -> bool:
    """Whether something holds in at least one process; all must ask."""
    if rank_and_size()[1] == 1:
        return holds
    flag = torch.tensor(int(holds))  # on the CPU, so that no GPU is waited for
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def smallest(number: int) -> int:
    """The smallest of the numbers that all processes give."""
    if rank_and_size()[1] == 1:
        return number
    least = torch.tensor(number)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def first_told(message: str | None) -> str | None:
    """The message of the first process that has one, on all processes."""
    messages: list[str | None] = [message] * rank_and_size()[1]
    if len(messages) > 1:
        dist.all_gather_object(messages, message)
    return next((m for m in messages if m is not None), None)


def summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in its place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values)
    return values
