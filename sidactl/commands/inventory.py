"""What is in a run directory: show, ls, look, verify, gc, env."""

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sidactl import __version__, catalog
from sidactl.commands import signing, tasks
from sidactl.commands.inputs import Ref, ref_text, run_of
from sidactl.commands.scores import Score, score_of
from sidactl.commands.words import RunDir
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store import KINDS, Artifact, GcReport, Store, collect_garbage, rehash
from sidactl.store.outputs import type_of

_MAX_HEADER_BYTES = 100_000_000
"""of a safetensors file, as the format has it"""


@dataclass(frozen=True)
class Described:
    """An artifact with its names, the artifacts behind it (role path, artifact), and the scores about it.

    `published`: those of the paper or the publisher's page, by name, for a network of the catalog.
    """

    artifact: Artifact
    names: Sequence[str]
    ancestors: Sequence[tuple[str, Artifact]]
    scores: Sequence[Score]
    paths: dict[str, Path]
    published: Mapping[str, catalog.Published]

    def to_json(self) -> dict[str, Any]:
        """The manifest, and what surrounds it."""
        artifact = self.artifact
        return {
            "oid": artifact.oid,
            "kind": artifact.kind,
            "names": list(self.names),
            "files": {n: {"sha256": f.sha256, "size_bytes": f.size_bytes} for n, f in artifact.files.items()},
            "inputs": dict(artifact.inputs),
            "params": dict(artifact.params),
            "results": dict(artifact.results),
            "scores": [score.to_json() for score in self.scores],
            "published": {name: number._asdict() for name, number in self.published.items()},
        }


def show(ref: Ref, *, run: RunDir = None) -> Described:
    """An artifact, the graph behind it, and its scores."""
    store = Store.open(run_of(ref, run))
    artifact = store.resolve(ref_text(ref), KINDS)
    scores = store.artifacts(kind="score", source=artifact.oid)
    return Described(
        artifact,
        store.names_of(artifact.oid),
        list(_ancestors(store, artifact, "")),
        [score_of(a) for a in scores if a.inputs.get("subject") == artifact.oid],
        {name: store.path(artifact, name) for name in artifact.files},
        _published(artifact),
    )


def unfetched(name: str, *, run: RunDir = None) -> list[catalog.Row]:
    """The catalog's entries of this name, where nothing in the run directory has it yet."""
    named = (ref for ref in Store.open(run).refs() if name in (ref, ref.partition("/")[2]))
    return [] if any(named) else [row for row in catalog.rows() if row.name == name]


def files(ref: Ref, *, run: RunDir = None) -> dict[str, Path]:
    """Where the files of an artifact lie, by name; read-only, and checked.

    Objects are named by their content, without a suffix, so readers that go by the suffix need a copy (`export`).
    Others read them as they are: zipfile.ZipFile(paths["images.zip"]), PIL.Image.open(paths["grid.png"]),
    safetensors.torch.load_file(paths["model.safetensors"]), numpy.load(paths["stats.npz"]).
    """
    return show(ref, run=run).paths


def look(path: os.PathLike[str] | str) -> dict[str, Any]:
    """What a .pkl or .safetensors file says of what it holds, as JSON has it; no net is built, and no torch is needed.

    Of a pickle `contents` by name: networks with "class", "args" and "options" (what they were built with), "parts"
    (the modules in them: name, class, options) and "tensors" (name, dtype, shape); arrays with dtype and shape; plain
    values. Of safetensors "metadata" and "tensors". Raises SidaError for other files, and for those that
    `pickles.read` refuses.
    """
    place = Path(path)
    if not place.is_file():
        problem = f"must be a file, got {type_of(place)}" if place.exists() else "no such file"
        raise SidaError(f"{place}: {problem}", "Name a .pkl or .safetensors file; sidactl show takes artifacts.")
    with place.open("rb") as file:
        is_pickle = file.read(1) == b"\x80"  # the opcode that begins protocol 2 and later
    if is_pickle:
        from sidactl.foreign import pickles

        contents = pickles.outline(place)
        return {"format": "pickle", "contents": {name: _looked_at(value) for name, value in contents.items()}}
    if not is_safetensors(place):
        message = "neither a pickle (protocol 2 to 5) nor a safetensors file"
        raise SidaError(f"{place}: {message}", "Name a .pkl or .safetensors file.")
    import safetensors

    try:
        with safetensors.safe_open(place, "np") as weights:
            kept = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  # it has nothing else
            tensors = [{"name": n, "dtype": t.get_dtype(), "shape": t.get_shape()} for n, t in kept.items()]
            return {"format": "safetensors", "metadata": weights.metadata() or {}, "tensors": tensors}
    except (OSError, safetensors.SafetensorError) as error:
        raise SidaError(f"{place}: damaged or not a safetensors file ({error})", "Export it again.") from error


def _looked_at(value: Any) -> Any:
    """A value of a pickle as JSON has it."""
    import numpy as np

    from sidactl.foreign import pickles, records

    match value:
        case records.Record():
            tensors = pickles.state_dict(value).items()
            built_with = {"class": value.class_name, "args": value.init_args, "options": value.init_kwargs}
            return {name: _looked_at(part) for name, part in built_with.items()} | {
                "parts": [
                    {"name": name, "class": part.class_name, "options": _looked_at(part.init_kwargs)}
                    for name, part in pickles.parts(value)
                ],
                "tensors": [{"name": name, "dtype": t.dtype, "shape": list(t.shape)} for name, t in tensors],
            }
        case records.Outline() | np.ndarray():
            return {"dtype": str(value.dtype), "shape": list(value.shape)}
        case dict():
            by_name = {str(name): _looked_at(each) for name, each in value.items()}
            # 1 and "1" are two names in Python, and one in JSON; and a dict with "tensors" in it is a network there.
            is_plain = len(by_name) == len(value) and "tensors" not in by_name
            return by_name if is_plain else [[name, _looked_at(each)] for name, each in value.items()]
        case list() | tuple() | set():
            return [_looked_at(each) for each in value]
        case records.Hook(name):
            return {"hook": name}
        case float() if not math.isfinite(value):
            return str(value)  # for which JSON has no word
    return value


