"""One function per command, of the same name: refs in, an Artifact or a score out. The only glue, and the Python API.

torch and all that needs it are imported where they are used, so that a question asked before is answered at once.
"""

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from sidactl import catalog, download, references
from sidactl.artifacts import (
    NET_FILES,
    NETS,
    Tick,
    agreed_answer,
    answered,
    asked,
    at_work,
    dataset_named,
    fetch_detector,
    image_source,
    is_alone,
    load_dataset,
    load_net,
    mapping,
    named,
    plain_name,
    require_images,
    resolve,
    shape_for_nets,
    tell_old,
)
from sidactl.artifacts import fetch_teacher as fetch_teacher
from sidactl.artifacts import load as load
from sidactl.artifacts import prepare_data as prepare_data
from sidactl.errors import EXIT_FAILED, EXIT_INTERRUPTED, MissingError, SidaError
from sidactl.recipe import (
    MODES,
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
)
from sidactl.references import detector_name, images_per_batch
from sidactl.scores import ScoreOptions, distance_name, load_detector, sampler_of
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
    from sidactl.diffusion import Preconditioned
    from sidactl.loop import Evaluate, Event, History, Schedule, Training
    from sidactl.trainer import Distillation, MicroBatches

Watch = Callable[["Event"], None]

PREVIEW_SEEDS = range(64)
# Far from the seeds that anybody scores with, so that the best checkpoint is not chosen by the images it is judged on.
SELECTION_SEED = 1 << 31


def dataset_stats(
    ref: str,
    *,
    detector: str | None = None,
    run: Path | str | None = None,
    device: str | None = None,
    force: bool = False,
) -> Artifact:
    """The feature statistics of all images of a dataset, as scores compare with them; by default of its own detector.

    Latents have those of the pixels that they were made from. A name of the dataset gives them one, with the detector.
    """
    from sidactl.engine import pick_device

    store = Store.open(run)
    data = resolve(store, ref, ["dataset"], recheck=force)
    require_images(data)
    names = [name.partition("/")[2] for name in store.names_of(data.oid)]
    data = references.pixels_of(store, data)
    called = detector or detector_name(data)
    if force and called in catalog.DETECTORS:
        fetch_detector(called, run=run, recheck=True)
    chosen = load_detector(store, called, pick_device(device))
    made = references.reference_stats(store, data, chosen, recheck=force)
    return named(store, made, [f"{name}-{chosen.name}" for name in names])


def train_teacher(
    dataset: str,
    *,
    name: str,
    net: str | None = None,
    recipe: TeacherRecipe | None = None,
    run: Path | str | None = None,
    device: str | None = None,
    force: bool = False,
    say: download.Say | None = download.to_stderr,
    watch: Watch | None = None,
    **recipe_overrides: Any,
) -> Artifact:
    """A teacher trained from scratch on a dataset with the EDM loss; the EMA net at the end of training.

    net: the form to start from, ddpmpp (default), ncsnpp, adm or edm2, small, and shaped to the dataset. Overrides name
    fields of TeacherRecipe or NetSpec. say: takes the line that an answer is an old one.
    """
    if net not in (None, *catalog.SMALL_NETS):
        raise SidaError(f"the net must be one of {', '.join(catalog.SMALL_NETS)}, got {net!r}", "Pass --net ddpmpp.")
    if not is_alone():
        raise SidaError("train-teacher runs in one process", "Start it without torchrun.")
    store = Store.open(run)
    store.check_name("teacher", name)
    data = resolve(store, dataset, ["dataset"], recheck=force)
    require_images(data)
    recipe = _teacher_recipe(recipe, net, data, recipe_overrides)
    key = store.key("train-teacher", {"recipe": recipe.to_json()}, {"dataset": data.oid})
    if not force and (known := asked(store, key)):
        tell_old(store, key, say)
        return named(store, known, [name])
    with at_work(store, key) as live:
        import torch

        from sidactl import loop, nets, trainer
        from sidactl.engine import pick_device

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
        _train(training, schedule, live, None, watch, {"title": f"train-teacher {name}"})
        params = {
            "name": name,
            "net": recipe.net.to_json(),
            "sampler": HeunSpec(convention="edm2" if recipe.net.architecture == "EDM2" else "edm").to_json(),
            "dataset": data.params["name"],
            "recipe": recipe.to_json(),
            "licence": None,
        }
        artifact = store.put(
            "teacher", {"model.safetensors": loop.weights(training.ema)}, inputs={"dataset": data.oid}, params=params
        )
        return answered(store, key, artifact, "train-teacher", refs=[name])


