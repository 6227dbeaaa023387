"""Scores of artifacts against a dataset, by trials over fresh seed ranges, kept as score artifacts."""

import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl import catalog
from sidactl.artifacts import (
    NETS,
    Tick,
    answered,
    asset_digest,
    load_dataset,
    load_net,
    mapping,
    require_images,
    resolve,
)
from sidactl.errors import SidaError
from sidactl.recipe import HeunSpec, OneStepSpec
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    import torch

    from sidactl.data import Dataset
    from sidactl.detectors import Detector
    from sidactl.diffusion import Preconditioned
    from sidactl.metrics import FeatureStats

SCORED = (*NETS, "samples", "dataset")
MAX_BATCH_SIZE, BATCH_VALUES = 1000, 1 << 20
"""images per batch: few enough that all their pixels are at most BATCH_VALUES values"""
SCORE_NAMES = {"tiny-digits": "FD tiny-digits", "inception": "FID", "dinov2": "FD-DINOv2"}
"""what a Fréchet distance is called by its detector; only Inception's is a FID"""

Images = Iterator["torch.Tensor"]
"""batches of uint8 images"""
Measure = Callable[["Detector", Artifact, Store], Callable[[Images], Mapping[str, float]]]
"""what a detector and a dataset make of images"""


@dataclass(frozen=True)
class Score:
    """One or more numbers about one artifact: by name, the value of every trial.

    `seeds`: [first, last + 1] of each trial, empty for a fixed set of images; `num`: images per trial.
    """

    values: Mapping[str, Sequence[float]]
    num: int
    seeds: Sequence[Sequence[int]]
    detector: str
    subject: str
    reference: str
    oid: str

    @property
    def value(self) -> float:
        """The mean over trials of the first number."""
        return statistics.fmean(next(iter(self.values.values())))

    def to_json(self) -> dict[str, Any]:
        """Every number as mean, standard deviation (null for one trial), minimum and values; and how it was made."""
        numbers = {
            name: {
                "value": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "minimum": min(values),
                "trials": list(values),
            }
            for name, values in self.values.items()
        }
        return {
            "scores": numbers,
            "num": self.num,
            "seeds": [list(pair) for pair in self.seeds],
            "detector": self.detector,
            "subject": self.subject,
            "reference": self.reference,
            "oid": self.oid,
        }


def fid(
    ref: str,
    *,
    reference: str | None = None,
    num: int | None = None,
    trials: int = 1,
    first_seed: int = 0,
    detector: str | None = None,
    run: Path | str | None = None,
    device: str | None = None,
    force: bool = False,
    tick: Tick | None = None,
) -> Score:
    """Fréchet distance of generated images to a dataset: called FID only with Inception's features.

    A generator or teacher is sampled anew in each trial (`num` images, default 50,000, from seed first_seed on, by its
    own sampler); samples are taken as they are. `reference` defaults to the dataset that the subject was made from.
    Source: Heusel et al. (1706.08500), eq. 6.
    """

    def measure(chosen: "Detector", data: Artifact, store: Store) -> Callable[[Images], Mapping[str, float]]:
        from sidactl import detectors

        real = reference_stats(store, data, chosen)
        return lambda images: {SCORE_NAMES[chosen.name]: frechet(detectors.stats_of(chosen, images), real)}

    return _score(
        "fid",
        measure,
        ref,
        reference,
        num,
        50_000,
        trials,
        first_seed,
        detector,
        run,
        device,
        force,
        tick,
    )


