"""What makes a network a denoiser: preconditioning and the logits map. No architecture lives here."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.errors import SidaError
from sidactl.recipes import NetSpec


class Encoded(NamedTuple):
    """What the encoder half of a U-Net hands to its decoder half."""

    features: Tensor
    """[B, C, r, r], the last encoder block's output"""
    skips: list[Tensor]
    embedding: Tensor
    """[B or 1, E]"""


class UNet(Protocol):
    """A raw network F, split in two halves; F(x) = decode(encode(x))."""

    def encode(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Encoded: ...

    def decode(self, encoded: Encoded) -> Tensor: ...


class Denoiser(Protocol):
    """D(x; sigma, labels): the expectation of the clean image, given a noisy one.

    x: [B, C, H, W]; sigma: scalar, [B] or [B, 1, 1, 1]; labels: one-hot [B, K], class indices [B], or None (a zero
    vector on a conditional net). Images come back as float32 [B, C, H, W], the logits map as [B, 1, r, r].
    """

    @property
    def spec(self) -> NetSpec: ...

    def __call__(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor: ...

    def denoise_and_logits(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        num_denoised: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def denoise_and_features(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        num_denoised: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]: ...

    def features(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> list[Tensor]: ...

    def logits(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor: ...

    def logvar(self, sigma: Tensor | float) -> Tensor:
        """u(sigma), [B, 1, 1, 1]; only for specs with logvar_channels."""
        ...


class Preconditioned(nn.Module):
    """A U-Net with EDM's preconditioning: the Denoiser. Source: EDM (2206.00364), section 5 and table 1.

    `attribute` is the name under which published checkpoints keep the U-Net ("model" in EDM, "unet" in EDM2); it is
    part of every key of the state dict. The logits map is the channel mean of the last encoder block's output: the
    discriminator adds no parameter (SiDA 2410.14919, section 4).
    """

    def __init__(self, spec: NetSpec, unet: nn.Module, attribute: str) -> None:
        super().__init__()
        self.spec = spec
        self._attribute = attribute
        self.compute_dtype = torch.float32
        self.memory_format = torch.contiguous_format
        self.add_module(attribute, unet)

    @property
    def raw(self) -> UNet:
        """The U-Net F without preconditioning."""
        unet: UNet = getattr(self, self._attribute)
        return unet

    def set_dropout(self, probability: float) -> None:
        """Gives every block this dropout probability: it is a setting of a run, not of the weights."""
        self.spec = dataclasses.replace(self.spec, dropout=probability)
        for module in self.modules():
            if isinstance(getattr(module, "dropout", None), int | float):  # 0 without a point, from Python
                setattr(module, "dropout", probability)  # noqa: B010 (nn.Module types every attribute as a module)

    def forward(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        x, sigma = with_own_grad_node(x.to(torch.float32)), as_sigma(sigma, x)
        return self._combine(x, sigma, self.raw.decode(self._encode(x, sigma, labels, augment_labels)))

    def denoise_and_logits(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        num_denoised: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The denoised image and the logits map of one pass.

        num_denoised: of so many images from the first on; the others go through the encoder alone, for their logits.
        """
        denoised, encoded = self._denoise(x, sigma, labels, augment_labels, num_denoised)
        return denoised, _channel_mean(encoded.features)

    def denoise_and_features(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        num_denoised: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `denoise_and_logits`, with the encoder's maps as `features` gives them."""
        denoised, encoded = self._denoise(x, sigma, labels, augment_labels, num_denoised)
        return denoised, _maps(encoded)

    def features(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> list[Tensor]:
        """The encoder's last map of each resolution, float32 [B, C, r, r], the finest first; the decoder does not run.

        The coarsest is the one that the logits map is the channel mean of.
        """
        x, sigma = with_own_grad_node(x.to(torch.float32)), as_sigma(sigma, x)
        return _maps(self._encode(x, sigma, labels, augment_labels))

    def logits(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The logits map alone; the decoder half does not run."""
        x, sigma = with_own_grad_node(x.to(torch.float32)), as_sigma(sigma, x)
        return _channel_mean(self._encode(x, sigma, labels, augment_labels).features)

    def logvar(self, sigma: Tensor | float) -> Tensor:
        """EDM2 nets have an uncertainty head; raises SidaError on this one, which has none."""
        raise SidaError(
            f"logvar needs a net with an uncertainty head, got {self.spec.architecture}", "Use an EDM2 teacher."
        )

    def _denoise(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        num_denoised: int | None,
    ) -> tuple[Tensor, Encoded]:
        x, sigma = with_own_grad_node(x.to(torch.float32)), as_sigma(sigma, x)
        encoded = part = self._encode(x, sigma, labels, augment_labels)
        if num_denoised is not None and num_denoised < len(x):
            x, sigma = x[:num_denoised], as_sigma(_first(sigma, num_denoised), x)
            part = Encoded(*(_first(each, num_denoised) for each in encoded))
        return self._combine(x, sigma, self.raw.decode(part)), encoded

    def _encode(self, x: Tensor, sigma: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Encoded:
        c_in = 1 / (self.spec.sigma_data**2 + sigma**2).sqrt()
        c_noise = (sigma.log() / 4).flatten()
        labels = as_one_hot(labels, self.spec.label_dim, x.device)
        if not self.spec.augment_dim:
            augment_labels = None
        scaled = (c_in * x).to(self.compute_dtype, memory_format=self.memory_format)
        return self.raw.encode(scaled, c_noise, labels, augment_labels)

    def _combine(self, x: Tensor, sigma: Tensor, F_x: Tensor) -> Tensor:
        sigma_data = self.spec.sigma_data
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return c_skip * x + c_out * F_x.to(torch.float32)


def with_own_grad_node(x: Tensor) -> Tensor:
    """x itself, with a node of its own in the graph, in which the gradients of its uses are added up first.

    FSDP2's hooks put such a node before every part; with it in any case a sharded run has the bits of one that is not.
    """
    return x.view_as(x)


def _first(values: Any, count: int) -> Any:
    """The first `count` rows of a tensor, or of each in a list; a single row holds for all."""
    if isinstance(values, list):
        return [_first(each, count) for each in values]
    return values if len(values) == 1 else values[:count]


def _maps(encoded: Encoded) -> list[Tensor]:
    by_resolution = {each.shape[-1]: each for each in [*encoded.skips, encoded.features]}
    return [each.to(torch.float32) for each in by_resolution.values()]


def _channel_mean(features: Tensor) -> Tensor:
    return features.to(torch.float32).mean(dim=1, keepdim=True)


def as_sigma(sigma: Tensor | float, like: Tensor) -> Tensor:
    """sigma as float32 [B, 1, 1, 1] or [1, 1, 1, 1] on the device of `like`; a number goes there without waiting."""
    if not isinstance(sigma, Tensor):
        return torch.full((1, 1, 1, 1), sigma, dtype=torch.float32, device=like.device)
    return torch.as_tensor(sigma, dtype=torch.float32, device=like.device).reshape(-1, 1, 1, 1)


def as_one_hot(labels: Tensor | None, label_dim: int, device: torch.device) -> Tensor | None:
    """One-hot float32 [B, label_dim] of class indices [B] or one-hot rows; zeros [1, label_dim] for None.

    Returns None for an unconditional net (label_dim 0), whatever the labels.
    """
    if label_dim == 0:
        return None
    if labels is None:
        return torch.zeros(1, label_dim, device=device)
    if labels.ndim == 1 and not labels.is_floating_point():
        labels = F.one_hot(labels.to(torch.int64), label_dim)
    return labels.to(torch.float32).reshape(-1, label_dim)
