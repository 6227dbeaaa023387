"""Precision and recall by nearest neighbours: fidelity and coverage apart."""

import torch
from torch import Tensor

from sidactl.metrics.features import Features, as_sets, in_blocks
from sidactl.metrics.neighbours import Distance, Precision, check_neighbours, euclidean, radii


def precision_recall(
    real: Features,
    generated: Features,
    k: int = 3,
    *,
    precision: Precision = "float32",
    block: int = 4096,
) -> tuple[float, float]:
    """(precision, recall): the share of generated points in the real manifold, and of real ones in the generated one.

    `real` [N, F] and `generated` [M, F] are compared on the device of `real`, `block` rows against `block` rows at a
    time. A manifold is the union of balls around its points, each with the distance to the point's k-th neighbour, the
    point itself not counted, as radius; a ball's surface belongs to it. `precision` is that of the distances, "float16"
    being SiD's. Errors: fewer than k + 1 points, dimensions that differ, values that are not finite or do not fit.

    Source: Improved precision and recall metric (1904.06991), eq. 1-3.
    """
    return _precision_recall(real, generated, k, block, euclidean(precision))


def guided_diffusion_precision_recall(
    real: Features, generated: Features, k: int = 3, *, block: int = 4096
) -> tuple[float, float]:
    """(precision, recall) as `precision_recall`, with the arithmetic of guided-diffusion's evaluator.

    Squared distances |u|^2 - 2 u.v + |v|^2, clipped at 0, in float16; where one overflows, its block again in float32.

    Source: Diffusion models beat GANs on image synthesis (2105.05233), evaluation suite.
    """

    def squared(u: Tensor, v: Tensor) -> Tensor:
        for dtype in (torch.float16, torch.float32):
            a, b = u.to(dtype), v.to(dtype)
            distances = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
            if distances.isfinite().all():
                break
        return distances.clamp(min=0).float()

    return _precision_recall(real, generated, k, block, squared)


def _precision_recall(
    real: Features, generated: Features, k: int, block: int, distance: Distance
) -> tuple[float, float]:
    reals, fakes = as_sets(real=real, generated=generated)
    check_neighbours(k, 3, real=reals, generated=fakes)
    real_radii, fake_radii = (radii(rows, k, block, distance) for rows in (reals, fakes))

    fake_inside = torch.zeros(len(fakes), dtype=torch.bool, device=reals.device)
    real_inside = torch.zeros(len(reals), dtype=torch.bool, device=reals.device)
    for i in in_blocks(reals, block):
        for j in in_blocks(fakes, block):
            distances = distance(reals[i], fakes[j])
            fake_inside[j] |= (distances <= real_radii[i, None]).any(0)
            real_inside[i] |= (distances <= fake_radii[j]).any(1)
    return int(fake_inside.sum()) / len(fakes), int(real_inside.sum()) / len(reals)