def _teacher_recipe(
    recipe: TeacherRecipe | None, form: str | None, data: Artifact, overrides: Mapping[str, Any]
) -> TeacherRecipe:
    shape = dict(zip(("img_resolution", "img_channels", "label_dim"), shape_for_nets(data), strict=True))
    net_fields = {f.name for f in dataclasses.fields(NetSpec)}
    fields = {f.name for f in dataclasses.fields(TeacherRecipe)} - {"dataset", "net"}
    if unknown := sorted(set(overrides) - net_fields - fields):
        raise SidaError(f"unknown recipe field {unknown[0]!r}", f"Fields are {', '.join(sorted(fields | net_fields))}.")
    net = dataclasses.replace(
        recipe.net if recipe else catalog.SMALL_NETS[form or "ddpmpp"],
        **(shape | {k: v for k, v in overrides.items() if k in net_fields}),
    )
    _check_fit(data, net, "network")
    # EDM2's normalised weights turn by the same angle at ten times the rate.
    lr = 1e-2 if net.architecture == "EDM2" else TeacherRecipe.lr
    base = recipe or TeacherRecipe(dataset="", net=net, lr=lr)
    rest = {k: v for k, v in overrides.items() if k in fields}
    return dataclasses.replace(base, dataset=str(data.params["name"]), net=net, **rest)


@dataclass(frozen=True)
class Plan:
    """What `distill` would do: the complete recipe, and the inputs by role (a catalog name where nothing is stored)."""

    recipe: Recipe
    inputs: Mapping[str, str]
    memory: Mapping[tuple[int, bool], Memory]
    """what a device needs, by the number of devices that share a batch, and whether the networks are sharded"""
    cost: catalog.Cost | None

    @property
    def hours(self) -> float | None:
        """What the published run's machine would need; None where its pace is not published."""
        return self.recipe.duration_nimg / 1000 * self.cost.sec_per_kimg / 3600 if self.cost else None


def plan(
    *,
    teacher: str,
    mode: str,
    generator: str | None,
    dataset: str | None,
    store: Store,
    overrides: Mapping[str, Any],
    execution: Execution | None = None,
) -> Plan:
    """The resolved recipe and input names of a distillation; writes nothing and needs no torch."""
    if mode not in MODES:
        raise SidaError(f"mode must be one of {', '.join(MODES)}, got {mode!r}", "Pass --mode sida.")
    if mode == "sid2a" and generator is None:
        raise SidaError(
            "mode sid2a starts from a generator, got none", "Pass --generator REF: distill one with --mode sid first."
        )
    if mode != "sid2a" and generator is not None:
        raise SidaError(f"mode {mode} starts from the teacher, got generator {generator!r}", "Use --mode sid2a for it.")
    chosen: Mode = next(m for m in MODES if m == mode)
    if teacher in catalog.TEACHERS:
        recipe = catalog.recipe_for(teacher, chosen)
        own_dataset: Any = catalog.TEACHERS[teacher].dataset
        net, num_parameters = catalog.TEACHERS[teacher].net, catalog.NUM_PARAMETERS[teacher]
    else:
        stored = _stored_teacher(store, teacher)
        net = NetSpec.from_json(mapping(stored.params["net"]))
        num_parameters = _num_parameters(store.path(stored, "model.safetensors"))
        recipe = catalog.recipe_for(
            str(stored.params["name"]), chosen, str(mapping(stored.params["net"])["architecture"])
        )
        own_dataset = stored.params["dataset"]
    if not (dataset or own_dataset):
        raise SidaError(f"teacher {teacher} does not say what it was trained on", "Pass --dataset REF.")
    recipe = dataclasses.replace(override(recipe, overrides), dataset=dataset or str(own_dataset))
    inputs = {"teacher": teacher, "dataset": recipe.dataset}
    if generator:
        inputs["generator"] = generator
    rounds, settings = recipe.num_accumulation_rounds, execution or Execution()
    memory = {
        (num_devices, shard): Memory.of(
            recipe, net, num_parameters, dataclasses.replace(settings, shard=shard), num_devices=num_devices
        )
        for num_devices in range(1, rounds + 1)
        if rounds % num_devices == 0
        for shard in (False, True)
    }
    return Plan(recipe, inputs, memory, catalog.COSTS.get((recipe.teacher, recipe.mode)))


