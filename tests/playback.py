"""Stand-ins: recorded random draws in the order in which the reference made them, and VAEs that need no download."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn


class Playback:
    """Implements `Draws` from a list of recorded arrays; a draw of another shape than recorded is an error."""

    def __init__(self, recorded: Sequence[np.ndarray]) -> None:
        self._recorded = [torch.from_numpy(array) for array in recorded]

    @property
    def left(self) -> list[np.ndarray]:
        """What was not asked for yet."""
        return [draw.numpy() for draw in self._recorded]

    def _next(self, shape: Sequence[int]) -> Tensor:
        draw = self._recorded.pop(0)
        assert tuple(draw.shape) == tuple(shape), f"asked for {tuple(shape)}, recorded {tuple(draw.shape)}"
        return draw

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._next(shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._next(shape)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return self._next(shape)

    def exhausted(self) -> bool:
        return not self._recorded


class IdentityVae:
    """In place of diffusers' AutoencoderKL: decodes to what it is given, or to the recorded output."""

    def __init__(self, output: np.ndarray | None = None) -> None:
        self._output = None if output is None else torch.from_numpy(output)
        self.seen: list[Tensor] = []

    def to(self, device: torch.device) -> "IdentityVae":
        return self

    def decode(self, latents: Tensor) -> SimpleNamespace:
        self.seen.append(latents)
        return SimpleNamespace(sample=latents if self._output is None else self._output)

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        self.seen.append(pixels)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels, std=pixels + 1))


class SmallVae(nn.Module):
    """In place of diffusers' AutoencoderKL: random, but always the same; 8x8 pixels to one latent of 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 3, 8, 8, generator=generator) / 8)
        self.batches: list[int] = []

    @classmethod
    def from_pretrained(cls, name: str, **options: bool) -> "SmallVae":
        return cls()

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        self.batches.append(len(pixels))
        mean, log_std = nn.functional.conv2d(pixels, self.weight, stride=8).chunk(2, dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=log_std.exp()))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=nn.functional.conv_transpose2d(latents, self.weight[:4], stride=8))


def save_vae(folder: Path, seed: int = 0, num_blocks: int = 4, latent_channels: int = 4) -> Path:
    """A folder as diffusers saves a VAE: a random one, as narrow as they get; skips where diffusers is not."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `vae` is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(1,) * num_blocks,
            down_block_types=("DownEncoderBlock2D",) * num_blocks,
            up_block_types=("UpDecoderBlock2D",) * num_blocks,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=1,
            mid_block_add_attention=False,  # most of the work
        )
    vae.save_pretrained(folder)
    return folder
