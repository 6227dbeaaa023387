"""From the words people type to artifacts and what they hold: resolving, fetching, importing, preparing, loading.

torch and all that needs it are imported where they are used, so that a question asked before is answered at once.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias
from urllib.parse import urlsplit

from sidactl import catalog
from sidactl.errors import EXIT_FAILED, MissingError, SidaError
from sidactl.foreign import download, http
from sidactl.inputs import Count, Ref, Size, count_of, optional_ref, ref_text, run_of, size_of, whole
from sidactl.live import Question, begin, option_words
from sidactl.outputs import manifest_of
from sidactl.recipes import HeunSpec, NetSpec, OneStepSpec
from sidactl.store import KINDS, SETTLED_NS, Artifact, LiveDir, Store, UnwritableError, canonical_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sidactl.data.dataset import Dataset
    from sidactl.data.listing import ClassOrder, Convention
    from sidactl.data.prepare import Encoder
    from sidactl.data.unfinished import PreparedDataset
    from sidactl.nets import Preconditioned
    from sidactl.trainer import ImageSource

Tick = Callable[[int, int], None]
"""called with (images done, images in all)"""
RunDir: TypeAlias = str | os.PathLike[str] | None
NetKind = Literal["teacher", "generator"]
NETS: tuple[NetKind, ...] = ("teacher", "generator")
NET_FILES = (".pkl", ".safetensors")
DATA_FILES = (".zip", ".npz")
_ENCODING = "encoding"
"""what the first of several processes tells the others where there are latents to be made"""
_MAX_NAME = 64
"""characters of a name from outside that go into that of a temporary file: file systems take 255 bytes"""


_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_OTHER_FILES = {suffix: f"a single {suffix[1:].upper()} image" for suffix in _IMAGE_FILES} | {
    ".npy": "an .npy array",
    ".tar": "a tar archive",
    ".tgz": "a tar archive",
    ".gz": "a compressed file",
    ".pt": "a torch file",
    ".pth": "a torch file",
    ".ckpt": "a checkpoint of another tool",
}
"""what people take for a dataset or network, by suffix"""


def resolve(
    store: Store, text: str, kinds: Sequence[str], *, any_size: bool = False, recheck: bool = False
) -> Artifact:
    """The artifact that `text` means: an oid, a prefix, a ref, a catalog name, a foreign file, a URL or a folder.

    What is not in the run directory yet is fetched, imported or prepared first. "./name" is always a path; "kind/name"
    never is one, and may be a catalog name. any_size: of images, for scores. recheck: read sources again, and derive
    again what is damaged, as --force does. Raises SidaError where there is none, it is ambiguous, or it is of another
    kind.
    """
    nets = [kind for kind in NETS if kind in kinds]
    if is_source(store, text, kinds):
        is_net = "://" in text or _suffix(text) in NET_FILES
        if is_net and not nets:
            raise SidaError(f"{text} cannot be read as a {' or '.join(kinds)}", "Give an artifact or another file.")
        if problem := None if "://" in text or os.path.exists(text) else _not_readable(store, text, kinds):
            raise problem
        if not is_net and "dataset" in kinds:
            return prepared_as_usual(store, text, any_size=any_size, recheck=recheck)
        if not nets:
            raise SidaError(f"{text} cannot be read as a {' or '.join(kinds)}", "Give an artifact or another file.")
        kind = nets[0] if len(nets) == 1 else None
        return fetch_teacher(text, kind=kind, run=store.root, recheck=recheck, is_inner=True)
    if text in store.refs() and os.path.exists(text):
        _say_once(f"{text} is taken for the artifact of this name; ./{text} would be the file or folder")
    kind_and_name = next(iter(_in_catalog(store, text, kinds)), None)
    if kind_and_name and kind_and_name[0] in NETS:
        return fetch_teacher(kind_and_name[1], run=store.root, recheck=recheck, is_inner=True)
    if kind_and_name and kind_and_name[0] == "dataset":
        return dataset_called(store, kind_and_name[1], recheck=recheck)
    if problem := _not_readable(store, text, kinds):
        raise problem
    found = stored(store, text, kinds)
    return repaired(store, found) if recheck else found


@cache
def _say_once(line: str) -> None:
    download.to_stderr(line)


def stored(store: Store, text: str, kinds: Sequence[str]) -> Artifact:
    """As `Store.resolve`; where images are asked for, which a folder may hold, the error says that there is none."""
    try:
        return store.resolve(text, kinds)
    except MissingError as error:
        if "dataset" not in kinds or "/" in text:
            raise
        raise MissingError(f"{error.message}, and no such file or folder", error.hint) from error


def _not_readable(store: Store, text: str, kinds: Sequence[str]) -> SidaError | None:
    """What is wrong with a word that is no ref but looks like a path; None for any other word."""
    path, suffix = Path(text), _suffix(text)
    is_below = "/" in text and text.partition("/")[0] not in KINDS
    looks_like_path = is_below or text.startswith((".", "~")) or suffix in (*NET_FILES, *DATA_FILES, *_OTHER_FILES)
    if is_ref(store, text) or not (looks_like_path or path.exists()):
        return None
    wanted = [*([" or ".join(NET_FILES)] if set(NETS) & set(kinds) else [])]
    wanted += ["a folder, .zip or .npz of images"] if "dataset" in kinds else []
    if not wanted or re.fullmatch("[0-9a-fA-F]{4,}", text):
        return None
    if not path.exists():
        return SidaError(f"{text}: no such file or folder", "Check the path, or see sidactl ls for names.")
    if path.is_dir():
        got, hint = "a folder", "Name a file in it."
    else:
        got = f"{_OTHER_FILES.get(suffix, f'a {suffix} file' if suffix else 'a file without a suffix')}"
        hint = "Give the folder that it lies in." if suffix in _IMAGE_FILES else "Convert it to one of these."
        if text.lower().endswith((".tar", ".tar.gz", ".tgz", "idx3-ubyte", "idx3-ubyte.gz")) and "dataset" in kinds:
            hint = "Make a dataset of it with: sidactl prepare-data"
    return SidaError(f"{text} is {got}, {' or '.join(wanted)} is needed", hint)


def dataset_called(store: Store, name: str, *, recheck: bool = False, may_download: bool = True) -> Artifact:
    """The dataset that a network says it is of: one of the catalog, or a ref. recheck: as in `resolve`.

    What the catalog says where to get is downloaded and prepared, unless may_download is False. What a file from
    outside says is a name, never the path or URL of something to be read. Raises MissingError where it is not there.
    """
    entry = catalog.DATASETS.get(name)
    if entry and entry.builtin:
        return prepared_as_usual(store, f"dataset/{name}", recheck=recheck)
    if store.ref("dataset", name):
        found = store.resolve(f"dataset/{name}", ["dataset"])
        return repaired(store, found) if recheck else found
    if entry and entry.source and may_download:
        return prepared_as_usual(store, f"dataset/{name}", recheck=recheck)
    if entry:
        raise not_prepared(entry)
    raise MissingError(
        f"the network is of dataset {name!r}, which is no name of the catalog and no ref in {store.root}",
        "Pass the dataset: --ref in a score, --dataset in training.",
    )


def not_prepared(entry: catalog.Dataset) -> MissingError:
    """What a dataset of the catalog is refused with that is not in the run directory and cannot be downloaded."""
    words = f"--preset {entry.name}{' --latents' if entry.is_latent else ''} --name {entry.name}"
    return MissingError(
        f"dataset {entry.name} must be prepared from its files",
        f"Get them from {entry.where}, then run sidactl prepare-data PATH {words}.",
    )


def is_ref(store: Store, text: str) -> bool:
    """Whether an artifact of any kind has this name, with or without its kind."""
    return bool(store.refs_called(text))


def is_source(store: Store, text: str, kinds: Sequence[str]) -> bool:
    """Whether `text` means a URL, file or folder from which an artifact of these kinds is to be made.

    Raises SidaError where it could be an artifact or a catalog name as well.
    """
    is_file = "://" in text or (_suffix(text) in (*NET_FILES, *DATA_FILES) and not is_ref(store, text))
    return is_file or (_is_readable(text, kinds) and means_path(store, text, kinds))


def _is_readable(text: str, kinds: Sequence[str]) -> bool:
    """Whether there is a folder or file of this name from which an artifact of these kinds could be made."""
    suffixes = (*(NET_FILES if {*NETS} & {*kinds} else ()), *(DATA_FILES if "dataset" in kinds else ()))
    return ("dataset" in kinds and os.path.isdir(text)) or (_suffix(text) in suffixes and os.path.isfile(text))


def means_path(store: Store, text: str, kinds: Sequence[str]) -> bool:
    """Whether `text` means a folder or file that is there, and not an artifact of these kinds or a catalog name.

    Raises SidaError where it could be either.
    """
    if not os.path.exists(text) or text in store.refs():
        return False
    if text.startswith((".", "/")):
        return True
    in_catalog = _in_catalog(store, text, kinds)
    if any(text == f"{kind}/{name}" for kind, name in in_catalog):
        return False
    refs = [ref for ref in store.refs() if ref.partition("/")[0] in kinds and ref.partition("/")[2] == text]
    oids = [found.oid for found in store.starting_with(text) if found.kind in kinds]
    others = dict.fromkeys(
        [
            *refs,
            *(f"{kind}/{name}" for kind, name in in_catalog),
            *(oid[:12] if len(text) < 12 else oid for oid in oids),
        ]
    )
    if others:
        what = "folder" if os.path.isdir(text) else "file"
        raise SidaError(
            f"'{text}' is the name of a {what} and of {' and '.join(others)}",
            f"Write ./{text} for the {what}, or {' or '.join(others)}.",
        )
    return True


def _in_catalog(store: Store, text: str, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Kind and name of the catalog's entries that `text` names, bare or as "kind/name" where no ref is called so."""
    groups: Mapping[str, Mapping[str, catalog.Entry]] = {
        "teacher": catalog.TEACHERS,
        "generator": {**catalog.GENERATORS, **catalog.COMPARISONS},
        "dataset": catalog.DATASETS,
        "stats": catalog.REFERENCES,
        "vae": catalog.VAES,
    }
    found = []
    for kind in (kind for kind in groups if kind in kinds):
        name = text.removeprefix(f"{kind}/")
        if name in groups[kind] and (name == text or text not in store.refs()):
            found.append((kind, name))
    return found


