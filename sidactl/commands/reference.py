"""What images are scored against: datasets and their statistics, and the statistics that others published."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidactl import catalog
from sidactl.commands.files import fetched_file
from sidactl.commands.moments import Need, imported_statistics
from sidactl.commands.prepare import prepare_data
from sidactl.commands.question import Question
from sidactl.commands.resolve import dataset_called, repaired, resolve
from sidactl.commands.words import NETS, is_ref, means_path
from sidactl.errors import MissingError, SidaError
from sidactl.store import Artifact, Store


def find(store: Store, text: str | None, subject: Artifact, need: Need, *, recheck: bool = False) -> Artifact:
    """The dataset or stats artifact to score `subject` against.

    text: a dataset or stats artifact, a catalog name, a URL or a file; None = that of the subject's own dataset. A name
    of published statistics, also as `stats/NAME`, means them; `dataset/NAME` means the images. recheck: as in
    `resolve.resolve`. Raises SidaError for what has no images where those are needed.
    """
    if text is None:
        return _own(store, subject, need, recheck)
    suffix = Path(text.partition("?")[0]).suffix.lower()
    could_be_path = os.path.isdir(text) or suffix in (".pkl", ".npz", ".zip")
    is_path = could_be_path and means_path(store, text, ["dataset", "stats"])
    name = text if text in store.refs() else text.removeprefix("stats/")
    published = None if is_path else catalog.REFERENCES.get(name) or _by_url(text)
    if published:
        return _published(store, published, need, recheck)
    is_file = is_path or "://" in text or not is_ref(store, text)
    if is_file and (suffix == ".pkl" or (suffix == ".npz" and ("://" in text or _has_moments(text)))):
        if need == "moments":
            return imported_statistics(store, text, None, recheck)
        if suffix == ".pkl" or not _has(text, "arr_0"):
            raise MissingError(
                f"precision, recall and KID need images, got the statistics {text}",
                "Pass --ref with a dataset or a folder.",
            )
    try:
        found = resolve(store, text, ["dataset", "stats"], any_size=True, recheck=recheck)
        return _checked(store, pixels_of(store, found), recheck, need)
    except SidaError as error:
        try:
            store.resolve(text, NETS)
        except SidaError:
            raise error from None
        raise SidaError(
            f"a reference must be a dataset or statistics, got {text}, which is a network", "Swap the two."
        ) from None


def described(store: Store, reference: Artifact) -> str:
    """What a reference is, in a word or two."""
    name = reference.params.get("name")
    if reference.kind == "stats":
        return f"statistics {name}" if name else f"statistics of {dataset_name(store, reference)}"
    return f"{reference.kind} {name or reference.oid[:12]}"


def pixels_of(store: Store, artifact: Artifact) -> Artifact:
    """The images that latents were made from; anything else as it is."""
    is_latents = artifact.kind == "dataset" and artifact.results.get("kind") == "latents"
    return store.get(artifact.inputs["dataset"]) if is_latents and "dataset" in artifact.inputs else artifact


def published_as(reference: Artifact) -> catalog.Reference | None:
    """The catalog's entry of published statistics."""
    return _by_url(str(reference.params.get("source")))


def _by_url(text: str) -> catalog.Reference | None:
    return next((e for e in catalog.REFERENCES.values() if e.source and e.source.url == text), None)


def _checked(store: Store, artifact: Artifact, recheck: bool, need: Need = "moments") -> Artifact:
    refuse_latents(artifact, need)
    return repaired(store, artifact) if recheck else artifact


_WITH_IMAGES = "Pass --ref with a folder or a dataset of images."


def refuse_latents(artifact: Artifact, need: Need = "moments") -> None:
    """MissingError for latents whose images are not there: nothing that is drawn compares with them."""
    if artifact.results.get("kind") == "latents":
        by_moments = "Pass --ref with the dataset of pixels, or with published statistics such as imagenet512."
        raise MissingError(
            f"latents have no images to compare with, got {artifact.params.get('name')}",
            by_moments if need == "moments" else _WITH_IMAGES,
        )


def refuse_classes(artifact: Artifact) -> None:
    """MissingError for classes alone."""
    if artifact.results.get("kind") == "labels":
        called = artifact.params.get("name")
        raise MissingError(f"there are no images to compare with: {called} is of classes alone", _WITH_IMAGES)


def _own(store: Store, subject: Artifact, need: Need, recheck: bool) -> Artifact:
    if subject.kind == "dataset":
        raise SidaError("a dataset needs another to be compared with, got none", "Pass --ref DATASET.")
    net = store.get(subject.inputs["net"]) if "net" in subject.inputs else subject
    if "reference" in net.inputs:
        held = store.get(net.inputs["reference"])
        entry = published_as(held)
        if need == "moments" and entry:
            return _published(store, entry, need, recheck)
        if need == "moments" or held.kind == "dataset":
            return _checked(store, held, recheck, need)
    name = dataset_name(store, net)
    entry = published_for(name, net.params["net"].get("architecture") if net.kind in NETS else None)
    if entry and need == "moments":
        return _published(store, entry, need, recheck)
    if entry and (images := catalog.REFERENCES.get(f"{name}-images")):
        return _published(store, images, need, recheck)
    return _checked(store, dataset_of(store, net), recheck, need)


def published_for(dataset: str, architecture: object) -> catalog.Reference | None:
    """The published statistics that a dataset's networks are scored against by default; EDM2's have some of their own.

    Source: the published runs were scored against them while they trained, not against the images.
    """
    by_edm2 = catalog.REFERENCES.get(f"{dataset}-edm2") if architecture == "EDM2" else None
    return by_edm2 or catalog.REFERENCES.get(dataset)


