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
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from sidactl.errors import MissingError, SidaError
from sidactl.store.artifact import (
    ASK_AGAIN,
    DAMAGED,
    EMPTY,
    HEX,
    KINDS,
    MANIFEST_HEAD,
    NAME,
    SCHEMA_VERSION,
    SHA256,
    Artifact,
    BrokenError,
    canonical_json,
    complete,
    digest,
    how_to_repair,
    parse_manifest,
)
from sidactl.store.files import Data, FileEntry, append, hash_file, is_file, place, telling_os_errors, write_flushed
from sidactl.store.live import QUESTION, LiveDir, lock_live

T = TypeVar("T")

_LARGE_BYTES = 1 << 30
"""of a file that is not read to its end at every start, but once, and again when it was touched"""

SETTLED_NS = 2 * 10**9
"""how long a file must have been left alone before it was read for its times to tell whether it was changed since"""

_MAX_NAME_BYTES = 255
"""of a file's name, on every file system there is"""

_OID_FILE_BYTES = 256
"""more than a ref or an answer holds"""

_FOLDERS = ("objects", "refs", "asked", "live", "tmp")

_SEE_LS = "See what there is with: sidactl ls"


def _read_manifest(path: Path) -> bytes | None:
    if not is_file(path):
        return None
    with path.open("rb") as file:
        head = file.read(len(MANIFEST_HEAD))
        return head + file.read() if head == MANIFEST_HEAD else None


