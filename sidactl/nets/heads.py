"""Heads of discriminators, which tell real images from others by the features of another network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SMALLEST = 4
"""pixels of a side that the last convolution over space takes whole"""


class ConvolutionHeads(nn.Module):
    """A head for each map of features, [B, C, r, r]: convolutions down to one position, and to one logit.

    Source: DMD2 (2405.14867), its head on the fake score's last encoder map; one for each resolution as in f-distill
    (2502.15681): 4x4 convolutions with stride 2 as long as r is above 4, one with stride 4 over what is left, each
    followed by group normalisation and SiLU, and a 1x1 convolution.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        """shapes: channels and resolution of each map."""
        super().__init__()
        self.heads = nn.ModuleList(_convolutions(channels, resolution) for channels, resolution in shapes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, heads]."""
        logits = [head(each).flatten(1) for head, each in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)


def _convolutions(channels: int, resolution: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while resolution > _SMALLEST:
        layers += _step(channels, nn.Conv2d(channels, channels, 4, stride=2, padding=1))
        resolution //= 2
    layers += _step(channels, nn.Conv2d(channels, channels, resolution))
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def _step(channels: int, convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.GroupNorm(max(1, min(32, channels // 4)), channels), nn.SiLU()]
