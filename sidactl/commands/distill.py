"""The commands `distill` and `finetune-sid2a`: assemble, train, store."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl.commands import moments as commands_moments
from sidactl.commands import reference as commands_reference
from sidactl.commands.assemble import Assembled, assembled, in_fastest_form
from sidactl.commands.evaluation import Eye, evaluation_of, is_teacher_scored, score_teacher, try_scoring
from sidactl.commands.fetch import fetch_detector
from sidactl.commands.generators import draw, keep, name_run
from sidactl.commands.inputs import Ref, field_values, optional_ref, ref_text
from sidactl.commands.pairs import pair_source, training_pairs
from sidactl.commands.plan import TeacherScore, not_published, published_score
from sidactl.commands.question import Question, name_artifact, rank0_first
from sidactl.commands.resolve import load_net
from sidactl.commands.running import OnEvent, batches_for, run_training
from sidactl.commands.samplers import sampler_of
from sidactl.commands.scorers import load_detector
from sidactl.commands.scores import METRICS, detector_label, name_of
from sidactl.commands.tasks import option_words
from sidactl.commands.vae import vae_loader
from sidactl.commands.words import RunDir, part_of
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.foreign import download, perceptual
from sidactl.recipes import FROM_GENERATOR, Adversarial, Execution, FdLossRecipe, PairedRecipe, recipe_classes
from sidactl.store import Artifact, LiveDir, Store

if TYPE_CHECKING:
    import torch

    from sidactl.detectors import Detector
    from sidactl.methods.base import Distance, TrainingDetector
    from sidactl.nets import Preconditioned
    from sidactl.training.distillation import Distillation
    from sidactl.training.state import Evaluate, History


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
    guide: Ref | None = None,
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
    guide: a weaker teacher that the teacher is moved away from, teacher_guidance times as far; without it that is the
        teacher itself without labels.
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
    guide = optional_ref(guide, "the guide")
    recipe_overrides = field_values(recipe_overrides, *recipe_classes(), Adversarial, Execution)
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
            guide=guide,
            device=device,
            recheck=force,
        )
        words = ["distill", *option_words({"teacher": teacher, "mode": mode, "generator": generator})]
        words += option_words({"guide": guide})
        words += option_words({"dataset": dataset, "ref": reference, "detector": detector, "vae": vae, "name": name})
        words += option_words(
            {"no_score": not score, "teacher_score": teacher_score, "allow_untrained": allow_untrained}
        )
        words += option_words(recipe_overrides, *recipe_classes(), Adversarial)
        questions = asked_for.questions(store, words, force=force, say=say)
        known = questions["best"].known()
    if not known:
        with _together(questions["best"]) as live:
            _distill(live, questions, asked_for, device, watch, teacher_score=teacher_score, force=force, say=say)
    with rank0_first():
        found = known or questions["best"].answer()
        assert found
        return name_artifact(store, found, [name] if name else [], say)


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


@dataclass(frozen=True)
class _Scoring:
    """How a run scores its generators, and what of its teacher's score is known before it starts."""

    detector: "Detector | None" = None
    evaluate: "Evaluate | None" = None
    teacher: TeacherScore = "none"
    published: float | None = None
    notes: Sequence[str] = ()
    trained_by: str | None = None
    """the detector whose features the generators were trained on"""


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
    """Trains, stores the last and the best generator as the answers to their questions, and a run that binds them."""
    from sidactl.engine import devices, ranks, sharding

    store, chosen_device = questions["best"].store, devices.pick_device(device)
    if isinstance(wanted.recipe, PairedRecipe):
        teacher, num = wanted.inputs["teacher"], wanted.recipe.num_pairs
        pairs = training_pairs(store, teacher, num, device, watch, force=force)
        wanted = dataclasses.replace(wanted, inputs={**wanted.inputs, "pairs": pairs})
    training, scoring, history = _train(store, live, wanted, chosen_device, watch, teacher_score, force)
    net = sharding.gathered(training.ema, chosen_device)
    drawn = None
    if ranks.rank_and_size()[0] == 0:
        num_skipped = sum(training.skipped.total.values())
        drawn = draw(store, wanted, net, training.nimg, num_skipped, history, live, say)
    if scoring.teacher == "measure":
        if drawn and not is_teacher_scored(store, wanted):  # hours may pass, and the generator is wanted before
            made = keep(store, wanted, drawn, scoring.detector, None, trained_by=scoring.trained_by)
            for which, ref in (("last", "last"), ("best", "latest")):
                name_artifact(store, made[which], [ref])
            (say or (lambda line: None))("generator/latest is there already; scoring the teacher goes on")
        of_teacher = score_teacher(store, wanted, device, watch, force)
    else:
        of_teacher = scoring.published if scoring.teacher == "published" else None
    if not drawn:
        return
    is_published = scoring.teacher == "published"
    by = scoring.trained_by
    made = keep(store, wanted, drawn, scoring.detector, of_teacher, is_published=is_published, trained_by=by)
    name_run(store, wanted, made, say or (lambda line: None))
    # `best` is recorded last: its presence is what marks the run as finished.
    for which, artifact in made.items():
        questions[which].record(artifact)


