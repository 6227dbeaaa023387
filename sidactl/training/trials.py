"""What is found by trying before a run begins, by what fits and by the clock. What is tried comes in as functions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sidactl.engine import ranks

Clock = Callable[[], float]
"""seconds since some moment in the past, once the device has done all that it was given"""
SPARE = 0.05
"""of a device's memory that stays free: collectives, other programs, and what the pieces in use leave between them"""

_NEVER = 1 << 62


class Fit(NamedTuple):
    """What `fastest` chose; no time where not even the smallest size fits."""

    size: int
    seconds: float | None


def slowest(seconds: float | None) -> float | None:
    """The most seconds of all processes, which must all ask; None where one has none."""
    most = -ranks.all_reduce_min(-(_NEVER if seconds is None else round(seconds * 1e12)))
    return None if most == _NEVER else most / 1e12


def fastest(sizes: Sequence[int], start: int, seconds_of: Callable[[int], float | None]) -> Fit:
    """The size with the least time per item that fits: from `start` down to one that does, then up or down from there.

    sizes: ascending; start: one of them. seconds_of: per item, None where it does not fit. Processes try the same sizes
    at a time, and the slowest counts for all. Where none fits it is the smallest, whose own error the run then tells.
    """
    known: dict[int, float | None] = {}

    def measured(index: int) -> float | None:
        if index not in known:
            known[index] = slowest(seconds_of(sizes[index]))
        return known[index]

    at = sizes.index(start)
    while at and measured(at) is None:
        at -= 1
    best = measured(at)
    for way in (1, -1):
        while best is not None and 0 <= at + way < len(sizes):
            other = measured(at + way)
            if other is None or other >= best:
                break
            at, best = at + way, other
    return Fit(sizes[at], best)


def least_seconds(work: Callable[[], object], clock: Clock, *, num_tries: int = 2) -> float:
    """Of some repetitions of a work the shortest: whatever else a machine does only adds to it."""
    found = []
    for _ in range(num_tries):
        started = clock()
        work()
        found.append(clock() - started)
    return min(found)
