"""Density and coverage: precision and recall that outliers of either set do not move."""

import torch

from sidactl.metrics.features import Features, as_sets, check_number, in_blocks
from sidactl.metrics.neighbours import Precision, check_neighbours, euclidean, radii


def density_coverage(
    real: Features, generated: Features, k: int = 5, *, precision: Precision = "float32", block: int = 4096
) -> tuple[float, float]:
    """(density, coverage): how many real balls a generated point lies in, and the share of real balls that hold one.

    `real` [N, F] and `generated` [M, F] are compared on the device of `real`, `block` rows against `block` rows at a
    time, with distances in `precision`. B_i is the open ball around the i-th real point with the distance to its k-th
    neighbour, itself not counted, as radius. Density = sum_ij [generated_j in B_i] / (k M), about 1 for images like the
    real ones, more where they keep to the dense parts; coverage = sum_i [some generated_j in B_i] / N, at most 1, and
    1 - C(N - 1 + M - k, M) / C(N - 1 + M, M) on average for images like the real ones: it grows with M / N. Errors:
    fewer than k + 1 real points, no generated ones, dimensions that differ, values that are not finite or do not fit.

    Source: Reliable fidelity and diversity metrics (2002.09797), eq. 3 and 4; the strict inequality of `prdc` 0.2.
    """
    reals, fakes = as_sets(real=real, generated=generated)
    check_neighbours(k, 5, real=reals)
    check_number(1, generated=fakes)
    distance = euclidean(precision)
    real_radii = radii(reals, k, block, distance)
    num_inside, covered = 0, torch.zeros(len(reals), dtype=torch.bool, device=reals.device)
    for i in in_blocks(reals, block):
        for j in in_blocks(fakes, block):
            inside = distance(reals[i], fakes[j]) < real_radii[i, None]
            num_inside += int(inside.sum())
            covered[i] |= inside.any(1)
    return num_inside / (k * len(fakes)), int(covered.sum()) / len(reals)
