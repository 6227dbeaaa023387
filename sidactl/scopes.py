"""Named parts of some work, for whoever measures it; entering one costs next to nothing while nobody does."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

REST = "rest"
"""the part of work that lies in no scope"""
_MEASURE = ContextVar[Callable[[str], AbstractContextManager[Any]]]("_MEASURE", default=nullcontext)
"""what a scope is entered with, by its name"""


@contextmanager
def scope(name: str) -> Iterator[None]:
    """A part of some work, for whoever measures that."""
    with _MEASURE.get()(name):
        yield


def by_part(work: Callable[[], object], read: Callable[[], float]) -> dict[str, float]:
    """What `read` grows by in each scope that the work enters, without the scopes inside of it; all in this thread."""
    spent: dict[str, float] = defaultdict(float)
    entered, last = [REST], read()

    def charge() -> None:
        nonlocal last
        now = read()
        spent[entered[-1]] += now - last
        last = now

    @contextmanager
    def measure(name: str) -> Iterator[None]:
        charge()
        entered.append(name)
        try:
            yield
        finally:
            charge()
            entered.pop()

    token = _MEASURE.set(measure)
    try:
        work()
    finally:
        _MEASURE.reset(token)
    charge()
    rest = spent.pop(REST)
    return {**spent, REST: rest}