def repaired(store: Store, artifact: Artifact) -> Artifact:
    """The artifact, after an attempt to derive it again where a file of it is damaged and its origin is known."""
    if store.is_whole(artifact):
        return artifact
    name, url = str(artifact.params.get("name")), artifact.params.get("source_url")
    if artifact.kind == "detector":
        fetch_detector(name, run=store.root, recheck=True)
    elif artifact.kind == "dataset" and name in catalog.DATASETS and catalog.DATASETS[name].builtin:
        prepared_as_usual(store, f"dataset/{name}", force=True)
    elif artifact.kind in NETS and (url or name in catalog.TEACHERS) and "dataset" not in artifact.inputs:
        fetch_teacher(str(url or name), run=store.root, force=True, is_inner=True)
    return artifact


def part_of(watcher: object, what: str, unit: str = "images") -> Tick | None:
    """A tick for a part of some work that has images, or bytes, of its own to count, such as those of a reference.

    None where `watcher`, a tick or watch, has no method `part` for them, as a plain function has not.
    """
    part = getattr(watcher, "part", None)
    return part(what, unit) if part else None


def load(ref: Ref, run: RunDir = None, device: str = "cpu") -> "Preconditioned":
    """The denoiser of a teacher or generator, in eval mode and float32."""
    store = Store.open(run_of(ref, run))
    return load_net(store, resolve(store, ref_text(ref), NETS), device)


def load_net(store: Store, artifact: Artifact, device: "str | torch.device") -> "Preconditioned":
    import safetensors.torch

    from sidactl import nets as nets_module
    from sidactl.foreign import networks

    net = nets_module.build(NetSpec.from_json(mapping(artifact.params["net"])))
    networks.load_weights(net, safetensors.torch.load(store.read(artifact, "model.safetensors")))
    return net.eval().requires_grad_(False).to(device)


def mapping(value: Any) -> Mapping[str, Any]:
    assert isinstance(value, Mapping)
    return value


def load_dataset(store: Store, artifact: Artifact) -> "Dataset":
    """The images of a dataset or samples artifact; raises SidaError for classes alone."""
    from sidactl.data.dataset import Dataset

    require_images(artifact)
    return Dataset(store.path(artifact, "images.zip"))


def image_source(store: Store, artifact: Artifact) -> "ImageSource":
    """What training needs of a dataset artifact, be it of images or of classes alone."""
    if artifact.results["kind"] != "labels":
        return load_dataset(store, artifact)
    from sidactl import trainer
    from sidactl.data import labels as data_labels

    found = data_labels.read_labels(store.path(artifact, data_labels.LABEL_FILE))
    return trainer.ClassesAlone(found.label_dim, list((found.labels or {}).values()))


def fetch_teacher(
    source: Ref,
    *,
    kind: NetKind | None = None,
    dataset: str | None = None,
    name: str | None = None,
    offline: bool = False,
    mirror: str | None = None,
    max_bytes: Count | None = None,
    run: RunDir = None,
    force: bool = False,
    recheck: bool = False,
    is_inner: bool = False,
    progress: download.Progress | None = None,
    say: download.Say = download.to_stderr,
) -> Artifact:
    """The teacher or generator artifact of a catalog name, a URL, or a file (.pkl as published, .safetensors as ours).

    Downloads what is not in the run directory yet (see `download.fetch`) and converts it; no code in it is executed.
    kind: of a pickle; by default a file that holds nothing but the net, as SiD and SiDA save it, is a generator.
    dataset: the name of what a foreign net was trained on. name: a ref for it; by default the catalog's or the file's.
    max_bytes: what a download may have at most, as in `download.fetch`.
    recheck: as in `resolve`. is_inner: another question asks, whose answer need not be told to be an old one.

    A detector of the catalog is fetched, too, and the VAE. Raises SidaError for an unknown name, with the nearest one,
    and for a file that is no network or not the right one.
    """
    source, store = ref_text(source, "the source"), Store.open(run)
    limit = None if max_bytes is None else count_of(max_bytes, "max_bytes", "bytes")
    if source in catalog.DETECTORS and source not in catalog.TEACHERS:
        return fetch_detector(
            source, run=store.root, progress=progress, offline=offline, mirror=mirror, max_bytes=limit
        )
    if source in catalog.VAES:
        return fetch_vae(store, source, offline=offline, mirror=mirror, recheck=force or recheck, progress=progress)
    entry, url = _locate(source)
    if entry:
        _check_kind(source, _kind_of(entry), kind)
    if isinstance(entry, catalog.Teacher) and entry.asset:
        artifact = _fetch_asset(store, entry, entry.asset, force, recheck, None if is_inner else say)
        return named(store, artifact, [entry.name, *([name] if name else [])], say)
    called = entry.name if entry else name or _name_of_file(source)
    refs = [called, name] if name else [called]
    suffix = _suffix(url or source)
    what = url or source_identity(store, source, recheck=force or recheck)
    # What it was first imported as answers for the source itself, so that only a new source is downloaded.
    first_key = store.key("fetch-teacher", {"source": what}, {})
    key = store.key("fetch-teacher", {"source": what, "kind": kind, "dataset": dataset}, {})
    temporary = store.root / "tmp" / f"import-{key[:16]}-{called.replace('/', '-')[:_MAX_NAME]}{suffix}"

    def known() -> Artifact | None:
        found, first = [None if force else store.asked(k, whole=recheck) for k in (key, first_key)]
        if (found or first) and not is_inner:
            tell_old(store, key if found else first_key, say)
        if found or not first or (suffix != ".pkl" and kind not in (None, first.kind)):
            return found
        return answered(store, key, _as_said(store, first, kind, dataset), "fetch-teacher")

    if found := known():
        return named(store, found if entry else called_so(store, found, name), refs, say)
    with download.exclusive(temporary.with_suffix(".lock"), lambda: say(f"waiting for another process: {source}")):
        if found := known():
            return named(store, found if entry else called_so(store, found, name), refs, say)
        try:
            path = Path(source) if url is None else temporary
            if url is None:
                download.refuse_larger(called, path, limit)
                sha256 = file_digest(path)
            else:
                sha256 = _download(entry, url, path, called, offline, mirror, limit, progress, say)
            foreign = _read_safetensors(path) if suffix == ".safetensors" else _read_pickle(path)
            if entry:
                _check_network(foreign.net, entry)
            elif foreign.is_kind_certain:
                _check_kind(source, foreign.kind, kind)
        except SidaError:
            temporary.unlink(missing_ok=True)
            raise
        chosen = _kind_of(entry) if entry else kind or foreign.kind
        sampler = entry.sampler if entry else foreign.sampler or _default_sampler(chosen, foreign.net.spec)
        params = {
            "name": called,
            "net": foreign.net.spec.to_json(),
            "sampler": sampler.to_json(),
            "dataset": entry.dataset if entry else dataset or foreign.params.get("dataset"),
            "licence": entry.licence if entry else foreign.params.get("licence"),
            "source_url": url,
            "source_sha256": sha256,
        }
        if chosen == "generator" or "recipe" in foreign.params:
            params["recipe"] = foreign.params.get("recipe")
        if "vae" in foreign.params:
            params["vae"] = str(foreign.params["vae"])
        artifact = store.put(chosen, {"model.safetensors": _weights(foreign)}, params=params)
        if url is None:
            check_unchanged(store, source, what)
        store.answer(first_key, artifact.oid)
        answered(store, key, artifact, "fetch-teacher", refs=refs, say=say)
        temporary.unlink(missing_ok=True)  # no sooner: what fails before need not download it again
        return artifact


