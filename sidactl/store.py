"""The run directory: immutable objects named by their SHA-256, refs, answers, live directories; not what they mean.

- `format`: the format's number; also the lock that writers share and gc holds alone
- `objects/ab/cdef...`: files and manifests alike, mode 0444
- `refs/<kind>/<name>`: the oid of an artifact; '/' in a name is written %2F, so that no name stands in another's way
- `asked/<key>`: the oid of the answer
- `live/<key>/`: the only mutable place, one process at a time
- `tmp/`: every write starts here, is flushed, then moved into its place
- `digests/<name>`: what files outside, and large objects, last held; a shortcut, and no error where it cannot be kept
- `log.jsonl`: when which question was answered: what must never enter a hash
- `logs/<key>/`: losses and scores of finished runs, and what loggers write
"""

import difflib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from sidactl.errors import EXIT_FAILED, NO_LOCKS, MissingError, SidaError
from sidactl.text import shell_word

SCHEMA_VERSION = 1
KINDS = ("teacher", "generator", "dataset", "detector", "vae", "samples", "features", "stats", "score", "run")

Json: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None
Data: TypeAlias = bytes | memoryview
T = TypeVar("T")

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_CHUNK_BYTES = 1 << 20
_LARGE_BYTES = 1 << 30
"""of a file that is not read to its end at every start, but once, and again when it was touched"""
SETTLED_NS = 2 * 10**9
"""how long a file must have been left alone before it was read for its times to tell whether it was changed since"""
_MAX_NAME_BYTES = 255
"""of a file's name, on every file system there is"""
_OID_FILE_BYTES = 256
"""more than a ref or an answer holds"""
_DIGESTS = "SHA256SUMS"
"""the file in a folder of live/ that lists the others, as `sha256sum` does"""
# Sorted keys put this first in a manifest: ten bytes tell it from nearly any other object, whatever its size.
_MANIFEST_HEAD = b'{"files":{'
_MANIFEST_FIELDS = {"schema", "kind", "files", "inputs", "params", "results"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-fA-F]+")
_PART = r"[A-Za-z0-9_+][A-Za-z0-9._+-]*"
_NAME = re.compile(rf"(?!.*\.\.){_PART}(/{_PART})*")
COLLECTED = "-collected.json"
"""how files of unfinished scores end that say which others hold their features"""
_LIVE_NAME = re.compile(rf"(?!lock$){_PART}")
_FOLDERS = ("objects", "refs", "asked", "live", "tmp")
_SEE_LS = "See what there is with: sidactl ls"
_ASK_AGAIN = "Run sidactl verify, then ask again with --force."
_DAMAGED = "damaged: its content no longer matches its name"


class UnwritableError(SidaError):
    """The run directory does not take what should be kept in it."""


class BrokenError(SidaError):
    """An artifact lost a file, or its bytes changed; the hint names the command that repairs it."""

    def __init__(self, sha256: str, oid: str, name: str, problem: str, kind: str = "artifact", hint: str = "") -> None:
        super().__init__(f"object {sha256[:12]} of {kind} {oid[:12]} ({name}) is {problem}", hint or _ASK_AGAIN)


def _how_to_repair(artifact: "Artifact") -> str:
    """The command that makes a damaged artifact again, as far as the artifact says how it was made."""
    kind, params, recipe = artifact.kind, artifact.params, artifact.params.get("recipe")
    name, is_trained = params.get("name"), "dataset" in artifact.inputs
    if kind in ("detector", "vae", "stats", "features"):
        return "Repeat the command that scores or trains with it, with --force."
    if kind == "samples":
        return f"Repeat sidactl sample {artifact.inputs.get('net', '')[:12]} with its seeds, with --force."
    if kind == "dataset":
        return f"Repeat sidactl prepare-data for {name} with its options, with --force."
    if kind == "teacher" and is_trained:
        return f"Repeat sidactl train-teacher --name {name} with its dataset and options, with --force."
    if kind == "generator" and is_trained and isinstance(recipe, Mapping):
        made_by = f"--teacher {recipe.get('teacher')} --mode {recipe.get('mode')}"
        return f"Repeat sidactl distill {made_by} with its options, with --force."
    if kind in ("teacher", "generator"):
        source = params.get("source_url") or ("of its file" if "source_sha256" in params else name)
        return f"Repeat sidactl fetch-teacher {source} with --force."
    return _ASK_AGAIN


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """The object that holds a file of an artifact."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What came out of a command: files by name, oids of inputs by role, small JSON values. `oid` hashes all of it."""

    oid: str
    kind: str
    files: Mapping[str, FileEntry]
    inputs: Mapping[str, str]
    params: Mapping[str, Json]
    results: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What gc removed, or would: objects, bytes, and names: SHA-256s, "asked/...", "tmp/...", "live/..."."""

    num_objects: int
    num_bytes: int
    removed: tuple[str, ...]
    num_young: int = 0
    """objects that no ref reaches and that were spared for their age"""


def canonical_json(value: object) -> bytes:
    """The one UTF-8 JSON text of `value`: keys sorted, no spaces, floats by repr, tuples as lists.

    ValueError: NaN, infinity, lone surrogates. TypeError: keys that are not str, types that JSON does not have.
    """
    return _plain_json(_plain(value))


def _plain_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys of canonical JSON must be str, got {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def digest(value: object) -> str:
    """SHA-256 of `canonical_json(value)`, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _manifest_bytes(draft: Artifact) -> bytes:
    files = {name: {"sha256": entry.sha256, "size_bytes": entry.size_bytes} for name, entry in draft.files.items()}
    fields = {"schema": SCHEMA_VERSION, "kind": draft.kind, "files": files, "inputs": draft.inputs}
    return canonical_json(fields | {"params": draft.params, "results": draft.results})


def _parse_manifest(oid: str, manifest: bytes) -> Artifact | None:
    """The artifact whose manifest these bytes are; None for any others."""
    try:
        fields = json.loads(manifest)
        files = {name: FileEntry(**entry) for name, entry in fields["files"].items()}
        parts = {part: fields[part] for part in ("kind", "inputs", "params", "results")}
        artifact = Artifact(oid=oid, files=files, **parts)
        oids = [*artifact.inputs.values(), *(entry.sha256 for entry in files.values())]
        sound = artifact.kind in KINDS and all(map(_NAME.fullmatch, files)) and all(map(_SHA256.fullmatch, oids))
        # What comes from JSON is plain already; this is `_manifest_bytes(artifact) == manifest`, in half the time.
        sound = sound and set(fields) == _MANIFEST_FIELDS and type(fields["schema"]) is int
        sound = sound and fields["schema"] == SCHEMA_VERSION and _plain_json(fields) == manifest
        return artifact if sound else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _complete(draft: Artifact) -> tuple[Artifact, bytes]:
    """The artifact with its oid, and its manifest."""
    manifest = _manifest_bytes(draft)
    artifact = _parse_manifest(hashlib.sha256(manifest).hexdigest(), manifest)
    assert artifact, f"a manifest needs a known kind, plain file names and full oids, got {manifest.decode()}"
    return artifact, manifest