def prec_recall(
    ref: str,
    *,
    reference: str | None = None,
    num: int | None = None,
    trials: int = 1,
    first_seed: int = 0,
    detector: str | None = None,
    neighbours: int = 3,
    run: Path | str | None = None,
    device: str | None = None,
    force: bool = False,
    tick: Tick | None = None,
) -> Score:
    """Improved precision and recall, in this order; arguments as in `fid`, but 10,000 images by default.

    Source: Kynkäänniemi et al. (1904.06991), eqs. 1-3.
    """

    def measure(chosen: "Detector", data: Artifact, store: Store) -> Callable[[Images], Mapping[str, float]]:
        from sidactl import detectors, metrics

        real = detectors.features_of(chosen, dataset_images(load_dataset(store, data)))

        def measured(images: Images) -> Mapping[str, float]:
            precision, recall = metrics.precision_recall(real, detectors.features_of(chosen, images), neighbours)
            return {"precision": precision, "recall": recall}

        return measured

    return _score(
        f"prec-recall-{neighbours}",
        measure,
        ref,
        reference,
        num,
        10_000,
        trials,
        first_seed,
        detector,
        run,
        device,
        force,
        tick,
    )


def _score(
    command: str,
    measure: Measure,
    ref: str,
    reference: str | None,
    num: int | None,
    default_num: int,
    trials: int,
    first_seed: int,
    detector: str | None,
    run: Path | str | None,
    device: str | None,
    force: bool,
    tick: Tick | None,
) -> Score:
    if num is not None and num < 2:
        raise SidaError(f"sample count must be >= 2, got {num}", "Pass --num 2 or more.")
    if trials < 1:
        raise SidaError(f"the number of trials must be >= 1, got {trials}", "Pass --trials 1 or more.")
    store = Store.open(run)
    subject = resolve(store, ref, SCORED)
    data = resolve(store, reference, ["dataset"]) if reference else dataset_of(store, subject)
    require_images(subject)
    require_images(data)
    seeds: list[list[int]] = []
    if subject.kind in NETS:
        num = num or default_num
        seeds = [[first_seed + t * num, first_seed + (t + 1) * num] for t in range(trials)]
    else:
        num = _fixed_count(subject, num, trials)
    chosen = detector or detector_name(data)
    params: dict[str, Any] = {
        "num": num,
        "seeds": seeds,
        "detector": chosen,
        "weights": asset_digest(f"{chosen}-detector.safetensors"),
    }
    key = store.key(command, params, {"subject": subject.oid, "reference": data.oid})
    known = None if force else store.asked(key)
    if known is None:
        from sidactl import detectors
        from sidactl.engine import pick_device

        loaded = detectors.load(chosen, device=pick_device(device))
        images = _images_by_trial(store, subject, seeds, num, loaded, tick)
        results = [*map(measure(loaded, data, store), images)]
        values = {name: [result[name] for result in results] for name in results[0]}
        known = store.put(
            "score",
            {},
            inputs={"subject": subject.oid, "reference": data.oid},
            params={"command": command, "num": num, "seeds": seeds, "detector": loaded.identity},
            results={"values": values},
        )
        answered(store, key, known, command)
    return score_of(known)


def score_of(artifact: Artifact) -> Score:
    """The Score that a score artifact holds."""
    params, inputs = artifact.params, artifact.inputs
    assert isinstance(params["num"], int)
    assert isinstance(params["seeds"], list)
    values: Any = artifact.results["values"]
    seeds: Any = params["seeds"]
    return Score(
        values, params["num"], seeds, str(params["detector"]), inputs["subject"], inputs["reference"], artifact.oid
    )


def _fixed_count(subject: Artifact, num: int | None, trials: int) -> int:
    available = subject.results["num_images"]
    assert isinstance(available, int)
    what = "samples" if subject.kind == "samples" else "images of a dataset"
    if trials > 1:
        raise SidaError(
            f"trials need images drawn anew, got {trials} trials of fixed {what}",
            "Score the generator itself, or leave out --trials.",
        )
    if num is not None and num > available:
        raise SidaError(
            f"sample count must be <= {available}, the number of these {what}, got {num}",
            "Pass a smaller --num, or sample more.",
        )
    return num or available


