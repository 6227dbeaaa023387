"""What a distillation would do, from its flags alone: `distill --dry-run`."""

import dataclasses
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sidactl import catalog, launch
from sidactl.commands import companions, preflight, scores
from sidactl.commands.files import check_has_file
from sidactl.commands.running import check_fit, check_trainable
from sidactl.commands.scorers import require_classes
from sidactl.commands.scores import METRICS, score_name
from sidactl.commands.vae import other_vae, vae_for
from sidactl.commands.words import NET_FILES
from sidactl.errors import EXIT_USAGE, SidaError
from sidactl.recipes import (
    FROM_GENERATOR,
    MODES,
    SID_MODES,
    EvaluatedBy,
    Execution,
    Memory,
    Mode,
    NetSpec,
    PairedRecipe,
    Recipe,
    SidRecipe,
    flag_of,
    override,
    passes_of,
)
from sidactl.store import Artifact, Store

TeacherScore: TypeAlias = Literal["published", "measure", "none"]

TEACHER_SCORES: tuple[TeacherScore, ...] = ("published", "measure", "none")


@dataclass(frozen=True)
class Scoring:
    """How a run is scored while it trains."""

    detector: str
    reference: preflight.Input
    is_default: bool
    """whether it is the detector that would be taken without being asked for"""
    metric: EvaluatedBy = "fid"

    @property
    def score_name(self) -> str:
        return score_name(self.detector, self.metric)


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
        return "measure" if published_score(self.recipe, compared, by) is None else "published"

    @property
    def num_evaluations(self) -> int:
        """How often the generator is scored."""
        every = max(self.recipe.evaluate_every_nimg, self.recipe.batch_size)
        early = [n for n in self.recipe.evaluate_early_nimg if n < self.recipe.duration_nimg and n % every]
        return -(-self.recipe.duration_nimg // every) + len(early) + (self.recipe.mode in FROM_GENERATOR)


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
    guide: str | None = None,
) -> Plan:
    """The resolved recipe and inputs of a distillation, with all checked that can be known before it begins.

    Raises SidaError as the run would; writes nothing, fetches nothing, and needs no torch.
    """
    if mode not in MODES:
        hint = "Pass --mode sida."
        if mode == "uni-instruct":
            hint = "Its published step is SiDA's with both weights 1: pass --mode sida --alpha 1 --joint-weight 1."
        raise SidaError(f"mode must be one of {', '.join(MODES)}, got {mode!r}", hint)
    if mode in FROM_GENERATOR and generator is None:
        raise SidaError(
            f"mode {mode} starts from a generator, got none", "Pass --generator REF: distill one with --mode sid first."
        )
    if mode not in FROM_GENERATOR and generator is not None:
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
    net = NetSpec.from_json(taught.params["net"])
    name, own_dataset = str(taught.params["name"]), taught.params["dataset"]
    num_parameters = _parameters_of(store, taught)
    recipe = catalog.recipe_for(name, chosen, net, num_parameters)
    if name not in catalog.TEACHERS:
        recipe = _suited(recipe, taught, overrides)
    start = preflight.find(store, generator, ["generator"]) if generator else None
    if start and (own := start.params.get("sampler")):
        recipe = companions.sampled_as(recipe, own)
    if not (dataset or own_dataset):
        raise SidaError(f"teacher {teacher} does not say what it was trained on", "Pass --dataset REF.")
    default = recipe
    recipe = dataclasses.replace(override(recipe, overrides), dataset=dataset or str(own_dataset))
    settings, notes = execution or Execution(), list[str]()
    if chosen not in SID_MODES and (run := catalog.published_run(chosen, name)) is None:
        notes.append(f"no run of {chosen} on {name} is published: its own numbers, and the rest as SiDA's")
    elif chosen not in SID_MODES:
        notes.append(f"{chosen} on {name}: the numbers of {run}")
    is_chosen = "teacher_guidance" in overrides
    recipe, guided_by, more_notes = companions.guided(store, guide, recipe, taught, is_chosen=is_chosen)
    notes += more_notes
    passes_of(recipe, settings, 0, launch.world_size())
    warnings = recipe.unusual()
    if refusal := preflight.check_stages(recipe):
        if not allow_untrained:
            raise refusal
        warnings.append(refusal.message)
    inputs = {"teacher": teacher, "dataset": recipe.dataset}
    used = [taught, *([guided_by] if guided_by else [])]
    if guide:
        inputs["guide"] = guide
    if generator and start:
        inputs["generator"] = generator
        used.append(start)
        if start.params:
            companions.check_generator(start.params, taught.params)
        if mode == "sid2a" and (began := companions.mode_of(start)) not in (None, "sid"):
            notes.append(f"SiD2A starts from a generator of mode sid, {generator} is one of mode {began}")
    data, missing = _planned_data(store, recipe, dataset)
    if data:
        used.append(data)
        if recipe.needs_images:
            preflight.check_images(data)
        if data.artifact:
            check_trainable(data.artifact)
        check_fit(preflight.shape_of(data), net, "teacher")
    if dataset is None and not recipe.needs_images and not (data and data.has_images):
        labels = next((e.name for e in catalog.DATASETS.values() if e.labels_of == recipe.dataset), None)
        way = f", each as often; --dataset {labels} downloads the published ones" if labels else ""
        notes.append(f"dataset {recipe.dataset}: mode {recipe.mode} needs no images, training on classes alone{way}")
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
    if isinstance(recipe, PairedRecipe):
        notes.append(companions.check_pairs(recipe, net, taught))
    if recipe.trained_on is not None:
        compared = scoring.reference if scoring else data or preflight.Input(recipe.dataset, None, None)
        more = companions.check_trained_on(store, recipe, net, compared, is_scored=scoring is not None)
        needs += [need for need in more if need not in needs]
    for flag in ("evaluate_also", "evaluate_by"):
        if not scoring and overrides.get(flag):
            raise SidaError(f"{flag_of(flag)} is for runs that are scored, this one is not", "Leave it out.")
    if not score:
        notes.append("nothing is scored, and the last generator is the result")
    needs += preflight.vae(store, vae, taught, is_needed=scoring is not None)
    if vae is None:
        own = vae_for(store, None, taught.artifact) if taught.artifact else None
        warnings += of_other_vae(own, [each.artifact for each in used if each.artifact])
    free_bytes = preflight.check_disk(store, num_parameters)
    rounds = recipe.num_accumulation_rounds
    memory = {
        (num_devices, shard): Memory.of(
            recipe,
            net,
            num_parameters,
            dataclasses.replace(settings, shard=shard, compile=False),
            num_devices=num_devices,
            guide_parameters=0 if guided_by is None else _parameters_of(store, guided_by),
        )
        for num_devices in range(1, rounds + 1)
        if rounds % num_devices == 0
        for shard in (False, True)
    }
    # The published pace is that of one step, unguided.
    is_plain = isinstance(recipe, SidRecipe) and (
        1 == recipe.teacher_guidance == recipe.score_guidance == len(recipe.levels)
    )
    cost = catalog.COSTS.get((recipe.teacher, recipe.mode)) if is_plain else None
    otherwise = vae not in (None, catalog.VAE_NAME)
    made = Plan(recipe, default, inputs, memory, cost, scoring, needs, missing, warnings, notes, free_bytes, otherwise)
    if scoring and teacher_score == "published" != made.teacher_score:
        raise not_published(recipe, scoring.score_name)
    return made


