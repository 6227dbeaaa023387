"""Frozen descriptions of networks, samplers and runs, every number with its unit; no torch here, and no I/O."""

from sidactl.recipes.add import AddRecipe
from sidactl.recipes.diffusion_gan import DiffusionGanRecipe
from sidactl.recipes.distillation import (
    FROM_GENERATOR,
    MODES,
    SID_MODES,
    EvaluatedBy,
    FakeScoreRecipe,
    FurtherRecipe,
    HeadsRecipe,
    Mode,
    Recipe,
    passes_of,
)
from sidactl.recipes.dmd import MatchingRecipe, PairedRecipe
from sidactl.recipes.execution import PRECISIONS, Execution, Precision, SamplingForm
from sidactl.recipes.fd_loss import FdLossRecipe
from sidactl.recipes.fields import JsonFields, flag_of
from sidactl.recipes.memory import BASE_BYTES, Memory
from sidactl.recipes.networks import NetSpec
from sidactl.recipes.noise_levels import NoiseLevels
from sidactl.recipes.overriding import names_of, override, recipe_classes
from sidactl.recipes.pretraining import TeacherRecipe
from sidactl.recipes.samplers import HeunSpec, OneStepSpec
from sidactl.recipes.sid import Adversarial, SidRecipe

__all__ = [
    "BASE_BYTES",
    "FROM_GENERATOR",
    "MODES",
    "PRECISIONS",
    "SID_MODES",
    "AddRecipe",
    "Adversarial",
    "DiffusionGanRecipe",
    "EvaluatedBy",
    "Execution",
    "FakeScoreRecipe",
    "FdLossRecipe",
    "FurtherRecipe",
    "HeadsRecipe",
    "HeunSpec",
    "JsonFields",
    "MatchingRecipe",
    "Memory",
    "Mode",
    "NetSpec",
    "NoiseLevels",
    "OneStepSpec",
    "PairedRecipe",
    "Precision",
    "Recipe",
    "SamplingForm",
    "SidRecipe",
    "TeacherRecipe",
    "flag_of",
    "names_of",
    "override",
    "passes_of",
    "recipe_classes",
]