def _num_parameters(path: Path) -> int:
    """Values in a safetensors file, by its header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _stored_teacher(store: Store, text: str) -> Artifact:
    """A stored teacher; for a word that is neither stored nor in the catalog the error has the nearest name."""
    if _is_foreign(text):
        raise SidaError(f"teacher {text} must be imported before it can be planned with", "Use fetch-teacher first.")
    try:
        return store.resolve(text, ["teacher"])
    except SidaError:
        if all(c in "0123456789abcdef" for c in text) or "/" in text:
            raise
        catalog.teacher(text)
        raise


def _is_foreign(text: str) -> bool:
    return "://" in text or Path(text).suffix in NET_FILES


def distill(
    *,
    teacher: str,
    mode: str,
    generator: str | None = None,
    dataset: str | None = None,
    reference: str | None = None,
    name: str | None = None,
    run: Path | str | None = None,
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

    A run that was interrupted is continued; one that finished before is answered from the run directory, which moves
    no name but the one given. A run that finishes now is called `generator/latest` and by its teacher and mode, its
    last generator `generator/last`. `generator/best-DATASET` (with the detector, where it is not the dataset's usual
    one) and `generator/best` move only to a better one. Of two on the same dataset, under the same detector and against
    the same reference, the one that was scored on more images is the better, of as many the one with the lower score;
    others do not compare, and `generator/best` stays. say: takes a line where it stays, or where the answer is an old
    one. Overrides name fields of Recipe or Adversarial. Source: SiDA (2410.14919), Algorithms 1 and 2.
    """
    store = Store.open(run)
    if name:
        store.check_name("generator", name)
    with _first_alone():
        recipe, inputs, notes = _resolved(store, teacher, mode, generator, dataset, reference, recipe_overrides, force)
        oids = {role: artifact.oid for role, artifact in inputs.items()}
        keys = {
            which: store.key("distill", {"recipe": recipe.to_json(), "which": which}, oids)
            for which in ("best", "last")
        }
        is_known = not force and asked(store, keys["best"]) is not None
    if is_known:
        tell_old(store, keys["best"], say)
    else:
        with _together(store, keys["best"]) as live:
            _distill(store, live, keys, recipe, execution or Execution(), inputs, device, watch, notes, force, say)
    with _first_alone():
        found = store.asked(keys["best"])
        assert found
        return named(store, found, [name] if name else [])


def _name_generators(store: Store, made: Mapping[str, Artifact], data: Artifact, say: download.Say) -> None:
    """Gives a finished run its names; see `distill` for which of them move."""
    new, recipe = made["best"], mapping(made["best"].params["recipe"])
    named(store, made["last"], ["last"])
    named(store, new, ["latest", f"{recipe['teacher']}-{recipe['mode']}".replace("/", "-")])
    detector = new.results["detector"]
    of_dataset = f"best-{plain_name(str(new.params['dataset']))}"
    of_dataset += "" if detector in (None, detector_name(data)) else f"-{detector}"
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
def _first_alone() -> Iterator[None]:
    """See `engine.first_alone`; a process that is alone anyway does not import torch for it."""
    if is_alone():
        yield
        return
    from sidactl import engine

    with engine.first_alone():
        yield


