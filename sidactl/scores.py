"""Scores of images against a reference, by trials over fresh seed ranges, kept as score artifacts."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypedDict, Unpack

from sidactl import __version__, catalog, features, references
from sidactl.artifacts import (
    NETS,
    RunDir,
    Tick,
    agreed_answer,
    answered,
    answering,
    changed,
    check_unchanged,
    check_vae_is_there,
    fetch_detector,
    file_digest,
    first_alone,
    is_of_latents,
    load_dataset,
    load_net,
    mapping,
    other_vae,
    part_of,
    read_state_dict,
    require_images,
    resolve,
    source_identity,
    tell_old,
    vae_digest,
    vae_for,
    vae_loader,
)
from sidactl.errors import EXIT_FAILED, MissingError, SidaError
from sidactl.foreign import download
from sidactl.inputs import Count, Ref, count_of, optional_ref, ref_text, run_of, seeds_of, whole
from sidactl.live import Question, option_words
from sidactl.recipes import HeunSpec, OneStepSpec, Setting, flag_of
from sidactl.references import ENOUGH, RANDOM_FEATURES, Moments, Need, detector_name
from sidactl.store import Artifact, LiveDir, Store, UnwritableError, sealed, unsealed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from sidactl.data.dataset import Dataset
    from sidactl.detectors import Detector, Resize
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

    has_order: whether it takes images in parts, so that their order counts.
    """

    detector: str | None = None
    need: Need | None = "moments"
    has_order: bool = False


METRICS: Mapping[str, Metric] = {
    "fid": Metric(),
    "fd-dinov2": Metric(detector="dinov2"),
    "prec-recall": Metric(need="images"),
    "kid": Metric(need="images", has_order=True),
    "inception-score": Metric(need=None, has_order=True),
}


