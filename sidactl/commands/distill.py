"""The commands `distill` and `finetune-sid2a`: assemble, train, store."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidactl import catalog
from sidactl.commands import moments as commands_moments
from sidactl.commands import reference as commands_reference
from sidactl.commands.assemble import Assembled, assembled, find_batch_per_device
from sidactl.commands.evaluation import (
    Eye,
    evaluation_of,
    finite_or_none,
    is_teacher_scored,
    preview_of,
    score_teacher,
    try_scoring,
)
from sidactl.commands.fetch import fetch_detector
from sidactl.commands.inputs import Ref, field_values, optional_ref, ref_text
from sidactl.commands.moments import detector_name
from sidactl.commands.plan import TeacherScore, not_published, published_score
from sidactl.commands.question import Question, name_artifact, rank0_first
from sidactl.commands.resolve import load_net
from sidactl.commands.running import OnEvent, batches_for, run_training
from sidactl.commands.samplers import sampler_of
from sidactl.commands.scorers import load_detector
from sidactl.commands.scores import METRICS, detector_label, distance_name
from sidactl.commands.tasks import option_words
from sidactl.commands.vae import vae_label, vae_loader
from sidactl.commands.words import RunDir, part_of, plain_name
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.foreign import download
from sidactl.recipes import Adversarial, Execution, OneStepSpec, Recipe
from sidactl.store import Artifact, LiveDir, Store


def distill(
    *,
    teacher: Ref,
    mode: str,
    generator: Ref | None = None,
    dataset: Ref | None = None,
    reference: Ref | None = None,
    score: bool = True,
    detector: str | os.PathLike[str] | None = None,
    vae: Ref | None = None,
    teacher_score: TeacherScore | None = None,
    allow_untrained: bool = False,
    name: str | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    say: download.OnLine | None = download.to_stderr,
    watch: OnEvent | None = None,
    execution: Execution | None = None,
    **recipe_overrides: Any,
) -> Artifact:
    """The best one-step generator of a distillation run, by its score against the dataset; `last` is kept too.

    Processes that torchrun started work together, with a run directory that all can see; the first one writes.

    dataset: of the teacher's by default; in mode sid its classes alone do, where it is not there.
    reference: what to score against meanwhile, as in `fid`; by default the images of the dataset, or else its
        published statistics. In mode sid, where there are neither, nothing is scored, and the last generator is the
        result.
    score: False = nothing is scored, and the last generator is the result.
    detector: what scores the run: a name or a file, as in `fid`; by default the reference's own, and for a dataset of
        one's own random-features, which is built in.
    vae: what decodes latents: a folder that diffusers saved, or OWNER/NAME in the Hugging Face hub; by default the
        teacher's own, or the usual one. The generator remembers it.
    teacher_score: what the generator is compared with: the teacher's published score, one measured likewise at the end,
        once the generator is there, or none; by default the published one, where it is by this detector and reference.
        It shapes no generator.
    allow_untrained: go on where the duration ends before the generator, or its adversarial part, would be trained.

    A run that was interrupted is continued; one that finished before is answered from the run directory, which moves
    no name but the one given. A run that finishes now is called `generator/latest` and by its teacher and mode, its
    last generator `generator/last`. `generator/best-DATASET` (with the detector, where it is not the dataset's usual
    one) and `generator/best` move only to a better one. Of two on the same dataset, under the same detector and against
    the same reference, the one that was scored on more images is the better, of as many the one with the lower score;
    others do not compare, and `generator/best` stays. say: takes a line where it stays, or where the answer is an old
    one.

    Overrides name fields of Recipe, Adversarial or Execution, or their flags: duration="2k" is duration_nimg=2000.
    With a teacher of one's own, the duration alone changes all that is counted in images in proportion.
    Source: SiDA (2410.14919), Algorithms 1 and 2.
    """
    teacher, generator = ref_text(teacher, "the teacher"), optional_ref(generator, "the generator")
    dataset, reference = optional_ref(dataset, "the dataset"), optional_ref(reference, "the reference")
    detector, vae = optional_ref(detector, "the detector"), optional_ref(vae, "the VAE")
    recipe_overrides = field_values(recipe_overrides, Recipe, Adversarial, Execution)
    settings = {f.name for f in dataclasses.fields(Execution)} & set(recipe_overrides)
    chosen = {name: recipe_overrides.pop(name) for name in settings}
    execution = dataclasses.replace(execution or Execution(), **chosen)
    store = Store.open(run)
    if name:
        store.check_name("generator", name)
    with rank0_first():
        asked_for = assembled(
            store,
            teacher=teacher,
            mode=mode,
            generator=generator,
            dataset=dataset,
            overrides=recipe_overrides,
            execution=execution,
            reference=reference,
            score=score,
            detector=detector,
            vae=vae,
            teacher_score=teacher_score,
            allow_untrained=allow_untrained,
            device=device,
            recheck=force,
        )
        words = ["distill", *option_words({"teacher": teacher, "mode": mode, "generator": generator})]
        words += option_words({"dataset": dataset, "ref": reference, "detector": detector, "vae": vae, "name": name})
        words += option_words(
            {"no_score": not score, "teacher_score": teacher_score, "allow_untrained": allow_untrained}
        )
        words += option_words(recipe_overrides, Recipe, Adversarial)
        questions = asked_for.questions(store, words, force=force, say=say)
        known = questions["best"].known()
    if not known:
        with _together(questions["best"]) as live:
            _distill(live, questions, asked_for, device, watch, teacher_score=teacher_score, force=force, say=say)
    with rank0_first():
        found = known or questions["best"].answer()
        assert found
        return name_artifact(store, found, [name] if name else [], say)


def _name_generators(store: Store, made: Mapping[str, Artifact], data: Artifact, say: download.OnLine) -> None:
    """Gives a finished run its names; see `distill` for which of them move."""
    new, recipe = made["best"], made["best"].params["recipe"]
    name_artifact(store, made["last"], ["last"])
    name_artifact(store, new, ["latest", f"{recipe['teacher']}-{recipe['mode']}".replace("/", "-")])
    detector = new.results["detector"]
    of_dataset = f"best-{plain_name(str(new.params['dataset']))}"
    of_dataset += "" if detector in (None, detector_name(data)) else f"-{plain_name(str(detector))}"
    for name in (of_dataset, "best"):
        try:
            old = store.resolve(f"generator/{name}", ["generator"])
        except SidaError:  # there is none, or it is damaged
            old = new
        verdict = _is_better(new, old)
        if old.oid == new.oid or verdict:
            name_artifact(store, new, [name])
        elif name == "best" and verdict is None:
            say(
                f"generator/best stays {old.oid[:12]} ({old.params['name']}, of {old.params['dataset']}), which does "
                f"not compare with this run; the best of its dataset is generator/{of_dataset}"
            )
        elif name == "best" or verdict is None:
            say(
                f"generator/latest {_told_score(new)} is not better than generator/{name} {_told_score(old)} "
                f"({old.params['name']}, {old.oid[:12]}); generator/{name} stays"
            )


def _is_better(new: Artifact, old: Artifact) -> bool | None:
    """Whether a generator did better than another by their selection scores; None where these do not compare."""

    def shared(generator: Artifact) -> list[object]:
        against = generator.inputs.get("reference", generator.inputs.get("dataset"))
        return [generator.params.get("dataset"), generator.results.get("detector"), against]

    def rank(generator: Artifact) -> tuple[int, float]:
        score, recipe = generator.results.get("selection_score"), generator.params.get("recipe")
        if not isinstance(score, int | float) or not isinstance(recipe, Mapping):
            return 0, 0.0
        return recipe.get("evaluate_num", 0), -score

    if rank(old)[0] == 0 and new.params["dataset"] == old.params.get("dataset"):
        return rank(new)[0] > 0
    return rank(new) > rank(old) if shared(new) == shared(old) else None


def _told_score(generator: Artifact) -> str:
    score = generator.results.get("selection_score")
    return f"{score:.4g}" if isinstance(score, int | float) else "(not scored)"


@contextmanager
def _together(question: Question) -> Iterator[LiveDir]:
    """The live directory of a question that several processes work on; the first one holds and fills it."""
    from sidactl.engine import ranks

    if ranks.rank_and_size()[0] > 0:
        place = Path(ranks.receive())
        yield LiveDir(place, is_writer=False)
        return
    with question.working() as live:
        ranks.broadcast_from_rank0(lambda: str(live.path))
        yield live


def _distill(
    live: LiveDir,
    questions: Mapping[str, Question],
    wanted: Assembled,
    device: str | None,
    watch: OnEvent | None,
    *,
    teacher_score: TeacherScore | None,
    force: bool,
    say: download.OnLine | None,
) -> None:
    """Trains, stores the last and the best generator under their keys, and a run that binds them."""
    import safetensors.torch

    from sidactl import report, sampling
    from sidactl.engine import configure, devices, ranks, sharding
    from sidactl.foreign import networks
    from sidactl.training import distillation, loop, state

    store = questions["best"].store
    recipe, execution, inputs, compared = wanted.recipe, wanted.execution, wanted.inputs, wanted.compared
    chosen_device = devices.pick_device(device)
    configure.passes_of(recipe, execution)  # what does not fit is told before anything is loaded
    sampler = OneStepSpec(sigma_init=recipe.sigma_init)
    teacher = load_net(store, inputs["teacher"], chosen_device)
    start = load_net(store, inputs["generator"], chosen_device) if "generator" in inputs else None
    load_vae = vae_loader(store, wanted.vae)
    detector, evaluate, notes = None, None, list(wanted.notes)
    facts = {"title": f"distill {recipe.teacher} {recipe.mode}", "teacher": recipe.teacher}
    if compared:
        assert wanted.detector
        if force and wanted.detector in catalog.DETECTORS:
            fetch_detector(wanted.detector, run=store.root, recheck=True)
        detector = load_detector(store, wanted.detector, chosen_device)
        facts["score_name"] = distance_name(detector)
        moments = commands_moments.moments(store, compared, detector, watch, recheck=force)
        try_scoring(detector, moments, start or teacher, sampler, load_vae)
        counts: Any = inputs["dataset"].results["class_counts"] if recipe.evaluate_labels == "dataset" else None
        tick = part_of(watch, "scoring the generator")
        eyes = [Eye("fid", detector, moments)]
        for metric in recipe.evaluate_also:
            by = METRICS[metric].detector
            other = load_detector(store, by, chosen_device) if by not in (None, wanted.detector) else detector
            needed = (
                commands_moments.moments(store, compared, other, watch, recheck=force) if METRICS[metric].need else None
            )
            eyes.append(Eye(metric, other, needed))
        evaluate = evaluation_of(eyes, sampler, recipe.evaluate_num, tick, counts or None, load_vae)
        entry = None if wanted.vae else commands_reference.published_as(compared)
        published = published_score(recipe, entry, distance_name(detector))
        if teacher_score is None:
            teacher_score = "measure" if published is None else "published"
        elif teacher_score == "published" and published is None:
            raise not_published(recipe, distance_name(detector))
        if teacher_score == "measure" and not is_teacher_scored(store, wanted):
            notes.append(
                f"at the end the teacher is scored, too, on {recipe.evaluate_num:,} images of "
                f"{sampler_of(inputs['teacher']).nfe} evaluations each; --teacher-score none leaves that out"
            )
    data = inputs["dataset"]
    batches = batches_for(store, data, recipe.batch_size, recipe.num_accumulation_rounds, recipe.seed, chosen_device)
    training = distillation.Distillation(recipe, teacher, start, batches, execution)
    if tried := find_batch_per_device(training, execution, live, chosen_device):
        notes.append(tried)
    schedule = state.Schedule(
        duration_nimg=recipe.duration_nimg,
        evaluate_every_nimg=recipe.evaluate_every_nimg,
        checkpoint_every_nimg=recipe.checkpoint_every_nimg,
        stop_if_nan_steps=recipe.stop_if_nan_steps,
        evaluate_early_nimg=recipe.evaluate_early_nimg,
        # So that a fine-tuning that only makes it worse ends with what it started from.
        evaluates_start=recipe.mode == "sid2a",
        patience=recipe.patience,
        patience_from_nimg=max(start or 0 for start in recipe.stages().values()),
    )
    history = run_training(training, schedule, live, evaluate, watch, facts, notes, wanted.warnings)
    last: tuple[int, float | None] = training.nimg, None
    best = last
    if detector:
        if history.best is None:
            raise SidaError("no evaluation gave a finite score", "Lower the learning rate.", exit_code=EXIT_FAILED)
        last, best = history.scores[-1], history.best
    net = sharding.gathered(training.ema, chosen_device)
    is_first = ranks.rank_and_size()[0] == 0
    untrained, made = recipe.untrained(), dict[str, Artifact]()
    also = {name: [[nimg, finite_or_none(value)] for nimg, value in points] for name, points in history.also.items()}
    made_with = {"vae": wanted.vae.oid} if wanted.vae else {}
    files: dict[str, dict[str, bytes]] = {}
    for which in ("last", "best") if is_first else ():
        if which == "best" and history.best:
            networks.load_weights(net, safetensors.torch.load(loop.best_weights(history, live)))
        files[which] = {"model.safetensors": loop.weights(net)}
        try:
            files[which]["grid.png"] = preview_of(net, sampler, load_vae)
        except SidaError as error:
            # Of a run that was scored the last may draw what is no image; one that is not may be without its VAE.
            if isinstance(error, sampling.NotFiniteError) != (compared is not None):
                raise
            if compared is None and which == "best" and say:
                say(f"warning: there is no picture of the generator: {error.message}")

    def keep(of_teacher: float | None, *, is_published: bool = False) -> None:
        """Stores the last and the best generator, beside this score of the teacher."""
        if detector:
            curve = report.curve(
                history.scores,
                teacher_score=of_teacher,
                title=f"{recipe.mode} of {recipe.teacher}, one step",
                ylabel=distance_name(detector),
            )
            for kept in files.values():
                kept["curve.png"] = curve
        for which, (nimg, score) in (("last", last), ("best", best)):
            made[which] = store.put(
                "generator",
                files[which],
                inputs={role: artifact.oid for role, artifact in inputs.items()} | made_with,
                params={
                    "name": f"{recipe.teacher}-{recipe.mode}",
                    "net": net.spec.to_json(),
                    "sampler": sampler.to_json(),
                    "dataset": recipe.dataset,
                    "recipe": recipe.to_json(),
                    **({"vae": vae_label(wanted.vae)} if wanted.vae else {}),
                },
                results={
                    "images_seen": nimg,
                    "selection_score": finite_or_none(score),
                    "teacher_score": of_teacher,
                    **({"teacher_score_is": "published"} if is_published else {}),
                    "detector": detector_label(detector) if detector else None,
                    "scores": [[n, finite_or_none(s)] for n, s in history.scores],
                    **({"also": also} if also else {}),
                    "skipped_updates": sum(training.skipped.total.values()),
                    **({"untrained": untrained} if untrained else {}),
                },
            )

    if detector and teacher_score == "measure":
        if is_first and not is_teacher_scored(store, wanted):  # hours may pass, and the generator is wanted before
            keep(None)
            for which, ref in (("last", "last"), ("best", "latest")):
                name_artifact(store, made[which], [ref])
            (say or (lambda line: None))("generator/latest is there already; scoring the teacher goes on")
        measured = score_teacher(store, wanted, device, watch, force)
        if is_first:
            keep(measured)
    elif is_first and detector and teacher_score == "published":
        keep(published, is_published=True)
    elif is_first:
        keep(None)
    if not is_first:
        return
    record = store.put(
        "run", {}, inputs={which: artifact.oid for which, artifact in made.items()}, params=recipe.to_json()
    )
    # A run keeps its generators reachable when a later run takes over the names best and last.
    store.set_ref("run", f"{recipe.teacher}-{recipe.mode}-{record.oid[:8]}".replace("/", "-"), record.oid)
    _name_generators(store, made, data, say or (lambda line: None))
    # The best comes last: once it is there, the question is answered.
    for which, artifact in made.items():
        questions[which].record(artifact)


def finetune_sid2a(*, teacher: Ref, generator: Ref, **options: Any) -> Artifact:
    """`distill` in mode sid2a: SiDA started from a generator; options as there.

    Source: SiDA (2410.14919), section 4.3.
    """
    return distill(teacher=teacher, mode="sid2a", generator=generator, **options)
