"""Noise levels, and where random numbers come from; no network lives here."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sidactl.recipes import NoiseLevels
from sidactl.recipes.noise_levels import GRID


class Draws(Protocol):
    """A source of random numbers, float32 (integers: int64), which the caller seeds and places."""

    def normal(self, shape: Sequence[int]) -> Tensor: ...

    def uniform(self, shape: Sequence[int]) -> Tensor: ...

    def integers(self, high: int, shape: Sequence[int]) -> Tensor: ...


class JoinedDraws:
    """The draws of several micro-batches, one after the other along the first dimension. Implements `Draws`."""

    def __init__(self, parts: Sequence[Draws]) -> None:
        self.parts = parts

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._joined(shape, lambda draws, part: draws.normal(part))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._joined(shape, lambda draws, part: draws.uniform(part))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return self._joined(shape, lambda draws, part: draws.integers(high, part))

    def _joined(self, shape: Sequence[int], draw: Callable[[Draws, Sequence[int]], Tensor]) -> Tensor:
        num_images, *rest = shape
        return torch.cat([draw(draws, (num_images // len(self.parts), *rest)) for draws in self.parts])


def karras_sigmas(
    num_steps: int, sigma_min: float, sigma_max: float, rho: float, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Noise levels of a multi-step sampler, [num_steps + 1], falling, ending in 0. Source: EDM (2206.00364), eq. 5."""
    i = torch.arange(num_steps, dtype=dtype)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + i / max(num_steps - 1, 1) * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sigma_of_time(t: Tensor, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The noise level at time t in [0, 1]: t = 0 gives sigma_min, t = 1 sigma_max.

    Source: EDM (2206.00364), eq. 5, as SiD uses it to diffuse the generator's output.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.pow(high + (1 - t) * (low - high), rho)


def draw_levels(levels: NoiseLevels, draws: Draws, num_images: int) -> Tensor:
    """A noise level for each image, [B, 1, 1, 1]."""
    shape = (num_images, 1, 1, 1)
    if levels.kind == "lognormal":
        return (levels.b * draws.normal(shape) + levels.a).exp()
    if levels.kind == "uniform":
        return sigma_of_time(levels.a + draws.uniform(shape) * (levels.b - levels.a))
    low, high = int(levels.a), int(levels.b)
    return sigma_of_time((low + draws.integers(high - low + 1, shape)) / (GRID - 1))
