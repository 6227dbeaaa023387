"""Distances between sets of features, a file each; no network, no image and no file is touched here."""

from sidactl.metrics.features import LARGEST, NOT_STATISTICS, FeatureStats, check_positive, check_symmetric, real_array
from sidactl.metrics.frechet import frechet_distance
from sidactl.metrics.inception_score import inception_score
from sidactl.metrics.kernel import kernel_distance
from sidactl.metrics.precision_recall import guided_diffusion_precision_recall, precision_recall

__all__ = [
    "LARGEST",
    "NOT_STATISTICS",
    "FeatureStats",
    "check_positive",
    "check_symmetric",
    "frechet_distance",
    "guided_diffusion_precision_recall",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "real_array",
]
