"""The processes that torchrun starts: who they are, and what they tell one another."""

import atexit
import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sidactl import launch
from sidactl.engine.heartbeat import LONGEST, Watch
from sidactl.engine.threads import In, Out
from sidactl.errors import EXIT_FAILED


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; joins those that torchrun started. (0, 1) without torchrun."""
    if launch.world_size() == 1:
        return 0, 1
    join()
    return dist.get_rank(), dist.get_world_size()


def join(**where: Any) -> None:
    if dist.is_initialized():
        return
    local_rank = launch.local_rank() or 0
    has_own = local_rank < torch.cuda.device_count()
    if has_own:
        torch.cuda.set_device(local_rank)  # NCCL takes the current one for its own work
    watch = None
    if not where:
        store, rank, size = next(rendezvous("env://", timeout=LONGEST))
        watch, where = Watch(rank, size), {"store": store, "rank": rank, "world_size": size}
    # One process may prepare or download for hours while the others wait; of one that ends they hear at once, and of
    # one that hangs by the watch. On GPUs nobody waits for long: what has not come within NCCL's time never comes.
    if has_own:
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=NCCL_TIMEOUT, **where)
        _patient.append(dist.new_group(backend="gloo", timeout=LONGEST))
    else:
        dist.init_process_group("gloo", timeout=LONGEST, **where)
    atexit.register(_leave, watch)


NCCL_TIMEOUT = timedelta(minutes=15)

_patient: list[dist.ProcessGroup] = []


def patient_group() -> dist.ProcessGroup | None:
    """The group for what may take hours, over the CPU alone; None = the default one."""
    return _patient[0] if _patient else None


def _leave(watch: Watch | None) -> None:
    if hasattr(sys, "last_value"):  # Python ends with an exception that nobody caught
        abandon(EXIT_FAILED)
    if watch:
        watch.end()
    gc.collect()  # sharded tensors must be gone before the connections that they use
    _patient.clear()
    dist.destroy_process_group()


def abandon(code: int) -> NoReturn:
    """Ends this process at once: to close connections would wait for the others, who wait for it in their work."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def rank_share(items: Sequence[In]) -> Sequence[In]:
    """The items that fall to this process: every n-th of n processes."""
    rank, size = rank_and_size()
    return items[rank::size]


def gather_in_order(
    shared: Iterable[Out], num_items: int, *, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Out]:
    """Gathers every process's results and yields them in order on rank 0; the others yield nothing.

    `num_items` are shared in turn. Every process must iterate to the end, which comes early once should_stop() is true
    in one of them.
    """
    rank, size = rank_and_size()
    mine = iter(shared)
    for start in range(0, num_items, size):
        if any_rank(should_stop()):
            return
        made = next(mine) if start + rank < num_items else None
        everyone: list[Out] | None = [made] * size if rank == 0 else None  # type: ignore[list-item]  # filled below
        if size > 1:
            dist.gather_object(made, everyone, group=patient_group())
        yield from (everyone or [])[: num_items - start]


def scatter_in_order(make: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """Scatters rank 0's items over the processes and yields make(item) in order on rank 0; the others yield nothing.

    Every process must iterate to the end; only rank 0 has `items`.
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
        dist.scatter_object_list(payload, parts if rank == 0 else None, group=patient_group())
        num_taken, item = payload[0]
        yield from gather_in_order(map(make, [item] if rank < num_taken else []), num_taken)


def broadcast_from_rank0(make: Callable[[], str]) -> str:
    """Broadcasts the string that rank 0 makes; an error there ends all."""
    rank, size = rank_and_size()
    payload: list[str | None] = [make() if rank == 0 else None]
    if size > 1:
        dist.broadcast_object_list(payload, group=patient_group())
    assert payload[0] is not None
    return payload[0]


def receive() -> str:
    """The string that rank 0 broadcasts next; asked on the others alone."""
    return broadcast_from_rank0(str)


def barrier() -> None:
    """Waits until every process is here."""
    broadcast_from_rank0(str)


@contextmanager
def rank0_first() -> Iterator[None]:
    """Rank 0 goes through the block first; the others follow, and find what it left."""
    if rank_and_size()[0] > 0:
        barrier()
        yield
    else:
        yield
        barrier()


def any_rank(holds: bool) -> bool:
    """Whether something holds in at least one process; all must ask."""
    if rank_and_size()[1] == 1:
        return holds
    flag = torch.tensor(int(holds))  # on the CPU, so that no GPU is waited for
    dist.all_reduce(flag, dist.ReduceOp.MAX, patient_group())
    return bool(flag)


def all_reduce_min(number: int) -> int:
    """The smallest of the numbers that all processes give."""
    if rank_and_size()[1] == 1:
        return number
    least = torch.tensor(number)
    dist.all_reduce(least, dist.ReduceOp.MIN, patient_group())
    return int(least)


def any_message(message: str | None) -> str | None:
    """The message of the first process that has one, on all processes."""
    messages: list[str | None] = [message] * rank_and_size()[1]
    if len(messages) > 1:
        dist.all_gather_object(messages, message, group=patient_group())
    return next((m for m in messages if m is not None), None)


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in its place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values)
    return values


def open_collectives(device: torch.device) -> None:
    """Makes one collective of a step's kind and size on the device, whose buffers are then there; all must ask."""
    all_reduce_sum(torch.zeros(_BUFFER_BYTES // 8, dtype=torch.float64, device=device))


_BUFFER_BYTES = 1 << 26
"""that travel at a time: a collective of less takes as long, and more would be held twice while the next is packed"""


def all_reduce_sums(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields the sums of tensors over all processes, in order, in few collectives.

    One is under way while the next is packed. All tensors are of one type and on one device; they are taken one by one.
    """
    if rank_and_size()[1] == 1:
        yield from tensors
        return
    under_way: deque[tuple[Any, Tensor, list[torch.Size]]] = deque()
    packed: list[Tensor] = []
    num_bytes = 0

    def send() -> None:
        nonlocal num_bytes
        flat = torch.cat([tensor.reshape(-1) for tensor in packed])
        shapes = [tensor.shape for tensor in packed]
        packed.clear()
        num_bytes = 0
        under_way.append((dist.all_reduce(flat, async_op=True), flat, shapes))

    def received() -> Iterator[Tensor]:
        work, flat, shapes = under_way.popleft()
        work.wait()
        for part, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes, strict=True):
            yield part.view(shape)

    for tensor in tensors:
        packed.append(tensor)
        num_bytes += tensor.nbytes
        if num_bytes >= _BUFFER_BYTES:
            del tensor
            send()
            if len(under_way) > 1:
                yield from received()
    if packed:
        send()
    while under_way:
        yield from received()