@contextmanager
def _together(store: Store, key: str) -> Iterator[LiveDir]:
    """The live directory of a question that several processes work on; the first one holds and fills it."""
    from sidactl import engine

    if engine.rank_and_size()[0] > 0:
        place = Path(engine.agreed(str))
        yield LiveDir(place, is_writer=False)
        return
    with at_work(store, key) as live:
        engine.agreed(lambda: str(live.path))
        yield live


def _resolved(
    store: Store,
    teacher: str,
    mode: str,
    generator: str | None,
    dataset: str | None,
    reference: str | None,
    overrides: Mapping[str, Any],
    recheck: bool,
) -> tuple[Recipe, dict[str, Artifact], list[str]]:
    """The complete recipe of a distillation, its inputs by role, and what people should know of them."""
    if _is_foreign(teacher):
        teacher = resolve(store, teacher, ["teacher"], recheck=recheck).oid
    elif recheck:
        resolve(store, teacher, ["teacher"], recheck=True)  # before the plan reads it
    planned = plan(teacher=teacher, mode=mode, generator=generator, dataset=dataset, store=store, overrides=overrides)
    teacher_artifact = resolve(store, teacher, ["teacher"])
    inputs = {"teacher": teacher_artifact}
    teacher_net = NetSpec.from_json(mapping(teacher_artifact.params["net"]))
    data = inputs["dataset"] = _training_data(store, planned, teacher_net, dataset, recheck)
    recipe = dataclasses.replace(
        planned.recipe, dataset=planned.recipe.dataset if dataset is None else str(data.params["name"])
    )
    notes: list[str] = []
    if data.results["kind"] == "labels" and dataset is None:
        notes.append(f"dataset {recipe.dataset}: mode sid needs no images, training on classes alone")
    try:
        inputs["reference"] = _training_reference(store, teacher_artifact, data, reference, recheck)
    except MissingError as error:
        # What failed, such as a download, may work another time; what is not there does not come.
        if reference is not None or recipe.mode != "sid" or data.results["kind"] != "labels":
            raise
        notes.append(f"nothing is scored, and the last generator is the result: {error.message}")
    if generator is not None:
        inputs["generator"] = resolve(store, generator, ["generator"], recheck=recheck)
        _check_generator(inputs["generator"], teacher_artifact)
    _check_fit(data, teacher_net, "teacher")
    if "reference" in inputs and inputs["reference"].oid == data.oid:
        del inputs["reference"]
    return recipe, inputs, notes


def _training_data(store: Store, planned: Plan, net: NetSpec, asked: str | None, recheck: bool) -> Artifact:
    """The dataset to train on; in mode sid, where it is not there and none was named, the net's classes alone."""
    try:
        if asked:
            data = resolve(store, asked, ["dataset"], recheck=recheck)
        else:
            data = dataset_named(store, planned.inputs["dataset"], recheck=recheck)
    except MissingError:
        if asked or planned.recipe.mode != "sid":
            raise
        # A net without classes looks at no label: one class does as well.
        return prepare_data(None, classes=net.label_dim or 1, run=store.root, recheck=recheck, say=None)
    if planned.recipe.mode != "sid":
        require_images(data)
    return data


def _training_reference(store: Store, teacher: Artifact, data: Artifact, asked: str | None, recheck: bool) -> Artifact:
    """What the generator is scored against while it trains."""
    pixels = references.pixels_of(store, data)
    if asked is None and pixels.results["kind"] == "pixels":
        return pixels
    return references.find(store, asked, teacher, "moments", recheck=recheck)


