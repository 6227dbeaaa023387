"""A recipe with some of its numbers replaced, by whatever class of recipe has them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from sidactl.errors import SidaError
from sidactl.recipes.distillation import FEW_IMAGES, MODES, Recipe
from sidactl.recipes.fields import flag_of
from sidactl.recipes.sid import Adversarial, SidRecipe


def recipe_classes() -> tuple[type[Recipe], ...]:
    """The classes of all modes, each once."""
    return tuple(dict.fromkeys(Recipe._classes[mode] for mode in MODES if mode in Recipe._classes))


def names_of(mode: str) -> set[str]:
    """The fields that a recipe of this mode has, those of its adversarial part with them."""
    cls = Recipe._classes[mode]
    names = {f.name for f in dataclasses.fields(cls)} - {"adversarial"} - cls._hidden
    if issubclass(Recipe._classes[mode], SidRecipe) and mode != "sid":
        names |= {f.name for f in dataclasses.fields(Adversarial)}
    return names


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def override(recipe: AnyRecipe, overrides: Mapping[str, Any]) -> AnyRecipe:
    """The recipe with some fields replaced; names of Adversarial fields reach into its adversarial part.

    Raises SidaError for a name that is no field of this mode's recipe, and for one that would count for nothing.
    """
    own = names_of(recipe.mode)
    for name in overrides:
        if name in own:
            continue
        others = [mode for mode in Recipe._classes if name in names_of(mode)]
        if not others:
            hint = f"Fields of mode {recipe.mode} are {', '.join(sorted(own))}."
            raise SidaError(f"unknown recipe field {name!r}", hint)
        if recipe.mode == "sid" and name in {f.name for f in dataclasses.fields(Adversarial)}:
            raise SidaError(
                f"{name} belongs to the adversarial loss, which mode sid does not have",
                "Use --mode sida, or leave it out.",
            )
        raise SidaError(
            f"{flag_of(name)} is no setting of mode {recipe.mode}, but of {', '.join(others)}", "Leave it out."
        )
    changed: dict[str, Any] = dict(overrides)
    if isinstance(recipe, SidRecipe) and recipe.adversarial is not None:
        fields = {f.name for f in dataclasses.fields(Adversarial)}
        part = {name: changed.pop(name) for name in list(changed) if name in fields}
        changed["adversarial"] = dataclasses.replace(recipe.adversarial, **part)
    if (precision := changed.get("precision", recipe.precision)) != recipe.precision and "adam_eps" not in changed:
        changed["adam_eps"] = 1e-6 if precision == "fp16" else 1e-8
    if changed.get("evaluate_by", "fid") != "fid" and "evaluate_num" not in changed:
        changed["evaluate_num"] = min(recipe.evaluate_num, FEW_IMAGES)
    if changed.get("direction") == "sid" and "direction_dropout" not in changed:
        changed["direction_dropout"] = False  # which that direction cannot have
    if (levels := changed.get("step_levels")) and "sigma_init" not in changed and 0 < levels[0] < math.inf:
        changed["sigma_init"] = levels[0]
    if "steps" in changed and "step_levels" not in changed:
        changed["step_levels"] = ()  # those of the generator that it starts from, if any, are of its number of steps
    made = dataclasses.replace(recipe, **changed)
    idle = made.idle()
    for name in overrides:
        if name in idle:
            raise SidaError(f"{flag_of(name)} counts for nothing with {idle[name]}", "Leave out one of the two.")
    return made
