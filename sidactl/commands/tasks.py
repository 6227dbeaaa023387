"""Unfinished work: what each directory of live/ works on, how far it is, and the command that goes on."""

import dataclasses
import fcntl
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidactl.errors import SidaError
from sidactl.recipes import flag_of
from sidactl.store import QUESTION, LiveDir, Store
from sidactl.store.events import nimg_of

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{10,15})-[0-9]{1,9}")

_TAIL_BYTES = 1 << 16
"""as much of events.jsonl is read for its last event"""

_DIFFERENCES_TOLD = 3

_TRAINING = ("distill", "train-teacher")


@dataclass(frozen=True)
class Task:
    """What a live directory works on, in words and numbers; its key is a digest, which says nothing."""

    command: str
    """such as "distill" """
    subject: str
    """such as "tiny-digits sida"; two tasks of one subject are likely to be compared by whoever asks them"""
    words: Sequence[str]
    """what follows `sidactl` to go on with it; none where it is part of another command"""
    params: Mapping[str, Any]
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.command} {self.subject}"

    def again(self) -> "Task":
        """The same, done again."""
        return dataclasses.replace(self, words=[*self.words, "--force"] if self.words else [])

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def read(cls, path: Path) -> "Task | None":
        """The task in a file; None for one that is not there, or not of ours."""
        try:
            value = json.loads(path.read_bytes())
            read = cls(**value)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        strings = [read.command, read.subject, *(read.words if isinstance(read.words, list) else [None])]
        sound = isinstance(read.params, dict) and isinstance(read.inputs, dict)
        return read if sound and all(isinstance(text, str) for text in strings) else None


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """One directory of live/, as it is now."""

    key: str
    task: Task | None
    """None in those of older versions"""
    nimg: int | None
    """images done"""
    total_nimg: int | None
    checkpoint_nimg: int | None
    """images of the newest checkpoint"""
    size_bytes: int
    is_worked_on: bool
    process: int | None
    """that works on it, where it is known"""
    touched: float
    """when something in it was last written, as time.time() counts"""

    def go_on(self, run: str | None = None) -> str | None:
        """The command that goes on, in a shell; None where it is not known."""
        if self.task is None or not self.task.words:
            return None
        return shlex.join(["sidactl", *self.task.words, *(["--run", run] if run else [])])


def option_words(options: Mapping[str, Any], *recipes: Any) -> list[str]:
    """Options by their names in Python, as words of a command; what is None, or off by default and off, is left out.

    Of fields of the dataclasses `recipes` a None is the word none, and what is on by default takes true or false.
    """
    defaults = {f.name: f.default for cls in recipes for f in dataclasses.fields(cls)}
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool) and defaults.get(name, False) is False:
            words += [flag_of(name)] if value else []
        elif value is not None or name in defaults:
            words += [flag_of(name), _word(value)]
    return words


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def unfinished(store: Store) -> list[Unfinished]:
    """Every unfinished piece of work, the one touched last first."""
    root = store.root / "live"
    names = store.live_names()
    found = [look for name in names if (look := _look_at(root / name))]
    return sorted(found, key=lambda each: -each.touched)


def find(store: Store, prefix: str) -> Unfinished:
    """The one whose key begins so; SidaError where there is none, or several."""
    fitting = [each for each in unfinished(store) if each.key.startswith(prefix)]
    exact = [each for each in fitting if each.key == prefix]
    if prefix and len(exact or fitting) == 1:
        return (exact or fitting)[0]
    hint = "See what there is with: sidactl ls --live"
    if prefix and fitting:
        labels = ", ".join(each.key[:12] for each in fitting[:5])
        raise SidaError(f"'{prefix}' fits {len(fitting)} pieces of unfinished work: {labels}", "Give more digits.")
    raise SidaError(f"no unfinished work in {store.root} has a key that starts with '{prefix}'", hint)


