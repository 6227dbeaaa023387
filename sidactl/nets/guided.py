"""A denoiser that moves away from a weaker one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidactl.nets.denoiser import Denoiser, as_one_hot, as_sigma
from sidactl.recipes import NetSpec


@dataclass(frozen=True)
class Guided:
    """D = D_guide + scale (D_net - D_guide), at noise levels within an interval. Implements `Denoiser`.

    guide: an unconditional network (classifier-free guidance), a weaker conditional one (autoguidance, 2406.02507, eq.
    4), or None, which is the network itself without its label. Logits, features and u(sigma) are the network's own.
    keep: which images keep their labels, [B, 1] of ones and zeros, repeated where there are more of them; None = all.
    Source: classifier-free guidance (2207.12598); for the fake score SiD-LSG (2406.01561); the interval 2404.07724.
    """

    net: Denoiser
    guide: Denoiser | None
    scale: float
    interval: Sequence[float] = ()
    keep: Tensor | None = None

    @property
    def spec(self) -> NetSpec:
        return self.net.spec

    def __call__(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self._denoised(_alone, x, sigma, labels, augment_labels, None)[0]

    def denoise_and_logits(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        num_denoised: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        denoised, logits = self._denoised(
            lambda net, *seen, **how: net.denoise_and_logits(*seen, **how),
            x,
            sigma,
            labels,
            augment_labels,
            num_denoised,
        )
        return denoised, logits[0]

    def denoise_and_features(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        num_denoised: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        return self._denoised(
            lambda net, *seen, **how: net.denoise_and_features(*seen, **how),
            x,
            sigma,
            labels,
            augment_labels,
            num_denoised,
        )

    def features(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> list[Tensor]:
        return self.net.features(x, sigma, self._kept(labels, x), augment_labels)

    def logits(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.net.logits(x, sigma, self._kept(labels, x), augment_labels)

    def logvar(self, sigma: Tensor | float) -> Tensor:
        return self.net.logvar(sigma)

    def _kept(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if labels is None or self.keep is None:
            return labels
        one_hot = as_one_hot(labels, self.spec.label_dim, x.device)
        return one_hot if one_hot is None else one_hot * self.keep.repeat(len(one_hot) // len(self.keep), 1)

    def _denoised(
        self,
        ask: Callable[..., tuple[Tensor, Any]],
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        num_denoised: int | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The guided images, and the maps of encoders that `ask` gives beside them."""
        num, labels = len(x) if num_denoised is None else num_denoised, self._kept(labels, x)
        levels, (low, high) = as_sigma(sigma, x), self.interval or (0.0, math.inf)
        if self.scale == 1 or (not isinstance(sigma, Tensor) and not low <= sigma <= high):
            denoised, maps = ask(self.net, x, sigma, labels, augment_labels, num_denoised=num_denoised)
            return denoised, _listed(maps)
        if self.guide is None:
            # Both in one pass, whose images without labels stand behind the first ones.
            levels = levels.expand(len(x), 1, 1, 1)
            one_hot = as_one_hot(labels, self.spec.label_dim, x.device)
            assert one_hot is not None, "a network without classes cannot guide itself"
            one_hot = one_hot.expand(len(x), -1)

            def doubled(each: Tensor, second: Tensor) -> Tensor:
                return torch.cat([each[:num], second, each[num:]])

            both, maps = ask(
                self.net,
                doubled(x, x[:num]),
                doubled(levels, levels[:num]),
                doubled(one_hot, torch.zeros_like(one_hot[:num])),
                None if augment_labels is None else doubled(augment_labels, augment_labels[:num]),
                num_denoised=2 * num,
            )
            denoised, other = both.chunk(2)
            maps = [torch.cat([each[:num], each[2 * num :]]) for each in _listed(maps)]
        else:
            denoised, maps = ask(self.net, x, sigma, labels, augment_labels, num_denoised=num_denoised)
            of_guide = labels if labels is None else labels[:num]
            other = self.guide(x[:num], levels if len(levels) == 1 else levels[:num], of_guide)
        guided = other + self.scale * (denoised - other)
        if self.interval:
            inside = (levels >= low) & (levels <= high)
            guided = torch.where(inside if len(inside) == 1 else inside[:num], guided, denoised)
        return guided, _listed(maps)


@dataclass(frozen=True)
class Unlabelled:
    """A network that sees no label, as its own guide."""

    net: Denoiser

    @property
    def spec(self) -> NetSpec:
        return self.net.spec

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        return self.net(x, sigma, None)


def _alone(net: Denoiser, *seen: Any, num_denoised: int | None) -> tuple[Tensor, list[Tensor]]:
    return net(*seen), []


def _listed(maps: Tensor | list[Tensor]) -> list[Tensor]:
    return maps if isinstance(maps, list) else [maps]