@contextmanager
def _disk(root: Path, verb: str) -> Iterator[None]:
    """Tells any OSError of the run directory in one line; `verb` is "read" or "written"."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space" if is_full else "Check what it is and its permissions,"
        if error.errno in NO_LOCKS:
            remedy = "Locks do not work on its file system: mount it with them,"
        done = "locked" if error.errno in NO_LOCKS else verb
        message = f"the run directory {root} cannot be {done}: {error.strerror}"
        kind = UnwritableError if verb == "written" else SidaError
        raise kind(message, f"{remedy} or choose another with --run DIR.") from error


def _chunks(source: Path | Data) -> Iterator[Data]:
    if not isinstance(source, Path):
        yield memoryview(source).cast("B")
        return
    try:
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        message = f"{source} cannot be read: {error.strerror}"
        raise SidaError(message, "Check the path, and that you may read it.") from error


def _write_flushed(path: Path, source: Path | Data, mode: int) -> FileEntry:
    sha256, size_bytes = hashlib.sha256(), 0
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        for chunk in _chunks(source):
            sha256.update(chunk)
            size_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(sha256=sha256.hexdigest(), size_bytes=size_bytes)


def _place(tmp: Path, target: Path) -> None:
    """Moves a flushed file to its place in one step, for good: the folder, and the folder's own entry, are flushed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(tmp, target)
    for folder in (target.parent, target.parent.parent):
        _flush(folder)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _append(path: Path, line: bytes) -> None:
    """Adds one line in a single write; takes back a line that fits only in part."""
    data = line.rstrip(b"\n") + b"\n"
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size_bytes = os.fstat(file.fileno()).st_size
        if file.write(data) != len(data):
            file.truncate(size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_abandoned(path: Path) -> bool:
    """Whether the file is there and nobody holds its lock."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_nlink > 0
    return False


def _is_file(path: Path) -> bool:
    """Whether it can be read to its end: a folder cannot, and a pipe waits for ever."""
    return stat.S_ISREG(path.stat().st_mode)


def _hash_file(path: Path) -> str:
    if not _is_file(path):
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> bytes | None:
    if not _is_file(path):
        return None
    with path.open("rb") as file:
        head = file.read(len(_MANIFEST_HEAD))
        return head + file.read() if head == _MANIFEST_HEAD else None


def _read_oid(path: Path) -> str | None:
    """What a ref or an answer holds, be it an oid or not; None for what is no file."""
    if not _is_file(path):
        return None
    with path.open("rb") as file:
        return file.read(_OID_FILE_BYTES).decode(errors="replace").strip()


QUESTION = "question.json"
"""the file in a live directory that says in words what is worked on; see live.py"""
_LOOKS_SEC = (0.02, 0.05, 0.1)


def _lock_in_time(fd: int) -> None:
    """Takes the lock; BlockingIOError where it stays taken for longer than whoever looks at it needs."""
    for wait_sec in _LOOKS_SEC:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(wait_sec)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_live(path: Path) -> int:
    """A file descriptor that holds the lock of the live directory `path`, which is created."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        # The holder before us may be removing the directory: then no lock is there to open, or ours has lost its name.
        with suppress(FileNotFoundError), ExitStack() as stack:
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, fd)
            try:
                _lock_in_time(fd)
            except BlockingIOError:
                message = f"run {path.name[:12]} is already being worked on by process {os.pread(fd, 32, 0).decode()}"
                raise SidaError(message.strip(), "Wait for it, or stop it first.", exit_code=EXIT_FAILED) from None
            if os.fstat(fd).st_nlink:
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
                stack.pop_all()
                return fd


@dataclass(frozen=True)
class LiveDir:
    """A mutable directory that one process holds; files have plain names. What cannot be written is a SidaError.

    is_writer: false in the processes that work with the one that holds it; what they are to write is left to that one.
    """

    path: Path
    is_writer: bool = True

    def _file(self, name: str) -> Path:
        assert _LIVE_NAME.fullmatch(name), f"a plain file name is needed, got {name!r}"
        return self.path / name

    def write(self, name: str, data: Data) -> None:
        """Puts `data` under `name` in one step: a reader, or a kill, meets the old content or the new."""
        if not self.is_writer:
            return
        target, tmp = self._file(name), self.path / f".{name}.tmp"
        with _disk(self.path.parents[1], "written"):
            try:
                _write_flushed(tmp, data, 0o666)
                _place(tmp, target)
            finally:
                tmp.unlink(missing_ok=True)

    def append(self, name: str, line: bytes) -> None:
        """Adds one line (its newline may be left out)."""
        if not self.is_writer:
            return
        with _disk(self.path.parents[1], "written"):
            _append(self._file(name), line)

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A folder to fill, by several processes if need be; it comes under `name` in one step, flushed, at the end."""
        target, tmp = self._file(name), self.path / f".{name}.tmp"
        if not self.is_writer:
            yield tmp
            return
        with _disk(self.path.parents[1], "written"):
            try:
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir()
                yield tmp
                for path in tmp.iterdir():
                    _flush(path)
                self.remove(name)
                _place(tmp, target)
            finally:
                shutil.rmtree(tmp, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes a file or folder at once; no error where there is none."""
        path = self._file(name)
        if not self.is_writer:
            return
        with _disk(self.path.parents[1], "written"):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            # Away in one step, so that a kill leaves no half of it under its name.
            gone = self.path / f".{path.name}.gone"
            shutil.rmtree(gone, ignore_errors=True)
            path.replace(gone)
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes everything in it but the events, which go to logs/<key>/ in the run directory; it stays locked."""
        if not self.is_writer:
            return
        root, events = self.path.parents[1], self.path / "events.jsonl"
        with _disk(root, "written"):
            if events.is_file():
                kept = root / "logs" / self.path.name[:16] / events.name
                kept.parent.mkdir(parents=True, exist_ok=True)
                events.replace(kept)
            # Backwards, so that no checkpoint is left without the best generator that it counts on.
            for path in sorted(self.path.iterdir(), reverse=True):
                if path.name.startswith(".") and path.is_dir() and not path.is_symlink():  # what a killed process left
                    shutil.rmtree(path)
                elif path.name != "lock":
                    self._remove(path)


def sealed(said: Mapping[str, Any]) -> bytes:
    """JSON with a digest of its own, for files of unfinished work that say what others hold."""
    return json.dumps({**said, "digest": _seal(said)}).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError where that is not what it wrote."""
    said = _json_or_none(data)
    if not isinstance(said, dict) or said.pop("digest", None) != _seal(said):
        raise ValueError("it is damaged")
    return said


