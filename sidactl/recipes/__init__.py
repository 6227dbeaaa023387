"""Frozen descriptions of networks, samplers and runs, every number with its unit; no torch here, and no I/O."""

from sidactl.recipes.distillation import MODES, EvaluatedBy, Mode, Recipe, override, passes_of
from sidactl.recipes.execution import PRECISIONS, Execution, Precision, SamplingForm
from sidactl.recipes.fields import JsonFields, flag_of
from sidactl.recipes.memory import BASE_BYTES, Memory
from sidactl.recipes.networks import NetSpec
from sidactl.recipes.pretraining import TeacherRecipe
from sidactl.recipes.samplers import HeunSpec, OneStepSpec
from sidactl.recipes.sid import Adversarial

__all__ = [
    "BASE_BYTES",
    "MODES",
    "PRECISIONS",
    "Adversarial",
    "EvaluatedBy",
    "Execution",
    "HeunSpec",
    "JsonFields",
    "Memory",
    "Mode",
    "NetSpec",
    "OneStepSpec",
    "Precision",
    "Recipe",
    "SamplingForm",
    "TeacherRecipe",
    "flag_of",
    "override",
    "passes_of",
]
