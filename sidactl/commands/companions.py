"""What a distillation has beside its teacher and dataset: where it starts, what guides the teacher, what it trains on.

Each is checked before any work; no torch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sidactl import catalog
from sidactl.commands import preflight
from sidactl.commands.moments import is_detector_file
from sidactl.commands.samplers import sampler_of
from sidactl.errors import SidaError
from sidactl.foreign.perceptual import check_lpips
from sidactl.recipes import AddRecipe, FakeScoreRecipe, FdLossRecipe, NetSpec, PairedRecipe, Recipe, flag_of
from sidactl.store import Store


def check_generator(generator: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Refuses a generator, by its parameters, that is not one of this teacher's kind."""
    if generator["dataset"] not in (None, teacher["dataset"]):
        raise SidaError(
            f"the generator must be of the teacher's dataset {teacher['dataset']!r}, "
            f"got one of {generator['dataset']!r}",
            "Give a generator that was distilled from this teacher.",
        )
    # Dropout is the recipe's, and generators have no uncertainty head.
    apart = {"dropout": 0, "logvar_channels": 0}
    theirs, ours = (dict(params["net"]) | apart for params in (generator, teacher))
    if theirs != ours:
        wrong = next(k for k in ours if theirs.get(k) != ours[k])
        raise SidaError(
            f"the generator must have the teacher's network, got {wrong} {theirs.get(wrong)} for {ours[wrong]}",
            "Give a generator that was distilled from this teacher.",
        )


def sampled_as(recipe: Recipe, own: Mapping[str, Any]) -> Recipe:
    """The recipe with the steps and noise levels of the generator that it starts from, whose sampler this is."""
    changed: dict[str, Any] = {"sigma_init": own["sigma_init"]}
    if own.get("num_steps", 1) > 1 and not isinstance(recipe, FakeScoreRecipe):
        what = f"mode {recipe.mode} trains generators of one step, got one of {own['num_steps']}"
        raise SidaError(what, "Pass --generator with one of one step.")
    if isinstance(recipe, FakeScoreRecipe) and own.get("num_steps", 1) > 1:
        levels, noise = tuple(own.get("levels", ())), own.get("noise", "fresh")
        changed |= {"steps": own["num_steps"], "step_levels": levels, "step_noise": noise}
    return dataclasses.replace(recipe, **changed)


def mode_of(generator: preflight.Input) -> str | None:
    """The mode that a generator was distilled in, where that is known."""
    entry = generator.entry or catalog.GENERATORS.get(str(generator.params.get("name")))
    recipe = generator.params.get("recipe")
    if isinstance(recipe, Mapping):
        return str(recipe["mode"])
    return entry.mode if isinstance(entry, catalog.Generator) else None


