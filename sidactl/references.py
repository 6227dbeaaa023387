"""What images are scored against: datasets and their statistics, and the statistics that others published."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sidactl import catalog, features
from sidactl.artifacts import (
    NETS,
    answered,
    check_unchanged,
    dataset_called,
    fetched_file,
    is_ref,
    mapping,
    means_path,
    named,
    part_of,
    prepare_data,
    repaired,
    resolve,
    source_identity,
)
from sidactl.errors import MissingError, SidaError
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sidactl.detectors import Detector

Need = Literal["moments", "images"]
"""what a metric compares with: mean and covariance of features, or the features of single images"""
ENOUGH = 1.1
"""images per feature below which a Fréchet distance is warned of: the covariance has not its full rank"""
RANDOM_FEATURES = "random-features"
_PUBLISHED_NAMES = {"inception": "fid", "dinov2": "fd_dinov2"}
"""what EDM2's reference files call the statistics by a detector"""


class Moments(NamedTuple):
    """Mean [F] and covariance [F, F] of features."""

    mean: "NDArray[np.float64]"
    covariance: "NDArray[np.float64]"


def find(store: Store, text: str | None, subject: Artifact, need: Need, *, recheck: bool = False) -> Artifact:
    """The dataset or stats artifact to score `subject` against.

    text: a dataset or stats artifact, a catalog name, a URL or a file; None = that of the subject's own dataset. A name
    of published statistics, also as `stats/NAME`, means them; `dataset/NAME` means the images. recheck: as in
    `artifacts.resolve`. Raises SidaError for what has no images where those are needed.
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
            return _imported(store, text, None, recheck)
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
    entry = published_for(name, mapping(net.params["net"]).get("architecture") if net.kind in NETS else None)
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
        architecture = mapping(teacher.params["net"]).get("architecture")
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
        key = store.key("fetch-reference", {"source": entry.source.url}, {})
        if known := store.asked(key, whole=recheck):
            return known
        with fetched_file(store, entry.source.url, entry.name, entry) as (path, _):
            artifact = prepare_data(str(path), name=entry.name, run=store.root, recheck=recheck, say=None)
        return answered(store, key, artifact, "fetch-reference")
    if need == "images":
        try:
            return _checked(store, pixels_of(store, dataset_called(store, entry.dataset)), recheck, need)
        except MissingError as error:
            if "--latents" not in (error.hint or ""):
                raise
            raise MissingError(error.message, _WITH_IMAGES) from error  # latents would be of no use here
    return _imported(store, entry.source.url, entry, recheck)


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


def _imported(store: Store, source: str, entry: catalog.Reference | None, recheck: bool) -> Artifact:
    """Published statistics as a stats artifact: one `<detector>.npz` with mu and sigma for each detector."""
    if "://" not in source and not Path(source).is_file():
        raise SidaError(f"{source}: no such file", "Check the path.")
    identity = source_identity(store, source, recheck=recheck)
    key, refs = store.key("import-stats", {"source": identity}, {}), [entry.name] if entry else []
    if known := store.asked(key, whole=recheck):
        return named(store, known, refs)
    import numpy as np

    from sidactl.foreign import pickles

    with fetched_file(store, source, f"statistics {entry.name}" if entry else source, entry) as (path, sha256):
        contents = pickles.read(path) if path.suffix.lower() == ".pkl" else None
        found = {"inception": _read_npz(path)} if contents is None else _read_pickle(path, contents)
        files: dict[str, Path | bytes] = {}
        for name, moments in found.items():
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, mu=moments.mean, sigma=moments.covariance)
            files[f"{name}.npz"] = buffer.getvalue()
        called = entry.name if entry else Path(source.partition("?")[0]).name
        params: dict[str, Any] = {
            "name": called,
            "source": source,
            "source_sha256": sha256,
            "licence": entry.licence if entry else None,
        }
        num, num_features = _num_images(contents or {}), max(len(moments.mean) for moments in found.values())
        if num and num < ENOUGH * num_features:  # alone, so that the oid of those that have enough stays as it was
            params["num_images"] = num
        check_unchanged(store, source, identity)
        artifact = store.put("stats", files, params=params)
        return answered(store, key, artifact, "import-stats", refs=refs)


def _read_npz(path: Path) -> Moments:
    import zipfile
    import zlib

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in ("mu", "sigma") if name not in arrays]
            if missing:
                raise SidaError(
                    f"{path} must hold arrays mu and sigma, {' and '.join(missing)} missing",
                    "Give the statistics that EDM or guided-diffusion published, or a dataset.",
                )
            return _moments(arrays["mu"], arrays["sigma"], str(path))
    except (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise SidaError(
                f"mu and sigma in {path} must hold real numbers, got Python objects", "Save them as plain arrays."
            ) from error
        raise SidaError(f"{path} is damaged or not an npz file", "Download it again.") from error


def _num_images(contents: Mapping[str, Any]) -> int | None:
    """How many images a reference file's statistics are of, where it says so."""
    count = contents.get("num_images")
    return count if isinstance(count, int) and count > 0 else None


def _read_pickle(path: Path, contents: Mapping[str, Any]) -> dict[str, Moments]:
    found = {}
    for detector, name in _PUBLISHED_NAMES.items():
        part = contents.get(name)
        if isinstance(part, dict) and {"mu", "sigma"} <= set(part):
            found[detector] = _moments(part["mu"], part["sigma"], f"{name} in {path}")
    if not found:
        raise SidaError(
            f"{path} must hold fid or fd_dinov2 with mu and sigma, got {', '.join(sorted(contents)) or 'nothing'}",
            "Give a reference file that EDM2 published.",
        )
    return found


