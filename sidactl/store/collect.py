"""What looks at the whole run directory: `verify` rehashes it, `gc` removes what no ref reaches."""

import errno
import fcntl
import math
import re
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

from sidactl.errors import SidaError
from sidactl.store.artifact import DAMAGED, EMPTY, HEX, KINDS, SHA256, Artifact
from sidactl.store.files import hash_file, is_abandoned, is_file, json_or_none, unsealed
from sidactl.store.objects import Store
from sidactl.text import shell_word

_DIGESTS = "SHA256SUMS"
"""the file in a folder of live/ that lists the others, as `sha256sum` does"""

COLLECTED = "-collected.json"
"""how files of unfinished scores end that say which others hold their features"""


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What gc removed, or would: objects, bytes, and names: SHA-256s, "asked/...", "tmp/...", "live/..."."""

    num_objects: int
    num_bytes: int
    removed: tuple[str, ...]
    num_young: int = 0
    """objects that no ref reaches and that were spared for their age"""


_UNSEEN_COMMANDS = ("fetch-detector", "fetch-reference", "import-stats", "stats", "features", "score")
"""what answers are logged under that are part of other commands"""

_EVENT_FIELDS = {"event": str, "nimg": int}


def _problem_in_live(path: Path) -> str:
    """What is wrong with a file or folder of unfinished work, and what helps; empty where nothing is."""
    try:
        if path.name in ("lock", "events.jsonl") and not is_file(path):
            return f"must be a file. Remove it: rm -rf {shell_word(path)}"
        if path.name == "events.jsonl" and (number := _bad_event(path)):
            return f"line {number} is no event. Remove it: sed -i {number}d {shell_word(path)}"
        if path.name == "state.json" and not (is_file(path) and isinstance(json_or_none(path.read_bytes()), dict)):
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
        wrong = next((name for name, sha256 in files if hash_file(path.parent / name) != sha256), None)
    except (OSError, ValueError, LookupError):
        return "is not as it was saved"
    return f"counts on {wrong}, which is damaged" if wrong else ""


def _bad_event(path: Path) -> int | None:
    """The number of the first line that is no event; the half line that a killed process left is none."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        event = json_or_none(line)
        is_event = isinstance(event, dict) and all(isinstance(event.get(k), t) for k, t in _EVENT_FIELDS.items())
        if line.endswith(b"\n") and not is_event:
            return number
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
    bad = [name for name, sha256 in digests.items() if hash_file(folder / name) != sha256]
    return f"{bad[0]} is {DAMAGED}" if bad else ""


def _problems_of_bests(folder: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with the best generators so far that the checkpoints count on, as (file, problem)."""
    counted_on = {}
    for path in sorted(folder.glob("checkpoint-*/state.json")):
        state = json_or_none(path.read_bytes())
        with suppress(TypeError, ValueError, LookupError):  # of which the digests tell
            finite = [point for point in state["scores"] if math.isfinite(point[1])]  # type: ignore[index]
            nimg, _ = min(finite, key=lambda point: float(point[1]))
            counted_on[f"best-{int(nimg):010d}.safetensors"] = state["best_sha256"]  # type: ignore[index]
    for name, sha256 in counted_on.items():
        is_there = (folder / name).is_file()
        if sha256 is not None and (not is_there or hash_file(folder / name) != sha256):
            problem_text = f"is {'damaged' if is_there else 'missing'}, and the run could not end with it"
            yield name, f"{problem_text}. Put it back, or begin anew after: sidactl gc --live {folder.name[:12]}"


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
            entry = json_or_none(line)
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
                yield sha256, f"{what}{DAMAGED}. Remove it: rm -rf {shell_word(path)}{then}"
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
        for key in filter(SHA256.fullmatch, self.store._listdir("asked")):
            way = "Remove it, and it is worked out anew"
            if problem := self._problem_of_name(f"asked/{key}", None, way, self._log.get(key, {})):
                yield f"asked/{key}", problem

    def _problem_of_name(self, name: str, kind: str | None, way: str, answers: Mapping[str, str] = EMPTY) -> str:
        path = self.store.root / name
        try:
            oid = self.store._oid(name)
        except SidaError as error:
            return _cannot_be_read(error.__cause__, path)
        if oid is None or oid in self.damaged or oid in self.unreadable:
            return ""  # it is gone meanwhile, or the object itself is told
        artifact = self.artifacts.get(oid) or self.store._sound(oid)  # younger than our look at the objects
        if not SHA256.fullmatch(oid):
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
                    artifacts[sha256] = replace(artifact, params=EMPTY, results=EMPTY)
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
            odd = [name for name in names if not SHA256.fullmatch(shard + name)]
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
        key for key in store._listdir("asked") if not SHA256.fullmatch(key) or not _is_file_of(store, f"asked/{key}")
    ]
    yield from (_nothing_of_ours(store, f"asked/{key}") for key in odd)
    odd = [key for key in store._listdir("live") if not SHA256.fullmatch(key) or _is_file_of(store, f"live/{key}")]
    yield from (_nothing_of_ours(store, f"live/{key}") for key in odd)


def _is_file_of(store: Store, name: str) -> bool:
    try:
        return is_file(store.root / name)
    except OSError:
        return False


def _nothing_of_ours(store: Store, name: str) -> tuple[str, str]:
    path = shell_word(store.root / name)
    return name, f"nothing that sidactl makes. Move it elsewhere, or remove it: rm -rf {path}"


def _verify_live(store: Store, key: str) -> Iterator[tuple[str, str]]:
    """What is wrong with unfinished work, unless a process is at it now."""
    folder = store.root / "live" / key
    if not SHA256.fullmatch(key) or not folder.is_dir():
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
    if found and (not _is_file_of(store, f"live/{key}/lock") or is_abandoned(lock)):
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
        manifests = {a.oid: replace(a, params=EMPTY, results=EMPTY) for a in store.artifacts()}
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
        tmp = [f"tmp/{name}" for name in store._listdir("tmp") if len(name) == 64 and HEX.fullmatch(name)]
        tmp = [name for name in tmp if is_abandoned(store.root / name)]
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
