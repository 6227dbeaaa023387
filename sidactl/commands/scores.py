"""What a score is: metrics, their options and defaults, names of numbers, the score and its JSON."""

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypedDict

from sidactl.commands import reference as commands_reference
from sidactl.commands.features import Features
from sidactl.commands.inputs import Count, Ref, count_of, optional_ref, run_of, whole
from sidactl.commands.moments import Moments, Need
from sidactl.commands.words import NETS, OnCount, RunDir
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import SamplingForm
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    from sidactl.detectors import Detector
    from sidactl.metrics import FeatureStats


SCORED = (*NETS, "samples", "dataset")

SCORE_NAMES = {
    "tiny-digits": "FD tiny-digits",
    "random-features": "random-features FD",
    "inception": "FID",
    "dinov2": "FD-DINOv2",
}
"""what a Fréchet distance is called by its detector, with the published weights where it has some"""

Convention = Literal["edm", "sid", "guided-diffusion"]

CONVENTIONS: tuple[Convention, ...] = ("edm", "sid", "guided-diffusion")

HEUN_FIELDS = ("sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise")

Labels = Literal["uniform", "dataset"]

LABELS: tuple[Labels, ...] = ("uniform", "dataset")


@dataclass(frozen=True)
class Metric:
    """A number or two about images: by which detector (None = the reference's own), and what it compares with.

    has_order: whether it takes images in parts, so that their order counts. needs_held_out: real images apart from
    those that were trained on, as `held_out`.
    """

    detector: str | None = None
    need: Need | None = "moments"
    has_order: bool = False
    needs_held_out: bool = False
    has_teacher: bool = False
    """whether it compares with what the teacher draws, by no detector"""


METRICS: Mapping[str, Metric] = {
    "fid": Metric(),
    "fd-dinov2": Metric(detector="dinov2"),
    "prec-recall": Metric(need="images"),
    "kid": Metric(need="images", has_order=True),
    "inception-score": Metric(need=None, has_order=True),
    "mind": Metric(need="images", has_order=True),
    "coverage": Metric(need="images"),
    "vendi": Metric(need=None),
    "fdr": Metric(needs_held_out=True),
    "memorisation": Metric(need="images", has_order=True, needs_held_out=True),
    "pairs": Metric(need=None, has_teacher=True),
}


def metric_of(key: str) -> Metric:
    """The metric behind a key such as "fid", or "fid@1" under the first further detector."""
    return METRICS[key.partition("@")[0]]


COMMANDS = ("fid", "fd-dinov2", "prec-recall", "kid", "inception-score")
"""metrics with a command of their own; the others are asked of `evaluate`"""

DEFAULTS: Mapping[str, Any] = {
    "num": None,
    "trials": 1,
    "first_seed": 0,
    "subset_seed": None,
    "labels": "uniform",
    "steps": None,
    "sampler": None,
    "detector": None,
    "detectors": None,
    "held_out": None,
    "vae": None,
    "resize": "torch",
    "convention": "edm",
    "neighbours": 3,
    "num_splits": 10,
}
"""of the options of scores that shape the number; a command that goes on repeats those that are not as here"""


