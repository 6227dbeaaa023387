"""Distances between sets of features, a file each; no network, no image and no file is touched here."""

from sidactl.metrics.coverage import density_coverage
from sidactl.metrics.features import LARGEST, NOT_STATISTICS, FeatureStats, check_positive, check_symmetric, real_array
from sidactl.metrics.frechet import frechet_distance, frechet_ratio
from sidactl.metrics.inception_score import inception_score
from sidactl.metrics.kernel import kernel_distance
from sidactl.metrics.memorisation import authenticity, generalisation_gap
from sidactl.metrics.mind import mind
from sidactl.metrics.pairs import pair_distances, pairing
from sidactl.metrics.precision_recall import guided_diffusion_precision_recall, precision_recall
from sidactl.metrics.vendi import vendi

__all__ = [
    "LARGEST",
    "NOT_STATISTICS",
    "FeatureStats",
    "authenticity",
    "check_positive",
    "check_symmetric",
    "density_coverage",
    "frechet_distance",
    "frechet_ratio",
    "generalisation_gap",
    "guided_diffusion_precision_recall",
    "inception_score",
    "kernel_distance",
    "mind",
    "pair_distances",
    "pairing",
    "precision_recall",
    "real_array",
    "vendi",
]
