"""Post-training on a Fréchet distance. Source: FD-loss (2604.28190), with moments that are averaged over steps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sidactl.methods.base import Batch, Losses, Method, Nets, TrainingDetector
from sidactl.recipes import FdLossRecipe, NetSpec

_LEAST_EIGENVALUE = 1e-10
"""relative to the largest; below it a direction has no slope that float64 could tell"""


def frechet_gradients(
    mean: Tensor, second: Tensor, real_mean: Tensor, real_root: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The Fréchet distance to real images, and its gradients with respect to mean [F] and second moment [F, F].

    All in float64. second: the mean of f f'; real_root: a symmetric root of the real covariance. With C = second - mean
    mean' the distance is |mean - real_mean|^2 + tr(C) + tr(real) - 2 tr((R C R)^(1/2)), by eigenvalues.
    Source: 1706.08500, eq. 6.
    """
    covariance = second - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(real_root @ covariance @ real_root)
    values = values.clamp(min=0)
    distance = (
        (mean - real_mean).square().sum() + covariance.trace() + real_root.square().sum() - 2 * values.sqrt().sum()
    )
    least = values.max() * _LEAST_EIGENVALUE
    slopes = torch.where(values > least, values.clamp(min=1e-300).rsqrt() / 2, 0)
    turned = real_root @ vectors
    of_covariance = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) - 2 * (turned * slopes) @ turned.T
    return distance, 2 * (mean - real_mean) - 2 * of_covariance @ mean, of_covariance


class FdLoss(Method):
    """Each image moves its features to where the moments of all come nearer to those of real images.

    The moments are averages over steps, of which those of the last batch, over all passes and processes, have a slope;
    so it is found once a step (`observe`), and each pass follows it.
    """

    recipe: FdLossRecipe
    statistics = ("count", "sum", "products")
    mean: Tensor
    second: Tensor
    weight: Tensor
    distance: Tensor
    of_mean: Tensor
    of_second: Tensor

    def __init__(self, recipe: FdLossRecipe, spec: NetSpec, detector: TrainingDetector | None = None) -> None:
        super().__init__(recipe, spec)
        assert detector
        assert detector.mean is not None
        assert detector.covariance is not None
        self._detector = detector
        values, vectors = torch.linalg.eigh(detector.covariance.double())
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        num = len(detector.mean)
        for name, value in (("real_mean", detector.mean.double()), ("real_root", root)):
            self.register_buffer(name, value, persistent=False)
        zeros = {"mean": (num,), "second": (num, num), "weight": (), "distance": ()}
        for name, shape in (zeros | {"of_mean": (num,), "of_second": (num, num)}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64), persistent=name in zeros)

    def stage(self, nimg: int) -> str:
        return "generator"

    def measure(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Mapping[str, Tensor]:
        features = self._detector.features(x).double()
        return {
            "count": torch.full((), len(x), dtype=torch.float64, device=x.device),
            "sum": features.sum(dim=0),
            "products": features.T @ features,
        }

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        rate, count = self.recipe.moments_rate, sums["count"]
        self.weight.mul_(rate).add_(1 - rate)
        for moment, name in ((self.mean, "sum"), (self.second, "products")):
            # An average whose first values do not lean towards the zeros that it began with.
            moment.lerp_(sums[name] / count, (1 - rate) / self.weight)
        found = frechet_gradients(self.mean, self.second, self.get_buffer("real_mean"), self.get_buffer("real_root"))
        for buffer, value in zip((self.distance, self.of_mean, self.of_second), found, strict=True):
            buffer.copy_(value)

    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        features = self._detector.features(x)
        slope = self.of_mean.float(), self.of_second.float()
        moved = (features @ slope[0] + ((features @ slope[1]) * features).sum(dim=1)).sum() / self.recipe.batch_size
        share = len(x) / self.recipe.batch_size
        return {"frechet_distance": (self.distance * share).float()}, nets.gradient(moved, x)

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        raise NotImplementedError  # nothing is trained but the generator