def guided(
    store: Store, asked: str | None, recipe: Recipe, taught: preflight.Input, *, is_chosen: bool
) -> tuple[Recipe, preflight.Input | None, list[str]]:
    """The recipe with the guidance of a published pair where none is asked for, the guide, and what is to be said.

    is_chosen: whether the recipe's guidance is what somebody asked for.

    Raises SidaError for guidance that cannot be, and for a guide that counts for nothing or does not fit the teacher.
    """
    name, net, notes = recipe.teacher, NetSpec.from_json(taught.params["net"]), list[str]()
    if not isinstance(recipe, FakeScoreRecipe):
        if asked:
            raise SidaError(f"mode {recipe.mode} takes no guide, got {asked}", "Leave out --guide.")
        return recipe, None, notes
    published, guidance = catalog.GUIDES.get(name, (None, 1.0))
    if asked is None and published and recipe.teacher_guidance == 1:
        raise SidaError(f"{name} is for guided sampling, got no guide", f"Pass --guide {published}.")
    if asked and recipe.teacher_guidance == 1:
        if asked != published or is_chosen:
            what = f"guide {asked} counts for nothing with --teacher-guidance 1"
            raise SidaError(what, "Pass --teacher-guidance, such as 1.4.")
        recipe = dataclasses.replace(recipe, teacher_guidance=guidance)
        notes.append(f"{name} is guided by {published}, with the published guidance, {guidance:g}")
    if not net.label_dim and (recipe.score_guidance != 1 or (recipe.teacher_guidance != 1 and not asked)):
        flag = "score_guidance" if recipe.score_guidance != 1 else "teacher_guidance"
        what = f"{flag_of(flag)} needs classes where a network guides itself, {name} has none"
        raise SidaError(what, "Pass --guide REF with --teacher-guidance.")
    if asked is None:
        if recipe.teacher_guidance != 1 and not _sees_no_labels(taught):
            notes.append(
                f"{name} guides itself by what it draws without labels, which it was not trained to do as far as is "
                "known (train-teacher --label-dropout); a --guide would be another network"
            )
        return recipe, None, notes
    guide = preflight.find(store, asked, ["teacher"])
    if guide.artifact and taught.artifact and guide.artifact.oid == taught.artifact.oid:
        raise SidaError(f"a teacher that is its own guide is not guided, got {asked}", "Pass another --guide.")
    if guide.params:
        theirs = NetSpec.from_json(guide.params["net"])
        wanted, got = ((n.img_channels, n.img_resolution, n.label_dim) for n in (net, theirs))
        if wanted[:2] != got[:2] or got[2] not in (0, wanted[2]):
            fitting, its = (", ".join(map(str, each)) for each in (wanted, got))
            raise SidaError(
                f"the guide must fit the teacher (channels, resolution, classes = {fitting}), got {its}",
                "Pass another --guide; one without classes fits as well.",
            )
    return recipe, guide, notes


def _sees_no_labels(taught: preflight.Input) -> bool:
    """Whether a teacher was trained without labels, too, as far as is known here."""
    recipe = taught.artifact.params.get("recipe") if taught.artifact else None
    return isinstance(recipe, Mapping) and bool(recipe.get("label_dropout"))


def check_trained_on(
    store: Store, recipe: Recipe, net: NetSpec, compared: preflight.Input, *, is_scored: bool
) -> list[preflight.Need]:
    """Refuses a detector that a generator cannot be trained on; what it needs."""
    detector = str(recipe.trained_on)
    if net.img_channels == catalog.LATENT_CHANNELS:
        what = f"mode {recipe.mode} trains on a detector's features of pixels, {recipe.teacher} draws latents"
        way = "Pass --mode ladd, which sees the teacher's." if recipe.mode == "add" else "Distil a teacher of pixels."
        raise SidaError(what, way)
    if isinstance(recipe, FdLossRecipe) and not is_scored and not compared.has_images:
        what = "fd-loss compares with images or statistics, got a run without scores on classes alone"
        raise SidaError(what, "Leave out --no-score, or pass --dataset REF with images.")
    if is_detector_file(detector):
        raise SidaError(f"a generator is trained on a detector by its name, got the file {detector}", "Name one.")
    if isinstance(recipe, AddRecipe) and detector not in catalog.MAPPED:
        what = f"heads see the maps of {', '.join(catalog.MAPPED)}, got {detector!r}"
        raise SidaError(what, f"Pass --discriminator-detector {catalog.MAPPED[0]}.")
    if isinstance(recipe, AddRecipe):  # whose heads look at images, and at no statistics
        compared = preflight.Input(recipe.dataset, None, None)
    return preflight.check_detector(store, detector, net, compared)


def check_pairs(recipe: PairedRecipe, net: NetSpec, taught: preflight.Input) -> str:
    """Refuses what no pairs can be made of, or compared by; says what they cost."""
    if net.img_channels == catalog.LATENT_CHANNELS:
        what = f"mode {recipe.mode} regresses on images that the teacher draws, {recipe.teacher} draws latents"
        raise SidaError(what, "Pass --mode dmd2, which needs no pairs.")
    if recipe.regression == "lpips":
        check_lpips()
    entry = catalog.TEACHERS.get(recipe.teacher)
    nfe = sampler_of(taught.artifact).nfe if taught.artifact else entry.sampler.nfe if entry else None
    each = "" if nfe is None else f", {nfe} evaluations each"
    return f"the teacher draws {recipe.num_pairs:,} pairs first{each}, unless they are there"
