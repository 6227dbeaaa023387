"""The detector that scores: which one, by whose weights, and whether it has classes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl import catalog
from sidactl.commands import moments
from sidactl.commands import reference as commands_reference
from sidactl.commands.fetch import fetch_detector
from sidactl.commands.files import read_state_dict
from sidactl.commands.identity import changed, file_digest, source_identity
from sidactl.commands.moments import RANDOM_FEATURES, Need, detector_name
from sidactl.commands.scores import metric_of
from sidactl.commands.words import NETS
from sidactl.errors import EXIT_FAILED, MissingError, SidaError
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    import torch

    from sidactl.detectors import Detector, Resize


def applicable_metrics(store: Store, subject: Artifact, options: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation: all with the reference's own detector, and FD-DINOv2 where Inception is used."""
    reference = commands_reference.find(store, options.get("reference"), subject, "moments")
    detector = options.get("detector") or default_detector(subject, reference, options)
    try:
        commands_reference.find(store, options.get("reference"), subject, "images")
        has_images = detector != "dinov2"
    except MissingError:  # statistics alone, or a dataset that is not here
        has_images = False
    wanted = ["fid"]
    if detector == "inception" and (reference.kind == "dataset" or "dinov2.npz" in reference.files):
        wanted.append("fd-dinov2")
    if has_images:
        wanted += ["prec-recall", "kid"]
    return wanted + (["inception-score"] if has_classes(detector) else [])


def detector_of(
    metric: str, options: Mapping[str, Any], found: Mapping[str, Artifact], store: Store, subject: Artifact
) -> str:
    fixed, asked = metric_of(metric).detector, options.get("detector")
    if fixed and asked not in (None, fixed):
        raise SidaError(f"{metric} is by detector {fixed}, got {asked!r}", "Leave out --detector.")
    if fixed or asked:
        return str(fixed or asked)
    if metric in found:
        return default_detector(subject, found[metric], options)
    # What compares with nothing is by the detector of what is compared beside it, or would be.
    compared = next((found[name] for name in found if not metric_of(name).detector), None)
    if not compared and options.get("reference"):
        compared = commands_reference.find(store, options.get("reference"), subject, "moments")
    if compared and has_classes(own := detector_name(compared)):
        return own
    if not compared and subject.kind == "dataset":
        return detector_name(subject)
    return "tiny-digits" if commands_reference.dataset_name(store, subject) == "tiny-digits" else "inception"


def reference_for(
    store: Store, asked: str | None, subject: Artifact, need: Need, detector: str, recheck: bool
) -> Artifact:
    """What a further detector compares with: published statistics where they hold its, or else the images."""
    found = commands_reference.find(store, asked, subject, need, recheck=recheck)
    if found.kind == "stats" and f"{detector}.npz" not in found.files:
        found = commands_reference.find(store, asked, subject, "images", recheck=recheck)
    return found


def default_detector(subject: Artifact, reference: Artifact, options: Mapping[str, Any]) -> str:
    """The reference's own detector; of a network's own dataset, when none is named, that of its runs."""
    is_of_net = subject.kind in NETS or "net" in subject.inputs
    if is_of_net and options.get("reference") is None:
        return moments.training_detector(reference)
    return detector_name(reference)


def require_classes(detector: str) -> None:
    """Raises SidaError for a detector that gives no inception score."""
    if not has_classes(detector):
        what = f"the inception score needs classes, detector {detector} gives none"
        raise SidaError(what, "Pass --detector inception.")


def has_classes(detector: str) -> bool:
    """Whether it classifies: only the digits' and Inception do; in TorchScript that, too, gives features alone."""
    is_state_dict = moments.is_detector_file(detector) and not moments.is_torchscript(detector)
    return detector in ("tiny-digits", "inception") or is_state_dict


def _weights_digest(store: Store, detector: str) -> Any:
    """What stands for a detector's weights in a question, without reading more than it must."""
    if moments.is_detector_file(detector):
        if not Path(detector).is_file():
            raise SidaError(f"{detector}: no such file", "Check the path, or use --detector inception.")
        return source_identity(store, detector)
    return fetch_detector(detector, run=store.root).oid


def weights_of(store: Store, detector: str, needs_classes: bool) -> Any:
    try:
        return _weights_digest(store, detector)
    except SidaError as error:
        if error.exit_code != EXIT_FAILED or needs_classes:  # which the one that is built in has not
            raise
        hint = f"{error.hint} Or score with --detector {RANDOM_FEATURES}, which is built in and is no FID."
        raise SidaError(error.message, hint.strip(), exit_code=EXIT_FAILED) from error


def read_again(store: Store, detector: str) -> None:
    """Hashes a detector's file anew; fetches one of the catalog again where it is damaged."""
    if moments.is_detector_file(detector):
        source_identity(store, detector, recheck=True)
    else:
        fetch_detector(detector, run=store.root, recheck=True)


def weights_by_whom(detectors: Mapping[str, str], weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """The detectors in a question; of a file its content alone counts, wherever it lies."""
    called = {name: "file" if moments.is_detector_file(name) else name for name in weights}
    return {"detectors": {metric: called[name] for metric, name in detectors.items()}} | {
        called[name]: weight for name, weight in weights.items()
    }


def load_detector(
    store: Store, name: str, device: "torch.device", resize: "Resize" = "torch", *, trust_code: bool = False
) -> "Detector":
    """The named detector, downloaded if need be; or Inception from a file, in TorchScript (.pt) or as a state dict."""
    from sidactl import detectors as detectors_module

    if moments.is_detector_file(name):
        sha256 = file_digest(Path(name))
        if moments.is_torchscript(name):
            found = detectors_module.load_torchscript(name, device=device, trust_code=trust_code)
        else:
            found = detectors_module.load("inception", read_state_dict(name), device=device)
        if file_digest(Path(name)) != sha256:
            raise changed(name)
        return replace(found, is_published=_is_published("inception", sha256))
    artifact = fetch_detector(name, run=store.root)
    is_published = _is_published(name, str(artifact.params.get("source_sha256")))
    if "model.pt" in artifact.files:
        found = detectors_module.load_torchscript(store.path(artifact, "model.pt"), device=device)
        return replace(found, is_published=is_published)
    import safetensors.torch

    from sidactl.nets.preparation import Preparation

    weights = safetensors.torch.load(store.read(artifact, "model.safetensors"))
    seen = artifact.params.get("preparation")
    preparation = Preparation.from_json(seen) if seen else None
    found = detectors_module.load(name, weights, device=device, resize=resize, preparation=preparation)
    return replace(found, is_published=is_published)


def _is_published(name: str, sha256: str) -> bool:
    """Whether a file is, by its digest, that which a detector of the catalog was published as; Inception has two."""
    names = ("inception", "inception-torchscript") if name.startswith("inception") else (name,)
    sources = [entry.source for n in names if (entry := catalog.DETECTORS.get(n))]
    return any(source and source.sha256 == sha256 and source.sha256_from_publisher for source in sources)
