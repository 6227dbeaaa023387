"""Scores of images against a reference, by trials over fresh seed ranges, kept as score artifacts."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Unpack

from sidactl import __version__
from sidactl.commands import features, moments
from sidactl.commands import reference as commands_reference
from sidactl.commands.blindness import seen_by
from sidactl.commands.identity import check_unchanged
from sidactl.commands.inputs import Ref, ref_text
from sidactl.commands.moments import MIN_IMAGES_PER_FEATURE, Moments
from sidactl.commands.pairs import pairing_of
from sidactl.commands.question import Question, rank0_first
from sidactl.commands.resolve import load_dataset, load_net
from sidactl.commands.samplers import note_of_steps, sampler_from, sampler_of
from sidactl.commands.score_question import ScoreQuestion, why_unkept
from sidactl.commands.scorers import load_detector
from sidactl.commands.scores import Score, ScoreOptions, detector_label, metric_of, numbers, plain_options, score_of
from sidactl.commands.vae import check_vae_is_there, is_of_latents, other_vae, vae_loader
from sidactl.commands.words import NETS, part_of
from sidactl.recipes import OneStepSpec
from sidactl.store import Artifact, LiveDir, Store, UnwritableError, sealed, unsealed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from sidactl.data.dataset import Dataset
    from sidactl.detectors import Detector


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
    """Several metrics in one pass over the images; the published ones that apply to the reference if none is named.

    Unless detectors are named, or a metric that is a command of its own stands alone, a blind one scores, too, where
    those that do are not blind.

    Source: those of `fid`, `prec_recall` and `inception_score`; KID is Bińkowski et al. (1801.01401), section 4.
    """
    plain = plain_options(ref, options)
    with rank0_first():  # it downloads what the others find then
        asked = ScoreQuestion.parse(ref_text(ref), metrics, plain)
    if known := asked.question.known_by_all():
        return score_of(known)
    from sidactl.engine import ranks

    with asked.question.known_or_working_together() as place:
        if isinstance(place, Artifact):  # by a process that this one waited for
            return score_of(place)
        problem = why_unkept(asked) if place is None else None
        measured = _measure(asked, place)
        payload = json.loads(ranks.broadcast_from_rank0(lambda: json.dumps(_keep(asked, measured, problem))))
    return Score(**payload)


@dataclass(frozen=True)
class _Measured:
    values: Mapping[str, Sequence[float]]
    detectors: Mapping[str, str]
    references: Mapping[str, str]
    warnings: Sequence[str]
    seen: Sequence[str]


def _measure(asked: ScoreQuestion, place: LiveDir | None) -> _Measured:
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
    keeps = {asked.detectors[m] for m in asked.metrics if metric_of(m).need != "moments"}
    warnings = [
        w for a in asked.references.values() if (w := commands_reference.warning(asked.store, asked.subject, a))
    ]
    for metric in asked.metrics:
        detector = by_metric[metric]
        if metric_of(metric).need == "moments":
            warnings += _too_few(
                asked.num, commands_reference.num_images(asked.store, asked.references[metric]), detector
            )
        elif metric_of(metric).need == "images":
            held = commands_reference.num_images(asked.store, asked.references[metric])
            if held and held > features.MAX_REAL_IMAGES:
                warnings.append(
                    f"{features.MAX_REAL_IMAGES:,} of {held:,} reference images, drawn by seed 0, stand for all of them"
                )
    if asked.subject.kind in NETS and (warning := other_vae(asked.subject, asked.vae)):
        warnings.append(warning)
    chosen = sampler_from(asked.settings["sampler"]) if "sampler" in asked.settings else None
    if chosen and (note := note_of_steps(asked.subject, chosen)):
        warnings.append(note)
    warnings += _of_other_shape(asked.store, asked.subject, asked.references.values())
    for metric, reference in asked.references.items():
        by = by_metric[metric]
        if reference.kind == "stats" and "detector" not in reference.params and not by.is_published:
            warnings.append(
                f"{reference.params['name']} holds statistics by the published {by.name}, the images are measured by "
                f"{by.short_identity}: unless its weights are the same, this number means nothing"
            )
    against = {m: _against(asked, m, by_metric[m]) for m in asked.metrics}
    held_out = {m: _held_out(asked, m, by_metric[m]) for m in asked.metrics}
    for m, unseen in held_out.items():
        compared = against[m]
        if unseen is None or not isinstance(compared, features.Features):
            continue
        if shared := len(set(unseen.digests.tolist()) & set(compared.digests.tolist())):
            warnings.append(f"{shared:,} of the {len(unseen.rows):,} held-out images are among the reference's")
    values: dict[str, list[float]] = {}
    made_by: dict[str, list[Detector]] = {}
    made_against: dict[str, str] = {}
    for trial in range(max(1, len(asked.seeds))):

        def of_trial(trial: int = trial) -> Mapping[str, Mapping[str, float]]:
            found = dict[str, dict[str, float]]()
            if asked.teacher:
                found["pairs"] = dict(_pairing(asked, trial, device))
            seen = _features(asked, trial, loaded, keeps, place) if loaded else None
            if ranks.rank_and_size()[0] > 0:
                return {}
            for m, by in asked.detectors.items():
                assert seen
                rows, compared = seen.features.get(by), (against[m], held_out[m])
                found[m] = dict(numbers(m, by_metric[m], seen.stats[by], rows, *compared, asked.settings))
            ratios = [value for key, each in found.items() if key.startswith("fdr") for value in each.values()]
            if len(ratios) > 1:
                found["fdr"]["FDr"] = statistics.fmean(ratios)
            return found

        by_trial = _once(place, f"trial-{trial}-numbers.json", of_trial)
        for metric, found in by_trial.items():
            for name, value in found.items():
                values.setdefault(name, []).append(value)
                keys = [metric] if name != "FDr" else [key for key in by_metric if key.startswith("fdr")]
                made_by[name] = [by_metric[key] for key in keys if key in by_metric]
                if metric == "pairs" and asked.teacher:
                    made_against[name] = asked.teacher.oid
                elif metric in asked.references:
                    made_against[name] = asked.references[metric].oid
    eyes = seen_by(asked.store, asked.subject)
    seen = sorted(name for name, by in made_by.items() if any(detector_label(detector) in eyes for detector in by))
    identities = {name: ", ".join(each.identity for each in by) or "pixels" for name, by in made_by.items()}
    return _Measured(values, identities, made_against, sorted(set(warnings)), seen)


def _once(
    place: LiveDir | None, file: str, make: Callable[[], Mapping[str, Mapping[str, float]]]
) -> Mapping[str, Mapping[str, float]]:
    """What an interrupted score left in this file, or else what is made now; the first of several processes has it."""
    from sidactl.engine import ranks

    def left() -> str:
        with suppress(OSError, ValueError, LookupError):
            return json.dumps(unsealed((place.path / file).read_bytes())["numbers"]) if place else ""
        return ""

    if payload := ranks.broadcast_from_rank0(left):
        known: dict[str, dict[str, float]] = json.loads(payload)
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
    num = int(artifact.results["num_images"])
    some = load_dataset(store, artifact).images(range(0, num, max(1, num // 64)))
    return bool((some == some[:, :1]).all())


def _shape(artifact: Artifact) -> tuple[int, int, int] | None:
    """Channels, width and height of an artifact's images; None where it does not say, or they are latents."""
    if artifact.kind in NETS:
        net = artifact.params["net"]
        channels, side = int(net["img_channels"]), int(net["img_resolution"])
        return (channels, side, side) if channels in (1, 3) else None
    results: Mapping[str, Any] = artifact.results
    if results.get("kind", "pixels") != "pixels" or not (results.get("num_channels") and results.get("resolution")):
        return None
    height = int(results["resolution"])
    return int(results["num_channels"]), int(results.get("width") or height), height