def _as_said(store: Store, artifact: Artifact, kind: NetKind | None, dataset: str | None) -> Artifact:
    """An imported network as the kind, and of the dataset, that it is now said to be."""
    if kind in (None, artifact.kind) and dataset in (None, artifact.params["dataset"]):
        return artifact
    params = {**artifact.params, "dataset": dataset or artifact.params["dataset"]}
    if kind and kind != artifact.kind:
        params["sampler"] = _default_sampler(kind, NetSpec.from_json(mapping(params["net"]))).to_json()
        params["recipe"] = None
    files = {"model.safetensors": store.path(artifact, "model.safetensors")}
    return store.put(kind or artifact.kind, files, params=params)


def _default_sampler(kind: NetKind, spec: NetSpec) -> HeunSpec | OneStepSpec:
    if kind == "generator":
        return OneStepSpec()
    return HeunSpec(num_steps=32, convention="edm2") if spec.architecture == "EDM2" else HeunSpec()


def _locate(source: str) -> tuple[catalog.Teacher | catalog.Generator | None, str | None]:
    """The catalog's entry of a name or URL, and the URL; neither for a local file. SidaError for anything else."""
    nets: dict[str, catalog.Teacher | catalog.Generator] = {**catalog.TEACHERS, **catalog.GENERATORS}
    entry = nets.get(source) or next((e for e in nets.values() if e.source and e.source.url == source), None)
    if source in catalog.COMPARISONS:
        check_has_file(catalog.COMPARISONS[source])
    if entry:
        check_has_file(entry)
        return entry, entry.source.url if entry.source else None
    if is_url := "://" in source:
        http.check_url(source)
    if _suffix(source) not in NET_FILES:
        if is_url or Path(source).exists():
            raise SidaError(f"a network file must be {' or '.join(NET_FILES)}, got {source}", "Convert it to one.")
        if source in catalog.DATASETS:
            data = catalog.DATASETS[source]
            way = f"Use sidactl prepare-data {source}."
            if not (data.builtin or data.source):
                way = f"Get it from {data.where}, then use sidactl prepare-data."
            raise SidaError(f"{source} is a dataset, not a network", way)
        if source in catalog.REFERENCES:
            hint = f"A score fetches it: sidactl fid REF --ref {source}"
            raise SidaError(f"{source} is a reference, not a network", hint)
        raise SidaError(f"unknown teacher {source!r}", catalog.did_you_mean(source, nets, "See sidactl ls --catalog."))
    if not is_url and not Path(source).is_file():
        raise SidaError(f"{source}: no such file", "Check the path.")
    return None, source if is_url else None


def check_has_file(entry: catalog.Entry) -> None:
    """Raises SidaError for a generator of which the catalog knows no file."""
    if isinstance(entry, catalog.Comparison):
        what = f"no file of {entry.name} is in the catalog, its published scores alone are"
        raise SidaError(what, f"To compare with them: sidactl show {entry.name}")
    if isinstance(entry, catalog.Generator) and entry.source is None:
        how = f"sidactl distill --teacher {entry.teacher} --mode {entry.mode} --alpha {entry.alpha:g}"
        raise SidaError(f"no file of {entry.name} is published, its scores alone are", f"Distill it: {how}")


def _suffix(path_or_url: str) -> str:
    """The suffix in lower case, with its dot."""
    return Path(path_or_url.partition("?")[0] if "://" in path_or_url else path_or_url).suffix.lower()


def _kind_of(entry: catalog.Teacher | catalog.Generator) -> NetKind:
    return "teacher" if isinstance(entry, catalog.Teacher) else "generator"


def _check_kind(source: str, is_a: NetKind, wanted: NetKind | None) -> None:
    if wanted not in (None, is_a):
        raise SidaError(f"{source} must be a {wanted}, got a {is_a}", "Give another.")


def _name_of_file(source: str) -> str:
    """What to call a network by its file or URL; that in an exported folder is called as the folder is."""
    path = Path(source.partition("?")[0])
    is_exported = path.name == "model.safetensors" and "://" not in source
    return plain_name(path.absolute().parent.name if is_exported else path.stem)


def plain_name(stem: str) -> str:
    """A file's name as a ref's: without what a ref must not have, and not to be read as an oid."""
    plain = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._+-]+", "-", stem)).lstrip(".-") or "net"
    return f"net-{plain}" if re.fullmatch(r"[0-9a-fA-F]{4,}", plain) else plain


def _download(
    entry: catalog.Entry | None,
    url: str,
    path: Path,
    what: str,
    offline: bool,
    mirror: str | None,
    max_bytes: int | None,
    progress: download.Progress | None,
    say: download.Say,
) -> str:
    file = entry.source if entry and entry.source else catalog.Download(url=url)
    sha256 = download.fetch(
        url,
        path,
        what=what,
        licence=entry.licence if entry else None,
        sha256=file.sha256 if file.is_certain else None,
        size_bytes=file.size_bytes,
        max_bytes=max_bytes,
        offline=offline,
        mirror=mirror,
        progress=progress,
        say=say,
    )
    if file.sha256 not in (None, sha256):
        say(f"warning: {what} has SHA-256 {sha256}, a third party saw it with {file.sha256}")
    return sha256


def file_digest(path: Path) -> str:
    """SHA-256 of a file; SidaError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SidaError(f"{path} cannot be read: {error.strerror}", "Check its permissions.") from error


@dataclass(frozen=True)
class _Foreign:
    """A network from a foreign file: its weights as stored, what kind it is, what else the file says of it."""

    net: "Preconditioned"
    stored: Mapping[str, "Tensor"]
    kind: NetKind
    is_kind_certain: bool = False
    sampler: HeunSpec | OneStepSpec | None = None
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _read_pickle(path: Path) -> _Foreign:
    from sidactl.foreign import networks, pickles, records

    contents = pickles.read(path)
    record = contents.get("ema")
    if not isinstance(record, records.Record):
        raise SidaError(f"{path} holds no network named 'ema'", "Give a snapshot that EDM, SiD or SiDA published.")
    # SiD and SiDA save nothing but the net; teachers come with their loss and the settings of their data.
    is_snapshot = len(contents) == 1 or record.class_name.endswith(("_EncoderDecoder", "_Generator"))
    kind: NetKind = "generator" if is_snapshot else "teacher"
    return _Foreign(networks.load_record(record), pickles.state_dict(record), kind)


def _read_safetensors(path: Path) -> _Foreign:
    import safetensors.torch

    from sidactl.foreign import networks

    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        stored = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise SidaError(f"{path}: damaged or not a safetensors file ({error})", "Export it again.") from error
    try:
        described = _described(path, metadata)
        kind, params = described["kind"], described["params"]
        spec = NetSpec.from_json(params["net"])
        sampler = (OneStepSpec if kind == "generator" else HeunSpec).from_json(params["sampler"])
        if kind not in NETS:
            raise ValueError(kind)
        canonical_json(params)
        if not all(isinstance(params.get(name), str | None) for name in ("name", "dataset", "licence")):
            raise ValueError("a name that is no text")
        if not isinstance(params.get("recipe"), Mapping | None):
            raise ValueError("a recipe that is none")
        layout = networks.laid_out(spec)
    except (
        SidaError,
        LookupError,
        TypeError,
        ValueError,
        OSError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        told = f" ({error.message})" if isinstance(error, SidaError) else ""
        raise SidaError(
            f"{path} does not say which network it holds{told}",
            "Give one that sidactl export --to safetensors wrote.",
        ) from error
    return _Foreign(networks.filled(layout, stored), stored, kind, True, sampler, params)


def _described(path: Path, metadata: Mapping[str, str]) -> Any:
    """What a safetensors file says of its network: in itself, or by the manifest of the exported folder it is in."""
    described = None if "sidactl" in metadata else manifest_of(path.parent)
    if described is None:
        return json.loads(metadata["sidactl"])
    if described["files"][path.name]["sha256"] != file_digest(path):
        raise ValueError("the manifest is of another file")
    return described


# What must agree between a file and the catalog; the rest is the file's own to say.
_SAME_NETWORK = ("architecture", "img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult")


def _check_network(net: "Preconditioned", entry: catalog.Teacher | catalog.Generator) -> None:
    for option in _SAME_NETWORK:
        wanted, got = getattr(entry.net, option), getattr(net.spec, option)
        if wanted != got:
            raise SidaError(
                f"{entry.name} must be a network with {option} {wanted}, got {got}",
                "The file is that of another network: look at the mirror.",
            )


def _weights(foreign: _Foreign) -> bytes:
    """The net as safetensors; each tensor as exact as it is used, in the file's half precision where that is enough."""
    import safetensors.torch
    import torch

    def compact(name: str, tensor: "Tensor") -> "Tensor":
        source = foreign.stored.get(name, tensor)
        half = tensor.to(source.dtype if source.element_size() < 4 else torch.float32)
        return half if torch.equal(half.to(torch.float32), tensor) else tensor

    state = foreign.net.state_dict()
    return safetensors.torch.save({name: compact(name, tensor).contiguous() for name, tensor in state.items()})