def _seal(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(said)).encode()).hexdigest()


_UNSEEN_COMMANDS = ("fetch-detector", "fetch-reference", "import-stats", "stats", "features", "score")
"""what answers are logged under that are part of other commands"""
_EVENT_FIELDS = {"event": str, "nimg": int}


def _problem_in_live(path: Path) -> str:
    """What is wrong with a file or folder of unfinished work, and what helps; empty where nothing is."""
    try:
        if path.name in ("lock", "events.jsonl") and not _is_file(path):
            return f"must be a file. Remove it: rm -rf {shell_word(path)}"
        if path.name == "events.jsonl" and (number := _bad_event(path)):
            return f"line {number} is no event. Remove it: sed -i {number}d {shell_word(path)}"
        if path.name == "state.json" and not (_is_file(path) and isinstance(_json_or_none(path.read_bytes()), dict)):
            return f"must be a JSON object. Remove it, and the work begins anew: rm -rf {shell_word(path.parent)}"
        if path.name.endswith(COLLECTED) and (problem := _problem_of_collected(path)):
            return f"{problem}. Remove it, and the score begins anew: rm -rf {shell_word(path)}"
        if path.name.startswith("checkpoint-") and (problem := _problem_of_checkpoint(path)):
            return f"{problem}. Remove it, and the work goes on from before it: rm -rf {shell_word(path)}"
    except FileNotFoundError:  # a process is at work
        return ""
    except OSError as error:
        return _cannot_be_read(error, path)
    return ""


def _problem_of_collected(path: Path) -> str:
    """What is wrong with features of an unfinished score, of which this file says where they lie; empty = nothing."""
    try:
        files = unsealed(path.read_bytes())["files"].items()
        wrong = next((name for name, sha256 in files if _hash_file(path.parent / name) != sha256), None)
    except (OSError, ValueError, LookupError):
        return "is not as it was saved"
    return f"counts on {wrong}, which is damaged" if wrong else ""


def _bad_event(path: Path) -> int | None:
    """The number of the first line that is no event; the half line that a killed process left is none."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        event = _json_or_none(line)
        is_event = isinstance(event, dict) and all(isinstance(event.get(k), t) for k, t in _EVENT_FIELDS.items())
        if line.endswith(b"\n") and not is_event:
            return number
    return None


def _json_or_none(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _problem_of_checkpoint(folder: Path) -> str:
    if not (folder.is_dir() and re.fullmatch(r"checkpoint-\d+-\d+", folder.name)):
        return "is no checkpoint"
    if not (folder / _DIGESTS).is_file():
        return f"has lost its {_DIGESTS}"
    lines = (folder / _DIGESTS).read_text(errors="replace").splitlines()
    digests = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    there = {path.name for path in folder.iterdir()} - {_DIGESTS}
    if odd := sorted(there ^ set(digests)):
        return f"{odd[0]} is {'not one of its files' if odd[0] in there else 'missing'}"
    bad = [name for name, sha256 in digests.items() if _hash_file(folder / name) != sha256]
    return f"{bad[0]} is {_DAMAGED}" if bad else ""


def _problems_of_bests(folder: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with the best generators so far that the checkpoints count on, as (file, problem)."""
    counted_on = {}
    for path in sorted(folder.glob("checkpoint-*/state.json")):
        state = _json_or_none(path.read_bytes())
        with suppress(TypeError, ValueError, LookupError):  # of which the digests tell
            finite = [point for point in state["scores"] if math.isfinite(point[1])]  # type: ignore[index]
            nimg, _ = min(finite, key=lambda point: float(point[1]))
            counted_on[f"best-{int(nimg):010d}.safetensors"] = state["best_sha256"]  # type: ignore[index]
    for name, sha256 in counted_on.items():
        is_there = (folder / name).is_file()
        if sha256 is not None and (not is_there or _hash_file(folder / name) != sha256):
            told = f"is {'damaged' if is_there else 'missing'}, and the run could not end with it"
            yield name, f"{told}. Put it back, or begin anew after: sidactl gc --live {folder.name[:12]}"


def _cannot_be_read(error: BaseException | None, path: Path) -> str:
    assert isinstance(error, OSError)
    is_shut = error.errno in (errno.EACCES, errno.EPERM)
    way = "Let it be read: chmod -R u+rX" if is_shut else "Remove it: rm -rf"
    return f"cannot be read: {error.strerror}. {way} {shell_word(path)}"