def _too_few(num: int, num_reference: int | None, detector: "Detector") -> Iterator[str]:
    """Warnings of sets whose covariance has not its full rank."""
    least = MIN_IMAGES_PER_FEATURE * detector.num_features
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
    asked: ScoreQuestion, trial: int, loaded: Mapping[str, "Detector"], keeps: set[str], place: LiveDir | None
) -> features.Collected:
    """One trial's features by detector; kept as features artifacts where they are kept in memory, and read again."""
    from sidactl.metrics import FeatureStats

    store, seeds = asked.store, asked.seeds[trial] if asked.seeds else None
    params = {
        "num": asked.num,
        "seeds": seeds,
        "labels": asked.settings["labels"],
        **asked.setting.of_images(),
        **{name: asked.settings[name] for name in ("subset_seed", "sampler", "rng", "vae") if name in asked.settings},
    }
    by = {name: params | {"detector": detector.identity} for name, detector in loaded.items()}
    inputs = {"subject": asked.subject}
    questions = {
        n: Question(store=store, command="features", params=p, inputs=inputs, force=asked.force) for n, p in by.items()
    }
    before, total = trial * asked.num, asked.num * max(1, len(asked.seeds))
    tick = asked.tick or (lambda done, total: None)
    known = {name: question.known_by_all() for name, question in questions.items()}
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
        features.keep(questions[name], kept)
    return collected


