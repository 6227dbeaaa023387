"""What a command asks of the run directory: answered already, worked on, gone on with, recorded."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from sidactl import launch
from sidactl.commands.tasks import Task, begin
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.store import Artifact, LiveDir, Store, UnwritableError


@dataclass(frozen=True, kw_only=True)
class Question:
    """A command, its parameters and inputs: their digest is the key under which the answer, an artifact, is kept.

    The commands read alike: `if known := question.known(): return known`, then `with question.working() as live: ...`
    and `return question.record(artifact)`.
    """

    store: Store
    command: str
    """such as "distill"; it is stored"""
    params: Mapping[str, Any]
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    refs: Sequence[str] = ()
    """the names that its answer gets"""
    called: str | None = None
    """the name that an answer has in itself; None = the one that it was made under"""
    force: bool = False
    recheck: bool = False
    """read all of an answer, and take one with a damaged file for none"""
    say: download.OnLine | None = None
    is_inner: bool = False
    """another question asks it: nobody need be told that its answer is an old one"""
    task: Task | None = None
    """what `ls --live` shows of it while it is worked on"""

    @cached_property
    def key(self) -> str:
        oids = {role: artifact.oid for role, artifact in self.inputs.items()}
        return self.store.key(self.command, self.params, oids)

    def answer(self) -> Artifact | None:
        """The answer; tidies up after a process that was killed once it had given it."""
        known = self.store.asked(self.key, whole=self.recheck)
        if known and (self.store.root / "live" / self.key).exists():
            with suppress(SidaError), self.store.live(self.key) as live:
                live.clear()
        return known

    def known(self) -> Artifact | None:
        """The answer under its names, and said so; None where there is none, or it is to be made again."""
        return self.named(known) if not self.force and (known := self.answer()) else None

    def known_by_all(self) -> Artifact | None:
        """`known` as rank 0 sees it: a process that looks later may see another."""
        known = on_every_rank(self.store, None if self.force else self.answer())
        return known and self.named(known)

    def named(self, known: Artifact) -> Artifact:
        """An answer that was there, as if it had been made now: under the names asked for. Says that it is an old one.

        A name within it that is another becomes the one asked for.
        """
        if self.say and not self.is_inner and (when := self.store.asked_at(self.key)):
            date = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(when))
            self.say(f"answered from the run directory, asked on {date}; --force does it again")
        if self.called is not None and known.params.get("name") != self.called:
            known = self.store.put_again(known, {**known.params, "name": self.called})
        return name_artifact(self.store, known, self.refs, self.say)

    @contextmanager
    def working(self) -> Iterator[LiveDir]:
        """Its live directory, which an interruption leaves for the next time and success empties.

        Says which other work does not go on. --force works in a second live directory, so that a forced run resumes,
        too, and the old answer stays until then.
        """
        assert self.task
        store, known = self.store, self.store.asked(self.key)
        key = store.key("again", {"key": self.key}, {"known": known.oid}) if known else self.key
        with store.live(key) as live:
            for line in begin(store, live, self.task.again() if known else self.task):
                download.to_stderr(line)
            yield live
            live.clear()

    @contextmanager
    def known_or_working(self) -> Iterator[Artifact | LiveDir]:
        """`known`, or else its live directory; of several commands that ask the same one works, the others wait."""
        if known := self.known():
            yield known
            return
        assert self.task
        lock, title = self.store.root / "tmp" / f"prepare-{self.key[:16]}.lock", self.task.title
        with download.exclusive(lock, lambda: download.to_stderr(f"waiting for another process: {title}")):
            if known := self.known():
                yield known
                return
            with self.working() as live:
                yield live

    @contextmanager
    def known_or_working_together(self) -> Iterator[Artifact | LiveDir | None]:
        """`known_or_working` in all processes that torchrun started; rank 0 writes.

        None where the run directory takes nothing.
        """
        if launch.world_size() == 1:
            with self._place() as place:
                yield place
            return
        from sidactl.engine import ranks

        if ranks.rank_and_size()[0] > 0:
            kind, _, rest = ranks.receive().partition(" ")
            yield self.store.get(rest) if kind == "answer" else LiveDir(Path(rest), is_writer=False) if rest else None
            return
        with self._place() as place:
            payload = f"answer {place.oid}" if isinstance(place, Artifact) else f"place {place.path if place else ''}"
            ranks.broadcast_from_rank0(lambda: payload)
            yield place

    @contextmanager
    def _place(self) -> Iterator[Artifact | LiveDir | None]:
        with ExitStack() as stack:
            place = None
            with suppress(UnwritableError):
                self.store.check_writable()
                place = stack.enter_context(self.known_or_working())
            yield place

    def record(self, artifact: Artifact) -> Artifact:
        """Keeps an artifact as the answer, under its names."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        # In this order, so that every answer is in the log, by which verify knows one that was swapped.
        self.store.log({"time": now, "command": self.command, "key": self.key, "oid": artifact.oid})
        self.store.answer(self.key, artifact.oid)
        return name_artifact(self.store, artifact, self.refs, self.say)


def name_artifact(
    store: Store, artifact: Artifact, refs: Sequence[str], say: download.OnLine | None = None
) -> Artifact:
    """Gives an artifact names; `say` takes a line for each that was another artifact's."""
    for name in refs:
        if (old := store.ref(artifact.kind, name)) != artifact.oid:
            store.set_ref(artifact.kind, name, artifact.oid)
            if old and say:
                say(f"{artifact.kind}/{name} named {old[:12]} before, and names {artifact.oid[:12]} now")
    return artifact


@contextmanager
def rank0_first() -> Iterator[None]:
    """See `ranks.rank0_first`; a process that is alone anyway does not import torch for it."""
    if launch.world_size() == 1:
        yield
        return
    from sidactl.engine import ranks

    with ranks.rank0_first():
        yield


def on_every_rank(store: Store, artifact: Artifact | None) -> Artifact | None:
    """The artifact that the first of several processes has, on all of them."""
    if launch.world_size() == 1:
        return artifact
    from sidactl.engine import ranks

    oid = ranks.broadcast_from_rank0(lambda: artifact.oid if artifact else "")
    return store.get(oid) if oid else None