@dataclass(frozen=True)
class _Checked:
    """What `verify` found in objects/, and what it says of that: every way out is a command that works."""

    store: "Store"
    artifacts: Mapping[str, Artifact]
    """the sound ones by oid, without parameters and results"""
    damaged: Collection[str]
    unreadable: Mapping[str, BaseException | None]
    """what the disk said, by SHA-256"""

    @cached_property
    def _names(self) -> Mapping[str, list[str]]:
        """The refs of artifacts."""
        names: dict[str, list[str]] = {}
        for name, file in self.store._ref_files().items():
            with suppress(SidaError):  # `refs` tells that it cannot be read
                names.setdefault(self.store._oid(f"refs/{file}") or "", []).append(name)
        return names

    @cached_property
    def _log(self) -> Mapping[str, Mapping[str, str]]:
        """The command that gave each answer, by question and oid."""
        log: dict[str, dict[str, str]] = {}
        for line in (self.store._read(Path.read_bytes, self.store.root / "log.jsonl") or b"").splitlines():
            entry = _json_or_none(line)
            words = [entry.get(field) for field in ("key", "oid", "command")] if isinstance(entry, dict) else [None]
            if all(isinstance(word, str) for word in words):
                key, oid, command = map(str, words)
                log.setdefault(key, {})[oid] = command
        return log

    @cached_property
    def _commands(self) -> Mapping[str, str]:
        """The command that made each artifact."""
        return {oid: command for answers in self._log.values() for oid, command in answers.items()}

    @cached_property
    def _uses(self) -> Mapping[str, list[tuple[str, str]]]:
        """What each broken object is to whom, and the artifact to be made anew for it."""
        uses: dict[str, list[tuple[str, str]]] = {sha256: [] for sha256 in (*self.damaged, *self.unreadable)}
        for sha256 in uses:
            uses[sha256] += [(f"artifact of ref {name}", sha256) for name in self._names.get(sha256, [])]
        for artifact in self.artifacts.values():
            for name, entry in artifact.files.items():
                if entry.sha256 in uses:
                    uses[entry.sha256].append((f"file {name} of {self._label(artifact)}", artifact.oid))
            for role, oid in artifact.inputs.items():
                if oid in uses:
                    uses[oid].append((f"input {role} of {self._label(artifact)}", oid))
        for key in self.store._listdir("asked") if uses else []:
            with suppress(SidaError):  # `answers` tells that it cannot be read
                oid = self.store._oid(f"asked/{key}") or ""
                if oid in uses:
                    uses[oid].append((f"artifact that answers {self._commands.get(oid, 'a question')}", oid))
        return uses

    def _label(self, artifact: Artifact) -> str:
        names = self._names.get(artifact.oid)
        return f"{artifact.kind} {artifact.oid[:12]}" + (f" ({', '.join(names)})" if names else "")

    def _make_anew(self, oid: str) -> str:
        command = self._commands.get(oid)
        which = "that needs it" if command in _UNSEEN_COMMANDS else f"that made it{f' ({command})' if command else ''}"
        return f"repeat the command {which} with --force"

    def objects(self) -> Iterator[tuple[str, str]]:
        """Damaged objects, and sound artifacts that lack something."""
        for sha256, uses in sorted(self._uses.items()):
            what = f"{uses[0][0]}{f' and {len(uses) - 1} more' if len(uses) > 1 else ''}: " if uses else ""
            path = self.store._object(sha256)
            if sha256 in self.unreadable:
                yield sha256, what + _cannot_be_read(self.unreadable[sha256], path)
            else:
                then = f", then {self._make_anew(uses[0][1])}" if uses else ""
                yield sha256, f"{what}{_DAMAGED}. Remove it: rm -rf {shell_word(path)}{then}"
        for artifact in self.artifacts.values():
            for problem, oid in self._lacks(artifact):
                forget = f"rm -f {shell_word(self.store._object(artifact.oid))}"
                mend = f"To have it back, {self._make_anew(oid)}; to forget the artifact: {forget}"
                yield artifact.oid, f"{self._label(artifact)}: {problem}. {mend}"

    def _lacks(self, artifact: Artifact) -> Iterator[tuple[str, str]]:
        """What an artifact lacks, and the artifact to be made anew for it."""
        broken = {*self.damaged, *self.unreadable}
        for name, entry in artifact.files.items():
            size_bytes = self.store._size_bytes(entry.sha256)
            if size_bytes is None:
                yield f"its file {name} ({entry.sha256[:12]}) is missing", artifact.oid
            elif size_bytes != entry.size_bytes and entry.sha256 not in broken:
                yield f"its file {name} must have {entry.size_bytes} bytes, got {size_bytes}", artifact.oid
        for role, oid in artifact.inputs.items():
            if oid not in self.artifacts and oid not in broken:
                is_there = self.store._size_bytes(oid) is not None
                yield f"its input {role} ({oid[:12]}) is {'no artifact' if is_there else 'missing'}", oid

    def refs(self) -> Iterator[tuple[str, str]]:
        """Refs that name nothing, or something of another kind."""
        for name, file in self.store._ref_files().items():
            if problem := self._problem_of_name(f"refs/{file}", name.partition("/")[0], "Remove it"):
                yield name, problem

    def answers(self) -> Iterator[tuple[str, str]]:
        """Answers that name nothing, or what never answered their question."""
        for key in filter(_SHA256.fullmatch, self.store._listdir("asked")):
            way = "Remove it, and it is worked out anew"
            if problem := self._problem_of_name(f"asked/{key}", None, way, self._log.get(key, {})):
                yield f"asked/{key}", problem

    def _problem_of_name(self, name: str, kind: str | None, way: str, answers: Mapping[str, str] = _EMPTY) -> str:
        path = self.store.root / name
        try:
            oid = self.store._oid(name)
        except SidaError as error:
            return _cannot_be_read(error.__cause__, path)
        if oid is None or oid in self.damaged or oid in self.unreadable:
            return ""  # it is gone meanwhile, or the object itself is told
        artifact = self.artifacts.get(oid) or self.store._sound(oid)  # younger than our look at the objects
        if not _SHA256.fullmatch(oid):
            problem = f"it names {oid[:12]!r}, which is no oid"
        elif artifact is None:
            what = "missing" if self.store._size_bytes(oid) is None else "no artifact"
            problem = f"it names artifact {oid[:12]}, which is {what}"
        elif kind not in (None, artifact.kind):
            problem = f"it names {self._label(artifact)}, which is not of its kind"
        elif answers and oid not in answers:
            command = next(iter(answers.values()))
            problem = f"it names {self._label(artifact)}, which never answered it ({command})"
        else:
            return ""
        return f"{problem}. {way}: rm -f {shell_word(path)}"