def of_run(store: Store, teacher: Artifact, data: Artifact, *, recheck: bool = False) -> Artifact:
    """What a distillation is scored against unless it is told otherwise, and `fid` of its generators afterwards.

    The published statistics of the dataset that it trains on, or else its images; those of the teacher's where it
    trains on classes alone, or on latents whose images are not there.
    """
    pixels = pixels_of(store, data)
    if data.results["kind"] != "labels":
        architecture = teacher.params["net"].get("architecture")
        if entry := published_for(str(data.params["name"]), architecture):
            return _published(store, entry, "moments", recheck)
        if pixels.results["kind"] == "pixels":
            return _checked(store, pixels, recheck)
    return find(store, None, teacher, "moments", recheck=recheck)


def dataset_name(store: Store, subject: Artifact) -> str:
    """The name of the dataset that an artifact is of, as far as it is known; classes alone stand for their net's."""
    if subject.kind == "dataset":
        return str(subject.params["name"])
    data = store.get(subject.inputs["dataset"]) if "dataset" in subject.inputs else None
    if data and data.results.get("kind") != "labels":
        return str(data.params["name"])
    return str(subject.params.get("dataset"))


def dataset_of(store: Store, subject: Artifact) -> Artifact:
    """The dataset that an artifact descends from."""
    if subject.kind == "dataset":
        return subject
    if "dataset" in subject.inputs:
        return pixels_of(store, store.get(subject.inputs["dataset"]))
    if "net" in subject.inputs:
        return dataset_of(store, store.get(subject.inputs["net"]))
    if subject.params["dataset"] is None:
        raise MissingError("it is not known which dataset this network is of", "Pass --ref DATASET.")
    return dataset_called(store, str(subject.params["dataset"]))


def class_of(store: Store, net: Artifact, name: str) -> int:
    """The index of a class by its name in the dataset that a network is of; SidaError with the nearest name."""
    names = _class_names(store, net)
    if names is None:
        raise SidaError(f"the classes of {net.params['name']} have no names, got --class {name}", "Pass its index.")
    if name not in names:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        near = catalog.did_you_mean(name, dict.fromkeys(names), f"They are {some}: see sidactl show DATASET.")
        raise SidaError(f"the class must be one of {len(names):,}, got {name!r}", near)
    return names.index(name)


def _class_names(store: Store, artifact: Artifact) -> Sequence[str] | None:
    """The names of the classes of the dataset that an artifact descends from, or is said to be of."""
    names: Any = artifact.results.get("class_names")
    for role in ("dataset", "teacher", "generator"):
        if not names and role in artifact.inputs:
            names = _class_names(store, store.get(artifact.inputs[role]))
    if names:
        return list(names)
    known = store.refs().get(f"dataset/{artifact.params.get('dataset')}")
    return _class_names(store, store.get(known)) if known and artifact.kind in NETS else None


def _published(store: Store, entry: catalog.Reference, need: Need, recheck: bool) -> Artifact:
    assert entry.source
    if entry.holds == "images" and need == "images":
        params = {"source": entry.source.url}
        question = Question(store=store, command="fetch-reference", params=params, recheck=recheck)
        if known := question.known():
            return known
        with fetched_file(store, entry.source.url, entry.name, entry) as (path, _):
            artifact = prepare_data(str(path), name=entry.name, run=store.root, recheck=recheck, say=None)
        return question.record(artifact)
    if need == "images":
        try:
            return _checked(store, pixels_of(store, dataset_called(store, entry.dataset)), recheck, need)
        except MissingError as error:
            if "--latents" not in (error.hint or ""):
                raise
            raise MissingError(error.message, _WITH_IMAGES) from error  # latents would be of no use here
    return imported_statistics(store, entry.source.url, entry, recheck)


def warning(store: Store, subject: Artifact, reference: Artifact) -> str | None:
    """What a user should know of published statistics before they believe a FID against them."""
    source = str(reference.params.get("source", ""))
    if reference.kind != "stats":
        return None
    if "VIRTUAL_imagenet64" in source:
        return "the published FIDs of ImageNet 64 are against --ref imagenet64; this file is for precision and recall"
    entry = _by_url(source)
    known = catalog.DATASETS[entry.dataset].num_images if entry else None
    net = store.get(subject.inputs["net"]) if "net" in subject.inputs else subject
    own = store.get(net.inputs["dataset"]) if "dataset" in net.inputs else None
    held = own.results["num_images"] if own and own.results["kind"] != "labels" else None
    if entry and own and known and held and held != known:
        pixels = pixels_of(store, own)
        way = f": --ref {pixels.oid[:12]} compares with these" if pixels.results["kind"] == "pixels" else ""
        return f"the statistics of {entry.name} are of {known:,} images, the network was trained on {held:,}{way}"
    return None


def num_images(store: Store, reference: Artifact) -> int | None:
    """How many images a reference's statistics are of; None where it is not known."""
    import numpy as np

    if "stats.npz" in reference.files:
        with np.load(io.BytesIO(store.read(reference, "stats.npz")), allow_pickle=False) as held:
            return int(held["num_items"])
    count = reference.results.get("num_images") if reference.kind == "dataset" else reference.params.get("num_images")
    return count if isinstance(count, int) else None


def _has_moments(path: str) -> bool:
    return _has(path, "mu") and _has(path, "sigma")


def _has(path: str, name: str) -> bool:
    import zipfile

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise SidaError(f"{path} is no regular file", "Give another.")
        with zipfile.ZipFile(path) as archive:
            return f"{name}.npy" in archive.namelist()
    except OSError as error:
        raise SidaError(f"{path} cannot be read: {error.strerror or error}", "Check the path.") from error
    except zipfile.BadZipFile as error:
        raise SidaError(f"{path} is damaged or not an npz file", "Download it again.") from error
