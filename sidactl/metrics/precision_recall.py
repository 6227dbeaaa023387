"""Precision and recall by nearest neighbours: fidelity and coverage apart."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sidactl.errors import SidaError
from sidactl.metrics.features import Features, as_rows, check_same_dimension, in_blocks


def precision_recall(
    real: Features,
    generated: Features,
    k: int = 3,
    *,
    precision: Literal["float16", "float32", "float64"] = "float32",
    block: int = 4096,
) -> tuple[float, float]:
    """(precision, recall): the share of generated points in the real manifold, and of real ones in the generated one.

    `real` [N, F] and `generated` [M, F] are compared on the device of `real`, `block` rows against `block` rows at a
    time. A manifold is the union of balls around its points, each with the distance to the point's k-th neighbour, the
    point itself not counted, as radius; a ball's surface belongs to it. `precision` is that of the distances, "float16"
    being SiD's. Errors: fewer than k + 1 points, dimensions that differ, values that are not finite or do not fit.

    Source: Improved precision and recall metric (1904.06991), eq. 1-3.
    """
    dtype = getattr(torch, precision)

    def euclidean(u: Tensor, v: Tensor) -> Tensor:
        return torch.cdist(u.to(dtype), v.to(dtype), compute_mode="use_mm_for_euclid_dist")

    return _precision_recall(real, generated, k, block, euclidean)


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
    real: Features, generated: Features, k: int, block: int, distance: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    reals = as_rows(real, "real features")
    fakes = as_rows(generated, "generated features").to(reals.device)
    check_same_dimension("real and generated features", reals.shape[1], fakes.shape[1])
    if k < 1:
        raise SidaError(f"k must be >= 1, got {k}", "The published metric uses 3.")
    for name, rows in (("real", reals), ("generated", fakes)):
        if len(rows) <= k:
            raise SidaError(
                f"{name} features must number >= k + 1 = {k + 1}, got {len(rows)}",
                "Score more images, or pass a smaller --neighbours.",
            )
    real_radii, fake_radii = (_radii(rows, k, block, distance) for rows in (reals, fakes))

    fake_inside = torch.zeros(len(fakes), dtype=torch.bool, device=reals.device)
    real_inside = torch.zeros(len(reals), dtype=torch.bool, device=reals.device)
    for i in in_blocks(reals, block):
        for j in in_blocks(fakes, block):
            distances = distance(reals[i], fakes[j])
            fake_inside[j] |= (distances <= real_radii[i, None]).any(0)
            real_inside[i] |= (distances <= fake_radii[j]).any(1)
    return int(fake_inside.sum()) / len(fakes), int(real_inside.sum()) / len(reals)


def _radii(rows: Tensor, k: int, block: int, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Distance [N] of each of `rows` to its k-th neighbour; each pair of blocks is compared once."""
    nearest = distance(rows[:1], rows[:1]).new_full((len(rows), k + 1), math.inf)
    blocks = in_blocks(rows, block)
    for index, i in enumerate(blocks):
        for j in blocks[index:]:
            distances = distance(rows[i], rows[j])
            for part, columns in ((i, distances), (j, distances.T))[: 1 if i == j else 2]:
                nearest[part] = torch.cat([nearest[part], columns], 1).topk(k + 1, largest=False).values
    if not nearest.isfinite().all():
        dtype = str(nearest.dtype).removeprefix("torch.")
        raise SidaError(f"feature distances must fit in {dtype}, they overflow", "Use a higher precision.")
    return nearest[:, k]