def _published(artifact: Artifact) -> Mapping[str, catalog.Published]:
    """The paper's scores of a network from the catalog, or of the generator that was trained as this one was."""
    name, recipe = str(artifact.params.get("name")), artifact.params.get("recipe")
    entries: Mapping[str, Mapping[str, catalog.Entry]] = {"teacher": catalog.TEACHERS, "generator": catalog.GENERATORS}
    entry = entries.get(artifact.kind, {}).get(name)
    if artifact.kind == "generator" and isinstance(recipe, Mapping):
        trained = tuple(recipe.get(field) for field in ("teacher", "mode", "alpha"))
        alike = (g for g in catalog.GENERATORS.values() if (g.teacher, g.mode, g.alpha) == trained)
        entry = next(alike, entry)
    return entry.scores if entry else {}


def _ancestors(store: Store, artifact: Artifact, path: str) -> Iterator[tuple[str, Artifact]]:
    for role, oid in artifact.inputs.items():
        parent = store.get(oid)
        yield f"{path}{role}", parent
        yield from _ancestors(store, parent, f"{path}{role}.")


def ls(kind: str | None = None, *, run: RunDir = None) -> list[tuple[Artifact, list[str]]]:
    """Every artifact (of one kind) with its names, by kind and then name."""
    return _in_order(listed for part in ls_in_parts(kind, run=run) for listed in part)


def ls_in_parts(kind: str | None = None, *, run: RunDir = None) -> Iterator[list[tuple[Artifact, list[str]]]]:
    """What `ls` gives, a thousand at a time as they are found, those with names first; each part in order."""
    if kind is not None and kind not in KINDS:
        raise SidaError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}", "Leave it out to list everything.")
    store = Store.open(run)
    names: dict[str, list[str]] = {}
    for name, oid in store.refs().items():
        names.setdefault(oid, []).append(name)
    found = ((artifact, names.get(artifact.oid, [])) for artifact in store.artifacts(kind=kind, first=names))
    while part := list(islice(found, 1000)):
        yield _in_order(part)


def _in_order(found: Iterable[tuple[Artifact, list[str]]]) -> list[tuple[Artifact, list[str]]]:
    return sorted(found, key=lambda item: (KINDS.index(item[0].kind), not item[1], item[1], item[0].oid))


def verify(*, run: RunDir = None) -> list[tuple[str, str]]:
    """What is wrong with the run directory, as (object, problem); every object is hashed again."""
    return list(rehash(Store.open(run)))


def verify_signature(path: os.PathLike[str] | str, key: os.PathLike[str] | str) -> None:
    """Raises SidaError unless the signature beside an exported file or folder is by the owner of this public key."""
    signing.check(Path(path), Path(key))


def unfinished(*, run: RunDir = None) -> list[tasks.Unfinished]:
    """Work that did not end, or goes on now: how far it has come and what goes on with it, the last touched first."""
    return tasks.unfinished(Store.open(run))


def gc(
    *, dry_run: bool = False, drop: Sequence[str] = (), unfinished: Sequence[str] = (), run: RunDir = None
) -> GcReport:
    """Removes what no ref reaches; first drops the refs named in `drop`, such as "generator/best".

    unfinished: keys, or their first digits, of unfinished work; where they are given, that alone is removed.
    """
    store = Store.open(run)
    if unfinished:
        if drop:
            raise SidaError("unfinished work and refs cannot be removed at once, got both", "Do one after the other.")
        return _remove_unfinished(store, unfinished, dry_run)
    for name in drop:
        if store.ref(*(name.partition("/")[::2])) is None:
            raise SidaError(f"no ref {name!r} in {store.root}", "See what there is with: sidactl ls")
    if not dry_run:
        for name in drop:
            kind, _, rest = name.partition("/")
            store.delete_ref(kind, rest)
    return collect_garbage(store, dry_run)


def _remove_unfinished(store: Store, keys: Sequence[str], dry_run: bool) -> GcReport:
    found = {each.key: each for each in (tasks.find(store, key) for key in keys)}
    for each in found.values():
        if each.is_worked_on:
            who = f" by process {each.process}" if each.process else ""
            message = f"unfinished work {each.key[:12]} is being worked on{who}"
            raise SidaError(message, "Wait for it, or stop it first.", exit_code=EXIT_FAILED)
    for key in () if dry_run else found:
        store.remove_live(key)
    size_bytes = sum(each.size_bytes for each in found.values())
    return GcReport(num_objects=0, num_bytes=size_bytes, removed=tuple(f"live/{key}" for key in found))


def is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return length <= _MAX_HEADER_BYTES and isinstance(json.loads(file.read(length)), dict)
        except (ValueError, RecursionError):
            return False


def env(*, run: RunDir = None) -> dict[str, Any]:
    """Versions, devices and the run directory: what a bug report needs."""
    import torch

    packages = ("torch", "numpy", "scipy", "pillow", "safetensors", "typer", "click", "rich", "diffusers")
    store = Store.open(run)
    return {
        "sidactl": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "run_directory": str(store.root.resolve()),
        "artifacts": sum(1 for _ in store.artifacts()),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SIDACTL_")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