def _fetch_asset(
    store: Store, entry: catalog.Teacher, asset: str, force: bool, recheck: bool, say: download.Say | None
) -> Artifact:
    key = store.key("fetch-teacher", {"entry": _teacher_params(entry), "asset_version": asset_digest(asset)}, {})
    if not force and (known := store.asked(key, whole=recheck)):
        tell_old(store, key, say)
        return known
    artifact = store.put("teacher", {"model.safetensors": catalog.ASSETS / asset}, params=_teacher_params(entry))
    return answered(store, key, artifact, "fetch-teacher", refs=[entry.name])


def _teacher_params(entry: catalog.Teacher) -> dict[str, Any]:
    return {
        "name": entry.name,
        "net": entry.net.to_json(),
        "sampler": entry.sampler.to_json(),
        "dataset": entry.dataset,
        "licence": entry.licence,
    }


def fetch_detector(
    name: str,
    *,
    run: RunDir = None,
    progress: download.Progress | None = None,
    offline: bool = False,
    mirror: str | None = None,
    max_bytes: int | None = None,
    recheck: bool = False,
) -> Artifact:
    """The detector artifact of a catalog name: its weights as safetensors, downloaded once and checked.

    recheck: read what is there, and fetch it again where it is damaged. Raises SidaError for an unknown name, with the
    nearest one, and for a file that is not that network.
    """
    entry, store = catalog.detector(name), Store.open(run)
    source = entry.source.url if entry.source else asset_digest(entry.asset) if entry.asset else name
    key = store.key("fetch-detector", {"source": source}, {})
    if known := store.asked(key, whole=recheck):
        return named(store, known, [name])
    params: dict[str, Any] = {"name": name, "licence": entry.licence}
    files: dict[str, Path | bytes]
    if entry.source is None:
        files = {"model.safetensors": catalog.ASSETS / entry.asset if entry.asset else _drawn_weights()}
        return answered(store, key, store.put("detector", files, params=params), "fetch-detector", refs=[name])
    with fetched_file(store, entry.source.url, name, entry, progress, offline, mirror, max_bytes) as (path, sha256):
        if known := store.asked(key, whole=recheck):
            return named(store, known, [name])
        import safetensors.torch

        from sidactl import detectors

        # Loading refuses what is another network.
        if path.suffix.lower() == ".pt":
            detectors.load_torchscript(path)
            files = {"model.pt": path}
        else:
            weights = read_state_dict(path)
            detectors.load(name, weights)
            files = {"model.safetensors": safetensors.torch.save(weights)}
        artifact = store.put("detector", files, params=params | {"source_url": source, "source_sha256": sha256})
        return answered(store, key, artifact, "fetch-detector", refs=[name])


def fetch_vae(
    store: Store,
    source: str,
    *,
    offline: bool = False,
    mirror: str | None = None,
    recheck: bool = False,
    progress: download.Progress | None = None,
) -> Artifact:
    """The artifact of a VAE: of a folder in diffusers' layout, of OWNER/NAME in the hub, or one that is there already.

    One that diffusers has in its cache is not downloaded again. It is known by the content of its two files, whatever
    it is called. Raises SidaError for what is no VAE of latents with four channels and an eighth of the side.
    """
    if means_path(store, source, ["vae"]):
        return _kept_vae(store, _vae_in(source), plain_name(Path(source).absolute().name), recheck=recheck)
    name = source.removeprefix("vae/")
    if source not in catalog.VAES and (is_ref(store, source) or store.starting_with(source)):
        found = store.resolve(source, ["vae"])
        if not recheck or found.params["source_url"] is None:
            return found
        name = str(found.params["name"])
    url = _vae_url(source, name)
    key = store.key("fetch-vae", {"source": url}, {})
    if known := store.asked(key, whole=recheck):
        return named(store, known, [name])
    lock = store.root / "tmp" / f"vae-{key[:16]}.lock"
    waiting = f"waiting for another process: the VAE {name}"
    with download.exclusive(lock, lambda: download.to_stderr(waiting)), ExitStack() as fetched:
        if known := store.asked(key, whole=recheck):
            return named(store, known, [name])
        files = _vae_of_diffusers(name)
        if files is None:
            download.refuse_forbidden(url, f"the VAE {name}", offline=offline, mirror=mirror)
            files = {}
            for file in catalog.VAE_FILES:  # the config first, so that what does not fit is told before the rest comes
                what = f"the VAE {name}" if file == catalog.VAE_WEIGHTS else f"{file} of the VAE {name}"
                ready = fetched_file(
                    store, catalog.vae_url(name, file), what, catalog.VAES.get(name), progress, offline, mirror
                )
                files[file], _ = fetched.enter_context(ready)
                _check_vae(f"the VAE {name}", files[catalog.VAE_CONFIG])
        made = _kept_vae(store, files, name, url, recheck=recheck)
        return answered(store, key, made, "fetch-vae", refs=[name])


def _vae_url(source: str, name: str) -> str:
    """The address of a VAE's weights in the hub. Raises SidaError for a word that can be no name there."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        return catalog.vae_url(name, catalog.VAE_WEIGHTS)
    raise SidaError(
        f"a VAE must be a folder that diffusers saved, or OWNER/NAME in huggingface.co, got {source}",
        f"Check the path, or pass a name such as {catalog.VAE_NAME}.",
    )


def _vae_in(source: str) -> Mapping[str, Path]:
    """The files of a VAE by name, of a folder. Raises SidaError where they are not there, or of another kind."""
    folder = Path(source)
    files = {name: folder / name for name in catalog.VAE_FILES}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        hint = f"Give a folder that diffusers saved, or a name such as {catalog.VAE_NAME}."
        if (folder / "vae" / catalog.VAE_CONFIG).is_file():
            hint = f"Did you mean {folder / 'vae'}?"
        elif missing == [catalog.VAE_WEIGHTS] and list(folder.glob("*.bin")):
            hint = "A .bin file is a pickle, which is never read: save the VAE by save_pretrained of diffusers."
        raise SidaError(f"{source} must hold {' and '.join(catalog.VAE_FILES)}, {missing[0]} is missing", hint)
    _check_vae(source, files[catalog.VAE_CONFIG])
    return files


def _check_vae(called: str, config: Path) -> None:
    """Raises SidaError for a VAE that is not of the form that latents of four channels need, by its config."""
    hint = f"Give a VAE of Stable Diffusion's first kind, such as {catalog.VAE_NAME}."
    try:
        told = json.loads(config.read_bytes())
        if not isinstance(told, dict):
            raise ValueError
        blocks = told.get("block_out_channels", [64])
        if not isinstance(blocks, list):
            raise TypeError
        got = {
            "class": told.get("_class_name"),
            "in_channels": told.get("in_channels", 3),
            "out_channels": told.get("out_channels", 3),
            "latent_channels": told.get("latent_channels", 4),
            "reduction": 2 ** (len(blocks) - 1),
        }
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SidaError(f"{called}: {catalog.VAE_CONFIG} does not say what the VAE is", hint) from error
    wanted = ("AutoencoderKL", 3, 3, catalog.LATENT_CHANNELS, catalog.LATENT_SCALE)
    for (name, value), want in zip(got.items(), wanted, strict=True):
        if value != want:
            raise SidaError(f"{called} must be a VAE with {name} {want}, got {value}", hint)


def _vae_of_diffusers(name: str) -> Mapping[str, Path] | None:
    """The files of a VAE that diffusers has in its cache; None where it does not have both. SidaError as `_vae_in`."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = ((file, try_to_load_from_cache(name, file)) for file in catalog.VAE_FILES)
    files = {file: Path(path) for file, path in found if isinstance(path, str)}
    if len(files) < len(catalog.VAE_FILES):
        return None
    _check_vae(f"the VAE {name}", files[catalog.VAE_CONFIG])
    return files


