"""What has a name: teachers, generators, datasets, detectors, statistics; sources, recipes, scores. Data only."""

from sidactl.catalog.datasets import (
    DATASETS,
    LATENT_CHANNELS,
    LATENT_SCALE,
    VAE_CONFIG,
    VAE_FILES,
    VAE_NAME,
    VAE_WEIGHTS,
    VAES,
    vae_url,
)
from sidactl.catalog.entries import (
    ASSETS,
    Comparison,
    Dataset,
    Detector,
    Download,
    Entry,
    Generator,
    Published,
    Reference,
    Shipped,
    Teacher,
    did_you_mean,
)
from sidactl.catalog.generators import COMPARISONS, GENERATORS
from sidactl.catalog.lookup import Row, rows
from sidactl.catalog.methods import published_run
from sidactl.catalog.scoring import DETECTORS, EYES, MAPPED, REFERENCES, TIMM, detector, digest_of_code, timm_name
from sidactl.catalog.teachers import COSTS, GUIDES, NUM_PARAMETERS, TEACHERS, Cost, recipe_for, teacher
from sidactl.catalog.tiny_digits import SMALL_NETS

__all__ = [
    "ASSETS",
    "COMPARISONS",
    "COSTS",
    "DATASETS",
    "DETECTORS",
    "EYES",
    "GENERATORS",
    "GUIDES",
    "LATENT_CHANNELS",
    "LATENT_SCALE",
    "MAPPED",
    "NUM_PARAMETERS",
    "REFERENCES",
    "SMALL_NETS",
    "TEACHERS",
    "TIMM",
    "VAES",
    "VAE_CONFIG",
    "VAE_FILES",
    "VAE_NAME",
    "VAE_WEIGHTS",
    "Comparison",
    "Cost",
    "Dataset",
    "Detector",
    "Download",
    "Entry",
    "Generator",
    "Published",
    "Reference",
    "Row",
    "Shipped",
    "Teacher",
    "detector",
    "did_you_mean",
    "digest_of_code",
    "published_run",
    "recipe_for",
    "rows",
    "teacher",
    "timm_name",
    "vae_url",
]