DEFAULTS: Mapping[str, Any] = {
    "num": None,
    "trials": 1,
    "first_seed": 0,
    "subset_seed": None,
    "labels": "uniform",
    "steps": None,
    "sampler": None,
    "detector": None,
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
    detector: inception, dinov2, tiny-digits, random-features (built in, for any images), or a file: Inception in
        TorchScript, or a state dict of Inception's.
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
    setting: Setting
    detector: str | os.PathLike[str] | None
    trust_code: bool
    resize: str
    convention: str
    neighbours: SupportsIndex
    num_splits: SupportsIndex
    run: RunDir
    device: str | None
    force: bool
    say: download.Say | None
    tick: Tick | None


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


def fid(ref: Ref, **options: Unpack[ScoreOptions]) -> Score:
    """Fréchet distance of images to a reference: called FID only with Inception's features.

    A generator or teacher is sampled anew in each trial by its own sampler; samples, folders, zips and npz files are
    taken as they are. Source: Heusel et al. (1706.08500), eq. 6.
    """
    return evaluate(ref, ["fid"], **options)


def fd_dinov2(ref: Ref, **options: Unpack[ScoreOptions]) -> Score:
    """Fréchet distance of DINOv2's features. Source: Stein et al. (2306.04675), as EDM2 (2312.02696) computes it."""
    return evaluate(ref, ["fd-dinov2"], **options)


def prec_recall(ref: Ref, **options: Unpack[ScoreOptions]) -> Score:
    """Improved precision and recall, in this order. Source: Kynkäänniemi et al. (1904.06991), eqs. 1-3."""
    return evaluate(ref, ["prec-recall"], **options)


def inception_score(ref: Ref, **options: Unpack[ScoreOptions]) -> Score:
    """Inception score, the mean over parts of the images. Source: Salimans et al. (1606.03498), section 4."""
    return evaluate(ref, ["inception-score"], **options)


def evaluate(ref: Ref, metrics: Sequence[str] | None = None, **options: Unpack[ScoreOptions]) -> Score:
    """Several metrics in one pass over the images; all that apply to the reference if none is named.

    Source: those of `fid`, `prec_recall` and `inception_score`; KID is Bińkowski et al. (1801.01401), section 4.
    """
    plain = _plain_options(ref, options)
    with first_alone():  # it downloads what the others find then
        asked = _Question.parse(ref_text(ref), metrics, plain)
    if known := None if asked.force else agreed_answer(asked.store, asked.key):
        tell_old(asked.store, asked.key, asked.say)
        return score_of(known)
    from sidactl.engine import ranks

    with answering(asked.store, asked.key, asked.question(ref_text(ref), plain), force=asked.force) as place:
        if isinstance(place, Artifact):  # by a process that this one waited for
            return score_of(place)
        problem = _why_unkept(asked) if place is None else None
        measured = _measure(asked, place)
        told = json.loads(ranks.agreed(lambda: json.dumps(_keep(asked, measured, problem))))
    return Score(**told)


def _why_unkept(asked: "_Question") -> str | None:
    """Why the run directory takes no score, said once, by the first of several processes."""
    from sidactl.engine import ranks

    try:
        if ranks.rank_and_size()[0] == 0:
            asked.store.check_writable()
    except UnwritableError as error:
        if asked.say:
            asked.say(f"warning: {error.message}: the score will be told, but not kept")
        return error.message
    return None


def against(score: Score, run: RunDir = None) -> Mapping[str, str]:
    """What the numbers of a score compare with, by name, as far as the run directory knows."""
    store, told = Store.open(run), dict[str, str]()
    for name, oid in score.references.items():
        with suppress(SidaError):
            told[name] = references.described(store, store.get(oid))
    return told


def score_name(detector: str) -> str:
    """What a Fréchet distance by this detector is called: by a name, or by the file that holds it."""
    return SCORE_NAMES.get(detector, f"FD {Path(detector).name}")


def is_answered(ref: str, metrics: Sequence[str], options: ScoreOptions) -> bool:
    """Whether `evaluate` would have its answer from the run directory."""
    question = _Question.parse(ref, metrics, _plain_options(ref, options))
    return question.store.asked(question.key) is not None


def _plain_options(ref: Ref, options: ScoreOptions) -> Mapping[str, Any]:
    """The options as text and ints, whatever they came as."""
    plain: dict[str, Any] = {**DEFAULTS, **options, "run": run_of(ref, options.get("run"))}
    if unknown := sorted(set(plain) - set(ScoreOptions.__annotations__)):
        raise SidaError(f"unknown option {unknown[0]!r}", f"There are {', '.join(ScoreOptions.__annotations__)}.")
    for name in ("reference", "detector", "vae"):
        plain[name] = optional_ref(plain.get(name), f"the {name}")
    if plain.get("num") is not None:
        plain["num"] = count_of(plain["num"], "num")
    for name in ("steps", "trials", "first_seed", "subset_seed", "neighbours", "num_splits"):
        if plain.get(name) is not None:
            plain[name] = whole(plain[name], name)
    return plain


@dataclass(frozen=True)
class _Question:
    """All that shapes a score, with every word resolved and checked."""

    store: Store
    subject: Artifact
    metrics: Sequence[str]
    detectors: Mapping[str, str]
    """by metric"""
    weights: Mapping[str, Any]
    """by detector, what stands for its weights in the question"""
    references: Mapping[str, Artifact]
    """by metric"""
    num: int
    seeds: Sequence[Sequence[int]]
    settings: Mapping[str, Any]
    setting: Setting
    vae: Artifact | None
    """what decodes latents; None = the usual one, or there are none"""
    key: str
    device: str | None
    trust_code: bool
    force: bool
    say: download.Say | None
    tick: Tick | None

    def question(self, ref: str, options: Mapping[str, Any]) -> Question:
        """What `ls --live` shows, and the command that goes on."""
        command = self.metrics[0] if len(self.metrics) == 1 else "evaluate"
        given = {name: options[name] for name, default in DEFAULTS.items() if options[name] != default}
        words = option_words({"ref": options.get("reference"), "trust_code": self.trust_code, **given})
        words += option_words(self.setting.of_images()) + option_words(dict(options.get("heun") or {}))
        params = {"num": self.num, "seeds": self.seeds, "metrics": self.metrics, **self.settings}
        inputs = {"subject": self.subject.oid, **{name: artifact.oid for name, artifact in self.references.items()}}
        return Question(command=command, subject=ref, words=[command, ref, *words], params=params, inputs=inputs)

    @classmethod
    def parse(cls, ref: str, metrics: Sequence[str] | None, options: Mapping[str, Any]) -> "_Question":
        num, trials = options["num"], options["trials"]
        if num is not None and num < 2:
            raise SidaError(f"sample count must be >= 2, got {num}", "Pass --num 2 or more.")
        if trials < 1:
            raise SidaError(f"the number of trials must be >= 1, got {trials}", "Pass --trials 1 or more.")
        setting = options.get("setting", Setting())
        names = ("labels", "convention", "resize", "neighbours", "num_splits")
        settings = setting.of_images() | {name: options[name] for name in names}
        for name, known in (("labels", LABELS), ("convention", CONVENTIONS), ("resize", ("torch", "pil"))):
            if settings[name] not in known:
                raise SidaError(f"{name} must be one of {', '.join(known)}, got {settings[name]!r}", "Pass another.")
        for name in metrics or ():
            if name not in METRICS:
                raise SidaError(f"unknown metric {name!r}", f"Metrics are {', '.join(METRICS)}.")
        if (asked := options.get("detector")) and not references.is_detector_file(asked):
            catalog.detector(asked)
        if asked and references.is_torchscript(asked):
            catalog.digest_of_code(asked, options.get("trust_code", False))
        store, force = Store.open(options.get("run")), options.get("force", False)
        subject = resolve(store, ref, SCORED, any_size=True, recheck=force)
        require_images(subject)
        seeds: list[list[int]] = []
        how_sampled, vae = [options.get(name) for name in ("sampler", "steps", "heun")], None
        if subject.kind in NETS:
            num, first = num or 50_000, options["first_seed"]
            seeds_of(range(first, first + trials * num), "seeds of all trials")
            seeds = [[first + t * num, first + (t + 1) * num] for t in range(trials)]
            if options.get("subset_seed") is not None:
                what = "a subset is of images that there are, got a net that draws them"
                raise SidaError(what, "Leave out --subset-seed: --first-seed chooses what a net draws.")
            sampler = chosen_sampler(subject, *how_sampled)
            if sampler != sampler_of(subject):
                settings["sampler"] = sampler.to_json()
            if vae := vae_for(store, options.get("vae"), subject, recheck=force):
                settings["vae"] = vae_digest(vae)
        else:
            if options.get("vae") is not None:
                raise SidaError("a VAE is of a net that draws latents, got fixed images", "Leave out --vae.")
            if any(option not in (None, {}) for option in how_sampled):
                raise SidaError(
                    "a sampler is of a net that draws images, got fixed ones",
                    "Score the network itself, or leave out --steps, --sampler and the settings of Heun's.",
                )
            num = _fixed_count(subject, num, trials, setting)
            settings |= _subset(subject, num, options.get("subset_seed"))
        chosen = list(metrics or _applicable(store, subject, options))
        if set(chosen) & {name for name, metric in METRICS.items() if metric.has_order} and not (
            settings["convention"] == "sid" and subject.kind in (*NETS, "samples")
        ):
            settings["order"] = "content"
        found = {
            name: references.find(store, options.get("reference"), subject, need, recheck=force)
            for name in chosen
            if (need := METRICS[name].need)
        }
        for artifact in found.values():
            references.refuse_classes(artifact)
        detectors = {name: _detector_of(name, options, found, store, subject) for name in chosen}
        if scorer := detectors.get("inception-score"):
            require_classes(scorer)
        if force:
            for name in set(detectors.values()):
                _read_again(store, name)
        needs_classes = {name for metric, name in detectors.items() if metric == "inception-score"}
        weights = {name: _weights_of(store, name, name in needs_classes) for name in set(detectors.values())}
        key = store.key(
            "score",
            {"metrics": chosen, "num": num, "seeds": seeds, "settings": settings, **_by_whom(detectors, weights)},
            {"subject": subject.oid} | {name: artifact.oid for name, artifact in found.items()},
        )
        return cls(
            store,
            subject,
            chosen,
            detectors,
            weights,
            found,
            num,
            seeds,
            settings,
            setting,
            vae,
            key,
            options.get("device"),
            options.get("trust_code", False),
            force,
            options.get("say", download.to_stderr),
            options.get("tick"),
        )


def _applicable(store: Store, subject: Artifact, options: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation: all with the reference's own detector, and FD-DINOv2 where Inception is used."""
    reference = references.find(store, options.get("reference"), subject, "moments")
    detector = options.get("detector") or _default_detector(subject, reference, options)
    try:
        references.find(store, options.get("reference"), subject, "images")
        has_images = detector != "dinov2"
    except MissingError:  # statistics alone, or a dataset that is not here
        has_images = False
    wanted = ["fid"]
    if detector == "inception" and (reference.kind == "dataset" or "dinov2.npz" in reference.files):
        wanted.append("fd-dinov2")
    if has_images:
        wanted += ["prec-recall", "kid"]
    return wanted + (["inception-score"] if _has_classes(detector) else [])


def _detector_of(
    metric: str, options: Mapping[str, Any], found: Mapping[str, Artifact], store: Store, subject: Artifact
) -> str:
    fixed, asked = METRICS[metric].detector, options.get("detector")
    if fixed and asked not in (None, fixed):
        raise SidaError(f"{metric} is by detector {fixed}, got {asked!r}", "Leave out --detector.")
    if fixed or asked:
        return str(fixed or asked)
    if metric in found:
        return _default_detector(subject, found[metric], options)
    # What compares with nothing is by the detector of what is compared beside it, or would be.
    compared = next((found[name] for name in found if not METRICS[name].detector), None)
    if not compared and options.get("reference"):
        compared = references.find(store, options.get("reference"), subject, "moments")
    if compared and _has_classes(own := detector_name(compared)):
        return own
    if not compared and subject.kind == "dataset":
        return detector_name(subject)
    return "tiny-digits" if references.dataset_name(store, subject) == "tiny-digits" else "inception"


def _default_detector(subject: Artifact, reference: Artifact, options: Mapping[str, Any]) -> str:
    """The reference's own detector; of a network's own dataset, when none is named, that of its runs."""
    is_of_net = subject.kind in NETS or "net" in subject.inputs
    if is_of_net and options.get("reference") is None:
        return references.training_detector(reference)
    return detector_name(reference)


def require_classes(detector: str) -> None:
    """Raises SidaError for a detector that gives no inception score."""
    if not _has_classes(detector):
        what = f"the inception score needs classes, detector {detector} gives none"
        raise SidaError(what, "Pass --detector inception.")


def _has_classes(detector: str) -> bool:
    """Whether it classifies: only the digits' and Inception do; in TorchScript that, too, gives features alone."""
    return detector not in ("dinov2", "random-features", "inception-torchscript") and not references.is_torchscript(
        detector
    )


def _weights_digest(store: Store, detector: str) -> Any:
    """What stands for a detector's weights in a question, without reading more than it must."""
    if references.is_detector_file(detector):
        if not Path(detector).is_file():
            raise SidaError(f"{detector}: no such file", "Check the path, or use --detector inception.")
        return source_identity(store, detector)
    return fetch_detector(detector, run=store.root).oid


def _weights_of(store: Store, detector: str, needs_classes: bool) -> Any:
    try:
        return _weights_digest(store, detector)
    except SidaError as error:
        if error.exit_code != EXIT_FAILED or needs_classes:  # which the one that is built in has not
            raise
        hint = f"{error.hint} Or score with --detector {RANDOM_FEATURES}, which is built in and is no FID."
        raise SidaError(error.message, hint.strip(), exit_code=EXIT_FAILED) from error


def _read_again(store: Store, detector: str) -> None:
    """Hashes a detector's file anew; fetches one of the catalog again where it is damaged."""
    if references.is_detector_file(detector):
        source_identity(store, detector, recheck=True)
    else:
        fetch_detector(detector, run=store.root, recheck=True)


def _by_whom(detectors: Mapping[str, str], weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """The detectors in a question; of a file its content alone counts, wherever it lies."""
    called = {name: "file" if references.is_detector_file(name) else name for name in weights}
    return {"detectors": {metric: called[name] for metric, name in detectors.items()}} | {
        called[name]: weight for name, weight in weights.items()
    }


def load_detector(
    store: Store, name: str, device: "torch.device", resize: "Resize" = "torch", *, trust_code: bool = False
) -> "Detector":
    """The named detector, downloaded if need be; or Inception from a file, in TorchScript (.pt) or as a state dict."""
    from sidactl import detectors as detectors_module

    if references.is_detector_file(name):
        sha256 = file_digest(Path(name))
        if references.is_torchscript(name):
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

    weights = safetensors.torch.load(store.read(artifact, "model.safetensors"))
    return replace(detectors_module.load(name, weights, device=device, resize=resize), is_published=is_published)


def _is_published(name: str, sha256: str) -> bool:
    """Whether a file is, by its digest, that which a detector of the catalog was published as; Inception has two."""
    names = ("inception", "inception-torchscript") if name.startswith("inception") else (name,)
    sources = [entry.source for n in names if (entry := catalog.DETECTORS.get(n))]
    return any(source and source.sha256 == sha256 and source.is_certain for source in sources)


def detector_label(detector: "Detector") -> str:
    """What a detector is called: by its name where nothing else bears it, by its weights otherwise."""
    is_known = detector.is_published or detector.name not in ("inception", "dinov2")
    return detector.name if is_known else detector.short_identity


def distance_name(detector: "Detector") -> str:
    """What a Fréchet distance by this detector is called: FID and FD-DINOv2 with the published weights alone."""
    return score_name(detector_label(detector))


@dataclass(frozen=True)
class _Measured:
    values: Mapping[str, Sequence[float]]
    detectors: Mapping[str, str]
    references: Mapping[str, str]
    warnings: Sequence[str]


def _measure(asked: _Question, place: LiveDir | None) -> _Measured:
    """Runs all trials; every process computes its share of the images, rank 0 the numbers."""
    from sidactl.engine import devices, ranks

    if asked.vae is None and is_of_latents(asked.subject):
        check_vae_is_there(asked.store)
    device = devices.pick_device(asked.device)
    resize = asked.settings["resize"]
    loaded = {
        name: load_detector(asked.store, name, device, resize, trust_code=asked.trust_code)
        for name in sorted(set(asked.detectors.values()))  # in one order in all processes
    }
    by_metric = {metric: loaded[name] for metric, name in asked.detectors.items()}
    keeps = {asked.detectors[m] for m in asked.metrics if METRICS[m].need != "moments"}
    warnings = [w for a in asked.references.values() if (w := references.warning(asked.store, asked.subject, a))]
    for metric in asked.metrics:
        detector = by_metric[metric]
        if METRICS[metric].need == "moments":
            warnings += _too_few(asked.num, references.num_images(asked.store, asked.references[metric]), detector)
        elif METRICS[metric].need == "images":
            held = references.num_images(asked.store, asked.references[metric])
            if held and held > features.MAX_REAL_IMAGES:
                warnings.append(
                    f"{features.MAX_REAL_IMAGES:,} of {held:,} reference images, drawn by seed 0, stand for all of them"
                )
    if asked.subject.kind in NETS and (told := other_vae(asked.subject, asked.vae)):
        warnings.append(told)
    warnings += _of_other_shape(asked.store, asked.subject, asked.references.values())
    for metric, reference in asked.references.items():
        by = by_metric[metric]
        if reference.kind == "stats" and "detector" not in reference.params and not by.is_published:
            warnings.append(
                f"{reference.params['name']} holds statistics by the published {by.name}, the images are measured by "
                f"{by.short_identity}: unless its weights are the same, this number means nothing"
            )
    against = {m: _against(asked, m, by_metric[m]) for m in asked.metrics}
    values: dict[str, list[float]] = {}
    made_by: dict[str, str] = {}
    made_against: dict[str, str] = {}
    for trial in range(max(1, len(asked.seeds))):

        def of_trial(trial: int = trial) -> Mapping[str, Mapping[str, float]]:
            seen = _features(asked, trial, loaded, keeps, place)
            if ranks.rank_and_size()[0] > 0:
                return {}
            return {
                m: numbers(m, by_metric[m], seen.stats[by], seen.features.get(by), against[m], asked.settings)
                for m, by in asked.detectors.items()
            }

        by_trial = _once(place, f"trial-{trial}-numbers.json", of_trial)
        for metric, found in by_trial.items():
            for name, value in found.items():
                values.setdefault(name, []).append(value)
                made_by[name] = by_metric[metric].identity
                if metric in asked.references:
                    made_against[name] = asked.references[metric].oid
    return _Measured(values, made_by, made_against, sorted(set(warnings)))


def _once(
    place: LiveDir | None, file: str, make: Callable[[], Mapping[str, Mapping[str, float]]]
) -> Mapping[str, Mapping[str, float]]:
    """What an interrupted score left in this file, or else what is made now; the first of several processes has it."""
    from sidactl.engine import ranks

    def left() -> str:
        with suppress(OSError, ValueError, LookupError):
            return json.dumps(unsealed((place.path / file).read_bytes())["numbers"]) if place else ""
        return ""

    if told := ranks.agreed(left):
        known: dict[str, dict[str, float]] = json.loads(told)
        return known
    made = make()
    if place:
        with suppress(UnwritableError):  # it only saves time
            place.write(file, sealed({"numbers": made}))
    return made


def _of_other_shape(store: Store, subject: Artifact, compared: Iterable[Artifact]) -> Iterator[str]:
    """Warnings of references whose images differ in size or channels, as far as both are known."""
    own = _shape(subject)
    for reference in compared:
        other = _shape(reference)
        if own and other and own != other:
            if own[1:] == other[1:] and all(_looks_grey(store, artifact) for artifact in (subject, reference)):
                continue
            yield (
                f"the images are {own[1]}x{own[2]}x{own[0]}, the reference's {other[1]}x{other[2]}x{other[0]}: the "
                "distance is of that, too"
            )


def _looks_grey(store: Store, artifact: Artifact) -> bool:
    """Whether images have one channel, or as far as a few of them show three that are equal, as grey files become."""
    shape = _shape(artifact)
    if artifact.kind != "dataset" or shape is None or shape[0] == 1:
        return shape is not None and shape[0] == 1
    num = int(artifact.results["num_images"])  # type: ignore[arg-type]
    some = load_dataset(store, artifact).images(range(0, num, max(1, num // 64)))
    return bool((some == some[:, :1]).all())


def _shape(artifact: Artifact) -> tuple[int, int, int] | None:
    """Channels, width and height of an artifact's images; None where it does not say, or they are latents."""
    if artifact.kind in NETS:
        net = mapping(artifact.params["net"])
        channels, side = int(net["img_channels"]), int(net["img_resolution"])
        return (channels, side, side) if channels in (1, 3) else None
    results: Mapping[str, Any] = artifact.results
    if results.get("kind", "pixels") != "pixels" or not (results.get("num_channels") and results.get("resolution")):
        return None
    height = int(results["resolution"])
    return int(results["num_channels"]), int(results.get("width") or height), height


def _too_few(num: int, num_reference: int | None, detector: "Detector") -> Iterator[str]:
    """Warnings of sets whose covariance has not its full rank."""
    least = ENOUGH * detector.num_features
    if num < least:
        yield (
            f"{num:,} images are few for {detector.num_features:,} features: the distance is far too high by their "
            "number alone; compare only with scores of as many, better of 50,000"
        )
    if num_reference is not None and num_reference < least:
        yield (
            f"{num_reference:,} reference images are few for {detector.num_features:,} features: the distance is far "
            "too high by their number alone; compare only with scores against the same ones, better take more"
        )


def _features(
    asked: _Question, trial: int, loaded: Mapping[str, "Detector"], keeps: set[str], place: LiveDir | None
) -> features.Collected:
    """One trial's features by detector; kept as features artifacts where they are kept in memory, and read again."""
    from sidactl.metrics import FeatureStats

    store, seeds = asked.store, asked.seeds[trial] if asked.seeds else None
    params = {
        "num": asked.num,
        "seeds": seeds,
        "labels": asked.settings["labels"],
        **asked.setting.of_images(),
        **{name: asked.settings[name] for name in ("subset_seed", "sampler", "vae") if name in asked.settings},
    }
    by = {name: params | {"detector": detector.identity} for name, detector in loaded.items()}
    keys = {name: store.key("features", params, {"subject": asked.subject.oid}) for name, params in by.items()}
    before, total = trial * asked.num, asked.num * max(1, len(asked.seeds))
    tick = asked.tick or (lambda done, total: None)
    known = {name: None if asked.force else agreed_answer(store, key) for name, key in keys.items()}
    if (found := features.read(store, known)) is not None:
        stats = {name: FeatureStats() for name in loaded}
        for name, kept in found.items():
            stats[name].add(kept.rows)
        for done in (before, before + asked.num):
            tick(done, total)
        return features.Collected(stats, found)
    collected = features.collect(
        _work(asked, range(*seeds) if seeds else None, loaded, keeps),
        place,
        name=f"trial-{trial}",
        before=before,
        tick=lambda done: tick(before + done, total),
    )
    for name, kept in collected.features.items():
        features.keep(store, keys[name], asked.subject, by[name], kept)
    return collected


def _work(asked: _Question, seeds: range | None, loaded: Mapping[str, "Detector"], keeps: set[str]) -> features.Work:
    """The images to go through."""
    from sidactl.engine import configure

    if seeds is None:
        dataset = load_dataset(asked.store, asked.subject)
        return features.of_images(dataset, loaded, _positions(asked, dataset), keeps)
    from sidactl import sampling

    device = next(iter(loaded.values())).device
    net = configure.set_up(load_net(asked.store, asked.subject, device), asked.setting)
    counts: Sequence[int] | None = None
    if asked.settings["labels"] == "dataset" and net.spec.label_dim:
        held = references.dataset_of(asked.store, asked.subject).results["class_counts"]
        assert isinstance(held, list)
        counts = held
    size = features.images_per_batch(net.spec.img_channels, net.spec.img_resolution)
    sampler = sampler_from(asked.settings["sampler"]) if "sampler" in asked.settings else sampler_of(asked.subject)
    samples = sampling.generate(
        net,
        seeds,
        sampler,
        device=device,
        class_counts=counts,
        load_vae=vae_loader(asked.store, asked.vae),
        batch_size=size,
    )

    def shared(first: int) -> "Iterator[Tensor]":
        return (batch.images for batch in samples.shared(first))

    return features.Work(len(samples), shared, loaded, keeps, lambda index: f"the image of seed {seeds[index]}")


def _positions(asked: _Question, dataset: "Dataset") -> "Sequence[int] | NDArray[np.int64]":
    """Which images of a dataset are scored."""
    from sidactl.data import dataset as data_dataset

    if "subset_seed" not in asked.settings:
        return range(asked.num)
    return data_dataset.drawn_subset(dataset.num_images, asked.num, asked.settings["subset_seed"])


def _against(asked: _Question, metric: str, detector: "Detector") -> "Moments | features.Features | None":
    """What a metric compares with: moments, features of real images, or nothing; see `references.moments`."""
    need, recheck = METRICS[metric].need, asked.force
    if need is None:
        return None
    reference = asked.references[metric]
    if need == "moments":
        return references.moments(asked.store, reference, detector, asked.tick, recheck=recheck)
    tick = part_of(asked.tick, references.reference_part(reference))
    return features.real_features(asked.store, reference, detector, tick, recheck=recheck)


def numbers(
    metric: str,
    detector: "Detector",
    stats: "FeatureStats",
    kept: "features.Features | None",
    against: "Moments | features.Features | None",
    settings: Mapping[str, Any],
) -> Mapping[str, float]:
    """What a metric says of images, by name: from the moments of their features, or the features themselves.

    settings: convention, order, neighbours and num_splits, as far as the metric has them.
    """
    from sidactl import metrics as metrics_module

    label = detector_label(detector)
    suffix = "" if label == "inception" else f" {label}"
    convention = settings["convention"]
    if isinstance(against, Moments):
        covariance = stats.covariance(ddof=0 if convention == "sid" else 1)
        return {distance_name(detector): metrics_module.frechet_distance(stats.mean, covariance, *against)}
    assert kept
    is_by_content = "order" in settings
    ours = kept.by_content() if is_by_content else kept.rows
    if against is None:
        score, _ = metrics_module.inception_score(detector.logits(ours), settings["num_splits"])
        return {f"IS{suffix}": score}
    theirs = against.by_content() if is_by_content else against.rows
    if metric == "kid":
        distance, _ = metrics_module.kernel_distance(
            theirs, ours, subset_size=min(1000, len(theirs), len(ours)), seed=0
        )
        return {f"KID{suffix}": distance}
    real, generated = theirs.to(detector.device), ours.to(detector.device)
    k = settings["neighbours"]
    if convention == "guided-diffusion":
        precision, recall = metrics_module.guided_diffusion_precision_recall(real, generated, k)
    else:
        dtype: Literal["float16", "float32"] = "float16" if convention == "sid" else "float32"
        precision, recall = metrics_module.precision_recall(real, generated, k, precision=dtype)
    return {"precision": precision, "recall": recall}


def _keep(asked: _Question, measured: _Measured, problem: str | None) -> dict[str, Any]:
    """The score's fields, kept as an artifact unless there is a problem with the run directory."""
    for name, weights in asked.weights.items():
        if references.is_detector_file(name):
            check_unchanged(asked.store, name, weights)
    draft = Artifact(
        oid="",
        kind="score",
        files={},
        inputs={"subject": asked.subject.oid} | {f"reference {n}": oid for n, oid in measured.references.items()},
        params={
            "metrics": list(asked.metrics),
            "num": asked.num,
            "seeds": [list(pair) for pair in asked.seeds],
            "detectors": dict(measured.detectors),
            "settings": dict(asked.settings),
        },
        results={
            "values": {name: list(values) for name, values in measured.values.items()},
            "versions": _versions(),
            "warnings": list(measured.warnings),
        },
    )
    if problem is None:
        try:
            draft = asked.store.put("score", {}, inputs=draft.inputs, params=draft.params, results=draft.results)
            answered(asked.store, asked.key, draft, "score")
        except UnwritableError as error:
            return asdict(score_of(draft)) | {"unkept": error.message}
    return asdict(score_of(draft))


def _versions() -> dict[str, str]:
    import numpy as np
    import scipy
    import torch

    return {"sidactl": __version__, "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__}


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
    )


def _fixed_count(subject: Artifact, num: int | None, trials: int, setting: Setting) -> int:
    available = subject.results["num_images"]
    assert isinstance(available, int)
    what = "samples" if subject.kind == "samples" else "images of a dataset"
    if trials > 1:
        raise SidaError(
            f"trials need images drawn anew, got {trials} trials of fixed {what}",
            "Score the generator itself, or leave out --trials.",
        )
    if setting != Setting():
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


def _subset(subject: Artifact, num: int, seed: int | None) -> dict[str, int]:
    """The settings of a drawn subset; none where all images are scored."""
    available = subject.results["num_images"]
    assert isinstance(available, int)
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


def sampler_of(subject: Artifact) -> OneStepSpec | HeunSpec:
    """The sampler that a teacher or generator artifact names as its own."""
    return sampler_from(mapping(subject.params["sampler"]))


def sampler_from(settings: Mapping[str, Any]) -> OneStepSpec | HeunSpec:
    """The sampler of either kind that its `to_json` wrote."""
    return HeunSpec.from_json(settings) if "S_churn" in settings else OneStepSpec.from_json(settings)


def chosen_sampler(
    subject: Artifact, kind: str | None = None, steps: int | None = None, heun: Mapping[str, float] | None = None
) -> OneStepSpec | HeunSpec:
    """A net's own sampler, or the one of this kind, with so many steps and these fields of HeunSpec.

    Raises SidaError for what does not fit the net, is out of its bounds, or would count for nothing.
    """
    own, heun = sampler_of(subject), dict(heun or {})
    if kind not in (None, "one-step", "heun"):
        way = "Pass --sampler heun." if isinstance(own, HeunSpec) else "Leave out --sampler."
        raise SidaError(f"the sampler must be one-step or heun, got {kind!r}", way)
    chosen: OneStepSpec | HeunSpec = own
    if kind == "heun" and isinstance(own, OneStepSpec):
        raise SidaError(
            "the heun sampler needs a teacher, got a one-step generator",
            "Leave out --sampler: --steps takes more than one.",
        )
    if kind == "one-step" and isinstance(own, HeunSpec):
        chosen = OneStepSpec()
    if steps is not None and steps < 1:
        raise SidaError(f"the number of steps must be >= 1, got {steps}", "Pass --steps 1 or more.")
    if unknown := sorted(set(heun) - set(HEUN_FIELDS)):
        raise SidaError(f"unknown setting {unknown[0]!r} of Heun's sampler", f"It has {', '.join(HEUN_FIELDS)}.")
    if heun and isinstance(chosen, OneStepSpec):
        flag = flag_of(next(iter(heun)))
        raise SidaError(f"{flag} is of the heun sampler of a teacher, got one-step", f"Leave out {flag}.")
    changes = heun if steps is None else {**heun, "num_steps": steps}
    chosen = replace(chosen, **changes)  # type: ignore[arg-type]  # checked by the class
    idle = next((name for name in ("S_min", "S_max", "S_noise") if name in heun), None)
    if idle and isinstance(chosen, HeunSpec) and chosen.S_churn == 0:
        raise SidaError(f"{flag_of(idle)} counts with churn alone, got --s-churn 0", "Pass --s-churn, such as 40.")
    return chosen