def _distill(
    store: Store,
    live: LiveDir,
    keys: Mapping[str, str],
    recipe: Recipe,
    execution: Execution,
    inputs: Mapping[str, Artifact],
    device: str | None,
    watch: Watch | None,
    notes: Sequence[str],
    force: bool,
    say: download.Say | None,
) -> None:
    """Trains, stores the last and the best generator under their keys, and a run that binds them."""
    import safetensors.torch

    from sidactl import engine, loop, pictures, teachers, trainer

    chosen_device = engine.pick_device(device)
    engine.passes_of(recipe, execution)  # what does not fit is told before anything is loaded
    data = inputs["dataset"]
    sampler = OneStepSpec(sigma_init=recipe.sigma_init)
    compared = inputs.get("reference", None if data.results["kind"] == "labels" else data)
    detector, evaluate = None, None
    if compared:
        if force:
            fetch_detector(detector_name(compared), run=store.root, recheck=True)
        detector = load_detector(store, detector_name(compared), chosen_device)
        against = references.moments(store, compared, detector, recheck=force)
        evaluate = _evaluation(detector, against, sampler, recipe.evaluate_num)
    teacher = load_net(store, inputs["teacher"], chosen_device)
    start = load_net(store, inputs["generator"], chosen_device) if "generator" in inputs else None
    batches = _batches(store, data, recipe.batch_size, recipe.num_accumulation_rounds, recipe.seed, chosen_device)
    training = trainer.Distillation(recipe, teacher, start, batches, execution)
    if tried := _fitted(training, execution, live, chosen_device):
        notes = [*notes, tried]
    schedule = loop.Schedule(
        duration_nimg=recipe.duration_nimg,
        evaluate_every_nimg=recipe.evaluate_every_nimg,
        checkpoint_every_nimg=recipe.checkpoint_every_nimg,
        stop_if_nan_steps=recipe.stop_if_nan_steps,
    )
    title = f"distill {recipe.teacher} {recipe.mode}"
    facts = {"title": title, "teacher": recipe.teacher}
    history = _train(training, schedule, live, evaluate, watch, facts, notes)
    teacher_score, curve = None, {}
    last: tuple[int, float | None] = training.nimg, None
    best = last
    if compared and detector:
        if history.best is None:
            raise SidaError("no evaluation gave a finite score", "Lower the learning rate.", exit_code=EXIT_FAILED)
        last, best = history.scores[-1], history.best
        teacher_score = _teacher_score(store, inputs["teacher"], compared, recipe, device, watch, force)
        curve["curve.png"] = pictures.curve(
            history.scores,
            teacher_score=teacher_score,
            title=f"{recipe.mode} of {recipe.teacher}, one step",
            ylabel=distance_name(detector),
        )
    net, made = engine.gathered(training.ema, chosen_device), {}
    if engine.rank_and_size()[0] > 0:
        return
    for which, (nimg, score) in (("last", last), ("best", best)):
        if which == "best" and history.best:
            teachers.load_weights(net, safetensors.torch.load(loop.best_weights(history, live)))
        made[which] = store.put(
            "generator",
            {"model.safetensors": loop.weights(net), "grid.png": _preview(net, sampler), **curve},
            inputs={role: artifact.oid for role, artifact in inputs.items()},
            params={
                "name": f"{recipe.teacher}-{recipe.mode}",
                "net": net.spec.to_json(),
                "sampler": sampler.to_json(),
                "dataset": recipe.dataset,
                "recipe": recipe.to_json(),
            },
            results={
                "images_seen": nimg,
                "selection_score": _finite(score),
                "teacher_score": teacher_score,
                "detector": detector.name if detector else None,
                "scores": [[n, _finite(s)] for n, s in history.scores],
                "skipped_updates": sum(training.skipped.total.values()),
            },
        )
    record = store.put(
        "run", {}, inputs={which: artifact.oid for which, artifact in made.items()}, params=recipe.to_json()
    )
    # A run keeps its generators reachable when a later run takes over the names best and last.
    store.set_ref("run", f"{recipe.teacher}-{recipe.mode}-{record.oid[:8]}".replace("/", "-"), record.oid)
    _name_generators(store, made, data, say or (lambda line: None))
    # The best comes last: once it is there, the question is answered.
    for which, artifact in made.items():
        answered(store, keys[which], artifact, "distill")


