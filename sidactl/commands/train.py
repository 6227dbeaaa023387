"""The command `train-teacher`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sidactl import catalog, launch
from sidactl.commands.inputs import Ref, field_values, ref_text
from sidactl.commands.question import Question
from sidactl.commands.resolve import resolve
from sidactl.commands.running import OnEvent, batches_for, check_fit, check_trainable, run_training
from sidactl.commands.tasks import Task, option_words
from sidactl.commands.words import RunDir, require_images, shape_for_nets
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import HeunSpec, NetSpec, TeacherRecipe
from sidactl.store import Artifact, Store


def train_teacher(
    dataset: Ref,
    *,
    name: str,
    net: str | None = None,
    recipe: TeacherRecipe | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    say: download.OnLine | None = download.to_stderr,
    watch: OnEvent | None = None,
    **recipe_overrides: Any,
) -> Artifact:
    """A teacher trained from scratch on a dataset with the EDM loss; the EMA net at the end of training.

    net: the form to start from, ddpmpp (default), ncsnpp, adm or edm2, small, and shaped to the dataset. Overrides name
    fields of TeacherRecipe or NetSpec, or their flags: duration="50k" is duration_nimg=50_000. say: takes the line that
    an answer is an old one.
    """
    if net not in (None, *catalog.SMALL_NETS):
        raise SidaError(f"the net must be one of {', '.join(catalog.SMALL_NETS)}, got {net!r}", "Pass --net ddpmpp.")
    if launch.world_size() > 1:
        raise SidaError("train-teacher runs in one process", "Start it without torchrun.")
    store = Store.open(run)
    store.check_name("teacher", name)
    data = resolve(store, ref_text(dataset, "the dataset"), ["dataset"], recheck=force)
    require_images(data)
    recipe_overrides = field_values(recipe_overrides, TeacherRecipe, NetSpec)
    recipe = _teacher_recipe(recipe, net, data, recipe_overrides)
    words = ["train-teacher", ref_text(dataset, "the dataset"), *option_words({"name": name, "net": net})]
    words += option_words(recipe_overrides, TeacherRecipe, NetSpec)
    question = Question(
        store=store,
        command="train-teacher",
        params={"recipe": recipe.to_json()},
        inputs={"dataset": data},
        refs=[name],
        force=force,
        say=say,
        task=Task("train-teacher", recipe.dataset, words, recipe.to_json(), {"dataset": data.oid}),
    )
    if known := question.known():
        return known
    with question.working() as live:
        import torch

        from sidactl import nets
        from sidactl.engine.devices import pick_device
        from sidactl.training import loop, pretraining, state

        chosen_device = pick_device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            built = nets.build(recipe.net).to(chosen_device)
        batches = batches_for(store, data, recipe.batch_size, 1, recipe.seed, chosen_device)
        training = pretraining.Pretraining(recipe, built, batches)
        schedule = state.Schedule(
            duration_nimg=recipe.duration_nimg,
            evaluate_every_nimg=recipe.duration_nimg,
            checkpoint_every_nimg=max(recipe.duration_nimg // 10, recipe.batch_size),
            stop_if_nan_steps=recipe.stop_if_nan_steps,
        )
        facts = {"title": f"train-teacher {name}"}
        shape = f"{recipe.net.img_resolution}x{recipe.net.img_resolution}x{recipe.net.img_channels}"
        seen = f"{data.results['num_images']:,} images of {shape}, {recipe.net.label_dim or 'no'} classes"
        run_training(training, schedule, live, None, watch, facts, notes=[seen], warnings=recipe.unusual())
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
        return question.record(artifact)


def _teacher_recipe(
    recipe: TeacherRecipe | None, form: str | None, data: Artifact, overrides: Mapping[str, Any]
) -> TeacherRecipe:
    check_trainable(data)
    shape = dict(zip(("img_resolution", "img_channels", "label_dim"), shape_for_nets(data), strict=True))
    net_fields = {f.name for f in dataclasses.fields(NetSpec)}
    fields = {f.name for f in dataclasses.fields(TeacherRecipe)} - {"dataset", "net"}
    if unknown := sorted(set(overrides) - net_fields - fields):
        raise SidaError(f"unknown recipe field {unknown[0]!r}", f"Fields are {', '.join(sorted(fields | net_fields))}.")
    net = dataclasses.replace(
        recipe.net if recipe else catalog.SMALL_NETS[form or "ddpmpp"],
        **(shape | {k: v for k, v in overrides.items() if k in net_fields}),
    )
    check_fit(shape_for_nets(data), net, "network")
    # EDM2's normalised weights turn by the same angle at ten times the rate.
    lr = 1e-2 if net.architecture == "EDM2" else TeacherRecipe.lr
    base = recipe or TeacherRecipe(dataset="", net=net, lr=lr)
    rest = {k: v for k, v in overrides.items() if k in fields}
    return dataclasses.replace(base, dataset=str(data.params["name"]), net=net, **rest)