def _kept_vae(
    store: Store, files: Mapping[str, Path], name: str, url: str | None = None, *, recheck: bool = False
) -> Artifact:
    """The artifact of these files; the one that there is, where they were kept before."""
    identities = {file: source_identity(store, str(path), recheck=recheck) for file, path in files.items()}
    key = store.key("keep-vae", {file: identity["sha256"] for file, identity in identities.items()}, {})
    if known := store.asked(key, whole=recheck):
        return known
    entry = catalog.VAES.get(name)
    params = {"name": name, "licence": entry.licence if entry else None, "source_url": url}
    artifact = store.put("vae", dict(files), params=params)
    for file, identity in identities.items():
        check_unchanged(store, str(files[file]), identity)
    return answered(store, key, artifact, "keep-vae")


def vae_digest(vae: Artifact) -> str:
    """What stands for a VAE in questions: 16 hex digits of its content."""
    held = "".join(vae.files[name].sha256 for name in catalog.VAE_FILES)
    return hashlib.sha256(held.encode()).hexdigest()[:16]


def vae_label(vae: Artifact | None) -> str:
    """What artifacts say of the VAE that made them: its name, of another than the usual one (None) with its digest."""
    return f"{vae.params['name']}@{vae_digest(vae)}" if vae else catalog.VAE_NAME


def vae_for(store: Store, asked: str | None, net: Artifact, *, recheck: bool = False) -> Artifact | None:
    """The VAE that decodes what a network draws: the one asked for, else its own; None = the usual one, or pixels.

    Raises SidaError for a network of pixels where one is asked for, and where it cannot be had.
    """
    if asked is not None:
        refuse_vae_of_pixels(str(net.params["name"]), mapping(net.params["net"]))
        return chosen_vae(store, asked, recheck=recheck)
    label = str(net.params.get("vae") or catalog.VAE_NAME)
    if label == catalog.VAE_NAME or not is_of_latents(net):
        return None
    if "vae" in net.inputs:
        return store.get(net.inputs["vae"])
    for found in store.artifacts(kind="vae"):
        if vae_digest(found) == label.rpartition("@")[2]:
            return found
    raise MissingError(
        f"{net.params['name']} was made with the VAE {label}, which is not in {store.root}",
        f"Pass it as --vae PATH or OWNER/NAME, or --vae {catalog.VAE_NAME} for the usual one.",
    )


def chosen_vae(
    store: Store, asked: str, *, offline: bool = False, mirror: str | None = None, recheck: bool = False
) -> Artifact | None:
    """The VAE that --vae names; None for the usual one."""
    if asked.removeprefix("vae/") == catalog.VAE_NAME and not means_path(store, asked, ["vae"]):
        return None
    return fetch_vae(store, asked, offline=offline, mirror=mirror, recheck=recheck)


def is_of_latents(artifact: Artifact) -> bool:
    """Whether it is a network that draws latents, which a VAE decodes."""
    return artifact.kind in NETS and mapping(artifact.params["net"])["img_channels"] == catalog.LATENT_CHANNELS


def refuse_vae_of_pixels(name: str, net: Mapping[str, Any]) -> None:
    """Raises SidaError for a network that needs no VAE."""
    if net["img_channels"] != catalog.LATENT_CHANNELS:
        raise SidaError(f"--vae is for networks of latents, {name} draws pixels", "Leave out --vae.")


def other_vae(made: Artifact, used: Artifact | None) -> str | None:
    """What to know of latents, or of a network, that was made with another VAE than the one that decodes now."""
    label, now = str(made.params.get("vae") or catalog.VAE_NAME * is_of_latents(made)), vae_label(used)
    if not label or label.partition("@")[2] == now.partition("@")[2]:
        return None
    return f"{made.params['name']} was made with the VAE {label}, latents are decoded by {now} here (--vae)"


def check_vae_is_there(store: Store, asked: str | None = None, remedy: str = "") -> str | None:
    """The address that a VAE, by default the usual one, is downloaded from when it is needed; None where it is here.

    Raises SidaError without diffusers, and where it cannot be had; reads its config alone, and needs no torch.
    """
    installed = sys.modules["diffusers"] if "diffusers" in sys.modules else importlib.util.find_spec("diffusers")
    if installed is None:
        raise SidaError(
            "decoding latents needs the VAE of diffusers, which is not installed",
            f"Install it with: pip install 'sidactl[vae]'{remedy}.",
        )
    asked = catalog.VAE_NAME if asked is None else asked
    if means_path(store, asked, ["vae"]):
        _vae_in(asked)
        return None
    name = asked.removeprefix("vae/")
    if is_ref(store, f"vae/{name}") or store.starting_with(asked) or _vae_of_diffusers(name):
        return None
    url = _vae_url(asked, name)
    download.refuse_forbidden(url, f"the VAE {name}")
    return url


def vae_loader(
    store: Store,
    vae: Artifact | None,
    *,
    purpose: str = "decoding latents",
    offline: bool = False,
    mirror: str | None = None,
) -> Callable[[], Any]:
    """Loads a VAE; None = the usual one, which is fetched where neither diffusers nor the run directory has it."""

    def files() -> Mapping[str, Path]:
        held = vae or fetch_vae(store, catalog.VAE_NAME, offline=offline, mirror=mirror)
        return {name: store.path(held, name) for name in catalog.VAE_FILES}

    def load() -> Any:
        from sidactl.data import codec

        return codec.stable_diffusion_vae(files=files, is_usual=vae is None, purpose=purpose)

    return load


def _drawn_weights() -> bytes:
    import safetensors.torch

    from sidactl.nets.random_features import RandomFeatures

    return safetensors.torch.save(RandomFeatures.drawn())


