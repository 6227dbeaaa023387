"""Statistics that others published, from their files."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sidactl import catalog
from sidactl.commands import features
from sidactl.commands.files import fetched_file
from sidactl.commands.identity import check_unchanged, source_identity
from sidactl.commands.question import Question
from sidactl.commands.words import part_of
from sidactl.errors import SidaError
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sidactl.detectors import Detector


Need = Literal["moments", "images"]
"""what a metric compares with: mean and covariance of features, or the features of single images"""

MIN_IMAGES_PER_FEATURE = 1.1
"""images per feature below which a Fréchet distance is warned of: the covariance has not its full rank"""

RANDOM_FEATURES = "random-features"

OF_TINY_DIGITS = ("tiny-digits", "tiny-digits-ssl")
"""the detectors that take grey images of 8x8 pixels alone"""

PUBLISHED_NAMES = {"inception": "fid", "dinov2": "fd_dinov2"}
"""what EDM2's reference files call the statistics by a detector"""


class Moments(NamedTuple):
    """Mean [F] and covariance [F, F] of features."""

    mean: "NDArray[np.float64]"
    covariance: "NDArray[np.float64]"


def imported_statistics(store: Store, source: str, entry: catalog.Reference | None, recheck: bool) -> Artifact:
    """Published statistics as a stats artifact: one `<detector>.npz` with mu and sigma for each detector."""
    if "://" not in source and not Path(source).is_file():
        raise SidaError(f"{source}: no such file", "Check the path.")
    identity = source_identity(store, source, recheck=recheck)
    refs, params = [entry.name] if entry else [], dict[str, Any](source=identity)
    question = Question(store=store, command="import-stats", params=params, refs=refs, recheck=recheck)
    if known := question.known():
        return known
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
        params = {
            "name": called,
            "source": source,
            "source_sha256": sha256,
            "licence": entry.licence if entry else None,
        }
        num, num_features = _num_images(contents or {}), max(len(moments.mean) for moments in found.values())
        if (
            num and num < MIN_IMAGES_PER_FEATURE * num_features
        ):  # alone, so that the oid of those that have enough stays as it was
            params["num_images"] = num
        check_unchanged(store, source, identity)
        artifact = store.put("stats", files, params=params)
        return question.record(artifact)


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
    for detector, name in PUBLISHED_NAMES.items():
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
    None. recheck: as in `resolve.resolve`.

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


def compared_with(
    store: Store, reference: Artifact, need: Need | None, detector: "Detector", watcher: object = None, *, recheck: bool
) -> Moments | features.Features | None:
    """What a metric of this need compares with: moments, features of real images, or nothing; see `moments`."""
    if need is None:
        return None
    if need == "moments":
        return moments(store, reference, detector, watcher, recheck=recheck)
    tick = part_of(watcher, reference_part(reference))
    return features.real_features(store, reference, detector, tick, recheck=recheck)


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