def _read_oid(path: Path) -> str | None:
    """What a ref or an answer holds, be it an oid or not; None for what is no file."""
    if not is_file(path):
        return None
    with path.open("rb") as file:
        return file.read(_OID_FILE_BYTES).decode(errors="replace").strip()


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
    def key(command: str, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        """The name of a question: SHA-256 of the command, its resolved parameters, its input oids and the schema."""
        return digest({"command": command, "inputs": inputs, "params": params, "schema": SCHEMA_VERSION})

    def put(
        self,
        kind: str,
        files: Mapping[str, Path | Data],
        *,
        inputs: Mapping[str, str] = EMPTY,
        params: Mapping[str, Any] = EMPTY,
        results: Mapping[str, Any] = EMPTY,
    ) -> Artifact:
        """Stores an artifact, the manifest last, and returns it. Files given as paths are copied and left alone.

        Putting the same again gives the same oid, and mends objects that were damaged meanwhile.
        """
        with self._writing() as stack:
            staged = {name: self._stage(stack, source) for name, source in files.items()}
            entries = {name: entry for name, (_, entry) in staged.items()}
            draft = Artifact(oid="", kind=kind, files=entries, inputs=inputs, params=params, results=results)
            artifact, manifest = complete(draft)
            # Objects that exist are replaced too: that mends damage, and being young again keeps gc away.
            for tmp, entry in (*staged.values(), self._stage(stack, manifest)):
                place(tmp, self._object(entry.sha256))
        return artifact

    def put_again(self, artifact: Artifact, params: Mapping[str, Any]) -> Artifact:
        """Stores an artifact of the same files, inputs and results with other params; the files are not copied."""
        with self._writing() as stack:
            again, manifest = complete(replace(artifact, oid="", params=params))
            place(self._stage(stack, manifest)[0], self._object(again.oid))
        return again

    def get(self, oid: str) -> Artifact:
        """The artifact of that full oid; its manifest is verified."""
        artifact = self._manifest(oid)
        if artifact is None:
            if self._sha256(oid) not in (None, oid):
                raise BrokenError(oid, oid, "manifest", DAMAGED)
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
                raise self._broken(artifact, name, DAMAGED)
            if anew or about.st_size < _LARGE_BYTES:
                self._verified.add(version)
        return self._object(entry.sha256)

    def _is_sound(self, entry: FileEntry, about: os.stat_result, anew: bool) -> bool:
        """Whether an object has its digest: of a large one as it was last read, where it is as it was then."""
        if about.st_size < _LARGE_BYTES:
            return self._sha256(entry.sha256) == entry.sha256
        note = self.key("object", {"sha256": entry.sha256}, {})
        seen = f"{about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        with telling_os_errors(self.root, "read"), self._object(entry.sha256).open("rb") as file:
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
        return BrokenError(sha256, artifact.oid, name, problem, artifact.kind, how_to_repair(artifact))

    def read(self, artifact: Artifact, name: str) -> bytes:
        """A file's content, verified as by `path`."""
        with telling_os_errors(self.root, "read"):
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
                raise SidaError(f"ref '{name}' names artifact {refs[name][:12]}, which is gone", ASK_AGAIN)
            if artifact.kind != name.partition("/")[0]:
                message = f"ref '{name}' must name an artifact of its kind, got {artifact.kind} {artifact.oid[:12]}"
                raise SidaError(message, "See what helps with: sidactl verify")
            return artifact
        if not HEX.fullmatch(text):
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
        if len(prefix) < 4 or not HEX.fullmatch(prefix):
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
            place(self._stage(stack, f"{oid}\n".encode(), 0o666)[0], path)

    def delete_ref(self, kind: str, name: str) -> None:
        """Removes a ref; the artifact stays until gc."""
        path = self._ref_path(kind, name)
        if self.ref(kind, name) is None:
            raise self._no_ref(f"{kind}/{name}")
        with telling_os_errors(self.root, "written"):
            path.unlink(missing_ok=True)

    def refs(self) -> dict[str, str]:
        """All refs: "kind/name" -> oid."""
        oids = {name: self._oid(f"refs/{file}") for name, file in self._ref_files().items()}
        return {name: oid for name, oid in oids.items() if oid is not None}

    def ref(self, kind: str, name: str) -> str | None:
        """The oid that the ref "kind/name" names; None where there is no such ref."""
        file = name.replace("/", "%2F")
        is_name = kind in KINDS and NAME.fullmatch(name) and len(file) <= _MAX_NAME_BYTES
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
        return {name: file for name, file in names.items() if NAME.fullmatch(name.partition("/")[2])}

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
            place(self._stage(stack, text.encode(), 0o666)[0], self.root / "asked" / key)

    @contextmanager
    def live(self, key: str) -> Iterator[LiveDir]:
        """Holds live/<key>/; SidaError (exit code 1) where another process does. An empty one is removed at the end."""
        path = self.root / "live" / key
        with self._writing():
            fd = lock_live(path)
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
        with telling_os_errors(self.root, "written"), ExitStack() as stack:
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

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds one JSON line to log.jsonl, exactly what is given."""
        with self._writing():
            append(self.root / "log.jsonl", canonical_json(line))

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
        with telling_os_errors(self.root, "written"), ExitStack() as stack:
            for folder in _FOLDERS:
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            if not has_format:
                place(self._stage(stack, f"{SCHEMA_VERSION}\n".encode(), 0o666)[0], self.root / "format")
            file = stack.enter_context((self.root / "format").open("r+b"))
            fcntl.flock(file, lock)
            yield stack

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keeps gc away for as long as a `with` block; writes nothing."""
        with telling_os_errors(self.root, "read"), ExitStack() as stack:
            if self._has_format():
                file = stack.enter_context((self.root / "format").open("rb"))
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def _stage(self, stack: ExitStack, source: Path | Data, mode: int = 0o444) -> tuple[Path, FileEntry]:
        tmp = self.root / "tmp" / os.urandom(32).hex()
        stack.callback(tmp.unlink, missing_ok=True)
        return tmp, write_flushed(tmp, source, mode)

    def _object(self, sha256: str) -> Path:
        # What a damaged ref or answer holds may be any text; "none" is never there.
        is_name = SHA256.fullmatch(sha256)
        return self.root / "objects" / (f"{sha256[:2]}/{sha256[2:]}" if is_name else "none")

    def _objects(self, prefix: str = "") -> Iterator[str]:
        for shard in [prefix[:2]] if prefix else [name for name in self._listdir("objects") if len(name) == 2]:
            names = (shard + rest for rest in self._listdir(f"objects/{shard}"))
            yield from (name for name in names if SHA256.fullmatch(name) and name.startswith(prefix))

    def _read(self, look: Callable[[Path], T], path: Path) -> T | None:
        """`look(path)`; None where there is nothing of that name."""
        with telling_os_errors(self.root, "read"):
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
        return self._read(hash_file, self._object(sha256))

    def _manifest(self, oid: str, words: Sequence[bytes] = ()) -> Artifact | None:
        """The artifact; None where there is no such object, or it is no manifest, or one without these words."""
        manifest = self._read(_read_manifest, self._object(oid))
        if manifest is None or not all(word in manifest for word in words):
            return None
        if hashlib.sha256(manifest).hexdigest() != oid:
            raise BrokenError(oid, oid, "manifest", DAMAGED)
        return parse_manifest(oid, manifest)

    def _sound(self, oid: str, words: Sequence[bytes] = ()) -> Artifact | None:
        with suppress(BrokenError):
            return self._manifest(oid, words)
        return None

    def _ref_path(self, kind: str, name: str) -> Path:
        if kind not in KINDS:
            raise SidaError(f"the kind of a ref must be one of {', '.join(KINDS)}, got '{kind}'", _SEE_LS)
        if not NAME.fullmatch(name):
            rule = "letters, digits and . _ + - /, each part beginning with one of the first two or _ +, without .."
            raise SidaError(f"a ref name must be made of {rule}, got '{name}'", "Choose a plainer name.")
        if len(name) >= 4 and HEX.fullmatch(name):
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