def _pairing(asked: ScoreQuestion, trial: int, device: "torch.device") -> Mapping[str, float]:
    """One trial's numbers of pairs with the teacher's images."""
    tick, before = asked.tick, trial * asked.num
    shown = (lambda done, total: tick(before + done, asked.num * len(asked.seeds))) if tick else None
    sampler = sampler_from(asked.settings["sampler"]) if "sampler" in asked.settings else sampler_of(asked.subject)
    assert isinstance(sampler, OneStepSpec)
    seeds, counts = range(*asked.seeds[trial]), _class_counts(asked)
    return pairing_of(
        asked.store,
        asked.subject,
        sampler,
        seeds,
        device,
        setting=asked.setting,
        class_counts=counts,
        vae=asked.vae,
        tick=shown,
    )


def _class_counts(asked: ScoreQuestion) -> Sequence[int] | None:
    """Images of each class in the dataset, where classes are to be drawn by their share of it."""
    if asked.settings["labels"] != "dataset" or not asked.subject.params["net"].get("label_dim"):
        return None
    counts: Sequence[int] | None = commands_reference.dataset_of(asked.store, asked.subject).results["class_counts"]
    return counts


def _work(
    asked: ScoreQuestion, seeds: range | None, loaded: Mapping[str, "Detector"], keeps: set[str]
) -> features.Work:
    """The images to go through."""
    from sidactl.engine import configure

    if seeds is None:
        dataset = load_dataset(asked.store, asked.subject)
        return features.of_images(dataset, loaded, _positions(asked, dataset), keeps)
    from sidactl import sampling

    device = next(iter(loaded.values())).device
    net = configure.configure_for_sampling(load_net(asked.store, asked.subject, device), asked.setting)
    size = features.images_per_batch(net.spec.img_channels, net.spec.img_resolution)
    sampler = sampler_from(asked.settings["sampler"]) if "sampler" in asked.settings else sampler_of(asked.subject)
    samples = sampling.generate(
        net,
        seeds,
        sampler,
        device=device,
        class_counts=_class_counts(asked),
        load_vae=vae_loader(asked.store, asked.vae),
        batch_size=size,
    )

    def shared(first: int) -> "Iterator[Tensor]":
        return (batch.images for batch in samples.shared(first))

    return features.Work(len(samples), shared, loaded, keeps, lambda index: f"the image of seed {seeds[index]}")


def _positions(asked: ScoreQuestion, dataset: "Dataset") -> "Sequence[int] | NDArray[np.int64]":
    """Which images of a dataset are scored."""
    from sidactl.data import dataset as data_dataset

    if "subset_seed" not in asked.settings:
        return range(asked.num)
    return data_dataset.drawn_subset(dataset.num_images, asked.num, asked.settings["subset_seed"])


def _against(asked: ScoreQuestion, metric: str, detector: "Detector") -> "Moments | features.Features | None":
    """What a metric compares with: moments, features of real images, or nothing; see `moments.compared_with`."""
    need = metric_of(metric).need
    if need is None:
        return None
    reference = asked.references[metric]
    return moments.compared_with(asked.store, reference, need, detector, asked.tick, recheck=asked.force)


def _held_out(asked: ScoreQuestion, metric: str, detector: "Detector") -> "features.Features | None":
    """Features of the real images that were not trained on, for the metrics that need them."""
    if asked.held_out is None or not metric_of(metric).needs_held_out:
        return None
    tick = part_of(asked.tick, moments.reference_part(asked.held_out))
    return features.real_features(asked.store, asked.held_out, detector, tick, recheck=asked.force)


def _keep(asked: ScoreQuestion, measured: _Measured, problem: str | None) -> dict[str, Any]:
    """The score's fields, kept as an artifact unless there is a problem with the run directory."""
    for name, weights in asked.weights.items():
        if moments.is_detector_file(name):
            check_unchanged(asked.store, name, weights)
    draft = Artifact(
        oid="",
        kind="score",
        files={},
        inputs={"subject": asked.subject.oid} | {f"reference {n}": oid for n, oid in measured.references.items()},
        params={
            "metrics": [*asked.metrics, *(["pairs"] if asked.teacher else [])],
            "num": asked.num,
            "seeds": [list(pair) for pair in asked.seeds],
            "detectors": dict(measured.detectors),
            "settings": dict(asked.settings),
        },
        results={
            "values": {name: list(values) for name, values in measured.values.items()},
            "versions": _versions(),
            "warnings": list(measured.warnings),
            **({"seen": list(measured.seen)} if measured.seen else {}),
        },
    )
    if problem is None:
        try:
            draft = asked.store.put("score", {}, inputs=draft.inputs, params=draft.params, results=draft.results)
            asked.question.record(draft)
        except UnwritableError as error:
            return asdict(score_of(draft)) | {"unkept": error.message}
    return asdict(score_of(draft))


def _versions() -> dict[str, str]:
    import numpy as np
    import scipy
    import torch

    return {"sidactl": __version__, "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
