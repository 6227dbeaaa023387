"""One function per command, of the same name: refs in, an Artifact or a score out. The only glue, and the Python API.

torch and all that needs it are imported where they are used, so that a question asked before is answered at once.
"""

import dataclasses
import json
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias

from sidactl import catalog, preflight, references, scores
from sidactl.artifacts import (
    NET_FILES,
    NETS,
    RunDir,
    Tick,
    agreed_answer,
    answered,
    asked,
    at_work,
    check_has_file,
    check_vae_is_there,
    dataset_called,
    fetch_detector,
    first_alone,
    image_source,
    is_alone,
    is_of_latents,
    load_dataset,
    load_net,
    mapping,
    named,
    other_vae,
    part_of,
    plain_name,
    require_images,
    resolve,
    shape_for_nets,
    source_identity,
    tell_old,
    vae_digest,
    vae_for,
    vae_label,
    vae_loader,
)
from sidactl.artifacts import fetch_teacher as fetch_teacher
from sidactl.artifacts import load as load
from sidactl.artifacts import prepare_data as prepare_data
from sidactl.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, MissingError, SidaError
from sidactl.features import images_per_batch, stats_of
from sidactl.foreign import download
from sidactl.inputs import Count, Ref, Seeds, count_of, field_values, optional_ref, ref_text, run_of, seeds_of, whole
from sidactl.live import Question, option_words
from sidactl.recipes import (
    MODES,
    Adversarial,
    Execution,
    HeunSpec,
    Memory,
    Mode,
    NetSpec,
    OneStepSpec,
    Recipe,
    Setting,
    TeacherRecipe,
    override,
    passes_of,
)
from sidactl.references import class_of, detector_name
from sidactl.scores import (
    METRICS,
    ScoreOptions,
    chosen_sampler,
    detector_label,
    distance_name,
    is_answered,
    load_detector,
    require_classes,
    sampler_of,
    score_name,
)
from sidactl.scores import evaluate as evaluate
from sidactl.scores import fd_dinov2 as fd_dinov2
from sidactl.scores import fid as fid
from sidactl.scores import inception_score as inception_score
from sidactl.scores import prec_recall as prec_recall
from sidactl.store import Artifact, BrokenError, LiveDir, Store

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from sidactl.detectors import Detector
    from sidactl.loop import Evaluate, Event, History, Schedule, Training
    from sidactl.nets import Preconditioned
    from sidactl.trainer import Distillation, MicroBatches

Watch = Callable[["Event"], None]
TeacherScore: TypeAlias = Literal["published", "measure", "none"]
TEACHER_SCORES: tuple[TeacherScore, ...] = ("published", "measure", "none")

PREVIEW_SEEDS = range(64)
# Far from the seeds that anybody scores with, so that the best checkpoint is not chosen by the images it is judged on.
SELECTION_SEED = 1 << 31


def dataset_stats(
    ref: Ref,
    *,
    detector: str | os.PathLike[str] | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    tick: Tick | None = None,
) -> Artifact:
    """The feature statistics of all images of a dataset, as scores compare with them; by default of its own detector.

    Latents have those of the pixels that they were made from. A name of the dataset gives them one, with the detector.
    """
    from sidactl.engine.devices import pick_device

    store, detector = Store.open(run_of(ref, run)), optional_ref(detector, "the detector")
    with first_alone():
        data = resolve(store, ref_text(ref), ["dataset"], recheck=force)
        require_images(data)
        names = [name.partition("/")[2] for name in store.names_of(data.oid)]
        references.refuse_latents(data := references.pixels_of(store, data))
        called = detector or detector_name(data)
        if called in catalog.DETECTORS:
            fetch_detector(called, run=store.root, recheck=force)
    chosen = load_detector(store, called, pick_device(device))
    store.check_writable()
    _, made = stats_of(store, data, chosen, tick, recheck=force)
    assert made
    return named(store, made, [f"{name}-{chosen.name}" for name in names])