def _moments(mu: Any, sigma: Any, where: str) -> Moments:
    """Checked so far that a distance to them means something. Raises SidaError naming `where`."""
    import numpy as np

    from sidactl import metrics

    mean, covariance = (metrics.real_array(v, f"{name} in {where}") for name, v in (("mu", mu), ("sigma", sigma)))
    if not mean.size or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        got = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise SidaError(f"mu and sigma in {where} must be [F] and [F, F], got {got}", "Download the file again.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise SidaError(f"mu and sigma in {where} must be finite", "Download the file again.")
    if (largest := max(np.abs(mean).max(), np.abs(covariance).max())) > metrics.LARGEST:
        raise SidaError(
            f"mu and sigma in {where} must be at most {metrics.LARGEST:g}, got {largest:.3g}", metrics.NOT_STATISTICS
        )
    metrics.check_symmetric(covariance, f"sigma in {where}")
    metrics.check_positive(covariance, f"sigma in {where}")
    return Moments(mean, covariance)


def moments(
    store: Store, reference: Artifact, detector: "Detector", watcher: object = None, *, recheck: bool = False
) -> Moments | None:
    """Mean and covariance of the reference's features by this detector; computed with `part_of(watcher)` where need be.

    All processes ask together; where the run directory takes nothing the first alone has those of a dataset, the others
    None. recheck: as in `artifacts.resolve`.

    Raises SidaError where statistics were made by another detector, by other weights, or with another resize.
    """
    if reference.kind == "dataset":
        stats, kept = features.stats_of(
            store, reference, detector, part_of(watcher, reference_part(reference)), recheck=recheck
        )
        return Moments(stats.mean, stats.covariance()) if kept or stats.num_items else None
    if "detector" in reference.params:
        if (made_by := str(reference.params["detector"])) != detector.identity:
            way, name = "the detector file that made them", detector_name(reference)
            if name != detector.name:
                way = f"--detector {name}"
            elif ("-pil" in made_by) != ("-pil" in detector.identity):
                way = f"--resize {'pil' if '-pil' in made_by else 'torch'}"
            raise SidaError(
                f"statistics compare under one detector alone, these are by {made_by}, "
                f"the images are measured by {detector.identity}",
                f"Score with {way}, or against the dataset itself.",
            )
        stats = features.read_stats(store, reference)
        return Moments(stats.mean, stats.covariance())
    file = f"{detector.name}.npz"
    if file not in reference.files:
        held = ", ".join(sorted(name.removesuffix(".npz") for name in reference.files))
        raise SidaError(
            f"{reference.params['name']} holds statistics by {held}, not by {detector.name}",
            "Pass another --ref, or --detector.",
        )
    if "-pil" in detector.identity:
        raise SidaError(
            "published statistics by dinov2 hold for --resize torch, got pil", "Score against the dataset itself."
        )
    import numpy as np

    with np.load(io.BytesIO(store.read(reference, file)), allow_pickle=False) as held:
        published = dict(held)
    if len(published["mu"]) != detector.num_features:
        raise SidaError(
            f"{reference.params['name']} holds {len(published['mu'])} features, {detector.name} gives "
            f"{detector.num_features}",
            "Pass another --ref, or --detector.",
        )
    return Moments(published["mu"], published["sigma"])


def reference_part(data: Artifact) -> str:
    """What the work on a reference's images is called where its progress is shown."""
    return f"features of {data.params.get('name') or data.oid[:12]}"


def is_detector_file(detector: str) -> bool:
    """Whether a detector is a file's path, and not a name of the catalog."""
    return Path(detector).suffix.lower() in (".pt", ".pth", ".safetensors")


def is_torchscript(detector: str) -> bool:
    """Whether it is a program, which is run by the rules of `catalog.digest_of_code` alone."""
    return Path(detector).suffix.lower() == ".pt"


def training_detector(reference: Artifact) -> str:
    """The detector that a run is scored with unless another is asked for: for a dataset of one's own one built in.

    Such a score chooses the best generator of one run, no more, so that it need not be one that papers print.
    """
    if reference.kind == "dataset" and (entry := _entry_of(reference)):
        return entry.detector
    name = detector_name(reference)
    return RANDOM_FEATURES if reference.kind == "dataset" and name == "inception" else name


def _entry_of(dataset: Artifact) -> catalog.Dataset | None:
    """The catalog's entry of a dataset, by its name or by the preset that made it."""
    known = (catalog.DATASETS.get(str(dataset.params.get(key))) for key in ("name", "preset"))
    return next(filter(None, known), None)


def detector_name(reference: Artifact) -> str:
    """The detector that goes with a reference unless another is asked for."""
    if reference.kind == "stats":
        if "detector" in reference.params:
            return str(reference.params["detector"]).partition("@")[0].removesuffix("-torchscript")
        return "inception" if "inception.npz" in reference.files else "dinov2"
    entry = catalog.DATASETS.get(str(reference.params["name"]))
    is_tiny = [reference.results.get(n) for n in ("resolution", "width", "num_channels")] == [8, None, 1]
    return entry.detector if entry else "tiny-digits" if is_tiny else "inception"
