"""A generator that goes through a few noise levels."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sidactl.nets.denoiser import Denoiser

StepNoise = Literal["fresh", "fixed", "ddim"]


def stepwise(
    net: Denoiser,
    z: Tensor,
    labels: Tensor | None,
    levels: Sequence[float],
    kind: StepNoise,
    draw: Callable[[], Tensor],
    *,
    graphs: Literal["last", "all"] = "all",
) -> Tensor:
    """Images [B, C, H, W] of unit noise z, by a step at each noise level; the first sees sigma z, with no image in it.

    What a later one sees is the image so far with noise: that of `draw` (fresh), z again (fixed), or what the step
    before took for noise (ddim). graphs: last = the steps before the last are taken without gradients.
    Source: few-step SiD (2505.12674), in EDM's notation: its flow time is sigma / (1 + sigma); EDM2's sampler of SiDA
    (2410.14919) is `fresh`.
    """
    image, seen = torch.zeros_like(z), z
    for step, sigma in enumerate(levels):
        noise = z if step == 0 or kind == "fixed" else draw() if kind == "fresh" else seen
        noisy = image + sigma * noise
        with torch.set_grad_enabled(torch.is_grad_enabled() and (graphs == "all" or step == len(levels) - 1)):
            image = net(noisy, sigma, labels)
        if kind == "ddim" and step < len(levels) - 1:
            seen = (noisy - image) / sigma
    return image
