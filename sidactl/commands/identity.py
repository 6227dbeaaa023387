"""What identifies a source: its content, wherever it lies."""

import hashlib
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sidactl import catalog
from sidactl.commands.words import suffix_of
from sidactl.digests import file_sha256
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store import SETTLED_NS, Store


def file_digest(path: Path) -> str:
    """SHA-256 of a file; SidaError where it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise SidaError(f"{path} cannot be read: {error.strerror}", "Check its permissions.") from error


def json_name(path: str) -> str:
    """A path as JSON holds it, whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def source_identity(store: Store, source: str, *, recheck: bool = False) -> Any:
    """What stands for a source in a question: its name, or a digest over the names and bytes of its files.

    Where it lies is no part of it, but its suffix is. What the catalog says where to download is known by its pinned
    digest. recheck: read the files even where they look as they did when they were read last.
    Raises SidaError for a file that cannot be read, or changes meanwhile.
    """
    entry = catalog.DATASETS.get(source)
    if entry and entry.source:
        return identity_in(entry.source)
    if (entry and entry.builtin) or not os.path.exists(source):
        return json_name(source)
    files = _files_of(store, source)
    seen, newest_ns = _look_at(files)
    note = store.key("digest", {"path": json_name(os.path.realpath(source))}, {})
    then, _, sha256 = (store.noted_digest(note) or "").partition(" ")
    if recheck or then != seen or not sha256:
        began_ns = time.time_ns()
        sha256 = _digest_of(files)
        if _look_at(files)[0] != seen:
            raise changed(source)
        if newest_ns > began_ns - SETTLED_NS:
            return {"suffix": json_name(suffix_of(source)), "sha256": sha256}
    store.note_digest(note, f"{seen} {sha256}")
    return {"suffix": json_name(suffix_of(source)), "sha256": sha256}


def identity_in(file: catalog.Download) -> Any:
    """The `source_identity` that a file has once it is downloaded; its URL where its digest is not known before."""
    if file.sha256 is None:
        return file.url
    sha256 = hashlib.sha256(b"\0" + file.sha256.encode()).hexdigest()  # as `_digest_of` a single file
    return {"suffix": suffix_of(file.url), "sha256": sha256}


def check_unchanged(store: Store, source: str, identity: Any) -> None:
    """Raises SidaError (exit code 1) where a source is no longer what `source_identity` found before it was read."""
    if source_identity(store, source) != identity:
        raise changed(source)


def changed(source: str) -> SidaError:
    """What a source that was written to meanwhile ends a command with."""
    return SidaError(
        f"{source} changed while it was read", "Repeat the command once nothing writes to it.", exit_code=EXIT_FAILED
    )


def _files_of(store: Store, source: str) -> Mapping[str, str]:
    """All files that a source is read from, by what they are to it; never those of the run directory."""
    path = Path(source)
    if not path.is_dir():
        files = {"": source}
        beside = (
            {"labels": path.name.replace("images", "labels").replace("idx3", "idx1")} if "idx3" in path.name else {}
        )
        # An exported network may be described by the manifest in its folder.
        beside |= {"manifest": "manifest.json"} if path.suffix == ".safetensors" else {}
        return files | {role: str(path.with_name(n)) for role, n in beside.items() if path.with_name(n).is_file()}
    found: dict[str, str] = {}
    own = os.path.realpath(store.root)
    for folder, subfolders, names in os.walk(path, followlinks=True):
        here = os.path.realpath(folder)
        # A link to a folder that holds it would be followed for ever.
        below = ((sub, os.path.join(folder, sub)) for sub in sorted(subfolders))
        subfolders[:] = [s for s, p in below if not _is_within(here, p) and os.path.realpath(p) != own]
        inner = os.path.relpath(folder, path)
        found |= {os.path.join(inner, name): os.path.join(folder, name) for name in sorted(names)}
    return found


def _look_at(files: Mapping[str, str]) -> tuple[str, int]:
    """A digest of all that tells whether files were touched, without reading them; and when one was last, in ns."""
    total, newest_ns = hashlib.sha256(), 0
    for name, path in files.items():
        with suppress(OSError):  # a link to nowhere
            s = os.stat(path)
            if not stat.S_ISREG(s.st_mode):  # opening it may wait for ever, or never end
                raise SidaError(
                    f"{path} is no regular file but a FIFO, device or socket", "Remove it, or give another."
                )
            facts = f"{s.st_dev} {s.st_ino} {s.st_mode} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
            total.update(os.fsencode(name) + b"\0" + facts.encode() + b"\0")
            newest_ns = max(newest_ns, s.st_mtime_ns, s.st_ctime_ns)
    return total.hexdigest(), newest_ns


def _digest_of(files: Mapping[str, str]) -> str:
    """A digest over names and bytes."""
    total = hashlib.sha256()
    for name, path in files.items():
        if os.path.isfile(path):
            try:
                sha256 = file_digest(Path(path))
            except SidaError:
                if not name:
                    raise
                sha256 = "unreadable"  # whoever needs this file of a folder says so
            total.update(os.fsencode(name) + b"\0" + sha256.encode())
    return total.hexdigest()


def _is_within(folder: str, other: str) -> bool:
    return (folder + os.sep).startswith(os.path.realpath(other) + os.sep)