def train_teacher(
    dataset: Ref,
    *,
    name: str,
    net: str | None = None,
    recipe: TeacherRecipe | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    say: download.Say | None = download.to_stderr,
    watch: Watch | None = None,
    **recipe_overrides: Any,
) -> Artifact:
    """A teacher trained from scratch on a dataset with the EDM loss; the EMA net at the end of training.

    net: the form to start from, ddpmpp (default), ncsnpp, adm or edm2, small, and shaped to the dataset. Overrides name
    fields of TeacherRecipe or NetSpec, or their flags: duration="50k" is duration_nimg=50_000. say: takes the line that
    an answer is an old one.
    """
    if net not in (None, *catalog.SMALL_NETS):
        raise SidaError(f"the net must be one of {', '.join(catalog.SMALL_NETS)}, got {net!r}", "Pass --net ddpmpp.")
    if not is_alone():
        raise SidaError("train-teacher runs in one process", "Start it without torchrun.")
    store = Store.open(run)
    store.check_name("teacher", name)
    data = resolve(store, ref_text(dataset, "the dataset"), ["dataset"], recheck=force)
    require_images(data)
    recipe_overrides = field_values(recipe_overrides, TeacherRecipe, NetSpec)
    recipe = _teacher_recipe(recipe, net, data, recipe_overrides)
    key = store.key("train-teacher", {"recipe": recipe.to_json()}, {"dataset": data.oid})
    if not force and (known := asked(store, key)):
        tell_old(store, key, say)
        return named(store, known, [name], say)
    words = ["train-teacher", ref_text(dataset, "the dataset"), *option_words({"name": name, "net": net})]
    question = Question(
        command="train-teacher",
        subject=recipe.dataset,
        words=[*words, *option_words(recipe_overrides, TeacherRecipe, NetSpec)],
        params=recipe.to_json(),
        inputs={"dataset": data.oid},
    )
    with at_work(store, key, question) as live:
        import torch

        from sidactl import loop, nets, trainer
        from sidactl.engine.devices import pick_device

        chosen_device = pick_device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            built = nets.build(recipe.net).to(chosen_device)
        batches = _batches(store, data, recipe.batch_size, 1, recipe.seed, chosen_device)
        training = trainer.Pretraining(recipe, built, batches)
        schedule = loop.Schedule(
            duration_nimg=recipe.duration_nimg,
            evaluate_every_nimg=recipe.duration_nimg,
            checkpoint_every_nimg=max(recipe.duration_nimg // 10, recipe.batch_size),
            stop_if_nan_steps=recipe.stop_if_nan_steps,
        )
        facts = {"title": f"train-teacher {name}"}
        shape = f"{recipe.net.img_resolution}x{recipe.net.img_resolution}x{recipe.net.img_channels}"
        seen = f"{data.results['num_images']:,} images of {shape}, {recipe.net.label_dim or 'no'} classes"
        _train(training, schedule, live, None, watch, facts, notes=[seen], warnings=recipe.unusual())
        params = {
            "name": name,
            "net": recipe.net.to_json(),
            "sampler": HeunSpec(convention="edm2" if recipe.net.architecture == "EDM2" else "edm").to_json(),
            "dataset": data.params["name"],
            "recipe": recipe.to_json(),
            "licence": None,
            **({"vae": data.params["vae"]} if "vae" in data.inputs else {}),
        }
        artifact = store.put(
            "teacher", {"model.safetensors": loop.weights(training.ema)}, inputs={"dataset": data.oid}, params=params
        )
        return answered(store, key, artifact, "train-teacher", refs=[name], say=say)


def _teacher_recipe(
    recipe: TeacherRecipe | None, form: str | None, data: Artifact, overrides: Mapping[str, Any]
) -> TeacherRecipe:
    _check_trainable(data)
    shape = dict(zip(("img_resolution", "img_channels", "label_dim"), shape_for_nets(data), strict=True))
    net_fields = {f.name for f in dataclasses.fields(NetSpec)}
    fields = {f.name for f in dataclasses.fields(TeacherRecipe)} - {"dataset", "net"}
    if unknown := sorted(set(overrides) - net_fields - fields):
        raise SidaError(f"unknown recipe field {unknown[0]!r}", f"Fields are {', '.join(sorted(fields | net_fields))}.")
    net = dataclasses.replace(
        recipe.net if recipe else catalog.SMALL_NETS[form or "ddpmpp"],
        **(shape | {k: v for k, v in overrides.items() if k in net_fields}),
    )
    _check_fit(shape_for_nets(data), net, "network")
    # EDM2's normalised weights turn by the same angle at ten times the rate.
    lr = 1e-2 if net.architecture == "EDM2" else TeacherRecipe.lr
    base = recipe or TeacherRecipe(dataset="", net=net, lr=lr)
    rest = {k: v for k, v in overrides.items() if k in fields}
    return dataclasses.replace(base, dataset=str(data.params["name"]), net=net, **rest)


@dataclass(frozen=True)
class Scoring:
    """How a run is scored while it trains."""

    detector: str
    reference: preflight.Input
    is_default: bool
    """whether it is the detector that would be taken without being asked for"""

    @property
    def score_name(self) -> str:
        return score_name(self.detector)


@dataclass(frozen=True)
class Plan:
    """What `distill` would do: the complete recipe, and the inputs by role (a catalog name where nothing is stored)."""

    recipe: Recipe
    default: Recipe
    """the recipe without what the user changed"""
    inputs: Mapping[str, str]
    memory: Mapping[tuple[int, bool], Memory]
    """what a device needs, by the number of devices that share a batch, and whether the networks are sharded"""
    cost: catalog.Cost | None
    scoring: Scoring | None
    """None: the last generator is the result"""
    needs: Sequence[preflight.Need]
    """what is fetched or made before training begins"""
    missing: Sequence[SidaError]
    """what nobody but the user can get, and without which the run is refused"""
    warnings: Sequence[str]
    notes: Sequence[str]
    free_bytes: int
    decodes_otherwise: bool
    """whether by another VAE than the published numbers"""

    @property
    def hours(self) -> float | None:
        """What the published run's machine would need; None where its pace is not published."""
        return self.recipe.duration_nimg / 1000 * self.cost.sec_per_kimg / 3600 if self.cost else None

    @property
    def teacher_score(self) -> TeacherScore:
        """What the generator is compared with at the end, unless something else is asked for."""
        entry = self.scoring.reference.entry if self.scoring and not self.decodes_otherwise else None
        compared = entry if isinstance(entry, catalog.Reference) else None
        by = self.scoring.score_name if self.scoring else ""
        return "measure" if _published_score(self.recipe, compared, by) is None else "published"

    @property
    def num_evaluations(self) -> int:
        """How often the generator is scored."""
        every = max(self.recipe.evaluate_every_nimg, self.recipe.batch_size)
        early = [n for n in self.recipe.evaluate_early_nimg if n < self.recipe.duration_nimg and n % every]
        return -(-self.recipe.duration_nimg // every) + len(early) + (self.recipe.mode == "sid2a")


def plan(
    *,
    teacher: str,
    mode: str,
    generator: str | None,
    dataset: str | None,
    store: Store,
    overrides: Mapping[str, Any],
    execution: Execution | None = None,
    reference: str | None = None,
    score: bool = True,
    detector: str | None = None,
    vae: str | None = None,
    teacher_score: TeacherScore | None = None,
    allow_untrained: bool = False,
    device: str | None = None,
) -> Plan:
    """The resolved recipe and inputs of a distillation, with all checked that can be known before it begins.

    Raises SidaError as the run would; writes nothing, fetches nothing, and needs no torch.
    """
    if mode not in MODES:
        raise SidaError(f"mode must be one of {', '.join(MODES)}, got {mode!r}", "Pass --mode sida.")
    if mode == "sid2a" and generator is None:
        raise SidaError(
            "mode sid2a starts from a generator, got none", "Pass --generator REF: distill one with --mode sid first."
        )
    if mode != "sid2a" and generator is not None:
        raise SidaError(f"mode {mode} starts from the teacher, got generator {generator!r}", "Use --mode sid2a for it.")
    for flag, given in (("--ref", reference), ("--detector", detector)):
        if given is not None and not score:
            raise SidaError(f"{flag} is for scoring, got {given} and --no-score", "Leave out one of the two.")
    if teacher_score not in (None, *TEACHER_SCORES):
        what = f"the teacher's score must be one of {', '.join(TEACHER_SCORES)}, got {teacher_score!r}"
        raise SidaError(what, "Pass --teacher-score measure.")
    preflight.check_device(device)
    chosen: Mode = next(m for m in MODES if m == mode)
    taught = _teacher_of(store, teacher)
    net = NetSpec.from_json(mapping(taught.params["net"]))
    name, own_dataset = str(taught.params["name"]), taught.params["dataset"]
    if taught.artifact:
        num_parameters = _num_parameters(store.path(taught.artifact, "model.safetensors"))
    else:
        num_parameters = catalog.NUM_PARAMETERS[name]
    recipe = catalog.recipe_for(name, chosen, net, num_parameters)
    if name not in catalog.TEACHERS:
        recipe = _suited(recipe, taught, overrides)
    if not (dataset or own_dataset):
        raise SidaError(f"teacher {teacher} does not say what it was trained on", "Pass --dataset REF.")
    default = recipe
    recipe = dataclasses.replace(override(recipe, overrides), dataset=dataset or str(own_dataset))
    settings, notes = execution or Execution(), list[str]()
    passes_of(recipe, settings, 0, int(os.environ.get("WORLD_SIZE", "1")))
    warnings = recipe.unusual()
    if refusal := preflight.check_stages(recipe):
        if not allow_untrained:
            raise refusal
        warnings.append(refusal.message)
    inputs = {"teacher": teacher, "dataset": recipe.dataset}
    used = [taught]
    if generator:
        inputs["generator"] = generator
        used.append(start := preflight.find(store, generator, ["generator"]))
        if start.params:
            _check_generator(start.params, taught.params)
        if (began := _mode_of(start)) not in (None, "sid"):
            notes.append(f"SiD2A starts from a generator of mode sid, {generator} is one of mode {began}")
    data, missing = _planned_data(store, recipe, dataset)
    if data:
        used.append(data)
        if recipe.mode != "sid":
            preflight.check_images(data)
        if data.artifact:
            _check_trainable(data.artifact)
        _check_fit(preflight.shape_of(data), net, "teacher")
    if dataset is None and recipe.mode == "sid" and not (data and data.has_images):
        labels = next((e.name for e in catalog.DATASETS.values() if e.labels_of == recipe.dataset), None)
        way = f", each as often; --dataset {labels} downloads the published ones" if labels else ""
        notes.append(f"dataset {recipe.dataset}: mode sid needs no images, training on classes alone{way}")
    scoring, needs = None, [source.need for source in used if source.need]
    if score:
        to_come = preflight.Input(recipe.dataset, None, catalog.DATASETS.get(recipe.dataset)) if missing else data
        scoring, more, nothing = _planned_scoring(store, recipe, net, taught, to_come, reference, detector)
        needs += [need for need in more if need not in needs]
        for metric in recipe.evaluate_also if scoring else ():
            assert scoring
            try:
                more = _check_further(store, metric, recipe, net, scoring)
                needs += [need for need in more if need not in needs]
            except SidaError as error:
                if "evaluate_also" in overrides:
                    raise
                notes.append(f"{metric} is left out of the evaluations: {error.message}")
                others = tuple(other for other in recipe.evaluate_also if other != metric)
                recipe = dataclasses.replace(recipe, evaluate_also=others)
        if scoring and reference is None:
            notes += _of_published(scoring.reference, data)
        if nothing:
            notes.append(f"nothing is scored, and the last generator is the result: {nothing}")
    if not scoring and overrides.get("evaluate_also"):
        raise SidaError("--evaluate-also is for runs that are scored, this one is not", "Leave it out.")
    if not score:
        notes.append("nothing is scored, and the last generator is the result")
    needs += preflight.vae(store, vae, taught, is_needed=scoring is not None)
    if vae is None:
        own = vae_for(store, None, taught.artifact) if taught.artifact else None
        warnings += _of_other_vae(own, [each.artifact for each in used if each.artifact])
    free_bytes = preflight.check_disk(store, num_parameters)
    rounds = recipe.num_accumulation_rounds
    memory = {
        (num_devices, shard): Memory.of(
            recipe,
            net,
            num_parameters,
            dataclasses.replace(settings, shard=shard, compile=False),
            num_devices=num_devices,
        )
        for num_devices in range(1, rounds + 1)
        if rounds % num_devices == 0
        for shard in (False, True)
    }
    cost = catalog.COSTS.get((recipe.teacher, recipe.mode))
    otherwise = vae not in (None, catalog.VAE_NAME)
    made = Plan(recipe, default, inputs, memory, cost, scoring, needs, missing, warnings, notes, free_bytes, otherwise)
    if scoring and teacher_score == "published" != made.teacher_score:
        raise _not_published(recipe, scoring.score_name)
    return made


def _of_other_vae(vae: Artifact | None, inputs: Sequence[Artifact]) -> list[str]:
    """Warnings of inputs of a run on latents that were made with another VAE than decodes what it draws."""
    return [told for artifact in inputs if (told := other_vae(artifact, vae))]


def _suited(recipe: Recipe, teacher: preflight.Input, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe for a teacher of one's own, with the noise levels that it was trained on, and for the duration asked."""
    trained = teacher.params.get("recipe")
    if isinstance(trained, Mapping):
        recipe = dataclasses.replace(recipe, P_mean=trained["P_mean"], P_std=trained["P_std"])
    return recipe.lasting(overrides["duration_nimg"]) if "duration_nimg" in overrides else recipe


def _planned_data(store: Store, recipe: Recipe, asked: str | None) -> tuple[preflight.Input | None, list[SidaError]]:
    """The dataset to train on; none where mode sid takes classes alone, or where the user has to prepare it first."""
    try:
        if asked is None:
            return preflight.dataset_called(store, recipe.dataset, may_download=recipe.mode != "sid"), []
        return preflight.find(store, asked, ["dataset"]), []
    except SidaError as error:
        if asked is None and recipe.mode == "sid":
            return None, []
        entry = catalog.DATASETS.get(recipe.dataset)
        if entry is None or entry.builtin:
            raise
        return None, [error]


def _of_published(compared: preflight.Input, data: preflight.Input | None) -> Iterator[str]:
    """What to know of a run that is scored against published statistics without having asked for them."""
    if not isinstance(compared.entry, catalog.Reference):
        return
    name, known = compared.entry.name, catalog.DATASETS[compared.entry.dataset].num_images
    results = data.artifact.results if data and data.artifact else {}
    held = results.get("num_images") if results.get("kind") != "labels" else None
    of_fewer = f" (of {known:,} images, the dataset has {held:,})" if known and held not in (None, known) else ""
    yield f"scored against the published statistics {name}, as the published runs were{of_fewer}; --ref takes others"


def _planned_scoring(
    store: Store,
    recipe: Recipe,
    net: NetSpec,
    teacher: preflight.Input,
    data: preflight.Input | None,
    asked: str | None,
    detector: str | None,
) -> tuple[Scoring | None, list[preflight.Need], str | None]:
    """What the run is scored with and against, and what that needs; or why it is not, in mode sid alone."""
    try:
        compared = preflight.reference(store, asked, teacher, data)
    except SidaError as error:
        if _needs_reference(recipe, asked, detector, data.artifact if data else None) or error.exit_code != EXIT_USAGE:
            raise
        return None, [], error.message
    default = preflight.default_detector(compared)
    chosen = detector or default
    needs = preflight.check_detector(store, chosen, net, compared)
    if compared.need:
        needs.insert(0, compared.need)
    return Scoring(chosen, compared, chosen == default), needs, None


def _check_further(store: Store, metric: str, recipe: Recipe, net: NetSpec, scoring: Scoring) -> list[preflight.Need]:
    """Refuses a further score of evaluations that this run cannot have; what it needs."""
    by = METRICS[metric].detector
    if by == scoring.detector:
        raise SidaError(f"{metric} is the first score of this run already", "Leave out --evaluate-also.")
    if by:
        try:
            return preflight.check_detector(store, by, net, scoring.reference)
        except SidaError as error:
            hint = f"Leave {metric} out of --evaluate-also, or pass a --ref that has it."
            raise SidaError(error.message, hint, exit_code=error.exit_code) from error
    require_classes(scoring.detector)
    if recipe.evaluate_num < (least := scores.DEFAULTS["num_splits"]):
        raise SidaError(f"the inception score needs at least {least} images", "Pass a larger --evaluate-num.")
    return []


def _needs_reference(recipe: Recipe, asked: str | None, detector: str | None, data: Artifact | None) -> bool:
    """Whether a run must be scored: not in mode sid, with classes alone, where nothing was asked for."""
    is_of_images = data is not None and data.results["kind"] != "labels"
    return asked is not None or detector is not None or recipe.mode != "sid" or is_of_images


def _num_parameters(path: Path) -> int:
    """Values in a safetensors file, by its header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _teacher_of(store: Store, text: str) -> preflight.Input:
    """A teacher; for a word that is neither stored nor in the catalog the error has the nearest name."""
    if _is_foreign(text):
        what = f"teacher {text} must be imported before it can be planned with"
        raise SidaError(what, f"Import it first: sidactl fetch-teacher {shlex.quote(text)}")
    try:
        return preflight.find(store, text, ["teacher"])
    except SidaError:
        if text in catalog.COMPARISONS:
            check_has_file(catalog.COMPARISONS[text])
        if text in catalog.TEACHERS or all(c in "0123456789abcdef" for c in text) or "/" in text:
            raise
        catalog.teacher(text)
        raise


def _is_foreign(text: str) -> bool:
    return "://" in text or Path(text).suffix.lower() in NET_FILES


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
    say: download.Say | None = download.to_stderr,
    watch: Watch | None = None,
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
    with first_alone():
        asked_for = _resolved(
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
        keys = asked_for.keys(store)
        is_known = not force and asked(store, keys["best"]) is not None
    if is_known:
        tell_old(store, keys["best"], say)
    else:
        words = ["distill", *option_words({"teacher": teacher, "mode": mode, "generator": generator})]
        words += option_words({"dataset": dataset, "ref": reference, "detector": detector, "vae": vae, "name": name})
        words += option_words(
            {"no_score": not score, "teacher_score": teacher_score, "allow_untrained": allow_untrained}
        )
        words += option_words(recipe_overrides, Recipe, Adversarial)
        with _together(store, keys["best"], asked_for.question(words)) as live:
            _distill(store, live, keys, asked_for, device, watch, teacher_score=teacher_score, force=force, say=say)
    with first_alone():
        found = store.asked(keys["best"])
        assert found
        return named(store, found, [name] if name else [], say)


def _name_generators(store: Store, made: Mapping[str, Artifact], data: Artifact, say: download.Say) -> None:
    """Gives a finished run its names; see `distill` for which of them move."""
    new, recipe = made["best"], mapping(made["best"].params["recipe"])
    named(store, made["last"], ["last"])
    named(store, new, ["latest", f"{recipe['teacher']}-{recipe['mode']}".replace("/", "-")])
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
            named(store, new, [name])
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
def _together(store: Store, key: str, question: Question) -> Iterator[LiveDir]:
    """The live directory of a question that several processes work on; the first one holds and fills it."""
    from sidactl.engine import ranks

    if ranks.rank_and_size()[0] > 0:
        place = Path(ranks.agreed(str))
        yield LiveDir(place, is_writer=False)
        return
    with at_work(store, key, question) as live:
        ranks.agreed(lambda: str(live.path))
        yield live


@dataclass(frozen=True)
class _Run:
    """A distillation with every word resolved: what `_distill` works on."""

    recipe: Recipe
    default: Recipe
    """the recipe without what the user changed"""
    execution: Execution
    inputs: Mapping[str, Artifact]
    compared: Artifact | None
    """what it is scored against; None = it is not"""
    detector: str | None
    vae: Artifact | None
    """what decodes its latents; None = the usual one, or it draws pixels"""
    settings: Mapping[str, Any]
    """what shapes the result beside recipe and inputs, where it is not the default"""
    warnings: Sequence[str]
    notes: Sequence[str]

    def _recipe_of_keys(self) -> dict[str, Any]:
        apart = {name: getattr(self.default, name) for name in ("checkpoint_every_nimg", "stop_if_nan_steps")}
        return dataclasses.replace(self.recipe, **apart).to_json()

    def keys(self, store: Store) -> dict[str, str]:
        """The questions that the best and the last generator answer; what shapes neither is no part of them."""
        recipe = self._recipe_of_keys()
        oids = {role: artifact.oid for role, artifact in self.inputs.items()}
        return {
            which: store.key("distill", {"recipe": recipe, "which": which, **self.settings}, oids)
            for which in ("best", "last")
        }

    def question(self, words: Sequence[str]) -> Question:
        """What the keys stand for, in words and numbers."""
        settings = {"no_score": True} if "scored" in self.settings else self.settings
        return Question(
            command="distill",
            subject=f"{self.recipe.teacher} {self.recipe.mode}",
            words=words,
            params={**self._recipe_of_keys(), **settings},
            inputs={role: artifact.oid for role, artifact in self.inputs.items()},
        )


def _resolved(
    store: Store, *, teacher: str, execution: Execution, device: str | None, recheck: bool, **options: Any
) -> _Run:
    """A distillation with its inputs fetched and prepared, once all was checked that can be known before."""
    if _is_foreign(teacher):
        teacher = resolve(store, teacher, ["teacher"], recheck=recheck).oid
    elif recheck:
        resolve(store, teacher, ["teacher"], recheck=True)  # before the plan reads it
    planned = plan(teacher=teacher, store=store, execution=execution, device=device, **options)
    if planned.missing:
        raise planned.missing[0]
    if planned.needs:  # nobody should wait for a download to hear of a device that is not there
        from sidactl.engine.devices import pick_device

        pick_device(device)
    dataset, generator, reference = (options[name] for name in ("dataset", "generator", "reference"))
    teacher_artifact = resolve(store, teacher, ["teacher"])
    inputs = {"teacher": teacher_artifact}
    net = NetSpec.from_json(mapping(teacher_artifact.params["net"]))
    data = inputs["dataset"] = _training_data(store, planned, teacher_artifact, dataset, recheck)
    recipe = dataclasses.replace(
        planned.recipe, dataset=planned.recipe.dataset if dataset is None else str(data.params["name"])
    )
    notes, settings = list(planned.notes), dict[str, Any]()
    compared, detector = None, options["detector"]
    if options["score"]:
        try:
            if reference is None:
                compared = references.of_run(store, teacher_artifact, data, recheck=recheck)
            else:
                compared = references.find(store, reference, teacher_artifact, "moments", recheck=recheck)
        except MissingError as error:
            # What failed, such as a download, may work another time; what is not there does not come.
            if _needs_reference(recipe, reference, detector, data):
                raise
            if planned.scoring:
                notes.append(f"nothing is scored, and the last generator is the result: {error.message}")
    elif data.results["kind"] != "labels":
        settings["scored"] = False
    is_without_images = data.results["kind"] == "latents" and "dataset" not in data.inputs
    if compared and reference is None and is_without_images and compared.params["name"] != data.params["name"]:
        told = f"scored against the {references.described(store, compared)} of its teacher's"
        notes.append(f"{data.params['name']} has no images to compare with: {told}")
    if generator is not None:
        inputs["generator"] = resolve(store, generator, ["generator"], recheck=recheck)
        _check_generator(inputs["generator"].params, teacher_artifact.params)
    _check_trainable(data)
    _check_fit(shape_for_nets(data), net, "teacher")
    if compared:
        default = references.training_detector(compared)
        if detector not in (None, default):
            is_file = references.is_detector_file(detector)
            settings["detector"] = source_identity(store, detector, recheck=recheck) if is_file else detector
        detector = detector or default
        if compared.oid != data.oid:
            inputs["reference"] = compared
    asked_vae, warnings = options.get("vae"), [*planned.warnings]
    vae = vae_for(store, asked_vae, teacher_artifact, recheck=recheck)
    if vae:
        settings["vae"] = vae_digest(vae)
    if asked_vae is not None:  # else the plan has told
        warnings += _of_other_vae(vae, [*inputs.values()])
    return _Run(recipe, planned.default, execution, inputs, compared, detector, vae, settings, warnings, notes)


def _training_data(store: Store, planned: Plan, teacher: Artifact, asked: str | None, recheck: bool) -> Artifact:
    """The dataset to train on; in mode sid, where it is not there and none was named, the net's classes alone."""
    try:
        if asked:
            data = resolve(store, asked, ["dataset"], recheck=recheck)
        else:
            needs_images = planned.recipe.mode != "sid"
            data = dataset_called(store, planned.inputs["dataset"], recheck=recheck, may_download=needs_images)
    except MissingError:
        if not asked and "dataset" in teacher.inputs:
            return store.get(teacher.inputs["dataset"])
        if asked or planned.recipe.mode != "sid":
            raise
        # A net without classes looks at no label: one class does as well.
        num_classes = int(mapping(teacher.params["net"])["label_dim"]) or 1
        return prepare_data(None, classes=num_classes, run=store.root, recheck=recheck, say=None)
    if planned.recipe.mode != "sid":
        require_images(data)
    return data


def _distill(
    store: Store,
    live: LiveDir,
    keys: Mapping[str, str],
    wanted: _Run,
    device: str | None,
    watch: Watch | None,
    *,
    teacher_score: TeacherScore | None,
    force: bool,
    say: download.Say | None,
) -> None:
    """Trains, stores the last and the best generator under their keys, and a run that binds them."""
    import safetensors.torch

    from sidactl import loop, report, sampling, trainer
    from sidactl.engine import configure, devices, ranks, sharding
    from sidactl.foreign import networks

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
        moments = references.moments(store, compared, detector, watch, recheck=force)
        _try_scoring(detector, moments, start or teacher, sampler, load_vae)
        counts: Any = inputs["dataset"].results["class_counts"] if recipe.evaluate_labels == "dataset" else None
        tick = part_of(watch, "scoring the generator")
        eyes = [_Eye("fid", detector, moments)]
        for metric in recipe.evaluate_also:
            by = METRICS[metric].detector
            other = load_detector(store, by, chosen_device) if by not in (None, wanted.detector) else detector
            needed = references.moments(store, compared, other, watch, recheck=force) if METRICS[metric].need else None
            eyes.append(_Eye(metric, other, needed))
        evaluate = _evaluation(eyes, sampler, recipe.evaluate_num, tick, counts or None, load_vae)
        entry = None if wanted.vae else references.published_as(compared)
        published = _published_score(recipe, entry, distance_name(detector))
        if teacher_score is None:
            teacher_score = "measure" if published is None else "published"
        elif teacher_score == "published" and published is None:
            raise _not_published(recipe, distance_name(detector))
        if teacher_score == "measure" and not _is_scored(store, wanted):
            notes.append(
                f"at the end the teacher is scored, too, on {recipe.evaluate_num:,} images of "
                f"{sampler_of(inputs['teacher']).nfe} evaluations each; --teacher-score none leaves that out"
            )
    data = inputs["dataset"]
    batches = _batches(store, data, recipe.batch_size, recipe.num_accumulation_rounds, recipe.seed, chosen_device)
    training = trainer.Distillation(recipe, teacher, start, batches, execution)
    if tried := _fitted(training, execution, live, chosen_device):
        notes.append(tried)
    schedule = loop.Schedule(
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
    history = _train(training, schedule, live, evaluate, watch, facts, notes, wanted.warnings)
    last: tuple[int, float | None] = training.nimg, None
    best = last
    if detector:
        if history.best is None:
            raise SidaError("no evaluation gave a finite score", "Lower the learning rate.", exit_code=EXIT_FAILED)
        last, best = history.scores[-1], history.best
    net = sharding.gathered(training.ema, chosen_device)
    is_first = ranks.rank_and_size()[0] == 0
    untrained, made = recipe.untrained(), dict[str, Artifact]()
    also = {name: [[nimg, _finite(value)] for nimg, value in points] for name, points in history.also.items()}
    made_with = {"vae": wanted.vae.oid} if wanted.vae else {}
    files: dict[str, dict[str, bytes]] = {}
    for which in ("last", "best") if is_first else ():
        if which == "best" and history.best:
            networks.load_weights(net, safetensors.torch.load(loop.best_weights(history, live)))
        files[which] = {"model.safetensors": loop.weights(net)}
        try:
            files[which]["grid.png"] = _preview(net, sampler, load_vae)
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
                    "selection_score": _finite(score),
                    "teacher_score": of_teacher,
                    **({"teacher_score_is": "published"} if is_published else {}),
                    "detector": detector_label(detector) if detector else None,
                    "scores": [[n, _finite(s)] for n, s in history.scores],
                    **({"also": also} if also else {}),
                    "skipped_updates": sum(training.skipped.total.values()),
                    **({"untrained": untrained} if untrained else {}),
                },
            )

    if detector and teacher_score == "measure":
        if is_first and not _is_scored(store, wanted):  # hours may pass, and the generator is wanted before
            keep(None)
            for which, ref in (("last", "last"), ("best", "latest")):
                named(store, made[which], [ref])
            (say or (lambda line: None))("generator/latest is there already; scoring the teacher goes on")
        measured = _teacher_score(store, wanted, device, watch, force)
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
        answered(store, keys[which], artifact, "distill")


def _published_score(recipe: Recipe, reference: catalog.Reference | None, by: str) -> float | None:
    """The teacher's, from its paper: a number of this name is against published statistics."""
    entry = catalog.TEACHERS.get(recipe.teacher)
    found = entry.scores.get(by) if entry and reference else None
    return found.value if found else None


def _not_published(recipe: Recipe, score: str) -> SidaError:
    what = f"no {score} of {recipe.teacher} against this reference is published"
    return SidaError(what, "Pass --teacher-score measure, or none.")


def _try_scoring(
    detector: "Detector",
    reference: references.Moments | None,
    net: "Preconditioned",
    sampler: OneStepSpec,
    load_vae: Callable[[], Any] | None = None,
) -> None:
    """Draws two images and has them measured, so that what does not fit is told before the first step."""
    from sidactl import sampling

    seeds = range(SELECTION_SEED, SELECTION_SEED + 2)
    (batch,) = sampling.generate(net, seeds, sampler, device=detector.device, load_vae=load_vae)
    found, wanted = detector(batch.images).shape[1], len(reference.mean) if reference else 0
    if reference and found != wanted:
        raise SidaError(
            f"the reference has {wanted:,} features, detector {detector.name} gives {found:,}",
            "Pass another --ref, or --detector.",
        )


def _fitted(training: "Distillation", execution: Execution, live: LiveDir, device: "torch.device") -> str | None:
    """Lets a GPU take as many images at a time as fit, found by trying and remembered; tells how many.

    Not where a number was asked for; nor on the CPU, whose memory gives no sign before it is full, nor sharded, where
    processes wait for each other: then it is one micro-batch.
    """
    from sidactl.engine import configure, devices, ranks

    if execution.batch_per_device or execution.shard or device.type == "cpu":
        return None
    remembered = live.path / "batch-per-device.json"
    tried_on = [ranks.rank_and_size()[1], devices.memory_of(device), execution.to_json()]
    told = json.loads(ranks.agreed(lambda: remembered.read_text() if remembered.exists() else "{}"))
    if told.get("tried_on") == tried_on:
        training.passes = configure.passes_of(training.recipe, Execution(batch_per_device=told["images"]))
        return None
    images = training.fit_batch_per_device()
    live.write(remembered.name, json.dumps({"images": images, "tried_on": tried_on}).encode())
    return f"{images} images at a time fit into the memory of {device} (--batch-per-device)"


@dataclass(frozen=True)
class _Eye:
    """One of the scores that an evaluation gives: by which detector, and against what."""

    metric: str
    detector: "Detector"
    against: references.Moments | None


def _evaluation(
    eyes: Sequence[_Eye],
    sampler: OneStepSpec,
    num_images: int,
    tick: Tick | None = None,
    class_counts: Sequence[int] | None = None,
    load_vae: Callable[[], Any] | None = None,
) -> "Evaluate":
    """What scores a net while it trains, by the first of these scores and the others; and a grid of images."""
    import torch

    from sidactl import features, loop, sampling
    from sidactl.engine import ranks, sharding

    seeds = range(SELECTION_SEED, SELECTION_SEED + num_images)
    device = eyes[0].detector.device
    detectors = {eye.detector.identity: eye.detector for eye in eyes}
    keeps = {eye.detector.identity for eye in eyes if METRICS[eye.metric].need is None}
    settings = {**scores.DEFAULTS, "order": "content"}  # as `evaluate` has them

    def evaluate(net: "Preconditioned", should_stop: Callable[[], bool]) -> loop.Evaluation | None:
        net = sharding.gathered(net, device)
        size = features.images_per_batch(net.spec.img_channels, net.spec.img_resolution)
        samples = sampling.generate(
            net, seeds, sampler, device=device, class_counts=class_counts, load_vae=load_vae, batch_size=size
        )
        problems: list[str] = []

        def images(first: int) -> "Iterator[torch.Tensor]":
            try:
                for batch in samples.shared(first):
                    yield batch.images
            except sampling.NotFiniteError as error:
                problems.append(error.message)
                channels, side = preflight.drawn_by(net.spec)
                yield torch.zeros(1, channels, side, side, dtype=torch.uint8)  # others count on this one's share

        collected = features.collect(
            features.Work(len(samples), images, detectors, keeps),
            tick=features.out_of(tick, num_images),
            should_stop=lambda: bool(problems) or should_stop(),
            refuse=problems.append,
        )
        if ranks.any_process(should_stop()):
            return None
        if told := ranks.first_told(problems[0] if problems else None):
            return loop.Evaluation(math.nan, None, f"no score after these updates: {told}")

        def numbers() -> str:
            found: dict[str, float] = {}
            for eye in eyes:
                stats = collected.stats[eye.detector.identity]
                kept = collected.features.get(eye.detector.identity)
                found |= scores.numbers(eye.metric, eye.detector, stats, kept, eye.against, settings)
            return json.dumps(found)

        found: dict[str, float] = json.loads(ranks.agreed(numbers))
        value = found.pop(distance_name(eyes[0].detector))
        try:
            return loop.Evaluation(value, _preview(net, sampler, load_vae), also=found)
        except sampling.NotFiniteError as error:
            return loop.Evaluation(value, None, f"no picture: {error.message}", also=found)

    return evaluate


def _finite(score: float | None) -> float | None:
    """The score, or None for one that JSON has no word for."""
    return score if score is not None and math.isfinite(score) else None


def _teacher_score(store: Store, wanted: _Run, device: str | None, watch: Watch | None, force: bool) -> float | None:
    """The teacher's score as the generator's are, for comparison; None, and said so, where it cannot be had."""
    from sidactl import loop

    recipe, teacher = wanted.recipe, wanted.inputs["teacher"]
    nfe = sampler_of(teacher).nfe
    show = part_of(watch, f"scoring the teacher ({nfe} evaluations each)")

    def tell(message: str, kind: str = "note") -> None:
        if watch:
            watch(loop.Event(kind, recipe.duration_nimg, {"message": message}))

    def tick(done: int, total: int) -> None:
        if done == 0:
            tell(f"scoring the teacher on {total:,} images ({nfe} evaluations each) for comparison")
        if show:
            show(done, total)

    try:
        options = _teacher_question(store, wanted) | {"device": device, "tick": tick, "say": None}
        try:
            return fid(teacher.oid, **options).value
        except BrokenError:
            if not force:
                raise
            return fid(teacher.oid, **(options | {"force": True})).value
    except (SidaError, RuntimeError, MemoryError) as error:
        if not is_alone():  # the others wait for this process
            raise
        told = error.message if isinstance(error, SidaError) else (str(error).splitlines() or [repr(error)])[0]
        tell(f"the teacher could not be scored ({told}); the generator is kept without that comparison", "warning")
        return None


def _teacher_question(store: Store, wanted: _Run) -> ScoreOptions:
    assert wanted.compared
    usual = catalog.VAE_NAME if is_of_latents(wanted.inputs["teacher"]) else None
    return {
        "reference": wanted.compared.oid,
        "num": wanted.recipe.evaluate_num,
        "detector": wanted.detector,
        "vae": wanted.vae.oid if wanted.vae else usual,
        "run": store.root,
    }


def _is_scored(store: Store, wanted: _Run) -> bool:
    """Whether the teacher's score is known already."""
    return is_answered(wanted.inputs["teacher"].oid, ["fid"], _teacher_question(store, wanted))


def finetune_sid2a(*, teacher: Ref, generator: Ref, **options: Any) -> Artifact:
    """`distill` in mode sid2a: SiDA started from a generator; options as there.

    Source: SiDA (2410.14919), section 4.3.
    """
    return distill(teacher=teacher, mode="sid2a", generator=generator, **options)


def _check_generator(generator: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Refuses a generator, by its parameters, that is not one of this teacher's kind."""
    if generator["dataset"] not in (None, teacher["dataset"]):
        raise SidaError(
            f"the generator must be of the teacher's dataset {teacher['dataset']!r}, "
            f"got one of {generator['dataset']!r}",
            "Give a generator that was distilled from this teacher.",
        )
    # Dropout is the recipe's, and generators have no uncertainty head.
    apart = {"dropout": 0, "logvar_channels": 0}
    theirs, ours = (dict(mapping(params["net"])) | apart for params in (generator, teacher))
    if theirs != ours:
        wrong = next(k for k in ours if theirs.get(k) != ours[k])
        raise SidaError(
            f"the generator must have the teacher's network, got {wrong} {theirs.get(wrong)} for {ours[wrong]}",
            "Give a generator that was distilled from this teacher.",
        )


def _mode_of(generator: preflight.Input) -> str | None:
    """The mode that a generator was distilled in, where that is known."""
    entry = generator.entry or catalog.GENERATORS.get(str(generator.params.get("name")))
    recipe = generator.params.get("recipe")
    if isinstance(recipe, Mapping):
        return str(recipe["mode"])
    return entry.mode if isinstance(entry, catalog.Generator) else None


def _check_trainable(data: Artifact) -> None:
    """Raises SidaError for images of a size that scores take but nets do not."""
    height: Any = data.results["resolution"]
    width: Any = data.results.get("width", height)
    if height is None or (width == height and height & (height - 1) == 0):
        return
    side = 1 << round(math.log2(min(width, height)))
    raise SidaError(
        f"images to train on must be square with a side that is a power of two, got {width}x{height}",
        f"Make a dataset of them with: sidactl prepare-data PATH --resolution {side}x{side}",
    )


def _check_fit(got: tuple[int | None, int | None, int] | None, net: NetSpec, whose: str) -> None:
    """Refuses a dataset of this resolution, channels and classes for a network; None = they are not known yet."""
    wanted = (net.img_resolution, net.img_channels, net.label_dim)
    if got and (got[:2] not in (wanted[:2], (None, None)) or net.label_dim not in (0, got[2])):
        raise SidaError(
            f"the dataset must fit the {whose} (resolution, channels, classes = "
            f"{wanted[0]}, {wanted[1]}, {wanted[2]}), got {got[0]}, {got[1]}, {got[2]}",
            "Pass another --dataset, or prepare this one to fit.",
        )


def _batches(
    store: Store, data: Artifact, batch_size: int, num_rounds: int, seed: int, device: "torch.device"
) -> "MicroBatches":
    from sidactl import trainer
    from sidactl.data.order import DataOrder

    dataset = image_source(store, data)
    order = DataOrder(dataset.num_images, seed)
    return trainer.DatasetBatches(
        dataset, order, batch_size=batch_size, num_rounds=num_rounds, seed=seed, device=device
    )


def _train(
    training: "Training",
    schedule: "Schedule",
    live: LiveDir,
    evaluate: "Evaluate | None",
    watch: Watch | None,
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> "History":
    """Runs the loop to its end, passing events on; an interruption leaves a checkpoint and raises, exit code 130."""
    from sidactl import loop
    from sidactl.engine import ranks

    history, interrupted = loop.History(), False
    tell = watch or (lambda event: None)
    with _stop_on_signals() as should_stop:
        began = {**facts, "events": str(live.path / "events.jsonl"), "duration_nimg": schedule.duration_nimg}
        tell(loop.Event("started", 0, began))
        for kind, messages in (("warning", warnings), ("note", notes)):
            for message in messages:
                tell(loop.Event(kind, 0, {"message": message}))
        events = loop.run(training, schedule, live, evaluate=evaluate, should_stop=should_stop, history=history)
        for event in events:
            tell(event)
            interrupted |= event.kind == "interrupted"
        # Whichever of several processes was asked to stop, all of them have.
        if ranks.any_process(interrupted or should_stop()):
            raise SidaError(
                f"interrupted at {training.nimg:,} of {schedule.duration_nimg:,} images; the checkpoint is kept",
                "Repeat the same command to go on.",
                exit_code=EXIT_INTERRUPTED,
            )
    return history


REPEATS_SEC = {signal.SIGTERM: 10.0, signal.SIGINT: 1.0}
"""one request comes more than once: clusters send SIGTERM to every process of a job, and torchrun sends it on; a
terminal sends SIGINT to all of a pipeline, and `timeout` sends it on"""


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT or SIGTERM makes the yielded function true; the next one acts as usual.

    One within REPEATS_SEC of the first signal is a repetition and goes unheeded.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first_sec = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first_sec
        if not stop.is_set():
            stop.set()
            first_sec = time.monotonic()
        elif time.monotonic() - first_sec >= REPEATS_SEC[signal.Signals(number)]:
            for each, handler in usual.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stop.is_set
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _preview(
    net: "Preconditioned", sampler: OneStepSpec | HeunSpec, load_vae: Callable[[], Any] | None = None
) -> bytes:
    from sidactl import report, sampling

    device, side = next(net.parameters()).device, preflight.drawn_by(net.spec)[1]
    seeds = PREVIEW_SEEDS[: _num_previewed(side)]
    batches = sampling.generate(net, seeds, sampler, device=device, load_vae=load_vae)
    return report.grid(next(iter(batches)).images.permute(0, 2, 3, 1).numpy())


def _num_previewed(side: int) -> int:
    """Images of this size in a preview: at most 2,048 pixels a side, since PNGs of 4,096 take a processor 12 s each."""
    return min(len(PREVIEW_SEEDS), max(1, 2048 // side) ** 2)


@dataclass(frozen=True)
class Sampled:
    """A samples artifact with its content: images uint8 [N, H, W, C], labels int64 [N] or None, seeds.

    Wherever a ref is expected it does as one, and says which run directory it lies in.
    """

    artifact: Artifact
    store: Store

    @property
    def oid(self) -> str:
        """That of the artifact."""
        return self.artifact.oid

    @cached_property
    def images(self) -> "NDArray[np.uint8]":
        dataset = load_dataset(self.store, self.artifact)
        return dataset.images(range(dataset.num_images)).permute(0, 2, 3, 1).numpy()

    @cached_property
    def labels(self) -> "NDArray[np.int64] | None":
        return load_dataset(self.store, self.artifact).labels

    @property
    def seeds(self) -> Sequence[int]:
        return _seeds_from_json(self.artifact.params["seeds"])


def sample(
    ref: Ref,
    *,
    seeds: Seeds | None = None,
    num: Count | None = None,
    class_index: SupportsIndex | str | None = None,
    steps: SupportsIndex | None = None,
    sampler: Literal["one-step", "heun"] | None = None,
    heun: Mapping[str, float] | None = None,
    guide: Ref | None = None,
    guidance: float = 1.0,
    vae: Ref | None = None,
    setting: Setting | None = None,
    name: str | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    say: download.Say | None = download.to_stderr,
    tick: Tick | None = None,
) -> Sampled:
    """Images of a teacher or generator, one per seed, as a samples artifact (a zip in the EDM layout, and a grid).

    num: so many from seed 0 on, such as "10k", instead of `seeds`; 64 where neither is given.
    The sampler defaults to the net's own: one step for a generator, Heun for a teacher. heun: fields of HeunSpec to
    take in place of the teacher's, such as {"S_churn": 0}. guide: a weaker teacher that
    Heun's sampler moves away from, `guidance` times as far (1 = not at all). Noise and class of an image depend on its
    seed alone. class_index: one class for all images, by its index or by its name in the net's dataset.
    vae: what decodes latents, as in `distill`; by default the one that the net was made with, or the usual one.
    setting: of the nets' arithmetic, float32 by default; another precision is another question. say: takes the line
    that an answer is an old one.
    """
    if seeds is not None and num is not None:
        raise SidaError("num and seeds cannot both be given", "Pass one of them.")
    count = 64 if num is None else count_of(num, "num")
    seeds = seeds_of(range(count) if seeds is None else seeds)
    if not seeds:
        raise SidaError(f"sample count must be >= 1, got {min(count, 0)}", "Pass --num 1 or more.")
    if class_index is not None and not isinstance(class_index, str):
        class_index = whole(class_index, "class_index")
    steps = None if steps is None else whole(steps, "steps")
    store = Store.open(run_of(ref, run))
    if name:
        store.check_name("samples", name)
    vae = optional_ref(vae, "the VAE")
    with first_alone():
        subject = resolve(store, ref_text(ref), NETS, recheck=force)
        decoder = vae_for(store, vae, subject, recheck=force)
    if say and (told := other_vae(subject, decoder)):
        say(f"warning: {told}")
    chosen = chosen_sampler(subject, sampler, steps, heun)
    if isinstance(class_index, str):
        class_index = class_of(store, subject, class_index)
    setting = setting or Setting()
    params: dict[str, Any] = {
        "seeds": _seeds_to_json(seeds),
        "class_index": class_index,
        "sampler": chosen.to_json(),
        **setting.of_images(),
    }
    inputs = {"net": subject}
    if not math.isfinite(guidance):
        raise SidaError(f"guidance must be finite, got {guidance}", "Pass another --guidance.")
    if guide is not None:
        inputs["guide"] = resolve(store, ref_text(guide, "the guide"), ["teacher"], recheck=force)
        params["guidance"] = guidance
    elif guidance != 1:
        raise SidaError(f"guidance {guidance:g} needs a second net, got none", "Pass --guide REF.")
    question = params | ({"vae": vae_digest(decoder)} if decoder else {})
    key = store.key("sample", question, {role: artifact.oid for role, artifact in inputs.items()})
    refs = [name] if name else []
    if not force and (known := agreed_answer(store, key)):
        tell_old(store, key, say)
        return Sampled(named(store, known, refs, say), store)
    store.check_writable()
    if decoder is None and is_of_latents(subject):
        check_vae_is_there(store)

    from sidactl import report, sampling
    from sidactl.data import archive_writer
    from sidactl.engine import configure, devices, ranks

    chosen_device = devices.pick_device(device)
    used = {
        role: configure.set_up(load_net(store, artifact, chosen_device), setting) for role, artifact in inputs.items()
    }
    net = used["net"]
    size = images_per_batch(net.spec.img_channels, net.spec.img_resolution)
    batches = sampling.generate(
        net,
        seeds,
        chosen,
        device=chosen_device,
        class_index=class_index,
        guide=used.get("guide"),
        guidance=guidance,
        load_vae=vae_loader(store, decoder),
        batch_size=size,
    )
    drawn = ranks.joined(batches.shared(), len(batches))
    if ranks.rank_and_size()[0] > 0:
        list(drawn)  # nothing, but the others wait for this process's share
        return Sampled(store.get(ranks.agreed(str)), store)
    made_with = {"vae": decoder.oid} if decoder else {}
    by = {"vae": vae_label(decoder)} if decoder else {}
    with store.scratch() as path:
        first: NDArray[np.uint8] | None = None
        with archive_writer.ZipWriter(path) as writer:
            for batch in drawn:
                images = batch.images.permute(0, 2, 3, 1).numpy()
                first = images[: _num_previewed(images.shape[1])] if first is None else first
                for index, image in enumerate(images):
                    writer.add(image, None if batch.labels is None else int(batch.labels[index]))
                if tick:
                    tick(writer.num_images, len(seeds))
        assert first is not None
        artifact = store.put(
            "samples",
            {"images.zip": path, "grid.png": report.grid(first)},
            inputs={role: artifact.oid for role, artifact in inputs.items()} | made_with,
            params=params | {"name": subject.params["name"], "dataset": subject.params["dataset"]} | by,
            results={"num_images": len(seeds), "nfe": chosen.nfe},
        )
    artifact = answered(store, key, artifact, "sample", refs=refs, say=say)
    return Sampled(store.get(ranks.agreed(lambda: artifact.oid)), store)


def _seeds_to_json(seeds: Sequence[int]) -> dict[str, int] | list[int]:
    if isinstance(seeds, range) and seeds.step == 1:
        return {"first": seeds.start, "count": len(seeds)}
    return [int(seed) for seed in seeds]


def _seeds_from_json(value: Any) -> Sequence[int]:
    return range(value["first"], value["first"] + value["count"]) if isinstance(value, Mapping) else value