def _look_at(folder: Path) -> Unfinished | None:
    size_bytes, touched = 0, 0.0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a process is at work
                about = os.lstat(os.path.join(place, name))
                size_bytes, touched = size_bytes + about.st_size, max(touched, about.st_mtime)
    entries: list[str] = []
    with suppress(OSError):
        entries = os.listdir(folder)
    if set(entries) <= {"lock"}:  # nothing to go on from: an empty place that a killed process left
        return None
    is_worked_on, process = _who_works_on(folder / "lock")
    task = Task.read(folder / QUESTION)
    total = task.params.get("duration_nimg") if task else None
    checkpoints = [int(found[1]) for name in entries if (found := _CHECKPOINT.fullmatch(name))]
    return Unfinished(
        key=folder.name,
        task=task,
        nimg=_nimg_in(folder),
        total_nimg=total if isinstance(total, int) else None,
        checkpoint_nimg=max(checkpoints, default=None),
        size_bytes=size_bytes,
        is_worked_on=is_worked_on,
        process=process,
        touched=touched,
    )


def _who_works_on(lock: Path) -> tuple[bool, int | None]:
    try:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read(32).strip()
                return True, int(text) if text.isdigit() else None
    except OSError:
        pass
    return False, None


def _nimg_in(folder: Path) -> int | None:
    """Images trained on, by the last event, or prepared."""
    events, state = folder / "events.jsonl", folder / "state.json"
    with suppress(OSError), (events if events.is_file() else Path(os.devnull)).open("rb") as file:  # not of a FIFO
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        counts = [nimg_of(line) for line in file.read().splitlines()]
        if known := [int(count) for count in counts if count < math.inf]:
            return known[-1]
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if state.is_file():
            return int(json.loads(state.read_bytes())["state"]["done"])
    return None


def begin(store: Store, live: LiveDir, task: Task) -> list[str]:
    """Keeps the task in its live directory; returns what to tell people of other work that does not go on."""
    others = [] if set(os.listdir(live.path)) - {"lock", QUESTION} else _told_of_others(store, live, task)
    live.write(QUESTION, task.to_bytes())
    return others


def _told_of_others(store: Store, live: LiveDir, task: Task) -> list[str]:
    others = [each for each in unfinished(store) if each.key != live.path.name]
    lines = []
    for each in others:
        there = each.task
        if there is None or each.is_worked_on or (there.command, there.subject) != (task.command, task.subject):
            continue
        if apart := list(_differences(there, task)):
            listed = "; ".join(apart[:_DIFFERENCES_TOLD])
            more = f"; and {len(apart) - _DIFFERENCES_TOLD} more" if len(apart) > _DIFFERENCES_TOLD else ""
            lines.append(
                f"this begins anew: an unfinished {task.title} differs in {listed}{more} (sidactl ls --live lists it)"
            )
    unknown = [each.key[:12] for each in others if each.task is None and each.checkpoint_nimg is not None]
    if unknown and task.command in _TRAINING:
        lines.append(
            f"unfinished work of an older version does not go on: {', '.join(unknown[:3])} "
            f"(sidactl gc --live {unknown[0]} removes it)"
        )
    return lines


def _differences(there: Task, now: Task) -> Iterator[str]:
    """What differs in two tasks, as options: "--generator-lr 1e-05 there, 2e-05 now"."""
    one, other = _flat(there.params), _flat(now.params)
    for name in dict.fromkeys([*other, *one]):
        before, after = one.get(name, "default"), other.get(name, "default")
        if before != after and name == "source":
            yield "the files of the source"
        elif before != after:
            yield f"{flag_of(name)} {_word(before)} there, {_word(after)} now"
    for role in dict.fromkeys([*now.inputs, *there.inputs]):
        before, after = str(there.inputs.get(role, "none")), now.inputs.get(role, "none")
        if before != after:
            yield f"{role} {before[:12]} there, {after[:12]} now"


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields as those of one level, as options have them; in the form that JSON gives them back."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(params))).items():
        is_source = name == "source"  # of which files a digest is of no use to people
        flat |= _flat(value) if isinstance(value, dict) and not is_source else {name: value}
    return flat