class ScoreOptions(TypedDict, total=False):
    """What every scoring function takes, by name.

    reference: a dataset or statistics by oid, name, file or URL; by default the published statistics of the dataset
        that the subject was made from, or that dataset.
    num, trials, first_seed: images per trial (50,000; "10k" does), trials, and the first one's first seed; the
        next go on from it.
    subset_seed: what draws `num` images of samples, a folder or a dataset that hold more; 0 by default.
    labels: classes drawn uniformly for each seed, as EDM does, or by their share of the dataset, as SiD does.
    steps, sampler, heun: how a generator or teacher is sampled where it is not by its own sampler, as in `sample`.
    vae: what decodes the latents of a generator or teacher, as in `sample`.
    setting: of the arithmetic of a generator or teacher, float32 by default; that of detectors is always float32.
    detectors: several of them, a list or a text with commas, for one pass over the images; the first one is the main
        one, of whose numbers some do not bear its name.
    held_out: real images that were not trained on, for fdr and memorisation, whose AuthPct is far above 50 for fresh
        images, too, in many dimensions: see `metrics.authenticity`.
    detector: inception, dinov2, efficientnet-lite0, tiny-digits, tiny-digits-ssl, random-features (built in, for any
        images), timm:NAME, or a file: Inception in TorchScript, or a state dict of Inception's.
    trust_code: run a TorchScript detector that is not the published one: a program, which can do all that you can.
    resize: of dinov2: torch, as in the published statistics, or pil.
    convention: whose arithmetic: edm (N - 1 in covariances, float32 distances), sid (N for generated images, float16
        distances, generated images in the order of their seeds) or guided-diffusion (its precision and recall).
    neighbours: k of precision and recall. num_splits: parts of the inception score. Which image is in which part, and
        in which of KID's subsets, depends on the images alone, not on their order or names.
    force: measure again, reading every source again and deriving again what is damaged.
    say: takes a line for people, such as that an answer is an old one; None = nobody.
    tick: called with images done and in all.
    """

    reference: Ref | None
    num: Count | None
    trials: SupportsIndex
    first_seed: SupportsIndex
    subset_seed: SupportsIndex | None
    labels: str
    steps: SupportsIndex | None
    sampler: str | None
    heun: Mapping[str, float] | None
    vae: Ref | None
    setting: SamplingForm
    detector: str | os.PathLike[str] | None
    detectors: Sequence[str] | str | None
    held_out: Ref | None
    trust_code: bool
    resize: str
    convention: str
    neighbours: SupportsIndex
    num_splits: SupportsIndex
    run: RunDir
    device: str | None
    force: bool
    say: download.OnLine | None
    tick: OnCount | None


@dataclass(frozen=True)
class Score:
    """Numbers about one artifact: by name, the value of every trial, and how they were made.

    `seeds`: [first, last + 1] of each trial, empty for a fixed set of images; `num`: images per trial; `detectors` and
    `references`: by the number's name, the detector's identity and the reference's oid. `oid` is empty where the run
    directory does not take the score, which `unkept` explains where that came unexpectedly.
    """

    values: Mapping[str, Sequence[float]]
    num: int
    seeds: Sequence[Sequence[int]]
    detectors: Mapping[str, str]
    references: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    warnings: Sequence[str]
    subject: str
    oid: str
    unkept: str | None = None
    seen: Sequence[str] = ()
    """the numbers by detectors that trained, chose or stopped the subject: by those it may flatter itself"""

    @property
    def value(self) -> float:
        """The mean over trials of the one number; also `float(score)`. Raises SidaError where there are several."""
        if len(self.values) > 1:
            raise SidaError(
                f"a score of several numbers has no one value: {', '.join(self.values)}", "Read score.values."
            )
        return statistics.fmean(next(iter(self.values.values())))

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def to_json(self) -> dict[str, Any]:
        """Every number as mean, standard deviation (null for one trial), minimum and values; and how it was made."""
        numbers = {
            name: {
                "name": name,
                "value": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "minimum": min(values),
                "trials": list(values),
                "detector": self.detectors[name],
                "blind": name not in self.seen,
                "reference": self.references.get(name),
            }
            for name, values in self.values.items()
        }
        return {
            "scores": numbers,
            "num": self.num,
            "seeds": [list(pair) for pair in self.seeds],
            "subject": self.subject,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "warnings": list(self.warnings),
            "oid": self.oid or None,
        }


def against(score: Score, run: RunDir = None) -> Mapping[str, str]:
    """What the numbers of a score compare with, by name, as far as the run directory knows."""
    store, described = Store.open(run), dict[str, str]()
    for name, oid in score.references.items():
        with suppress(SidaError):
            described[name] = commands_reference.described(store, store.get(oid))
    return described