class Store:
    """The content-addressed run directory at `root`. Reading never creates it; the first write does.

    Several processes may read and write it at once. A process killed at any moment leaves it valid, at worst with
    garbage. What cannot be read, written or found is a SidaError.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[tuple[str, int, int]] = set()
        self._digests: dict[str, str] = {}

    @classmethod
    def open(cls, root: os.PathLike[str] | str | None = None) -> "Store":
        """The store at `root`, or $SIDACTL_RUN, or ./sida-run (~ is a home); SidaError where its format is not ours."""
        # A shell leaves the ~ of --run=~/x and of quoted variables as it is.
        path = os.path.expanduser(root or os.environ.get("SIDACTL_RUN") or "sida-run")
        if path.startswith("~"):
            raise SidaError(f"there is no home directory for {path}", f"Write ./{path} for a folder of that name.")
        store = cls(Path(path))
        store._has_format()
        return store

    @staticmethod
    def key(command: str, params: Mapping[str, Json], inputs: Mapping[str, str]) -> str:
        """The name of a question: SHA-256 of the command, its resolved parameters, its input oids and the schema."""
        return digest({"command": command, "inputs": inputs, "params": params, "schema": SCHEMA_VERSION})

    def put(
        self,
        kind: str,
        files: Mapping[str, Path | Data],
        *,
        inputs: Mapping[str, str] = _EMPTY,
        params: Mapping[str, Json] = _EMPTY,
        results: Mapping[str, Json] = _EMPTY,
    ) -> Artifact:
        """Stores an artifact, the manifest last, and returns it. Files given as paths are copied and left alone.

        Putting the same again gives the same oid, and mends objects that were damaged meanwhile.
        """
        with self._writing() as stack:
            staged = {name: self._stage(stack, source) for name, source in files.items()}
            entries = {name: entry for name, (_, entry) in staged.items()}
            draft = Artifact(oid="", kind=kind, files=entries, inputs=inputs, params=params, results=results)
            artifact, manifest = _complete(draft)
            # Objects that exist are replaced too: that mends damage, and being young again keeps gc away.
            for tmp, entry in (*staged.values(), self._stage(stack, manifest)):
                _place(tmp, self._object(entry.sha256))
        return artifact

    def put_again(self, artifact: Artifact, params: Mapping[str, Json]) -> Artifact:
        """Stores an artifact of the same files, inputs and results with other params; the files are not copied."""
        with self._writing() as stack:
            again, manifest = _complete(replace(artifact, oid="", params=params))
            _place(self._stage(stack, manifest)[0], self._object(again.oid))
        return again

    def get(self, oid: str) -> Artifact:
        """The artifact of that full oid; its manifest is verified."""
        artifact = self._manifest(oid)
        if artifact is None:
            if self._sha256(oid) not in (None, oid):
                raise BrokenError(oid, oid, "manifest", _DAMAGED)
            raise MissingError(f"no artifact starts with '{oid}'", _SEE_LS)
        return artifact

    def is_whole(self, artifact: Artifact) -> bool:
        """Whether every file of it is there and unharmed; reads them all."""
        try:
            for name in artifact.files:
                self.path(artifact, name, anew=True)
        except BrokenError:
            return False
        return True

    def path(self, artifact: Artifact, name: str, *, anew: bool = False) -> Path:
        """Where a file's object lies (read-only); verified, once per Store for as long as it does not change.

        One of a gigabyte or more is verified once for all processes, by one of them, for as long as it is not touched,
        unless `anew`.
        """
        if name not in artifact.files:
            hint = f"It has: {', '.join(sorted(artifact.files)) or 'no files'}."
            raise SidaError(f"artifact {artifact.oid[:12]} ({artifact.kind}) has no file '{name}'", hint)
        entry = artifact.files[name]
        about = self._read(os.stat, self._object(entry.sha256))
        if about is None:
            raise self._broken(artifact, name, f"missing from {self.root}")
        version = (entry.sha256, about.st_mtime_ns, about.st_size)
        if version not in self._verified:
            if about.st_size != entry.size_bytes or not self._is_sound(entry, about, anew):
                raise self._broken(artifact, name, _DAMAGED)
            if anew or about.st_size < _LARGE_BYTES:
                self._verified.add(version)
        return self._object(entry.sha256)

    def _is_sound(self, entry: FileEntry, about: os.stat_result, anew: bool) -> bool:
        """Whether an object has its digest: of a large one as it was last read, where it is as it was then."""
        if about.st_size < _LARGE_BYTES:
            return self._sha256(entry.sha256) == entry.sha256
        note = self.key("object", {"sha256": entry.sha256}, {})
        seen = f"{about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        with _disk(self.root, "read"), self._object(entry.sha256).open("rb") as file:
            with suppress(OSError):  # no locks here: then each process reads it
                fcntl.flock(file, fcntl.LOCK_EX)
            if not anew and self._text(f"digests/{note}") == seen:
                return True
            began_ns = time.time_ns()
            is_sound = self._sha256(entry.sha256) == entry.sha256
            if is_sound and max(about.st_mtime_ns, about.st_ctime_ns) < began_ns - SETTLED_NS:
                self.note_digest(note, seen)
            return is_sound

    def _broken(self, artifact: Artifact, name: str, problem: str) -> BrokenError:
        sha256 = artifact.files[name].sha256
        return BrokenError(sha256, artifact.oid, name, problem, artifact.kind, _how_to_repair(artifact))

    def read(self, artifact: Artifact, name: str) -> bytes:
        """A file's content, verified as by `path`."""
        with _disk(self.root, "read"):
            return self.path(artifact, name).read_bytes()

    def resolve(self, text: str, kinds: Collection[str] | None = None) -> Artifact:
        """The one artifact, of one of `kinds`, that `text` means: an oid or its prefix (>= 4 hex digits), or a ref.

        A ref is "kind/name", or "name" alone where that is unique within `kinds`.
        """
        refs = self.refs_called(text)
        if refs:
            name = _only(text, [(name, name.partition("/")[0], name) for name in refs], kinds, "Write the kind too.")
            artifact = self._manifest(refs[name])
            if artifact is None:
                raise SidaError(f"ref '{name}' names artifact {refs[name][:12]}, which is gone", _ASK_AGAIN)
            if artifact.kind != name.partition("/")[0]:
                message = f"ref '{name}' must name an artifact of its kind, got {artifact.kind} {artifact.oid[:12]}"
                raise SidaError(message, "See what helps with: sidactl verify")
            return artifact
        if not _HEX.fullmatch(text):
            raise self._no_ref(text)
        if len(text) < 4:
            raise SidaError(f"a prefix must have 4 or more hex digits, got '{text}'", _SEE_LS)
        found = {artifact.oid: artifact for artifact in self.starting_with(text)}
        if not found:
            raise MissingError(f"no artifact starts with '{text}'", _SEE_LS)
        options = [(f"{oid[:12]} ({artifact.kind})", artifact.kind, oid) for oid, artifact in found.items()]
        return found[_only(text, options, kinds, "Give more digits.")]

    def artifacts(
        self, *, kind: str | None = None, source: str | None = None, first: Collection[str] = ()
    ) -> Iterator[Artifact]:
        """All artifacts (of one kind, with the oid `source` among their inputs), by oid; those that are not damaged.

        first: oids of those that come before the others.
        """
        # Looked for in the bytes first: most manifests need not be hashed and parsed then.
        words = [f'"kind":"{kind}"'.encode()] * bool(kind) + [f'"{source}"'.encode()] * bool(source)
        oids = chain(first, (oid for oid in self._objects() if oid not in first))
        for artifact in filter(None, (self._sound(oid, words) for oid in oids)):
            if kind in (None, artifact.kind) and (source is None or source in artifact.inputs.values()):
                yield artifact

    def starting_with(self, prefix: str) -> list[Artifact]:
        """The artifacts whose oid begins with `prefix`, 4 to 64 hex digits; SidaError where one of them is damaged."""
        if len(prefix) < 4 or not _HEX.fullmatch(prefix):
            return []
        if len(prefix) == 64:
            return [self.get(prefix.lower())]
        return [artifact for oid in self._objects(prefix.lower()) if (artifact := self._manifest(oid))]

    def set_ref(self, kind: str, name: str, oid: str) -> None:
        """Lets the ref "kind/name" name that artifact, which must be of that kind."""
        path = self._ref_path(kind, name)
        with self._writing() as stack:
            artifact = self.get(oid)
            if artifact.kind != kind:
                message = f"ref '{kind}/{name}' must name an artifact of kind {kind}, got {artifact.kind}"
                raise SidaError(message, f"Call it {artifact.kind}/{name}.")
            _place(self._stage(stack, f"{oid}\n".encode(), 0o666)[0], path)

    def delete_ref(self, kind: str, name: str) -> None:
        """Removes a ref; the artifact stays until gc."""
        path = self._ref_path(kind, name)
        if self.ref(kind, name) is None:
            raise self._no_ref(f"{kind}/{name}")
        with _disk(self.root, "written"):
            path.unlink(missing_ok=True)

    def refs(self) -> dict[str, str]:
        """All refs: "kind/name" -> oid."""
        oids = {name: self._oid(f"refs/{file}") for name, file in self._ref_files().items()}
        return {name: oid for name, oid in oids.items() if oid is not None}

    def ref(self, kind: str, name: str) -> str | None:
        """The oid that the ref "kind/name" names; None where there is no such ref."""
        file = name.replace("/", "%2F")
        is_name = kind in KINDS and _NAME.fullmatch(name) and len(file) <= _MAX_NAME_BYTES
        return self._oid(f"refs/{kind}/{file}") if is_name else None

    def refs_called(self, text: str) -> dict[str, str]:
        """The refs that `text` may mean, as "kind/name" or as "name" alone, with their oids."""
        oids = {text: self.ref(*text.split("/", 1))} if "/" in text else {}
        if oids.get(text) is None:
            oids = {f"{kind}/{text}": self.ref(kind, text) for kind in KINDS}
        return {name: oid for name, oid in oids.items() if oid is not None}

    def _ref_files(self) -> dict[str, str]:
        """The refs as "kind/name", and their paths in refs/; of names that are ours."""
        files = [(kind, file) for kind in KINDS for file in self._listdir(f"refs/{kind}")]
        names = {f"{kind}/{file.replace('%2F', '/')}": f"{kind}/{file}" for kind, file in files}
        return {name: file for name, file in names.items() if _NAME.fullmatch(name.partition("/")[2])}

    def check_name(self, kind: str, name: str) -> None:
        """Raises SidaError where `name` cannot be a ref, so that long work need not end in that."""
        self._ref_path(kind, name)

    def names_of(self, oid: str) -> list[str]:
        """The refs, as "kind/name", that name this artifact."""
        return [name for name, ref_oid in self.refs().items() if ref_oid == oid]

    def asked(self, key: str, *, whole: bool = False) -> Artifact | None:
        """The answer to a question asked before; None where there is none, or not all of it is there any more.

        whole: read all of it, and take one with a damaged file for none.
        """
        artifact = self._sound(self._oid(f"asked/{key}") or "")
        if artifact and any(self._size_bytes(e.sha256) != e.size_bytes for e in artifact.files.values()):
            return None
        return None if artifact and whole and not self.is_whole(artifact) else artifact

    def asked_at(self, key: str) -> float | None:
        """When a question was answered, in seconds since 1970; None where it was not."""
        stat = self._read(os.stat, self.root / "asked" / key)
        return stat.st_mtime if stat else None

    def answer(self, key: str, oid: str) -> None:
        """Remembers that this artifact answers this question."""
        with self._writing() as stack:
            text = f"{self.get(oid).oid}\n"
            _place(self._stage(stack, text.encode(), 0o666)[0], self.root / "asked" / key)

    @contextmanager
    def live(self, key: str) -> Iterator[LiveDir]:
        """Holds live/<key>/; SidaError (exit code 1) where another process does. An empty one is removed at the end."""
        path = self.root / "live" / key
        with self._writing():
            fd = _lock_live(path)
        try:
            yield LiveDir(path)
        finally:
            with suppress(OSError):
                if set(os.listdir(path)) <= {"lock", QUESTION}:
                    (path / QUESTION).unlink(missing_ok=True)
                    (path / "lock").unlink()
                    path.rmdir()
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone would leave the lock with a forked child
            os.close(fd)

    def live_names(self) -> list[str]:
        """The directories in live/."""
        return [name for name in self._listdir("live") if (self.root / "live" / name).is_dir()]

    def remove_live(self, key: str) -> None:
        """Removes live/<key>/ with all that is in it; SidaError (exit code 1) where a process works on it."""
        with self.live(key) as live:
            live.remove("events.jsonl")  # which `clear` would keep
            live.clear()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A file in tmp/ for the time of a `with` block, to be written there and then put; gc spares it."""
        with _disk(self.root, "written"), ExitStack() as stack:
            with self._writing():
                tmp = self.root / "tmp" / os.urandom(32).hex()
                fd = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                stack.callback(os.close, fd)
                stack.callback(tmp.unlink, missing_ok=True)
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield tmp

    def check_writable(self) -> None:
        """UnwritableError where nothing can be kept, so that long work need not end in that."""
        with self.scratch():
            pass

    def noted_digest(self, name: str) -> str | None:
        """What `note_digest` was last given under `name`, here or by another process."""
        with suppress(SidaError):
            return self._digests.get(name) or self._text(f"digests/{name}")
        return None

    def note_digest(self, name: str, text: str) -> None:
        """Keeps a line under `name`, in memory, and in the run directory where there is one that takes it."""
        self._digests[name] = text
        with suppress(SidaError, OSError):
            if self._has_format() and self._text(f"digests/{name}") != text:
                tmp, target = self.root / "tmp" / os.urandom(32).hex(), self.root / "digests" / name
                target.parent.mkdir(exist_ok=True)
                try:
                    tmp.write_text(text)
                    os.replace(tmp, target)
                finally:
                    tmp.unlink(missing_ok=True)

    def log(self, line: Mapping[str, Json]) -> None:
        """Adds one JSON line to log.jsonl, exactly what is given."""
        with self._writing():
            _append(self.root / "log.jsonl", canonical_json(line))

    def _has_format(self) -> bool:
        text = self._text("format")
        if text not in (None, str(SCHEMA_VERSION)):
            message = f"the run directory {self.root} has format {text}, this sidactl reads format {SCHEMA_VERSION}"
            raise SidaError(message, "Upgrade sidactl, or choose another directory with --run DIR.")
        return text is not None

    @contextmanager
    def _writing(self, lock: int = fcntl.LOCK_SH) -> Iterator[ExitStack]:
        """Creates what is not there yet, and keeps writers and gc apart. What is left in tmp/ goes with the stack."""
        has_format = self._has_format()
        with _disk(self.root, "written"), ExitStack() as stack:
            for folder in _FOLDERS:
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            if not has_format:
                _place(self._stage(stack, f"{SCHEMA_VERSION}\n".encode(), 0o666)[0], self.root / "format")
            file = stack.enter_context((self.root / "format").open("r+b"))
            fcntl.flock(file, lock)
            yield stack

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keeps gc away for as long as a `with` block; writes nothing."""
        with _disk(self.root, "read"), ExitStack() as stack:
            if self._has_format():
                file = stack.enter_context((self.root / "format").open("rb"))
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def _stage(self, stack: ExitStack, source: Path | Data, mode: int = 0o444) -> tuple[Path, FileEntry]:
        tmp = self.root / "tmp" / os.urandom(32).hex()
        stack.callback(tmp.unlink, missing_ok=True)
        return tmp, _write_flushed(tmp, source, mode)

    def _object(self, sha256: str) -> Path:
        # What a damaged ref or answer holds may be any text; "none" is never there.
        is_name = _SHA256.fullmatch(sha256)
        return self.root / "objects" / (f"{sha256[:2]}/{sha256[2:]}" if is_name else "none")

    def _objects(self, prefix: str = "") -> Iterator[str]:
        for shard in [prefix[:2]] if prefix else [name for name in self._listdir("objects") if len(name) == 2]:
            names = (shard + rest for rest in self._listdir(f"objects/{shard}"))
            yield from (name for name in names if _SHA256.fullmatch(name) and name.startswith(prefix))

    def _read(self, look: Callable[[Path], T], path: Path) -> T | None:
        """`look(path)`; None where there is nothing of that name."""
        with _disk(self.root, "read"):
            try:
                return look(path)
            except FileNotFoundError:
                return None

    def _listdir(self, folder: str) -> list[str]:
        """The names in it, in order; none where there is no such folder."""
        path = self.root / folder
        return sorted(self._read(os.listdir, path) or []) if folder in _FOLDERS or path.is_dir() else []

    def _text(self, name: str) -> str | None:
        data = self._read(Path.read_bytes, self.root / name)
        return None if data is None else data.decode(errors="replace").strip()

    def _oid(self, name: str) -> str | None:
        return self._read(_read_oid, self.root / name)

    def _size_bytes(self, sha256: str) -> int | None:
        stat = self._read(os.stat, self._object(sha256))
        return stat.st_size if stat else None

    def _sha256(self, sha256: str) -> str | None:
        """What an object's content hashes to now; None where there is no such object."""
        return self._read(_hash_file, self._object(sha256))

    def _manifest(self, oid: str, words: Sequence[bytes] = ()) -> Artifact | None:
        """The artifact; None where there is no such object, or it is no manifest, or one without these words."""
        manifest = self._read(_read_manifest, self._object(oid))
        if manifest is None or not all(word in manifest for word in words):
            return None
        if hashlib.sha256(manifest).hexdigest() != oid:
            raise BrokenError(oid, oid, "manifest", _DAMAGED)
        return _parse_manifest(oid, manifest)

    def _sound(self, oid: str, words: Sequence[bytes] = ()) -> Artifact | None:
        with suppress(BrokenError):
            return self._manifest(oid, words)
        return None

    def _ref_path(self, kind: str, name: str) -> Path:
        if kind not in KINDS:
            raise SidaError(f"the kind of a ref must be one of {', '.join(KINDS)}, got '{kind}'", _SEE_LS)
        if not _NAME.fullmatch(name):
            rule = "letters, digits and . _ + - /, each part beginning with one of the first two or _ +, without .."
            raise SidaError(f"a ref name must be made of {rule}, got '{name}'", "Choose a plainer name.")
        if len(name) >= 4 and _HEX.fullmatch(name):
            rule = "a ref name must not be 4 or more hex digits, which would read as an oid"
            raise SidaError(f"{rule}, got '{name}'", "Add another letter.")
        return self.root / "refs" / kind / name.replace("/", "%2F")

    def _no_ref(self, text: str) -> SidaError:
        refs = self._ref_files()
        bare = {name.partition("/")[2]: name for name in refs}
        near = [bare[match] for match in difflib.get_close_matches(text, bare)]
        near += difflib.get_close_matches(text, set(refs) - set(near), cutoff=0.85)
        kind, _, inner = text.partition("/")
        if inner and kind in KINDS:  # another kind is none that could be meant
            near = [name for name in near if name.startswith(f"{kind}/")]
        hint = f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else _SEE_LS
        return MissingError(f"no ref '{text}' in {self.root}", hint)


