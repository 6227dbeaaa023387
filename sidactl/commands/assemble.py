"""Everything that a distillation needs, resolved and loaded before its first step."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sidactl.commands import moments
from sidactl.commands import reference as commands_reference
from sidactl.commands.companions import check_generator, guided
from sidactl.commands.identity import source_identity
from sidactl.commands.plan import Plan, is_foreign, needs_reference, of_other_vae, plan
from sidactl.commands.preflight import Input
from sidactl.commands.prepare import prepare_data
from sidactl.commands.question import Question
from sidactl.commands.resolve import dataset_called, resolve
from sidactl.commands.running import check_fit, check_trainable
from sidactl.commands.tasks import Task
from sidactl.commands.vae import vae_digest, vae_for
from sidactl.commands.words import require_images, shape_for_nets
from sidactl.errors import MissingError
from sidactl.recipes import Execution, NetSpec, Recipe
from sidactl.store import Artifact, LiveDir, Store

if TYPE_CHECKING:
    import torch

    from sidactl.training.distillation import Distillation


@dataclass(frozen=True)
class Assembled:
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

    def questions(self, store: Store, words: Sequence[str] = (), **how: Any) -> dict[str, Question]:
        """The questions that the best and the last generator answer; what shapes neither is no part of them.

        words: the command that goes on. how: `force` and `say`, as in `Question`.
        """
        recipe, inputs = self._recipe_of_keys(), self.inputs
        shown = {**recipe, **({"no_score": True} if "scored" in self.settings else self.settings)}
        oids = {role: artifact.oid for role, artifact in inputs.items()}
        task = Task("distill", f"{self.recipe.teacher} {self.recipe.mode}", words, shown, oids)
        return {
            which: Question(
                store=store,
                command="distill",
                params={"recipe": recipe, "which": which, **self.settings},
                inputs=inputs,
                task=task,
                **how,
            )
            for which in ("best", "last")
        }


def assembled(
    store: Store, *, teacher: str, execution: Execution, device: str | None, recheck: bool, **options: Any
) -> Assembled:
    """A distillation with its inputs fetched and prepared, once all was checked that can be known before."""
    if is_foreign(teacher):
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
    net = NetSpec.from_json(teacher_artifact.params["net"])
    data = inputs["dataset"] = _training_data(store, planned, teacher_artifact, dataset, recheck)
    recipe = dataclasses.replace(
        planned.recipe, dataset=planned.recipe.dataset if dataset is None else str(data.params["name"])
    )
    notes, settings = list(planned.notes), dict[str, Any]()
    compared, detector = None, options["detector"]
    if options["score"]:
        try:
            if reference is None:
                compared = commands_reference.of_run(store, teacher_artifact, data, recheck=recheck)
            else:
                compared = commands_reference.find(store, reference, teacher_artifact, "moments", recheck=recheck)
        except MissingError as error:
            # What failed, such as a download, may work another time; what is not there does not come.
            if needs_reference(recipe, reference, detector, data):
                raise
            if planned.scoring:
                notes.append(f"nothing is scored, and the last generator is the result: {error.message}")
    elif data.results["kind"] != "labels":
        settings["scored"] = False
    is_without_images = data.results["kind"] == "latents" and "dataset" not in data.inputs
    if compared and reference is None and is_without_images and compared.params["name"] != data.params["name"]:
        comparison = f"scored against the {commands_reference.described(store, compared)} of its teacher's"
        notes.append(f"{data.params['name']} has no images to compare with: {comparison}")
    if generator is not None:
        inputs["generator"] = resolve(store, generator, ["generator"], recheck=recheck)
        check_generator(inputs["generator"].params, teacher_artifact.params)
    if options.get("guide") is not None:
        inputs["guide"] = resolve(store, options["guide"], ["teacher"], recheck=recheck)
        guided(store, inputs["guide"].oid, recipe, Input(teacher, teacher_artifact), is_chosen=True)
    check_trainable(data)
    check_fit(shape_for_nets(data), net, "teacher")
    if compared:
        default = moments.training_detector(compared)
        if detector not in (None, default):
            is_file = moments.is_detector_file(detector)
            settings["detector"] = source_identity(store, detector, recheck=recheck) if is_file else detector
        detector = detector or default
        if compared.oid != data.oid:
            inputs["reference"] = compared
    asked_vae, warnings = options.get("vae"), [*planned.warnings]
    vae = vae_for(store, asked_vae, teacher_artifact, recheck=recheck)
    if vae:
        settings["vae"] = vae_digest(vae)
    if asked_vae is not None:  # else the plan has told
        warnings += of_other_vae(vae, [*inputs.values()])
    return Assembled(recipe, planned.default, execution, inputs, compared, detector, vae, settings, warnings, notes)


def _training_data(store: Store, planned: Plan, teacher: Artifact, asked: str | None, recheck: bool) -> Artifact:
    """The dataset to train on; in mode sid, where it is not there and none was named, the net's classes alone."""
    try:
        if asked:
            data = resolve(store, asked, ["dataset"], recheck=recheck)
        else:
            needs_images = planned.recipe.needs_images
            data = dataset_called(store, planned.inputs["dataset"], recheck=recheck, may_download=needs_images)
    except MissingError:
        if not asked and "dataset" in teacher.inputs:
            return store.get(teacher.inputs["dataset"])
        if asked or planned.recipe.needs_images:
            raise
        # A net without classes looks at no label: one class does as well.
        num_classes = int(teacher.params["net"]["label_dim"]) or 1
        return prepare_data(None, classes=num_classes, run=store.root, recheck=recheck, say=None)
    if planned.recipe.needs_images:
        require_images(data)
    return data


