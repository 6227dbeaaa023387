"""Heads of discriminators, which tell real images from others by the features of another network."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

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


class TokenHeads(nn.Module):
    """A head for each map of features, as tokens [B, C, L]: a logit for each token, or its fit to a condition.

    Source: StyleGAN-T (2301.09515), after which ADD (2311.17042) names its own: convolutions over tokens under spectral
    normalisation, each followed by a batch normalisation of few images and a leaky ReLU, the second one beside a
    shortcut; with a condition [B, K] the last one gives a vector for each token, whose product with the condition's is
    the logit.
    Spectral norms are those of `iterate_norms`, called once a step, and not of every pass: so a step is the same in
    however many passes and processes.
    """

    def __init__(self, widths: Sequence[int], condition_dim: int, *, images_together: int, projected: int = 64) -> None:
        """widths: channels of each map. images_together: so many images, one after the other, share their statistics.

        projected: length of the vectors that a token and the condition are compared by.
        """
        super().__init__()
        self.heads = nn.ModuleList(_TokenHead(width, condition_dim, images_together, projected) for width in widths)
        self.train(False)

    def forward(self, features: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Logits [B, tokens of all maps]."""
        found = [head(each, condition) for head, each in zip(self.heads, features, strict=True)]
        return torch.cat(found, dim=1)

    def train(self, mode: bool = True) -> Self:
        """Stays as in use, whatever the trainer says: in training mode every pass would move the spectral norms."""
        return super().train(False)

    @torch.no_grad()
    def iterate_norms(self) -> None:
        """One power iteration of every weight's largest singular value."""
        for module in self.modules():
            if isinstance(module, parametrize.ParametrizationList):
                of_weight, original = module[0], module.original
                assert isinstance(of_weight, _SpectralNorm)
                assert isinstance(original, Tensor)
                of_weight.iterate(original)


class _TokenHead(nn.Module):
    def __init__(self, width: int, condition_dim: int, images_together: int, projected: int) -> None:
        super().__init__()

        def convolved(kernel: int) -> nn.Sequential:
            padding: dict[str, Any] = {"padding": kernel // 2, "padding_mode": "circular"} if kernel > 1 else {}
            convolution = _normalised(nn.Conv1d(width, width, kernel, **padding))
            return nn.Sequential(convolution, _FewImagesNorm(width, images_together), nn.LeakyReLU(0.2))

        self.main = nn.Sequential(convolved(1), _Shortcut(convolved(9)))
        self.cmapper = _ConditionMap(condition_dim, projected) if condition_dim else None
        self.cls = _normalised(nn.Conv1d(width, projected if condition_dim else 1, 1))

    def forward(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        found: Tensor = self.cls(self.main(tokens))
        if self.cmapper is not None:
            mapped = self.cmapper(condition)[:, :, None]
            found = (found * mapped).sum(dim=1, keepdim=True) / math.sqrt(mapped.shape[1])
        return found.flatten(1)


class _SpectralNorm(nn.Module):
    """A weight over its largest singular value, which every iteration tells better.

    torch's own iterates in the other order, v after u, and would not have the published code's logits.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(len(weight)), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(weight.flatten(1).shape[1]), dim=0))
        self.iterate(weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        rows = weight.flatten(1)
        self.v = F.normalize(rows.T @ self.get_buffer("u"), dim=0, eps=1e-12)
        self.u = F.normalize(rows @ self.v, dim=0, eps=1e-12)

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.iterate(weight)
        return weight / (self.get_buffer("u") @ weight.flatten(1) @ self.get_buffer("v"))


def _normalised(convolution: nn.Conv1d) -> nn.Conv1d:
    parametrize.register_parametrization(convolution, "weight", _SpectralNorm(convolution.weight.detach()))
    return convolution


class _ConditionMap(nn.Linear):
    """Weights of variance 1, divided by the root of the number of inputs where they are used, as StyleGAN has them."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, condition: Tensor) -> Tensor:
        return F.linear(condition, self.weight / math.sqrt(self.in_features), self.bias)


class _Shortcut(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.fn(x) + x) / math.sqrt(2)
        return out


class _FewImagesNorm(nn.Module):
    """Batch normalisation by the statistics of a few images that stand together, tokens and all; none are kept."""

    def __init__(self, channels: int, images_together: int) -> None:
        super().__init__()
        self.images_together = images_together
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(-1, self.images_together, *x.shape[1:])
        mean = grouped.mean(dim=(1, 3), keepdim=True)
        variance = grouped.var(dim=(1, 3), keepdim=True, unbiased=False)
        x = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        return x * self.weight[:, None] + self.bias[:, None]
