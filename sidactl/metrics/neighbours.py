"""Distances between rows and to their nearest neighbours, block by block, for the metrics that compare points."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sidactl.errors import SidaError
from sidactl.metrics.features import in_blocks

Precision = Literal["float16", "float32", "float64"]

Distance = Callable[[Tensor, Tensor], Tensor]
"""distances [N, M], squared or not, of rows [N, F] and [M, F]"""

CLOSE = 1e-2
"""squared distances below this share of both squared lengths lose 1e-4 or more of themselves to float32's rounding"""


def euclidean(precision: Precision) -> Distance:
    dtype = getattr(torch, precision)

    def distance(u: Tensor, v: Tensor) -> Tensor:
        return torch.cdist(u.to(dtype), v.to(dtype), compute_mode="use_mm_for_euclid_dist")

    return distance


def squared(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances [N, M]: of points that nearly coincide by their difference, so that those of copies are 0."""
    lengths = u.square().sum(1)[:, None] + v.square().sum(1)
    distances = torch.addmm(lengths, u, v.T, alpha=-2)
    for part in (distances < CLOSE * lengths).nonzero().split(4096):
        i, j = part.unbind(1)
        distances[i, j] = (u[i] - v[j]).square().sum(1)
    return distances


def check_neighbours(k: int, published: int, **sets: Tensor) -> None:
    """Raises SidaError unless k >= 1 and each of the named sets has k + 1 rows."""
    if k < 1:
        raise SidaError(f"k must be >= 1, got {k}", f"The published metric uses {published}.")
    for name, rows in sets.items():
        if len(rows) <= k:
            raise SidaError(
                f"{name} features must number >= k + 1 = {k + 1}, got {len(rows)}",
                "Score more images, or pass a smaller --neighbours.",
            )


def radii(rows: Tensor, k: int, block: int, distance: Distance) -> Tensor:
    """Distance [N] of each of `rows` to its k-th neighbour; each pair of blocks is compared once."""
    nearest = distance(rows[:1], rows[:1]).new_full((len(rows), k + 1), math.inf)
    blocks = in_blocks(rows, block)
    for index, i in enumerate(blocks):
        for j in blocks[index:]:
            distances = distance(rows[i], rows[j])
            for part, columns in ((i, distances), (j, distances.T))[: 1 if i == j else 2]:
                nearest[part] = torch.cat([nearest[part], columns], 1).topk(k + 1, largest=False).values
    _check_fit(nearest)
    return nearest[:, k]


def nearest(rows: Tensor, others: Tensor, block: int, distance: Distance) -> tuple[Tensor, Tensor]:
    """Distance [N] of each of `rows` to the nearest of `others`, and that one's index [N]."""
    least = distance(rows[:1], others[:1]).new_full((len(rows),), math.inf)
    index = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for i in in_blocks(rows, block):
        for j in in_blocks(others, block):
            values, indices = distance(rows[i], others[j]).min(1)
            # Not minimum(): of equal ones the first counts, at any size of block.
            index[i] = torch.where(values < least[i], indices + j.start, index[i])
            least[i] = torch.where(values < least[i], values, least[i])
    _check_fit(least)
    return least, index


def _check_fit(distances: Tensor) -> None:
    if not distances.isfinite().all():
        dtype = str(distances.dtype).removeprefix("torch.")
        raise SidaError(f"feature distances must fit in {dtype}, they overflow", "Use a higher precision.")