def _images_by_trial(
    store: Store,
    subject: Artifact,
    seeds: Sequence[Sequence[int]],
    num: int,
    detector: "Detector",
    tick: Tick | None,
) -> Iterator[Images]:
    if subject.kind not in NETS:
        yield _ticking(dataset_images(load_dataset(store, subject), num), tick, 0, num)
        return
    net, sampler = load_net(store, subject, detector.device), sampler_of(subject)
    for trial, (start, stop) in enumerate(seeds):
        images = generated_images(net, sampler, range(start, stop), detector.device)
        yield _ticking(images, tick, trial * num, len(seeds) * num)


def _ticking(images: Images, tick: Tick | None, done: int, total: int) -> Images:
    if tick:
        tick(done, total)
    for batch in images:
        yield batch
        done += len(batch)
        if tick:
            tick(done, total)


def generated_images(
    net: "Preconditioned", sampler: OneStepSpec | HeunSpec, seeds: Sequence[int], device: "torch.device"
) -> Images:
    """Batches of uint8 images for these seeds, computed as they are read."""
    from sidactl import sampling

    size = images_per_batch(net.spec.img_channels, net.spec.img_resolution)
    for batch in sampling.generate(net, seeds, sampler, device=device, batch_size=size):
        yield batch.images


def dataset_images(dataset: "Dataset", count: int | None = None) -> Images:
    """Batches of the first `count` images (all by default), in order."""
    stop = dataset.num_images if count is None else count
    size = images_per_batch(dataset.num_channels, dataset.resolution)
    for start in range(0, stop, size):
        yield dataset.images(range(start, min(start + size, stop)))


def images_per_batch(num_channels: int, resolution: int) -> int:
    """How many images of this size are held at once."""
    return max(1, min(MAX_BATCH_SIZE, BATCH_VALUES // (num_channels * resolution**2)))


def dataset_of(store: Store, subject: Artifact) -> Artifact:
    """The dataset that an artifact descends from."""
    if subject.kind == "dataset":
        return subject
    if "dataset" in subject.inputs:
        return store.get(subject.inputs["dataset"])
    if "net" in subject.inputs:
        return dataset_of(store, store.get(subject.inputs["net"]))
    return resolve(store, str(subject.params["dataset"]), ["dataset"])


def detector_name(data: Artifact) -> str:
    """The detector that a dataset is scored with unless another is asked for."""
    entry = catalog.DATASETS.get(str(data.params["name"]))
    is_tiny = data.results["resolution"] == 8 and data.results["num_channels"] == 1
    return entry.detector if entry else "tiny-digits" if is_tiny else "inception"


def sampler_of(subject: Artifact) -> OneStepSpec | HeunSpec:
    """The sampler that a teacher or generator artifact names as its own."""
    settings = mapping(subject.params["sampler"])
    return HeunSpec.from_json(settings) if "S_churn" in settings else OneStepSpec.from_json(settings)


def reference_stats(store: Store, data: Artifact, detector: "Detector") -> "FeatureStats":
    """Feature statistics of all images of a dataset; computed once, then kept as a stats artifact."""
    import numpy as np

    from sidactl import detectors
    from sidactl.metrics import FeatureStats

    key = store.key("stats", {"detector": detector.identity}, {"dataset": data.oid})
    known = store.asked(key)
    if known is None:
        stats = detectors.stats_of(detector, dataset_images(load_dataset(store, data)))
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **stats.arrays())
        params = {"detector": detector.identity}
        known = store.put("stats", {"stats.npz": buffer.getvalue()}, inputs={"dataset": data.oid}, params=params)
        answered(store, key, known, "stats")
    with np.load(io.BytesIO(store.read(known, "stats.npz")), allow_pickle=False) as arrays:
        return FeatureStats.from_arrays(dict(arrays))


def frechet(generated: "FeatureStats", reference: "FeatureStats") -> float:
    """Fréchet distance of two sets of features by their moments, covariances over N - 1."""
    from sidactl import metrics

    return metrics.frechet_distance(generated.mean, generated.covariance(), reference.mean, reference.covariance())