def _train(
    store: Store,
    live: LiveDir,
    wanted: Assembled,
    device: "torch.device",
    watch: OnEvent | None,
    teacher_score: TeacherScore | None,
    force: bool,
) -> "tuple[Distillation, _Scoring, History]":
    """Loads the nets and trains to the end, or goes on to it."""
    from sidactl.engine import configure
    from sidactl.training import distillation, state

    recipe, execution, inputs = wanted.recipe, wanted.execution, wanted.inputs
    configure.passes_of(recipe, execution)  # what does not fit is told before anything is loaded

    def load() -> "tuple[Preconditioned, Preconditioned | None, Preconditioned | None]":
        start, guide = (
            load_net(store, inputs[role], device) if role in inputs else None for role in ("generator", "guide")
        )
        return load_net(store, inputs["teacher"], device), start, guide

    loaded = [load()]
    facts, scoring = {"title": f"distill {recipe.teacher} {recipe.mode}", "teacher": recipe.teacher}, _Scoring()
    if wanted.compared:
        scoring = _scoring(
            store, wanted, wanted.compared, loaded[0][1] or loaded[0][0], device, watch, teacher_score, force
        )
        assert scoring.detector
        facts["score_name"] = name_of(recipe.evaluate_by, scoring.detector)
    pairs = pair_source(store, inputs["teacher"], inputs["pairs"], device) if "pairs" in inputs else None
    batches = batches_for(
        store, inputs["dataset"], recipe.batch_size, recipe.num_accumulation_rounds, recipe.seed, device, pairs
    )
    trained_on, label = _trained_on(store, wanted, device, watch, force)
    scoring = dataclasses.replace(scoring, trained_by=label)

    def make(execution: Execution) -> distillation.Distillation:
        teacher, start, guide = loaded.pop() if loaded else load()  # a form may change nets
        return distillation.Distillation(recipe, teacher, start, batches, execution, trained_on, guide)

    training, tried = in_fastest_form(make, execution, live, device)
    notes = [*wanted.notes, *scoring.notes, *training.notes, *tried]
    schedule = state.Schedule(
        duration_nimg=recipe.duration_nimg,
        evaluate_every_nimg=recipe.evaluate_every_nimg,
        checkpoint_every_nimg=recipe.checkpoint_every_nimg,
        stop_if_nan_steps=recipe.stop_if_nan_steps,
        evaluate_early_nimg=recipe.evaluate_early_nimg,
        # So that a fine-tuning that only makes it worse ends with what it started from.
        evaluates_start=recipe.mode in FROM_GENERATOR,
        patience=recipe.patience,
        patience_from_nimg=max(start or 0 for start in recipe.stages().values()),
    )
    history = run_training(training, schedule, live, scoring.evaluate, watch, facts, notes, wanted.warnings)
    if scoring.detector and history.best is None:
        raise SidaError("no evaluation gave a finite score", "Lower the learning rate.", exit_code=EXIT_FAILED)
    return training, scoring, history