def score_name(detector: str, metric: str = "fid") -> str:
    """What a run's score by this detector is called: by a name, or by the file that holds it; see `numbers`."""
    if metric != "fid":
        return metric.upper() + ("" if detector == "inception" else f" {Path(detector).name}")
    return SCORE_NAMES.get(detector, f"FD {Path(detector).name}")


_COPIES = -1000.0
"""FLD's gap below which images are copies, and how far below says nothing more: exact ones reach -1e15"""


def told(number: str, value: float, std: float | None = None) -> str:
    """A number for people, with its spread; a gap of copies in words. JSON has it as it is."""
    if number.startswith("FLD") and value < _COPIES:
        return f"below {_COPIES:.0f} (copies)"
    return f"{value:.4g}" + ("" if std is None else f" +- {std:.2g}")


def plain_options(ref: Ref, options: ScoreOptions) -> Mapping[str, Any]:
    """The options as text and ints, whatever they came as."""
    plain: dict[str, Any] = {**DEFAULTS, **options, "run": run_of(ref, options.get("run"))}
    if unknown := sorted(set(plain) - set(ScoreOptions.__annotations__)):
        raise SidaError(f"unknown option {unknown[0]!r}", f"There are {', '.join(ScoreOptions.__annotations__)}.")
    for name in ("reference", "detector", "vae", "held_out"):
        plain[name] = optional_ref(plain.get(name), f"the {name.replace('_', '-')}")
    if isinstance(several := plain.get("detectors"), str):
        several = [name.strip() for name in several.split(",")]
    plain["detectors"] = [str(optional_ref(name, "the detector")) for name in several or ()] or None
    if plain["detectors"] and plain.get("detector"):
        raise SidaError("one detector or several, got both", "Leave out --detector.")
    if len(set(plain["detectors"] or ())) < len(plain["detectors"] or ()):
        raise SidaError(f"detectors must differ, got {', '.join(plain['detectors'])}", "Name each once.")
    if plain.get("num") is not None:
        plain["num"] = count_of(plain["num"], "num")
    for name in ("steps", "trials", "first_seed", "subset_seed", "neighbours", "num_splits"):
        if plain.get(name) is not None:
            plain[name] = whole(plain[name], name)
    return plain


def detector_label(detector: "Detector") -> str:
    """What a detector is called: by its name where nothing else bears it, by its weights otherwise."""
    is_known = detector.is_published or detector.name not in ("inception", "dinov2")
    return detector.name if is_known else detector.short_identity


def name_of(metric: str, detector: "Detector") -> str:
    """What a run's score by this detector is called: FID and FD-DINOv2 with the published weights alone."""
    return score_name(detector_label(detector), metric)


