"""What an artifact is: its manifest, its canonical JSON, its name; no file is touched here."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sidactl.errors import SidaError
from sidactl.store.files import FileEntry

SCHEMA_VERSION = 1

KINDS = ("teacher", "generator", "dataset", "detector", "vae", "samples", "features", "stats", "score", "run")


EMPTY: Mapping[str, Any] = MappingProxyType({})

# Sorted keys put this first in a manifest: ten bytes tell it from nearly any other object, whatever its size.
MANIFEST_HEAD = b'{"files":{'

_MANIFEST_FIELDS = {"schema", "kind", "files", "inputs", "params", "results"}

SHA256 = re.compile(r"[0-9a-f]{64}")

HEX = re.compile(r"[0-9a-fA-F]+")

PART = r"[A-Za-z0-9_+][A-Za-z0-9._+-]*"

NAME = re.compile(rf"(?!.*\.\.){PART}(/{PART})*")

ASK_AGAIN = "Run sidactl verify, then ask again with --force."

DAMAGED = "damaged: its content no longer matches its name"


class BrokenError(SidaError):
    """An artifact lost a file, or its bytes changed; the hint names the command that repairs it."""

    def __init__(self, sha256: str, oid: str, name: str, problem: str, kind: str = "artifact", hint: str = "") -> None:
        super().__init__(f"object {sha256[:12]} of {kind} {oid[:12]} ({name}) is {problem}", hint or ASK_AGAIN)


def how_to_repair(artifact: "Artifact") -> str:
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
    return ASK_AGAIN


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What came out of a command: files by name, oids of inputs by role, small JSON values. `oid` hashes all of it."""

    oid: str
    kind: str
    files: Mapping[str, FileEntry]
    inputs: Mapping[str, str]
    params: Mapping[str, Any]
    results: Mapping[str, Any]


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


def parse_manifest(oid: str, manifest: bytes) -> Artifact | None:
    """The artifact whose manifest these bytes are; None for any others."""
    try:
        fields = json.loads(manifest)
        files = {name: FileEntry(**entry) for name, entry in fields["files"].items()}
        parts = {part: fields[part] for part in ("kind", "inputs", "params", "results")}
        artifact = Artifact(oid=oid, files=files, **parts)
        oids = [*artifact.inputs.values(), *(entry.sha256 for entry in files.values())]
        sound = artifact.kind in KINDS and all(map(NAME.fullmatch, files)) and all(map(SHA256.fullmatch, oids))
        # What comes from JSON is plain already; this is `_manifest_bytes(artifact) == manifest`, in half the time.
        sound = sound and set(fields) == _MANIFEST_FIELDS and type(fields["schema"]) is int
        sound = sound and fields["schema"] == SCHEMA_VERSION and _plain_json(fields) == manifest
        return artifact if sound else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def complete(draft: Artifact) -> tuple[Artifact, bytes]:
    """The artifact with its oid, and its manifest."""
    manifest = _manifest_bytes(draft)
    artifact = parse_manifest(hashlib.sha256(manifest).hexdigest(), manifest)
    assert artifact, f"a manifest needs a known kind, plain file names and full oids, got {manifest.decode()}"
    return artifact, manifest
