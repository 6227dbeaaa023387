"""From the words people type to artifacts and what they hold: resolving, fetching, preparing, loading.

torch and all that needs it are imported where they are used, so that a question asked before is answered at once.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl import catalog
from sidactl.errors import SidaError
from sidactl.recipe import NetSpec
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    import torch

    from sidactl.data import Dataset
    from sidactl.diffusion import Preconditioned

Tick = Callable[[int, int], None]
"""called with (images done, images in all)"""
NETS = ("teacher", "generator")
ASSETS = Path(__file__).parent / "assets"


def resolve(store: Store, text: str, kinds: Sequence[str]) -> Artifact:
    """The artifact that `text` means: an oid, a prefix, a ref, or a catalog name (fetched or prepared if need be).

    Raises SidaError where there is none, it is ambiguous, or it is of another kind.
    """
    if "teacher" in kinds and text in catalog.TEACHERS:
        return fetch_teacher(text, run=store.root)
    if "dataset" in kinds and text in catalog.DATASETS:
        return prepare_data(text, run=store.root)
    if Path(text).suffix in (".pkl", ".pth", ".safetensors", ".zip", ".npz") or "://" in text:
        raise SidaError(f"foreign files cannot be read yet, got {text}", "Use an artifact or a catalog name.")
    return store.resolve(text, kinds)


def load(ref: str, run: Path | str | None = None, device: str = "cpu") -> "Preconditioned":
    """The denoiser of a teacher or generator, in eval mode and float32."""
    store = Store.open(run)
    return load_net(store, resolve(store, ref, NETS), device)


def load_net(store: Store, artifact: Artifact, device: "str | torch.device") -> "Preconditioned":
    import safetensors.torch

    from sidactl import nets, teachers

    net = nets.build(NetSpec.from_json(mapping(artifact.params["net"])))
    teachers.load_weights(net, safetensors.torch.load(store.read(artifact, "model.safetensors")))
    return net.eval().requires_grad_(False).to(device)


def mapping(value: Any) -> Mapping[str, Any]:
    assert isinstance(value, Mapping)
    return value


def load_dataset(store: Store, artifact: Artifact) -> "Dataset":
    from sidactl.data import Dataset

    return Dataset(store.path(artifact, "images.zip"))


def fetch_teacher(name: str, *, run: Path | str | None = None, force: bool = False) -> Artifact:
    """The teacher artifact of a catalog name. Raises SidaError for an unknown name, with the nearest one."""
    store, entry = Store.open(run), catalog.teacher(name)
    assert entry.asset is not None
    key = store.key("fetch-teacher", {"entry": _teacher_params(entry), "asset_version": asset_digest(entry.asset)}, {})
    if not force and (known := store.asked(key)):
        return known
    data = asset_bytes(entry.asset)
    artifact = store.put("teacher", {"model.safetensors": data}, params=_teacher_params(entry))
    return answered(store, key, artifact, "fetch-teacher", refs=[name])


def _teacher_params(entry: catalog.Teacher) -> dict[str, Any]:
    return {
        "name": entry.name,
        "net": entry.net.to_json(),
        "sampler": entry.sampler.to_json(),
        "dataset": entry.dataset,
        "licence": entry.licence,
    }


def asset_bytes(name: str) -> bytes:
    """A file that ships with the package."""
    return (ASSETS / name).read_bytes()


def asset_digest(name: str) -> str | None:
    """SHA-256 of a file that ships with the package; None where there is no such file."""

    path = ASSETS / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def prepare_data(
    source: str,
    *,
    preset: str | None = None,
    transform: str | None = None,
    resolution: tuple[int, int] | None = None,
    max_images: int | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    name: str | None = None,
    run: Path | str | None = None,
    force: bool = False,
    tick: Tick | None = None,
) -> Artifact:
    """A dataset artifact: one uncompressed zip in the EDM layout, and a contact sheet.

    Takes what `prepare.prepare` takes; raises SidaError, naming the file, for what cannot be used.
    """
    store = Store.open(run)
    options: dict[str, Any] = {
        "preset": preset,
        "transform": transform,
        "resolution": resolution,
        "max_images": max_images,
        "skip_bad": skip_bad,
    }
    key = store.key("prepare-data", {"source": _source_identity(source), **options}, {})
    refs = [source] if source in catalog.DATASETS else [name] if name else []
    if not force and (known := store.asked(key)):
        return named(store, known, refs)
    from sidactl import prepare
    from sidactl.data import Dataset

    with tempfile.TemporaryDirectory(prefix="sidactl-") as folder:
        path = Path(folder) / "images.zip"
        made = prepare.prepare(
            source,
            path,
            preset=preset,
            transform=transform,
            resolution=resolution,
            max_images=max_images,
            workers=workers,
            skip_bad=skip_bad,
            progress=tick,
        )
        files: dict[str, Path | bytes] = {"images.zip": path}
        if made.kind == "pixels":
            files["contact-sheet.png"] = prepare.contact_sheet(Dataset(path))
        results = dataclasses.asdict(made)
        entry = catalog.DATASETS.get(source)
        params: dict[str, Any] = {
            "name": name or (source if entry else Path(source).name),
            "licence": entry.licence if entry else None,
        }
        artifact = store.put("dataset", files, params=params | options, results=results)
    return answered(store, key, artifact, "prepare-data", refs=refs)


def _source_identity(source: str) -> Any:
    """What stands for a source in a question: its name, or its files with sizes and times."""
    path = Path(source)
    if source in catalog.DATASETS or not path.exists():
        return source
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def answered(store: Store, key: str, artifact: Artifact, command: str, *, refs: Sequence[str] = ()) -> Artifact:
    store.answer(key, artifact.oid)
    store.log({"command": command, "key": key, "oid": artifact.oid})
    return named(store, artifact, refs)


def named(store: Store, artifact: Artifact, refs: Sequence[str]) -> Artifact:
    for name in refs:
        if store.refs().get(f"{artifact.kind}/{name}") != artifact.oid:
            store.set_ref(artifact.kind, name, artifact.oid)
    return artifact
