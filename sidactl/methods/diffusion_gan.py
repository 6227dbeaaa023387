"""Diffusion-GAN (2206.02262): the adversarial part alone, at noise levels whose maximum adapts to the discriminator."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sidactl.methods.base import Batch, Losses, Method, Nets
from sidactl.methods.discriminator import adversarial_loss, telling_loss
from sidactl.recipes import DiffusionGanRecipe, NetSpec

LEAST_TIME, MOST_TIME, TABLE, NOISE = 10, 1000, 64, 0.05
"""bounds of the largest time; entries of the table that times are drawn from; standard deviation of the noise"""

_LEAST_SIGMA = 0.002
"""what the network is told of an image without noise"""


def largest_time(p: float) -> int:
    """T of the adaptive probability p in [0, 1]."""
    return int(np.clip(int(LEAST_TIME + round((MOST_TIME - LEAST_TIME) * p)), LEAST_TIME, MOST_TIME))


def time_table(
    largest: int, random: np.random.RandomState, kind: Literal["priority", "uniform"] = "priority"
) -> np.ndarray:
    """The 64 times that are drawn from, int64: half of them 0, the rest from 1 to T, by chances that grow with t - 1.

    The paper's chances grow with t; these are the published code's, which never draws t = 1.
    """
    times = np.arange(1, largest + 1)
    chances = np.arange(largest) / np.arange(largest).sum() if kind == "priority" else None
    table = np.zeros(TABLE, dtype=np.int64)
    table[: TABLE // 2] = random.choice(times, size=TABLE // 2, p=chances)
    return table


def alpha_bars(largest: int) -> np.ndarray:
    """alpha-bar of times 0 to T, float64 [T + 1]: betas from 1e-4 to 2e-2 are spread anew over every T."""
    betas = np.linspace(1e-4, 2e-2, largest)
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def adapted(p: float, mean_sign: float, *, target: float, num_images: int, kimg: float) -> float:
    """p after so many images, moved towards where the discriminator is as sure of real images as the target says."""
    return float(np.clip(p + np.sign(mean_sign - target) * num_images / (kimg * 1000), 0, 1))


class DiffusionGan(Method):
    """The generator against the fake score's encoder, whose logits map's mean tells noisy real images from others.

    What of the published method is left out: R1, whose second derivatives fused attention has not; and its networks.
    """

    recipe: DiffusionGanRecipe
    statistics = ("sign", "count")
    p: Tensor
    sigmas: Tensor
    signs: Tensor
    observed: Tensor

    def __init__(self, recipe: DiffusionGanRecipe, spec: NetSpec) -> None:
        super().__init__(recipe, spec)
        self.register_buffer("p", torch.zeros((), dtype=torch.float64))
        self.register_buffer("sigmas", self._table(0.0, 0))
        self.register_buffer("signs", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))

    def stage(self, nimg: int) -> str:
        return "generator"

    def _table(self, p: float, number: int) -> Tensor:
        """EDM's noise levels of the table's times, [64]; zeros are images without noise."""
        largest = largest_time(p)
        times = time_table(
            largest, np.random.RandomState([self.recipe.seed % (1 << 32), number]), self.recipe.time_priority
        )
        bars = alpha_bars(largest)[times]
        return torch.from_numpy(NOISE * np.sqrt((1 - bars) / bars)).to(torch.float32)

    def _diffused(self, batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy images and their noise levels, [B, 1, 1, 1]."""
        sigma = self.sigmas[batch.diffusion.integers(TABLE, (len(images), 1, 1, 1))]
        return images + sigma * batch.diffusion.normal(images.shape), sigma

    def _logits(self, nets: Nets, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """[B, 1]"""
        return nets.fake_score.logits(noisy, sigma.clamp(min=_LEAST_SIGMA), labels).flatten(1).mean(dim=1, keepdim=True)

    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        logits = self._logits(nets, *self._diffused(batch, x), batch.labels)
        loss = adversarial_loss("softplus", logits).sum() / self.recipe.batch_size
        return {"generator_adversarial_loss": loss}, nets.gradient(loss, x)

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        parts = self._diffused(batch, x), self._diffused(batch, batch.reals())
        noisy, sigma = (torch.cat(each) for each in zip(*parts, strict=True))
        of_fakes, of_reals = self._logits(nets, noisy, sigma, torch.cat([batch.labels, batch.real_labels])).chunk(2)
        return {"discriminator_loss": telling_loss("softplus", of_fakes, of_reals).sum() / self.recipe.batch_size}

    def measure(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Mapping[str, Tensor]:
        signs = self._logits(nets, *self._diffused(batch, batch.reals()), batch.real_labels).sign().double()
        return {"sign": signs.sum(), "count": torch.full_like(signs.sum(), len(signs))}

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        recipe = self.recipe
        self.signs += torch.stack([sums["sign"], sums["count"]])
        self.observed += 1
        number = int(self.observed)
        if number % recipe.adapt_every:
            return
        sign, count = self.signs.tolist()
        p = adapted(
            float(self.p), sign / count, target=recipe.sign_target, num_images=int(count), kimg=recipe.adapt_kimg
        )
        self.p.fill_(p)
        self.sigmas.copy_(self._table(p, number))
        self.signs.zero_()