def _only(text: str, options: Sequence[tuple[str, str, str]], kinds: Collection[str] | None, hint: str) -> str:
    """The third part of the only one of `options` (label, kind, what) whose kind is in `kinds`."""
    fitting = [option for option in options if kinds is None or option[1] in kinds]
    if not fitting:
        wanted = " or ".join(kind for kind in KINDS if kinds and kind in kinds)
        raise SidaError(f"'{text}' must be of kind {wanted}, got {options[0][1]}", _SEE_LS)
    if len(fitting) > 1:
        labels = ", ".join(label for label, _, _ in fitting[:5])
        more = f" and {len(fitting) - 5} more" if len(fitting) > 5 else ""
        raise SidaError(f"'{text}' fits {len(fitting)} artifacts: {labels}{more}", hint)
    return fitting[0][2]


def rehash(store: Store) -> Iterator[tuple[str, str]]:
    """Rehashes everything; yields (what is broken, what is wrong with it and what helps).

    What is broken is named by its SHA-256, as "kind/name", or by its path in the run directory. gc waits for it;
    writers do not, and what a process works on in live/ is left alone.
    """
    with store._reading():
        yield from _verify_folders(store)
        damaged: set[str] = set()
        unreadable: dict[str, BaseException | None] = {}
        artifacts: dict[str, Artifact] = {}
        for sha256 in store._objects():
            try:
                if store._sha256(sha256) not in (None, sha256):
                    damaged.add(sha256)
                elif artifact := store._sound(sha256):
                    artifacts[sha256] = replace(artifact, params=_EMPTY, results=_EMPTY)
            except SidaError as error:
                unreadable[sha256] = error.__cause__
        checked = _Checked(store, artifacts, damaged, unreadable)
        yield from checked.objects()
        yield from checked.refs()
        yield from checked.answers()
        for name in store._listdir("live"):
            yield from _verify_live(store, name)