def of_other_vae(vae: Artifact | None, inputs: Sequence[Artifact]) -> list[str]:
    """Warnings of inputs of a run on latents that were made with another VAE than decodes what it draws."""
    return [warning for artifact in inputs if (warning := other_vae(artifact, vae))]


def _suited(recipe: Recipe, teacher: preflight.Input, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe for a teacher of one's own, with the noise levels that it was trained on, and for the duration asked."""
    trained = teacher.params.get("recipe")
    if isinstance(trained, Mapping):
        recipe = recipe.with_noise_of(trained["P_mean"], trained["P_std"])
    return recipe.lasting(overrides["duration_nimg"]) if "duration_nimg" in overrides else recipe


def _planned_data(store: Store, recipe: Recipe, asked: str | None) -> tuple[preflight.Input | None, list[SidaError]]:
    """The dataset to train on; none where mode sid takes classes alone, or where the user has to prepare it first."""
    try:
        if asked is None:
            return preflight.dataset_called(store, recipe.dataset, may_download=recipe.needs_images), []
        return preflight.find(store, asked, ["dataset"]), []
    except SidaError as error:
        if asked is None and not recipe.needs_images:
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
        if needs_reference(recipe, asked, detector, data.artifact if data else None) or error.exit_code != EXIT_USAGE:
            raise
        return None, [], error.message
    default = preflight.default_detector(compared)
    chosen = detector or default
    needs = preflight.check_detector(store, chosen, net, compared)
    if compared.need:
        needs.insert(0, compared.need)
    if METRICS[recipe.evaluate_by].need == "images":
        preflight.check_compares_images(recipe.evaluate_by, compared)
    return Scoring(chosen, compared, chosen == default, recipe.evaluate_by), needs, None


def _check_further(store: Store, metric: str, recipe: Recipe, net: NetSpec, scoring: Scoring) -> list[preflight.Need]:
    """Refuses a further score of evaluations that this run cannot have; what it needs."""
    by = METRICS[metric].detector
    if by == scoring.detector and scoring.metric == "fid":
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


def needs_reference(recipe: Recipe, asked: str | None, detector: str | None, data: Artifact | None) -> bool:
    """Whether a run must be scored: not in mode sid, with classes alone, where nothing was asked for."""
    is_of_images = data is not None and data.results["kind"] != "labels"
    return asked is not None or detector is not None or recipe.needs_images or is_of_images


def _parameters_of(store: Store, net: preflight.Input) -> int:
    """Of a network that is here or in the catalog; 0 of one that is imported first."""
    if net.artifact:
        return _num_parameters(store.path(net.artifact, "model.safetensors"))
    return catalog.NUM_PARAMETERS[net.entry.name] if net.entry else 0


def _num_parameters(path: Path) -> int:
    """Values in a safetensors file, by its header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _teacher_of(store: Store, text: str) -> preflight.Input:
    """A teacher; for a word that is neither stored nor in the catalog the error has the nearest name."""
    if is_foreign(text):
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


def is_foreign(text: str) -> bool:
    return "://" in text or Path(text).suffix.lower() in NET_FILES


def published_score(recipe: Recipe, reference: catalog.Reference | None, by: str) -> float | None:
    """The teacher's, from its paper: a number of this name is against published statistics."""
    entry = catalog.TEACHERS.get(recipe.teacher)
    found = entry.scores.get(by) if entry and reference else None
    return found.value if found else None


def not_published(recipe: Recipe, score: str) -> SidaError:
    what = f"no {score} of {recipe.teacher} against this reference is published"
    return SidaError(what, "Pass --teacher-score measure, or none.")
