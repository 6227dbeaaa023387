"""Noise pairing: how much of a teacher's map from noise to images a student keeps."""

import torch
from torch import Tensor

from sidactl.errors import SidaError
from sidactl.metrics.features import Features, as_sets, check_number


def pair_distances(first: Features, second: Features) -> Tensor:
    """Distance [N] of each of `first` [N, F] to the row of the same number in `second` [N, F], in units of a value.

    |a - b|_2 / sqrt(F), the root of the mean squared difference of their values, in float64. Errors: none or different
    numbers of rows, dimensions that differ, values that are not finite.
    """
    rows, others = as_sets(first=first, second=second)
    check_number(1, first=rows)
    if len(rows) != len(others):
        raise SidaError(
            f"pairs must be of as many rows, got {len(rows)} and {len(others)}", "Take both from the same seeds."
        )
    return (rows.to(torch.float64) - others.to(torch.float64)).square().mean(1).sqrt()


def pairing(paired: Tensor, random: Tensor) -> tuple[float, float]:
    """(mean distance of pairs, that over the mean distance of random pairs), of distances [N] and [M].

    The ratio is 0 where the student draws its teacher's images and 1 where it keeps nothing of the map, only the
    distribution. A student that draws blurred or grey images is nearer to all of them, in pairs or not: it is the ratio
    that tells, not the distance. 1 where all distances are 0. Errors: no pairs.
    """
    if not len(paired) or not len(random):
        raise SidaError("a pairing needs pairs, got none", "Score more images.")
    distance, apart = float(paired.mean()), float(random.mean())
    return distance, distance / apart if apart else 1.0