def read_state_dict(path: Path | str) -> "dict[str, Tensor]":
    """The tensors by name of a .safetensors or .pth file. Raises SidaError for any other, and for a damaged one."""
    import safetensors.torch

    from sidactl.foreign import pickles

    if Path(path).suffix.lower() != ".safetensors":
        return pickles.read_weights(path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        told = str(error).strip().partition("\n")[0]
        raise SidaError(f"{path} is damaged or no safetensors file ({told})", "Download it again.") from error


@contextmanager
def fetched_file(
    store: Store,
    source: str,
    what: str,
    entry: catalog.Entry | None = None,
    progress: download.Progress | None = None,
    offline: bool = False,
    mirror: str | None = None,
    max_bytes: int | None = None,
) -> Iterator[tuple[Path, str]]:
    """Within the block: the local path of a file or URL, and its SHA-256; what was downloaded is removed afterwards.

    An interruption leaves it for the next time.
    """
    if "://" not in source:
        yield Path(source), file_digest(Path(source))
        return
    name = Path(urlsplit(http.check_url(source)).path).name[-_MAX_NAME:]
    path = store.root / "tmp" / f"file-{store.key('download', {'source': source}, {})[:16]}-{name}"
    say = download.to_stderr
    with download.exclusive(path.with_suffix(".lock"), lambda: say(f"waiting for another process: {what}")):
        try:
            yield path, _download(entry, source, path, what, offline, mirror, max_bytes, progress, say)
        except SidaError:
            path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


def asset_digest(name: str) -> str | None:
    """SHA-256 of a file that ships with the package; None where there is no such file."""
    path = catalog.ASSETS / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def prepare_data(
    source: Ref | None,
    *,
    preset: str | None = None,
    transform: str | None = None,
    resolution: Size | None = None,
    max_images: Count | None = None,
    channels: int | None = None,
    exif_rotate: bool = False,
    class_order: "ClassOrder | None" = None,
    convention: "Convention | None" = None,
    workers: int | None = None,
    skip_bad: bool = False,
    latents: bool = False,
    vae: Ref | None = None,
    labels_only: bool = False,
    classes: SupportsIndex | None = None,
    any_size: bool = False,
    with_stats: bool = False,
    name: str | None = None,
    offline: bool = False,
    mirror: str | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    recheck: bool = False,
    say: download.Say | None = download.to_stderr,
    tick: Tick | None = None,
) -> Artifact:
    """A dataset artifact: one uncompressed zip in the EDM layout, and a contact sheet.

    Takes what `prepare.prepare` takes, and the name of a dataset whose files the catalog knows where to download
    (cifar10; offline, mirror: as in `download.fetch`), which is prepared by its preset and gets this name unless other
    options are given. An interrupted preparation goes on where it was, to the same artifact.
    latents: the VAE's means and standard deviations of the images instead, for EDM2; the images themselves are kept
        nowhere, unless the source is a dataset artifact: then they stay what the latents are compared with. The VAE
        runs on `device`. vae: another than the usual one: a folder that diffusers saved, or OWNER/NAME in the Hugging
        Face hub.
    any_size: images of any one size, to be scored; nets are trained on squares with a side that is a power of two.
    with_stats: feature statistics are to be made of it next; refused are latents without their images.
    labels_only: no images, but their classes, from a dataset.json, its URL, or the catalog's imagenet512-labels; or,
        without a source, `classes` of them, each once. That is all that mode sid needs for its training batches.
    recheck: as in `resolve`. say: takes the line that an answer is an old one.

    Raises SidaError, naming the file, for what cannot be used.
    """
    store = Store.open(run)
    if name:
        store.check_name("dataset", name)
    source, vae = optional_ref(source, "the source"), optional_ref(vae, "the VAE")
    if vae is not None and not latents:
        raise SidaError(f"--vae is for --latents, got {vae} without", "Pass --latents, or leave it out.")
    classes = None if classes is None else whole(classes, "classes")
    options: dict[str, Any] = {
        "preset": preset,
        "transform": transform,
        "resolution": None if resolution is None else size_of(resolution, "--resolution"),
        "max_images": None if max_images is None else count_of(max_images, "--max-images"),
        "skip_bad": skip_bad,
    }
    # Only what is not as usual, so that a dataset prepared as usual keeps its oid.
    others = {
        "channels": channels,
        "exif_rotate": exif_rotate,
        "class_order": None if class_order == "numeric" and convention is None else class_order,
        "convention": convention,
        # Which ones: once it was the first so many.
        "subset": "by class in turn" if max_images is not None and convention is None else None,
    }
    options |= {option: value for option, value in others.items() if value}
    if labels_only or classes is not None or (source and _labels_called(source)):
        if latents or any(options.values()):
            raise SidaError("labels without images take no options of images, got some", "Leave them out.")
        return _prepare_labels(store, source, classes, name, force, recheck, say, tick, offline, mirror)
    if source is None:
        raise SidaError("a source is needed, got none", "Name a folder, an archive, or tiny-digits.")
    if latents:
        if resolution is not None:
            from sidactl.data import prepare

            prepare.check_latents_size(transform, size_of(resolution, "--resolution"))
        if with_stats and _streams(store, source, options):
            raise SidaError(
                f"feature statistics are of images, which latents of {source} are made without",
                "Make a dataset of it first (prepare-data PATH --name NAME), then prepare-data dataset/NAME --latents.",
            )
        with first_alone():
            encoder = None
            if vae is not None:
                encoder = chosen_vae(store, vae, offline=offline, mirror=mirror, recheck=force or recheck)
        load_vae = vae_loader(store, encoder, purpose="encoding latents", offline=offline, mirror=mirror)
        by = _LatentsBy(vae, encoder, partial(_encoder, load_vae, device))
        prepared = partial(
            _prepare_latents,
            *(store, source, options, workers, name, force, recheck, say, tick, offline, mirror, by),
        )
        return _with_helpers(store, by, prepared)
    source = _plain_source(source)
    usual = _as_usual(source, options)
    return _prepare_images(
        store, source, usual, workers, name, force, recheck, say, tick, offline, mirror, any_size=any_size
    )


def prepared_as_usual(
    store: Store, source: str, *, any_size: bool = False, force: bool = False, recheck: bool = False
) -> Artifact:
    """The dataset of a path, or of a name of the catalog, without options and without a word."""
    if _labels_called(source):
        return _prepare_labels(store, source, None, None, force, recheck, None, None, False, None)
    source = _plain_source(source)
    usual = _as_usual(source, dict.fromkeys(("preset", "transform", "resolution", "max_images")))
    return _prepare_images(
        store,
        source,
        {**usual, "skip_bad": False},
        None,
        None,
        force,
        recheck,
        None,
        None,
        False,
        None,
        any_size=any_size,
    )


def _labels_called(source: str) -> catalog.Dataset | None:
    """The catalog's entry of classes without images that has this name or URL."""
    entries = (entry for entry in catalog.DATASETS.values() if entry.labels_of and entry.source)
    return next((e for e in entries if source in (e.name, f"dataset/{e.name}", e.source and e.source.url)), None)


def _as_usual(source: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a `_plain_source`: of one that is downloaded with its preset, unless others take its place."""
    entry = catalog.DATASETS.get(source)
    takes_preset = entry and entry.source and not any(options[o] for o in ("preset", "transform", "resolution"))
    return {**options, "preset": source} if takes_preset else options


def _plain_source(source: str) -> str:
    """A source of images, with a dataset of the catalog under its bare name; SidaError where a path has it, too."""
    name, is_path = source.removeprefix("dataset/"), os.path.exists(source)
    entry = catalog.DATASETS.get(name)
    is_known = entry and (entry.builtin or entry.source)
    if entry is None or (is_path and not is_known):
        return source
    if not is_known:
        raise not_prepared(entry)
    if is_path and name == source:
        raise SidaError(
            f"'{name}' is the name of a folder and of dataset/{name}",
            f"Write ./{name} for the folder, or dataset/{name}.",
        )
    return name


def _prepare_images(
    store: Store,
    source: str,
    options: Mapping[str, Any],
    workers: int | None,
    name: str | None,
    force: bool,
    recheck: bool,
    say: download.Say | None,
    tick: Tick | None,
    offline: bool,
    mirror: str | None,
    *,
    any_size: bool = False,
    latents: "_LatentsBy | None" = None,
) -> Artifact:
    """Of a source that is no artifact; latents: of its images, by this VAE."""
    identity = source_identity(store, source, recheck=force or recheck)
    _tell_other_file(source, identity)
    question: dict[str, Any] = {"source": identity, **options, **(latents.params if latents else {})}
    key = store.key("prepare-data", question, {})
    if any_size and (force or not store.asked(key)):  # what is fit for training is fit for scores
        key = store.key("prepare-data", question | {"any_size": True}, {})
    entry = catalog.DATASETS.get(source)
    file = entry.source if entry else None
    if file and {option: value for option, value in options.items() if value} == {"preset": source} and not latents:
        name = name or source
    refs = [*([source] if entry and entry.builtin and not latents else []), *([name] if name else [])]
    words = {**options, "latents": True, "vae": latents.asked} if latents else options
    asks = _preparation(source, question, words, name)
    if any_size:  # a score began it
        asks = dataclasses.replace(asks, words=())
    with _answering(store, key, source, force, recheck, asks) as work:
        if isinstance(work, Artifact):
            tell_old(store, key, say)
            _tell_count(catalog.DATASETS.get(options["preset"] or ""), work, say)
            return named(store, called_so(store, work, name), refs, say)
        from sidactl.data import prepare

        path = work.path / "images.zip"
        chosen = {option: value for option, value in options.items() if option != "subset"}
        # Before the source, which may take hours, since it may not be there.
        encode = latents.encoder() if latents else None
        ready: Any = nullcontext((source, None))
        if file:
            progress = part_of(tick, f"downloading {source}", "bytes")
            ready = fetched_file(store, file.url, source, entry, progress, offline, mirror)
        with ready as (readable, _):
            made = prepare.prepare(
                readable,
                path,
                **chosen,
                any_size=any_size,
                encode=encode,
                workers=workers,
                work=work.path,
                progress=tick,
                say=download.to_stderr,
            )
            entry = entry or catalog.DATASETS.get(options["preset"] or "")
            params: dict[str, Any] = {
                "name": name or _json_name(Path(file.url if file else source).name),
                "licence": entry.licence if entry else None,
                **({"vae": vae_label(latents.vae)} if latents else {}),
            }
            try:
                check_unchanged(store, source, identity)
            except SidaError:
                work.clear()  # what was read before the change and what after it must not be mixed
                raise
            inputs = latents.inputs if latents else {}
            files = _files_made(path, made)
            artifact = store.put("dataset", files, inputs=inputs, params={**params, **options}, results=_results(made))
            _tell_count(catalog.DATASETS.get(options["preset"] or ""), artifact, download.to_stderr)
            return answered(store, key, artifact, "prepare-data", refs=refs, say=say)


def _tell_other_file(source: str, identity: Any) -> None:
    """Warns of a file that is called as the published one of the catalog is, and is another."""
    for entry in catalog.DATASETS.values():
        if entry.source and Path(source).name == Path(entry.source.url).name and identity != _identity_of(entry.source):
            download.to_stderr(
                f"warning: {source} is not the {Path(source).name} that was published, by its SHA-256; "
                f"sidactl prepare-data {entry.name} downloads that one"
            )


def _tell_count(entry: catalog.Dataset | None, made: Artifact, say: download.Say | None) -> None:
    """Warns of a dataset of the catalog that became one of another number of images, where no number was asked for."""
    count = made.results["num_images"]
    if say and entry and entry.num_images not in (None, count) and not made.params.get("max_images"):
        say(f"warning: {entry.name} has {entry.num_images:,} images, this source gave {count:,}")


def _preparation(
    source: str,
    params: Mapping[str, Any],
    options: Mapping[str, Any],
    name: str | None,
    inputs: Mapping[str, str] | None = None,
) -> Question:
    resolution = options.get("resolution")
    written = {**options, "resolution": resolution and "x".join(map(str, resolution)), "name": name}
    words = ["prepare-data", source, *option_words(written)]
    return Question(command="prepare-data", subject=source, words=words, params=params, inputs=inputs or {})


def _prepare_latents(
    store: Store,
    source: str,
    options: Mapping[str, Any],
    workers: int | None,
    name: str | None,
    force: bool,
    recheck: bool,
    say: download.Say | None,
    tick: Tick | None,
    offline: bool,
    mirror: str | None,
    by: "_LatentsBy",
) -> Artifact:
    """Latents of a dataset artifact, linked with it; of any other source without its pixels, which are kept nowhere."""
    pixels = None
    if not _streams(store, source, options):
        name_of_data = source.removeprefix("dataset/")
        entry = catalog.DATASETS.get(name_of_data)
        if entry and entry.source and not store.ref("dataset", name_of_data):
            pixels = prepare_data(
                source, offline=offline, mirror=mirror, run=store.root, recheck=recheck, say=None, tick=tick
            )
        else:
            pixels = resolve(store, source, ["dataset"], recheck=force or recheck)
    if pixels is None:
        source = _plain_source(source)
        usual = _as_usual(source, options)
        return _prepare_images(
            store, source, usual, workers, name, force, recheck, say, tick, offline, mirror, latents=by
        )
    _require_pixels(pixels)
    key = store.key("prepare-data", by.params, {"dataset": pixels.oid})
    refs = [name] if name else []
    inputs = {"dataset": pixels.oid, **by.inputs}
    words = {**options, "latents": True, "vae": by.asked}
    asks = _preparation(source, {**options, **by.params}, words, name, inputs)
    with _answering(store, key, source, force, recheck, asks) as work:
        if isinstance(work, Artifact):
            tell_old(store, key, say)
            return named(store, called_so(store, work, name), refs, say)
        from sidactl.data import prepare

        made = prepare.prepare(
            store.path(pixels, "images.zip"),
            path := work.path / "images.zip",
            encode=by.encoder(),
            workers=workers,
            work=work.path,
            progress=tick,
            say=download.to_stderr,
        )
        params = {
            "name": name or pixels.params["name"],
            "licence": pixels.params["licence"],
            "vae": vae_label(by.vae),
        }
        results = _results(made) | {"skipped": pixels.results["skipped"]}
        artifact = store.put("dataset", _files_made(path, made), inputs=inputs, params=params, results=results)
        return answered(store, key, artifact, "prepare-data", refs=refs, say=say)


def _streams(store: Store, source: str, options: Mapping[str, Any]) -> bool:
    """Whether latents of a source are made of its files, and not of a dataset artifact."""
    called = store.ref("dataset", source) if os.path.exists(source) else None
    if called and store.get(called).results.get("kind") == "latents":  # of which none are made: the path is meant
        return True
    return bool(any(options.values()) or means_path(store, source, ["dataset"]))


@dataclass(frozen=True)
class _LatentsBy:
    """The VAE that latents are made by, as it was asked for; None = the usual one, which questions do not name."""

    asked: str | None
    vae: Artifact | None
    encoder: "Callable[[], Encoder]"

    @property
    def params(self) -> dict[str, Any]:
        return {"latents": True, **({"vae": vae_digest(self.vae)} if self.vae else {})}

    @property
    def inputs(self) -> dict[str, str]:
        return {"vae": self.vae.oid} if self.vae else {}


def _encoder(load_vae: Callable[[], Any], device: str | None) -> "Encoder":
    """The VAE, once it is there; tells the other processes, which are to help with it."""
    from sidactl.data import codec, prepare
    from sidactl.engine import devices, ranks

    chosen = devices.pick_device(device)
    vae = load_vae()
    if ranks.rank_and_size()[0] == 0:
        ranks.agreed(lambda: _ENCODING)
    return prepare.latent_encoder(codec.LatentCodec(lambda: vae), chosen)


def _with_helpers(store: Store, by: _LatentsBy, make: Callable[[], Artifact]) -> Artifact:
    """What `make` gives in the first of several processes, while the others encode their share of latents for it."""
    if is_alone():
        return make()
    from sidactl.engine import ranks

    if ranks.rank_and_size()[0] == 0:
        made = make()
        ranks.agreed(lambda: made.oid)
        return made
    told = ranks.agreed(str)
    if told == _ENCODING:
        for _ in ranks.handed_out(by.encoder(), ()):
            pass
        told = ranks.agreed(str)
    return store.get(told)


def _files_made(path: Path, made: "PreparedDataset") -> dict[str, Path | bytes]:
    """A prepared zip with its contact sheet."""
    from sidactl.data import prepare
    from sidactl.data.dataset import Dataset

    sheet = prepare.contact_sheet(Dataset(path)) if made.kind == "pixels" else made.contact_sheet
    return {"images.zip": path, **({"contact-sheet.png": sheet} if sheet else {})}


def _results(made: "PreparedDataset") -> dict[str, Any]:
    """A preparation's results without its contact sheet; a width and names of classes only where there are some."""
    rare, results = ("width", "class_names", "contact_sheet"), dataclasses.replace(made, contact_sheet=None)
    return {name: value for name, value in dataclasses.asdict(results).items() if name not in rare or value}


def _json_name(path: str) -> str:
    """A path as JSON holds it, whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _prepare_labels(
    store: Store,
    source: str | None,
    classes: int | None,
    name: str | None,
    force: bool,
    recheck: bool,
    say: download.Say | None,
    tick: Tick | None,
    offline: bool,
    mirror: str | None,
) -> Artifact:
    if (source is None) == (classes is None):
        got = "neither" if source is None else "both"
        raise SidaError(
            f"labels without images come from a dataset.json or a number of classes, got {got}",
            "Name the file, or pass --classes.",
        )
    entry = _labels_called(source) if source else None
    if entry and entry.source:
        _plain_source(str(source))
        source = entry.source.url
    url = http.check_url(source) if source and "://" in source else None
    identity = source_identity(store, source, recheck=force or recheck) if source else None
    key = store.key("prepare-data", {"labels_only": identity, "classes": classes}, {})
    refs = [*([entry.name] if entry else []), *([name] if name else [])]
    if not force and (known := store.asked(key, whole=recheck)):
        tell_old(store, key, say)
        return named(store, known if entry else called_so(store, known, name), refs, say)
    from sidactl.data.labels import LABEL_FILE, MAX_LABEL, LabelFile, class_counts, read_labels

    origin: dict[str, Any] = {}
    if source is not None:
        ready: Any = nullcontext((Path(source), None))
        if url:
            what = entry.name if entry else url
            progress = part_of(tick, f"downloading {what}", "bytes")
            ready = fetched_file(store, url, what, entry, progress, offline, mirror)
        with ready as (path, sha256):
            found = read_labels(path)
        check_unchanged(store, source, identity)
        origin = {"source_url": url, "source_sha256": sha256} if url else {}
    else:
        assert classes is not None
        if not 1 <= classes <= MAX_LABEL + 1:
            raise SidaError(f"--classes must be from 1 to {MAX_LABEL + 1}, got {classes}", "Pass the teacher's number.")
        found = LabelFile({f"class {index}": index for index in range(classes)})
    labels = found.labels or {}
    counts = class_counts(list(labels.values()), found.label_dim)
    results: dict[str, Any] = {
        "num_images": len(labels),
        "resolution": None,
        "num_channels": None,
        "label_dim": len(counts),
        "class_counts": counts,
        "skipped": [],
        "kind": "labels",
    }
    names = {"class_names": found.class_names} if found.class_names else {}
    results |= names
    called = name or (_json_name(Path(source.partition("?")[0]).name) if source else f"classes-{classes}")
    params = {
        "name": entry.labels_of if entry else called,  # the dataset that a net trained on them is of
        "licence": entry.licence if entry else None,
        **origin,
    }
    document = json.dumps({"labels": list(labels.items()), **names}).encode()
    artifact = store.put("dataset", {LABEL_FILE: document}, params=params, results=results)
    _tell_count(entry, artifact, download.to_stderr)
    return answered(store, key, artifact, "prepare-data", refs=refs, say=say)


@contextmanager
def _answering(
    store: Store, key: str, what: str, force: bool, recheck: bool, question: Question
) -> Iterator[Artifact | LiveDir]:
    """What answered the question before, or else the place to work on it, alone: emptied when all went well.

    An interruption leaves it for the next time.
    """
    if not force and (known := asked(store, key, recheck)):
        yield known
        return
    lock = store.root / "tmp" / f"prepare-{key[:16]}.lock"
    with download.exclusive(lock, lambda: download.to_stderr(f"waiting for another process: {what}")):
        known = store.asked(key, whole=recheck)
        if known and not force:
            yield known
            return
        with at_work(store, key, question) as live:
            yield live


@contextmanager
def at_work(store: Store, key: str, question: Question) -> Iterator[LiveDir]:
    """The live directory of a question, emptied when all went well; says which other work does not go on.

    To answer anew (--force) has a place of its own, so that this, too, goes on after an interruption.
    """
    known = store.asked(key)
    with store.live(store.key("again", {"key": key}, {"known": known.oid}) if known else key) as live:
        for line in begin(store, live, question.again() if known else question):
            download.to_stderr(line)
        yield live
        live.clear()


def is_alone() -> bool:
    """Whether torchrun started no other process with this one; told without importing torch."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


@contextmanager
def first_alone() -> Iterator[None]:
    """See `engine.first_alone`; a process that is alone anyway does not import torch for it."""
    if is_alone():
        yield
        return
    from sidactl.engine import ranks

    with ranks.first_alone():
        yield


def agreed_answer(store: Store, key: str) -> Artifact | None:
    """The answer that there is, as the first of several processes sees it: one that looks later may see another."""
    return on_all(store, asked(store, key))


def on_all(store: Store, artifact: Artifact | None) -> Artifact | None:
    """The artifact that the first of several processes has, on all of them."""
    if is_alone():
        return artifact
    from sidactl.engine import ranks

    oid = ranks.agreed(lambda: artifact.oid if artifact else "")
    return store.get(oid) if oid else None


@contextmanager
def answering(
    store: Store, key: str, question: Question, *, force: bool = False, recheck: bool = False
) -> Iterator[Artifact | LiveDir | None]:
    """What all processes find together: an answer, or the place to work on it, of which the first is the writer.

    None where the run directory takes nothing.
    """
    if not is_alone():
        from sidactl.engine import ranks

        if ranks.rank_and_size()[0] > 0:
            kind, _, told = ranks.agreed(str).partition(" ")
            yield store.get(told) if kind == "answer" else LiveDir(Path(told), is_writer=False) if told else None
            return
    with ExitStack() as stack:
        place = None
        with suppress(UnwritableError):
            store.check_writable()
            place = stack.enter_context(_answering(store, key, question.title, force, recheck, question))
        if not is_alone():
            from sidactl.engine import ranks

            told = f"answer {place.oid}" if isinstance(place, Artifact) else f"place {place.path if place else ''}"
            ranks.agreed(lambda: told)
        yield place


def asked(store: Store, key: str, whole: bool = False) -> Artifact | None:
    """The answer to a question of long work; tidies up after a process that was killed once it had given it."""
    known = store.asked(key, whole=whole)
    if known and (store.root / "live" / key).exists():
        with suppress(SidaError), store.live(key) as live:
            live.clear()
    return known


def _require_pixels(artifact: Artifact) -> None:
    require_images(artifact)
    if artifact.results["kind"] == "latents":
        raise SidaError(f"latents are made of pixels, got dataset {artifact.oid[:12]} of latents", "Use it as it is.")


def require_images(artifact: Artifact) -> None:
    """Raises SidaError for a dataset of classes alone."""
    if artifact.results.get("kind") == "labels":
        raise SidaError(
            f"images are needed, got dataset {artifact.oid[:12]} of classes alone", "Give a dataset with images."
        )


def shape_for_nets(data: Artifact) -> tuple[int | None, int | None, int]:
    """Resolution, channels and classes of a dataset as a network sees it; no resolution or channels without images."""
    results: Mapping[str, Any] = data.results
    channels = results["num_channels"]
    # Stored are mean and standard deviation of every latent channel.
    channels = channels // 2 if results.get("kind") == "latents" else channels
    return results["resolution"], channels, results["label_dim"]


def source_identity(store: Store, source: str, *, recheck: bool = False) -> Any:
    """What stands for a source in a question: its name, or a digest over the names and bytes of its files.

    Where it lies is no part of it, but its suffix is. What the catalog says where to download is known by its pinned
    digest. recheck: read the files even where they look as they did when they were read last.
    Raises SidaError for a file that cannot be read, or changes meanwhile.
    """
    entry = catalog.DATASETS.get(source)
    if entry and entry.source:
        return _identity_of(entry.source)
    if (entry and entry.builtin) or not os.path.exists(source):
        return _json_name(source)
    files = _files_of(store, source)
    seen, newest_ns = _look_at(files)
    note = store.key("digest", {"path": _json_name(os.path.realpath(source))}, {})
    then, _, sha256 = (store.noted_digest(note) or "").partition(" ")
    if recheck or then != seen or not sha256:
        began_ns = time.time_ns()
        sha256 = _digest_of(files)
        if _look_at(files)[0] != seen:
            raise changed(source)
        if newest_ns > began_ns - SETTLED_NS:
            return {"suffix": _json_name(_suffix(source)), "sha256": sha256}
    store.note_digest(note, f"{seen} {sha256}")
    return {"suffix": _json_name(_suffix(source)), "sha256": sha256}


def _identity_of(file: catalog.Download) -> Any:
    """The `source_identity` that a file has once it is downloaded; its URL where its digest is not known before."""
    if file.sha256 is None:
        return file.url
    sha256 = hashlib.sha256(b"\0" + file.sha256.encode()).hexdigest()  # as `_digest_of` a single file
    return {"suffix": _suffix(file.url), "sha256": sha256}


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


def tell_old(store: Store, key: str, say: download.Say | None) -> None:
    """Says that an answer was in the run directory already, and since when."""
    if say and (when := store.asked_at(key)):
        date = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(when))
        say(f"answered from the run directory, asked on {date}; --force does it again")


def called_so(store: Store, artifact: Artifact, name: str | None) -> Artifact:
    """An artifact under the name that it is now given: as if it had been made under it."""
    if name is None or artifact.params.get("name") == name:
        return artifact
    return store.put_again(artifact, {**artifact.params, "name": name})


def answered(
    store: Store,
    key: str,
    artifact: Artifact,
    command: str,
    *,
    refs: Sequence[str] = (),
    say: download.Say | None = None,
) -> Artifact:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # In this order, so that every answer is in the log, by which verify knows one that was swapped.
    store.log({"time": now, "command": command, "key": key, "oid": artifact.oid})
    store.answer(key, artifact.oid)
    return named(store, artifact, refs, say)


def named(store: Store, artifact: Artifact, refs: Sequence[str], say: download.Say | None = None) -> Artifact:
    """Gives an artifact names; `say` takes a line for each that was another artifact's."""
    for name in refs:
        if (old := store.ref(artifact.kind, name)) != artifact.oid:
            store.set_ref(artifact.kind, name, artifact.oid)
            if old and say:
                say(f"{artifact.kind}/{name} named {old[:12]} before, and names {artifact.oid[:12]} now")
    return artifact