def _fitted(training: "Distillation", execution: Execution, live: LiveDir, device: "torch.device") -> str | None:
    """Lets a GPU take as many images at a time as fit, found by trying and remembered; tells how many.

    Not where a number was asked for; nor on the CPU, whose memory gives no sign before it is full, nor sharded, where
    processes wait for each other: then it is one micro-batch.
    """
    from sidactl import engine

    if execution.batch_per_device or execution.shard or device.type == "cpu":
        return None
    remembered = live.path / "batch-per-device.json"
    tried_on = [engine.rank_and_size()[1], engine.memory_of(device), execution.to_json()]
    told = json.loads(engine.agreed(lambda: remembered.read_text() if remembered.exists() else "{}"))
    if told.get("tried_on") == tried_on:
        training.passes = engine.passes_of(training.recipe, Execution(batch_per_device=told["images"]))
        return None
    images = training.fit_batch_per_device()
    live.write(remembered.name, json.dumps({"images": images, "tried_on": tried_on}).encode())
    return f"{images} images at a time fit into the memory of {device} (--batch-per-device)"


def _evaluation(
    detector: "Detector", reference: references.Moments, sampler: OneStepSpec, num_images: int
) -> "Evaluate":
    """What scores a net while it trains: its distance from the reference, and a grid of images."""
    from sidactl import engine, loop, metrics, sampling

    seeds = range(SELECTION_SEED, SELECTION_SEED + num_images)

    def evaluate(net: "Preconditioned", should_stop: Callable[[], bool]) -> loop.Evaluation | None:
        net = engine.gathered(net, detector.device)
        size = images_per_batch(net.spec.img_channels, net.spec.img_resolution)
        samples = sampling.generate(net, seeds, sampler, device=detector.device, batch_size=size)
        generated = metrics.FeatureStats()
        features = (detector(batch.images) for batch in samples.shared())
        for rows in engine.joined(features, len(samples), should_stop=should_stop):
            generated.add(rows)
        if engine.any_process(should_stop()):
            return None

        def score() -> str:
            return repr(metrics.frechet_distance(generated.mean, generated.covariance(), *reference))

        return loop.Evaluation(float(engine.agreed(score)), _preview(net, sampler))

    return evaluate


def _finite(score: float | None) -> float | None:
    """The score, or None for one that JSON has no word for."""
    return score if score is not None and math.isfinite(score) else None


def _teacher_score(
    store: Store,
    teacher: Artifact,
    compared: Artifact,
    recipe: Recipe,
    device: str | None,
    watch: Watch | None,
    force: bool,
) -> float:
    from sidactl import loop

    def tick(done: int, total: int) -> None:
        if watch and done == 0:
            nfe = sampler_of(teacher).nfe
            message = f"scoring the teacher on {total:,} images ({nfe} evaluations each) for comparison"
            watch(loop.Event("note", recipe.duration_nimg, {"message": message}))

    options: ScoreOptions = {
        "reference": compared.oid,
        "num": recipe.evaluate_num,
        "run": store.root,
        "device": device,
        "say": None,
        "tick": tick,
    }
    try:
        return fid(teacher.oid, **options).value
    except BrokenError:
        if not force:
            raise
        options["force"] = True
        return fid(teacher.oid, **options).value


def finetune_sid2a(*, teacher: str, generator: str, **options: Any) -> Artifact:
    """`distill` in mode sid2a: SiDA started from a generator; options as there.

    Source: SiDA (2410.14919), section 4.3.
    """
    return distill(teacher=teacher, mode="sid2a", generator=generator, **options)