def _verify_folders(store: Store) -> Iterator[tuple[str, str]]:
    """What is in the folders of the run directory that cannot be ours."""
    for shard in store._listdir("objects"):
        names = store._listdir(f"objects/{shard}")
        if not re.fullmatch("[0-9a-f]{2}", shard) or not (store.root / "objects" / shard).is_dir():
            yield _nothing_of_ours(store, f"objects/{shard}")
        else:
            odd = [name for name in names if not _SHA256.fullmatch(shard + name)]
            yield from (_nothing_of_ours(store, f"objects/{shard}/{name}") for name in odd)
    ours = set(store._ref_files().values())
    for kind in store._listdir("refs"):
        if kind not in KINDS or not (store.root / "refs" / kind).is_dir():
            yield _nothing_of_ours(store, f"refs/{kind}")
            continue
        files = [f"{kind}/{name}" for name in store._listdir(f"refs/{kind}")]
        odd = [file for file in files if file not in ours or not _is_file_of(store, f"refs/{file}")]
        yield from (_nothing_of_ours(store, f"refs/{file}") for file in odd)
    odd = [
        key for key in store._listdir("asked") if not _SHA256.fullmatch(key) or not _is_file_of(store, f"asked/{key}")
    ]
    yield from (_nothing_of_ours(store, f"asked/{key}") for key in odd)
    odd = [key for key in store._listdir("live") if not _SHA256.fullmatch(key) or _is_file_of(store, f"live/{key}")]
    yield from (_nothing_of_ours(store, f"live/{key}") for key in odd)