def _trained_on(
    store: Store, wanted: Assembled, device: "torch.device", watch: OnEvent | None, force: bool
) -> "tuple[TrainingDetector | Distance | None, str | None]":
    """What the recipe trains on: a detector, with the moments of real images where it needs them, and its label.

    Or the distance that it regresses by, which has none.
    """
    import torch

    from sidactl.methods.base import TrainingDetector

    if isinstance(wanted.recipe, PairedRecipe) and wanted.recipe.regression == "lpips":
        return perceptual.lpips_distance(device), None
    name = wanted.recipe.trained_on
    if name is None:
        return None, None
    if force:
        fetch_detector(name, run=store.root, recheck=True)
    detector = load_detector(store, name, device)
    made = TrainingDetector(detector.differentiable, detector.differentiable_maps, detector.widths)
    if isinstance(wanted.recipe, FdLossRecipe):
        compared = wanted.compared or wanted.inputs["dataset"]
        found = commands_moments.moments(store, compared, detector, watch, recheck=force)
        if found is None:
            raise SidaError("fd-loss needs a run directory that it can write to", "Pass another --run.")
        mean, covariance = torch.from_numpy(found.mean), torch.from_numpy(found.covariance)
        made = dataclasses.replace(made, mean=mean, covariance=covariance)
    return made, detector_label(detector)


def _scoring(
    store: Store,
    wanted: Assembled,
    compared: Artifact,
    net: "Preconditioned",
    device: "torch.device",
    watch: OnEvent | None,
    teacher_score: TeacherScore | None,
    force: bool,
) -> _Scoring:
    """Loads what scores the generators, and tries it on two images of `net`."""
    assert wanted.detector
    recipe, inputs = wanted.recipe, wanted.inputs
    sampler, load_vae = recipe.sampler(), vae_loader(store, wanted.vae)
    if force and not commands_moments.is_detector_file(wanted.detector):
        fetch_detector(wanted.detector, run=store.root, recheck=True)
    detector = load_detector(store, wanted.detector, device)
    eyes = list[Eye]()
    for metric in (recipe.evaluate_by, *recipe.evaluate_also):
        by, need = METRICS[metric].detector, METRICS[metric].need
        other = load_detector(store, by, device) if by not in (None, wanted.detector) else detector
        against = commands_moments.compared_with(store, compared, need, other, watch, recheck=force)
        if not eyes:
            known = against if isinstance(against, commands_moments.Moments) else None
            try_scoring(detector, known, net, sampler, load_vae)
        eyes.append(Eye(metric, other, against))
    counts = inputs["dataset"].results["class_counts"] if recipe.evaluate_labels == "dataset" else None
    tick = part_of(watch, "scoring the generator")
    evaluate = evaluation_of(eyes, sampler, recipe.evaluate_num, tick, counts or None, load_vae)
    entry = None if wanted.vae else commands_reference.published_as(compared)
    score_name = name_of(recipe.evaluate_by, detector)
    published, notes = published_score(recipe, entry, score_name), list[str]()
    if teacher_score is None:
        teacher_score = "measure" if published is None else "published"
    elif teacher_score == "published" and published is None:
        raise not_published(recipe, score_name)
    if teacher_score == "measure" and not is_teacher_scored(store, wanted):
        notes.append(
            f"at the end the teacher is scored, too, on {recipe.evaluate_num:,} images of "
            f"{sampler_of(inputs['teacher']).nfe} evaluations each; --teacher-score none leaves that out"
        )
    return _Scoring(detector, evaluate, teacher_score, published, notes)


def finetune_sid2a(*, teacher: Ref, generator: Ref, **options: Any) -> Artifact:
    """`distill` in mode sid2a: SiDA started from a generator; options as there.

    Source: SiDA (2410.14919), section 4.3.
    """
    return distill(teacher=teacher, mode="sid2a", generator=generator, **options)