LEAST_SECONDS = 1800.0
"""of a run in its plain form, below which another is not tried: to compile takes minutes"""


def in_fastest_form(
    make: "Callable[[Execution], Distillation]", execution: Execution, live: LiveDir, device: "torch.device"
) -> "tuple[Distillation, list[str]]":
    """A distillation with the form and the images at a time that are fastest on a GPU, and lines that tell them.

    make: a distillation with nets of its own. On the CPU, whose bits are promised, where a form is asked for, and where
    the run is short, it is made as it is; what was found is remembered with the run, which goes on with it.
    """
    from sidactl.engine import configure, devices, meter, ranks

    if device.type == "cpu" or not execution.is_form_open:
        training = make(execution)
        note = find_batch_per_device(training, execution, live, device)
        return training, [note] if note else []
    remembered = live.path / "form.json"
    tried_on = [ranks.rank_and_size()[1], devices.memory_of(device), execution.to_json()]
    known = json.loads(ranks.broadcast_from_rank0(lambda: remembered.read_text() if remembered.exists() else "{}"))
    if known.get("tried_on") == tried_on:
        training = make(dataclasses.replace(execution, **known["form"]))
        training.passes = configure.passes_of(training.recipe, Execution(batch_per_device=known["images"]))
        return training, []
    memory, clock = partial(devices.free_and_total, device), partial(meter.when_done, time.perf_counter, device)
    training = make(execution)
    found = find_batch_per_device(training, execution, live, device)
    recipe, passes = training.recipe, training.passes
    images = len(passes[0]) * recipe.batch_size // recipe.num_accumulation_rounds
    plain, _ = training.seconds_per_image(memory, clock)
    if plain is not None and plain * recipe.duration_nimg < LEAST_SECONDS * ranks.rank_and_size()[1]:
        return training, [found] if found else []
    # Compiled dropout draws other masks, and takes one micro-batch at a time.
    form: dict[str, Any] = {"channels_last": True, "compile": not recipe.dropout}
    words = "channels-last and compiled" if form["compile"] else "channels-last"
    del training
    devices.free(device)
    training = make(dataclasses.replace(execution, **form))
    training.passes = passes
    formed, why = training.seconds_per_image(memory, clock)
    is_faster = formed is not None and (plain is None or formed < plain)
    if not is_faster:
        form = {}
        del training
        devices.free(device)
        training = make(execution)
        training.passes = passes
    live.write(remembered.name, json.dumps({"form": form, "images": images, "tried_on": tried_on}).encode())
    times = [f"{1e3 * s:.3g} ms" if s is not None else f"none ({why or 'it does not fit'})" for s in (plain, formed)]
    chosen = words if is_faster else "the plain form"
    told = f"{chosen} stays (--form): an image takes {times[0]} in the plain form, {times[1]} {words}"
    return training, [*([found] if found else []), told]


def find_batch_per_device(
    training: "Distillation", execution: Execution, live: LiveDir, device: "torch.device"
) -> str | None:
    """Lets a GPU take the fastest number of images at a time that fits, by trying and remembered; tells which.

    Not where a number was asked for; nor on the CPU, whose memory gives no sign before it is full, nor sharded, where
    processes wait for each other: then it is one micro-batch.
    """
    from sidactl.engine import configure, devices, meter, ranks

    if execution.batch_per_device or execution.shard or device.type == "cpu":
        return None
    remembered = live.path / "batch-per-device.json"
    tried_on = [ranks.rank_and_size()[1], devices.memory_of(device), execution.to_json()]
    remembered_json = json.loads(
        ranks.broadcast_from_rank0(lambda: remembered.read_text() if remembered.exists() else "{}")
    )
    if remembered_json.get("tried_on") == tried_on:
        training.passes = configure.passes_of(training.recipe, Execution(batch_per_device=remembered_json["images"]))
        return None
    clock = partial(meter.when_done, time.perf_counter, device)
    images, seconds = training.fit_batch_per_device(partial(devices.free_and_total, device), clock)
    live.write(remembered.name, json.dumps({"images": images, "tried_on": tried_on}).encode())
    if seconds is None:
        return f"not even {images} images at a time fit into the memory of {device} with a twentieth left free"
    return f"{images} images at a time are the fastest that fit into {device} (--batch-per-device): {1 / seconds:.1f}/s"