def _is_file_of(store: Store, name: str) -> bool:
    try:
        return _is_file(store.root / name)
    except OSError:
        return False


def _nothing_of_ours(store: Store, name: str) -> tuple[str, str]:
    path = shell_word(store.root / name)
    return name, f"nothing that sidactl makes. Move it elsewhere, or remove it: rm -rf {path}"


def _verify_live(store: Store, key: str) -> Iterator[tuple[str, str]]:
    """What is wrong with unfinished work, unless a process is at it now."""
    folder = store.root / "live" / key
    if not _SHA256.fullmatch(key) or not folder.is_dir():
        return
    found = []
    try:
        for path in sorted(folder.iterdir()):
            problem = _problem_in_live(path)
            found += [(f"live/{key[:12]}/{path.name}", problem)] if problem else []
        found += [(f"live/{key[:12]}/{name}", problem) for name, problem in _problems_of_bests(folder)]
    except OSError as error:
        found.append((f"live/{key[:12]}", _cannot_be_read(error, folder)))
    # Asked at the end: what a process is at work on changes under our eyes.
    lock = folder / "lock"
    if found and (not _is_file_of(store, f"live/{key}/lock") or _is_abandoned(lock)):
        yield from found


def collect_garbage(store: Store, dry_run: bool = False, *, grace_sec: float = 3600.0) -> GcReport:
    """Removes what no ref reaches, and reports it; with `dry_run`, reports and writes nothing. Waits for writers.

    Kept: what refs reach through files and inputs; scores whose every input is kept; objects younger than
    `grace_sec`, which a process may be about to name; what any of these needs; live/, which is work in progress.
    Answers keep nothing: they go with their artifact. SidaError where the manifest of a kept artifact is damaged.
    """
    if not store._has_format():
        return GcReport(num_objects=0, num_bytes=0, removed=())
    with store._reading() if dry_run else store._writing(fcntl.LOCK_EX):
        cutoff = time.time() - grace_sec
        found = {sha256: store._read(Path.stat, store._object(sha256)) for sha256 in store._objects()}
        stats = {sha256: about for sha256, about in found.items() if about and stat.S_ISREG(about.st_mode)}
        manifests = {a.oid: replace(a, params=_EMPTY, results=_EMPTY) for a in store.artifacts()}
        young = {sha256 for sha256, about in stats.items() if about.st_mtime > cutoff}
        kept = young | _reachable(store, [*store.refs().values(), *(young & manifests.keys())], manifests)
        dead = stats.keys() - kept
        num_young = len((stats.keys() & kept) - _reachable(store, [*store.refs().values()], manifests))
        # Answers go first, then manifests, an artifact before its inputs, then files: a kill leaves no loose end.
        graph = TopologicalSorter({oid: manifests[oid].inputs.values() for oid in sorted(dead & manifests.keys())})
        order = dict.fromkeys([*reversed([*graph.static_order()]), *sorted(dead)])
        num_bytes = {sha256: stats[sha256].st_size for sha256 in order if sha256 in dead}
        asked = [f"asked/{key}" for key in store._listdir("asked")]
        answers = kept & manifests.keys()
        asked = [name for name in asked if _is_file_of(store, name) and store._oid(name) not in answers]
        # While we hold the lock nobody writes: what has a name of ours in tmp/ has no owner, unless it is scratch.
        tmp = [f"tmp/{name}" for name in store._listdir("tmp") if len(name) == 64 and _HEX.fullmatch(name)]
        tmp = [name for name in tmp if _is_abandoned(store.root / name)]
        tmp_stats = [store._read(Path.stat, store.root / name) for name in tmp]
        num_tmp_bytes = sum(about.st_size for about in tmp_stats if about)
        if not dry_run:
            for path in (*(store.root / name for name in (*asked, *tmp)), *map(store._object, num_bytes)):
                path.unlink(missing_ok=True)
    total = sum(num_bytes.values()) + num_tmp_bytes
    removed = (*num_bytes, *asked, *tmp)
    return GcReport(num_objects=len(num_bytes), num_bytes=total, removed=removed, num_young=num_young)


def _reachable(store: Store, roots: Sequence[str], manifests: Mapping[str, Artifact]) -> set[str]:
    """The objects that `roots` need, and those that the scores need whose every input is among them."""
    reached: set[str] = set()
    files: set[str] = set()
    # How many of a score's inputs are not reached yet; a score waits at each of them.
    missing = {a.oid: len(set(a.inputs.values())) for a in manifests.values() if a.kind == "score"}
    waiting: dict[str, list[str]] = {}
    for score in missing:
        for oid in set(manifests[score].inputs.values()):
            waiting.setdefault(oid, []).append(score)
    queue = [*roots, *(score for score, count in missing.items() if count == 0)]
    while queue:
        oid = queue.pop()
        if oid in reached or store._size_bytes(oid) is None:
            continue
        artifact = manifests.get(oid) or store.get(oid)  # `get` tells what is wrong with a manifest left out
        reached.add(oid)
        files.update(entry.sha256 for entry in artifact.files.values())
        queue.extend(artifact.inputs.values())
        for score in waiting.pop(oid, []):
            missing[score] -= 1
            queue += [score] if missing[score] == 0 else []
    return reached | files
