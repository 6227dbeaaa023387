"""The processes that torchrun starts, as its environment variables tell; without torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sidactl.errors import SidaError


def is_rank0() -> bool:
    """Whether this process is the first one, which alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """How many processes work together; 1 without torchrun, and within `alone`."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", "1"))


_alone: list[bool] = []
"""an entry for each `alone` that is being gone through"""


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process works by itself, whatever others do; still the first one alone speaks."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def local_rank() -> int | None:
    """This process's number on its machine; None without torchrun."""
    number = os.environ.get("LOCAL_RANK")
    return None if number is None else int(number)


def processes_per_machine() -> int:
    """How many processes share a machine, where every machine has as many; all of them where that is not known."""
    size = world_size()
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(here) if here.isdecimal() and int(here) and size % int(here) == 0 else size


def check() -> None:
    """Raises SidaError where torchrun's variables are there in part or do not fit: some process would be silent."""
    names = ("RANK", "WORLD_SIZE")
    if there := [name for name in names if name in os.environ]:
        if len(there) < len(names):
            (missing,) = set(names) - set(there)
            raise SidaError(f"{there[0]} is set, {missing} is not", f"Start it with torchrun, or unset {there[0]}.")
        number, size = (os.environ[name] for name in names)
        if not (number.isdecimal() and size.isdecimal() and int(number) < int(size)):
            raise SidaError(
                f"RANK must be a number from 0 to WORLD_SIZE - 1, got RANK={number} and WORLD_SIZE={size}",
                "Start it with torchrun, or unset both.",
            )
        if int(size) > 1 and "MASTER_ADDR" not in os.environ:
            raise SidaError(
                f"WORLD_SIZE is {size}, but MASTER_ADDR, where the processes meet, is not set",
                "Start it with torchrun, or unset RANK and WORLD_SIZE.",
            )