def _check_generator(generator: Artifact, teacher: Artifact) -> None:
    if generator.params["dataset"] not in (None, teacher.params["dataset"]):
        raise SidaError(
            f"the generator must be of the teacher's dataset {teacher.params['dataset']!r}, "
            f"got one of {generator.params['dataset']!r}",
            "Give a generator that was distilled from this teacher.",
        )
    # Dropout is the recipe's, and generators have no uncertainty head.
    apart = {"dropout": 0, "logvar_channels": 0}
    theirs, ours = (dict(mapping(a.params["net"])) | apart for a in (generator, teacher))
    if theirs != ours:
        wrong = next(k for k in ours if theirs.get(k) != ours[k])
        raise SidaError(
            f"the generator must have the teacher's network, got {wrong} {theirs.get(wrong)} for {ours[wrong]}",
            "Give a generator that was distilled from this teacher.",
        )


def _check_fit(data: Artifact, net: NetSpec, whose: str) -> None:
    wanted = (net.img_resolution, net.img_channels, net.label_dim)
    got = shape_for_nets(data)
    if got[:2] not in (wanted[:2], (None, None)) or net.label_dim not in (0, got[2]):
        raise SidaError(
            f"the dataset must fit the {whose} (resolution, channels, classes = "
            f"{wanted[0]}, {wanted[1]}, {wanted[2]}), got {got[0]}, {got[1]}, {got[2]}",
            "Pass another --dataset, or prepare this one to fit.",
        )


def _batches(
    store: Store, data: Artifact, batch_size: int, num_rounds: int, seed: int, device: "torch.device"
) -> "MicroBatches":
    from sidactl import trainer
    from sidactl.data import DataOrder

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
) -> "History":
    """Runs the loop to its end, passing events on; an interruption leaves a checkpoint and raises, exit code 130."""
    from sidactl import engine, loop

    history, interrupted = loop.History(), False
    tell = watch or (lambda event: None)
    with _stop_on_signals() as should_stop:
        began = {**facts, "events": str(live.path / "events.jsonl"), "duration_nimg": schedule.duration_nimg}
        tell(loop.Event("started", 0, began))
        for message in notes:
            tell(loop.Event("note", 0, {"message": message}))
        events = loop.run(training, schedule, live, evaluate=evaluate, should_stop=should_stop, history=history)
        for event in events:
            tell(event)
            interrupted |= event.kind == "interrupted"
        # Whichever of several processes was asked to stop, all of them have.
        if engine.any_process(interrupted or should_stop()):
            raise SidaError(
                f"interrupted at {training.nimg:,} of {schedule.duration_nimg:,} images; the checkpoint is kept",
                "Repeat the same command to go on.",
                exit_code=EXIT_INTERRUPTED,
            )
    return history


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT or SIGTERM makes the yielded function true; the next one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each, handler in usual.items():
            signal.signal(each, handler)

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stop.is_set
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _preview(net: "Preconditioned", sampler: OneStepSpec | HeunSpec) -> bytes:
    from sidactl import pictures, sampling

    device = next(net.parameters()).device
    batches = sampling.generate(net, PREVIEW_SEEDS, sampler, device=device)
    return pictures.grid(next(iter(batches)).images.permute(0, 2, 3, 1).numpy())


