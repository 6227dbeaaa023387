"""The question that a score answers: every word of it resolved and checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidactl import catalog
from sidactl.commands import moments, reference
from sidactl.commands.blindness import blind_detector
from sidactl.commands.inputs import seeds_of
from sidactl.commands.pairs import teacher_of
from sidactl.commands.question import Question
from sidactl.commands.resolve import resolve
from sidactl.commands.samplers import chosen_sampler, drawn_on, sampler_of
from sidactl.commands.scorers import (
    applicable_metrics,
    detector_of,
    has_classes,
    read_again,
    reference_for,
    require_classes,
    weights_by_whom,
    weights_of,
)
from sidactl.commands.scores import (
    COMMANDS,
    CONVENTIONS,
    DEFAULTS,
    LABELS,
    METRICS,
    SCORED,
    ScoreOptions,
    fixed_count,
    metric_of,
    plain_options,
    subset_of,
)
from sidactl.commands.tasks import Task, option_words
from sidactl.commands.vae import vae_digest, vae_for
from sidactl.commands.words import NETS, OnCount, require_images
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import SamplingForm
from sidactl.store import Artifact, Store, UnwritableError


def why_unkept(asked: "ScoreQuestion") -> str | None:
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


def is_answered(ref: str, metrics: Sequence[str], options: ScoreOptions) -> bool:
    """Whether `evaluate` would have its answer from the run directory."""
    return ScoreQuestion.parse(ref, metrics, plain_options(ref, options)).question.answer() is not None


def held_out_images(
    store: Store, keys: Sequence[str], asked: str | None, found: Mapping[str, Artifact], *, recheck: bool
) -> Artifact | None:
    """The real images that were not trained on, where a metric needs them."""
    wanting = [key for key in keys if metric_of(key).needs_held_out]
    if asked is None:
        if wanting:
            what = f"{wanting[0]} needs real images that were not trained on, got none"
            raise SidaError(what, "Pass --held-out REF.")
        return None
    if not wanting:
        hint = "Leave out --held-out, or pass --metrics fdr,memorisation."
        raise SidaError(f"no metric here needs them, got {asked}", hint)
    held_out = resolve(store, asked, ["dataset"], any_size=True, recheck=recheck)
    require_images(held_out)
    if held_out.oid in {artifact.oid for artifact in found.values()}:
        raise SidaError(f"held-out images must not be the reference itself, got {asked}", "Pass another --held-out.")
    return held_out


@dataclass(frozen=True)
class ScoreQuestion:
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
    setting: SamplingForm
    held_out: Artifact | None
    teacher: Artifact | None
    """what it is paired with, where that was asked for"""
    vae: Artifact | None
    """what decodes latents; None = the usual one, or there are none"""
    question: Question
    device: str | None
    trust_code: bool
    force: bool
    say: download.OnLine | None
    tick: OnCount | None

    @classmethod
    def parse(cls, ref: str, metrics: Sequence[str] | None, options: Mapping[str, Any]) -> "ScoreQuestion":
        num, trials = options["num"], options["trials"]
        if num is not None and num < 2:
            raise SidaError(f"sample count must be >= 2, got {num}", "Pass --num 2 or more.")
        if trials < 1:
            raise SidaError(f"the number of trials must be >= 1, got {trials}", "Pass --trials 1 or more.")
        setting = options.get("setting", SamplingForm())
        names = ("labels", "convention", "resize", "neighbours", "num_splits")
        settings = setting.of_images() | {name: options[name] for name in names}
        for name, known in (("labels", LABELS), ("convention", CONVENTIONS), ("resize", ("torch", "pil"))):
            if settings[name] not in known:
                raise SidaError(f"{name} must be one of {', '.join(known)}, got {settings[name]!r}", "Pass another.")
        if metrics is not None and not metrics:
            raise SidaError("metrics are needed where they are asked for, got none", "Leave out --metrics.")
        for name in metrics or ():
            if name not in METRICS:
                raise SidaError(f"unknown metric {name!r}", f"Metrics are {', '.join(METRICS)}.")
        if metrics and all(METRICS[name].has_teacher for name in metrics):
            idle = ("reference", "--ref"), ("detector", "--detector"), ("detectors", "--detectors")
            if flag := next((flag for option, flag in idle if options.get(option)), None):
                what = f"{', '.join(metrics)} compares with the teacher by pixels, which {flag} says nothing of"
                raise SidaError(what, "Leave it out.")
        several = list(options.get("detectors") or ())
        options = {**options, "detector": several[0]} if several else options
        for asked in several or filter(None, [options.get("detector")]):
            if not moments.is_detector_file(asked):
                catalog.detector(asked)
            if moments.is_torchscript(asked):
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
            settings |= drawn_on(options.get("device"))
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
            num = fixed_count(subject, num, trials, setting)
            settings |= subset_of(subject, num, options.get("subset_seed"))
        chosen = list(metrics or applicable_metrics(store, subject, options))
        paired = [name for name in chosen if METRICS[name].has_teacher]
        teacher = teacher_of(store, subject) if paired else None
        chosen = [name for name in chosen if name not in paired]
        if set(chosen) & {name for name, metric in METRICS.items() if metric.has_order} and not (
            settings["convention"] == "sid" and subject.kind in (*NETS, "samples")
        ):
            settings["order"] = "content"
        found = {
            name: reference.find(store, options.get("reference"), subject, need, recheck=force)
            for name in chosen
            if (need := METRICS[name].need)
        }
        for artifact in found.values():
            reference.refuse_classes(artifact)
        detectors = {name: detector_of(name, options, found, store, subject) for name in chosen}
        if scorer := detectors.get("inception-score"):
            require_classes(scorer)
        further = several[1:]
        is_command = len(chosen) == 1 and not paired and chosen[0] in COMMANDS
        if chosen and not options.get("detector") and (metrics is None or not is_command):
            blind = blind_detector(store, subject, options.get("reference"), list(detectors.values()))
            further = [blind] if blind else []
        for index, detector in enumerate(further, start=1):
            for name in chosen if metrics or several else ["fid"]:
                if METRICS[name].detector or (name == "inception-score" and not has_classes(detector)):
                    continue
                key = f"{name}@{index}"
                detectors[key] = detector
                if need := METRICS[name].need:
                    found[key] = reference_for(store, options.get("reference"), subject, need, detector, force)
        chosen = list(detectors)
        held_out = held_out_images(store, chosen, options.get("held_out"), found, recheck=force)
        if force:
            for name in set(detectors.values()):
                read_again(store, name)
        needs_classes = {name for metric, name in detectors.items() if metric.startswith("inception-score")}
        weights = {name: weights_of(store, name, name in needs_classes) for name in set(detectors.values())}
        params = {"metrics": [*chosen, *paired], "num": num, "seeds": seeds}
        shown = {**params, **settings}
        given = {name: options[name] for name, default in DEFAULTS.items() if options[name] != default}
        if several:
            given = {name: value for name, value in given.items() if name != "detector"}
        trust_code = options.get("trust_code", False)
        words = option_words({"ref": options.get("reference"), "trust_code": trust_code, **given})
        words += option_words(setting.of_images()) + option_words(dict(options.get("heun") or {}))
        command = chosen[0] if params["metrics"] == chosen[:1] and chosen[0] in COMMANDS else "evaluate"
        words += option_words({"metrics": ",".join(metrics)}) if metrics and command == "evaluate" else []
        inputs: dict[str, Artifact] = {"subject": subject, **found, **({"pairs": teacher} if teacher else {})}
        inputs |= {"held out": held_out} if held_out else {}
        oids = {name: artifact.oid for name, artifact in inputs.items()}
        question = Question(
            store=store,
            command="score",
            params={**params, "settings": settings, **weights_by_whom(detectors, weights)},
            inputs=inputs,
            force=force,
            say=options.get("say", download.to_stderr),
            task=Task(command, ref, [command, ref, *words], shown, oids),
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
            held_out,
            teacher,
            vae,
            question,
            options.get("device"),
            trust_code,
            force,
            options.get("say", download.to_stderr),
            options.get("tick"),
        )