def numbers(
    metric: str,
    detector: "Detector",
    stats: "FeatureStats",
    kept: "Features | None",
    against: "Moments | Features | None",
    held_out: "Features | None",
    settings: Mapping[str, Any],
) -> Mapping[str, float]:
    """What a metric says of images, by name: from the moments of their features, or the features themselves.

    metric: a key as `metric_of` takes it; under a further detector every number bears its name.

    settings: convention, order, neighbours and num_splits, as far as the metric has them.
    """
    from sidactl import metrics as metrics_module

    label = detector_label(detector)
    suffix = "" if label == "inception" else f" {label}"
    convention = settings["convention"]
    kind, by = metric.partition("@")[0], f" {label}" if "@" in metric else ""
    if isinstance(against, Moments):
        covariance = stats.covariance(ddof=0 if convention == "sid" else 1)
        distance = metrics_module.frechet_distance(stats.mean, covariance, *against)
        if kind != "fdr":
            return {name_of("fid", detector): distance}
        assert held_out
        others = metrics_module.FeatureStats()
        others.add(held_out.rows)
        held_out_distance = metrics_module.frechet_distance(others.mean, others.covariance(), *against)
        return {f"FDr {label}": metrics_module.frechet_ratio([(distance, held_out_distance)])}
    assert kept
    is_by_content = "order" in settings
    ours = kept.by_content() if is_by_content else kept.rows
    if kind == "vendi":
        return {f"Vendi{suffix}": metrics_module.vendi(ours)}
    if against is None:
        score, _ = metrics_module.inception_score(detector.logits(ours), settings["num_splits"])
        return {f"IS{suffix}": score}
    theirs = against.by_content() if is_by_content else against.rows
    if kind == "mind":
        return {f"MIND{suffix}": metrics_module.mind(theirs, ours, seed=0)}
    if kind == "memorisation":
        assert held_out
        gap = metrics_module.generalisation_gap(theirs, held_out.rows, ours, seed=0)
        return {f"AuthPct{by}": metrics_module.authenticity(theirs, ours), f"FLD gap{by}": gap}
    if kind == "kid":
        distance, _ = metrics_module.kernel_distance(
            theirs, ours, subset_size=min(1000, len(theirs), len(ours)), seed=0
        )
        return {f"KID{suffix}": distance}
    real, generated = theirs.to(detector.device), ours.to(detector.device)
    k = settings["neighbours"]
    if kind == "coverage":
        density, coverage = metrics_module.density_coverage(real, generated)
        return {f"density{by}": density, f"coverage{by}": coverage}
    if convention == "guided-diffusion":
        precision, recall = metrics_module.guided_diffusion_precision_recall(real, generated, k)
    else:
        dtype: Literal["float16", "float32"] = "float16" if convention == "sid" else "float32"
        precision, recall = metrics_module.precision_recall(real, generated, k, precision=dtype)
    return {f"precision{by}": precision, f"recall{by}": recall}


def score_of(artifact: Artifact) -> Score:
    """The Score that a score artifact holds."""
    params: Mapping[str, Any] = artifact.params
    results: Mapping[str, Any] = artifact.results
    return Score(
        values=results["values"],
        num=params["num"],
        seeds=params["seeds"],
        detectors=params["detectors"],
        references={name.removeprefix("reference "): oid for name, oid in artifact.inputs.items() if name != "subject"},
        settings=params["settings"],
        versions=results["versions"],
        warnings=results["warnings"],
        subject=artifact.inputs["subject"],
        oid=artifact.oid,
        seen=results.get("seen", ()),
    )


def fixed_count(subject: Artifact, num: int | None, trials: int, setting: SamplingForm) -> int:
    available = subject.results["num_images"]
    what = "samples" if subject.kind == "samples" else "images of a dataset"
    if trials > 1:
        raise SidaError(
            f"trials need images drawn anew, got {trials} trials of fixed {what}",
            "Score the generator itself, or leave out --trials.",
        )
    if setting != SamplingForm():
        raise SidaError(
            f"precision and form are those of a net that draws images, got {setting.name} and fixed {what}",
            "Score the generator itself, or leave out --precision, --channels-last and --compile.",
        )
    if num is not None and num > available:
        raise SidaError(
            f"sample count must be <= {available}, the number of these {what}, got {num}",
            "Pass a smaller --num, or sample more.",
        )
    return num or available


def subset_of(subject: Artifact, num: int, seed: int | None) -> dict[str, int]:
    """The settings of a drawn subset; none where all images are scored."""
    available = subject.results["num_images"]
    if seed is not None and not 0 <= seed < 1 << 31:
        raise SidaError(f"the subset seed must be from 0 to {(1 << 31) - 1}, got {seed}", "Pass --subset-seed 0.")
    if num < available:
        return {"subset_seed": seed or 0, "subset_of": available}
    if seed is not None:
        raise SidaError(
            f"a subset must have fewer than all {available} images, got a seed for one of {num}",
            "Pass a smaller --num, or leave out --subset-seed.",
        )
    return {}