@dataclass(frozen=True)
class Sampled:
    """A samples artifact with its content: images uint8 [N, H, W, C], labels int64 [N] or None, seeds."""

    artifact: Artifact
    store: Store

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
    ref: str,
    *,
    seeds: Sequence[int],
    class_index: int | None = None,
    steps: int | None = None,
    sampler: Literal["one-step", "heun"] | None = None,
    guide: str | None = None,
    guidance: float = 1.0,
    setting: Setting | None = None,
    name: str | None = None,
    run: Path | str | None = None,
    device: str | None = None,
    force: bool = False,
    say: download.Say | None = download.to_stderr,
    tick: Tick | None = None,
) -> Sampled:
    """Images of a teacher or generator, one per seed, as a samples artifact (a zip in the EDM layout, and a grid).

    The sampler defaults to the net's own: one step for a generator, Heun for a teacher. guide: a weaker teacher that
    Heun's sampler moves away from, `guidance` times as far (1 = not at all). Noise and class of an image depend on its
    seed alone. setting: of the nets' arithmetic, float32 by default; another precision is another question. say: takes
    the line that an answer is an old one.
    """
    if not seeds:
        raise SidaError("sample count must be >= 1, got 0", "Pass --num 1 or more.")
    store = Store.open(run)
    if name:
        store.check_name("samples", name)
    with _first_alone():
        subject = resolve(store, ref, NETS, recheck=force)
    chosen = _sampler(subject, sampler, steps)
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
        inputs["guide"] = resolve(store, guide, ["teacher"], recheck=force)
        params["guidance"] = guidance
    elif guidance != 1:
        raise SidaError(f"guidance {guidance:g} needs a second net, got none", "Pass --guide REF.")
    key = store.key("sample", params, {role: artifact.oid for role, artifact in inputs.items()})
    refs = [name] if name else []
    if not force and (known := agreed_answer(store, key)):
        tell_old(store, key, say)
        return Sampled(named(store, known, refs), store)
    store.check_writable()

    from sidactl import engine, pictures, prepare, sampling

    chosen_device = engine.pick_device(device)
    used = {role: engine.set_up(load_net(store, artifact, chosen_device), setting) for role, artifact in inputs.items()}
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
        batch_size=size,
    )
    drawn = engine.joined(batches.shared(), len(batches))
    if engine.rank_and_size()[0] > 0:
        list(drawn)  # nothing, but the others wait for this process's share
        return Sampled(store.get(engine.agreed(str)), store)
    with store.scratch() as path:
        first: NDArray[np.uint8] | None = None
        with prepare.ZipWriter(path) as writer:
            for batch in drawn:
                images = batch.images.permute(0, 2, 3, 1).numpy()
                first = images[: len(PREVIEW_SEEDS)] if first is None else first
                for index, image in enumerate(images):
                    writer.add(image, None if batch.labels is None else int(batch.labels[index]))
                if tick:
                    tick(writer.num_images, len(seeds))
        assert first is not None
        artifact = store.put(
            "samples",
            {"images.zip": path, "grid.png": pictures.grid(first)},
            inputs={role: artifact.oid for role, artifact in inputs.items()},
            params=params | {"name": subject.params["name"], "dataset": subject.params["dataset"]},
            results={"num_images": len(seeds), "nfe": chosen.nfe},
        )
    artifact = answered(store, key, artifact, "sample", refs=refs)
    return Sampled(store.get(engine.agreed(lambda: artifact.oid)), store)


def _seeds_to_json(seeds: Sequence[int]) -> dict[str, int] | list[int]:
    if isinstance(seeds, range) and seeds.step == 1:
        return {"first": seeds.start, "count": len(seeds)}
    return [int(seed) for seed in seeds]


def _seeds_from_json(value: Any) -> Sequence[int]:
    return range(value["first"], value["first"] + value["count"]) if isinstance(value, Mapping) else value


def _sampler(subject: Artifact, kind: str | None, steps: int | None) -> OneStepSpec | HeunSpec:
    own = sampler_of(subject)
    if kind not in (None, "one-step", "heun"):
        raise SidaError(f"the sampler must be one-step or heun, got {kind!r}", "Pass --sampler heun for a teacher.")
    chosen: OneStepSpec | HeunSpec = own
    if kind == "heun" and isinstance(own, OneStepSpec):
        raise SidaError(
            "the heun sampler needs a teacher, got a one-step generator", "Leave out --sampler, or pass --steps."
        )
    if kind == "one-step" and isinstance(own, HeunSpec):
        chosen = OneStepSpec()
    if steps is not None and steps < 1:
        raise SidaError(f"the number of steps must be >= 1, got {steps}", "Pass --steps 1 or more.")
    return chosen if steps is None else dataclasses.replace(chosen, num_steps=steps)
