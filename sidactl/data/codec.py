"""Between what a dataset stores and what a network sees: pixels, or the latents of the Stable Diffusion VAE."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from sidactl.catalog import LATENT_CHANNELS, VAE_FILES, VAE_NAME
from sidactl.errors import SidaError
from sidactl.nets.constants import constant
from sidactl.noise import Draws

_LATENT_MEAN, _LATENT_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
"""per channel, of ImageNet's raw latents; networks see them with mean 0 and standard deviation 0.5"""

_VAE_BATCH = 8  # images at a time: those of 512x512 pixels take a gigabyte or so in the decoder


class Codec(Protocol):
    """How items of a dataset become what a network is trained on, and how its images become pixels."""

    def encode(self, items: Tensor, draws: Draws) -> Tensor:
        """What a network sees, float32 [B, C, H, W], of dataset items [B, ...]."""
        ...

    def decode(self, images: Tensor) -> Tensor:
        """Pixels, uint8 [B, C, H, W], of a network's images."""
        ...

    def leave_device(self) -> None:
        """Frees what it holds on a GPU, until it is needed again."""
        ...


class PixelCodec:
    """Pixels as float32 in [-1, 1]. Implements `Codec`; draws nothing."""

    def encode(self, items: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, C, H, W] as x / 127.5 - 1."""
        return items.to(torch.float32) / 127.5 - 1

    def decode(self, images: Tensor) -> Tensor:
        """x * 127.5 + 128, clipped to 0..255, truncated. Source: the sample writers of EDM and EDM2."""
        return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)

    def leave_device(self) -> None:
        """Holds nothing there."""


class LatentCodec:
    """Latents of the Stable Diffusion VAE, normalised per channel. Implements `Codec`.

    Datasets hold mean and standard deviation of the VAE's posterior, which are sampled anew every time.
    `load_vae` is called at the first need: an object with `encode` and `decode` as diffusers' AutoencoderKL has them.
    dtype: in which it decodes, channels last in half precision; scores that are told are in float32.
    Source: EDM2 (2312.02696), appendix A.
    """

    def __init__(self, load_vae: Callable[[], Any] | None = None, dtype: torch.dtype = torch.float32) -> None:
        self._load_vae, self._dtype = load_vae or stable_diffusion_vae, dtype
        self._vae: Any = None

    def encode(self, items: Tensor, draws: Draws) -> Tensor:
        """(mean + std * normal) * scale + bias of float32 [B, 8, h, w], 4 channels of mean and 4 of std."""
        mean, std = items.to(torch.float32).chunk(2, dim=1)
        return encode_affine(mean + std * draws.normal(mean.shape))

    def decode(self, images: Tensor) -> Tensor:
        """The VAE's output, clipped to 0..1, times 255, truncated: uint8 [B, 3, 8h, 8w]."""
        vae = self._on(images)
        raw = decode_affine(images.to(torch.float32)).to(self._dtype)
        decoded = (vae.decode(part).sample.to(torch.float32) for part in raw.split(_VAE_BATCH))
        return torch.cat([(part.clamp(0, 1) * 255).to(torch.uint8) for part in decoded])

    def mean_and_std(self, pixels: Tensor) -> Tensor:
        """What a dataset of latents holds: float32 [B, 8, h, w] of uint8 pixels [B, 3, 8h, 8w].

        The VAE takes pixels in 0..1 here, as the published latents were made.
        """
        vae = self._on(pixels)
        posteriors = [vae.encode(part.to(torch.float32) / 255).latent_dist for part in pixels.split(_VAE_BATCH)]
        return torch.cat([torch.cat([posterior.mean, posterior.std], dim=1) for posterior in posteriors])

    def _on(self, like: Tensor) -> Any:
        if self._vae is None:
            self._vae = self._load_vae()
        if self._dtype == torch.float32:
            return self._vae.to(like.device)
        return self._vae.to(like.device, self._dtype, memory_format=torch.channels_last)

    def leave_device(self) -> None:
        """Frees the memory that the VAE holds on a GPU, until it is needed again."""
        if self._vae is not None:
            self._vae.to("cpu")


def encode_affine(raw: Tensor) -> Tensor:
    """Normalised latents [B, 4, h, w] of the VAE's own: raw * scale + bias."""
    scale, bias = _scale_and_bias(raw)
    return raw * scale + bias


def decode_affine(latents: Tensor) -> Tensor:
    """The VAE's own latents [B, 4, h, w] of normalised ones: (x - bias) / scale."""
    scale, bias = _scale_and_bias(latents)
    return (latents - bias) / scale


def _scale_and_bias(like: Tensor) -> tuple[Tensor, Tensor]:
    both = constant((*_LATENT_MEAN, *_LATENT_STD), like.device, like.dtype)
    mean, std = both.reshape(2, 1, LATENT_CHANNELS, 1, 1)
    scale = 0.5 / std
    return scale, -mean * scale


def codec_for(
    img_channels: int, load_vae: Callable[[], Any] | None = None, dtype: torch.dtype = torch.float32
) -> Codec:
    """The codec of a network with so many channels: four are latents, others are pixels. dtype: the VAE's."""
    return LatentCodec(load_vae, dtype) if img_channels == LATENT_CHANNELS else PixelCodec()


def stable_diffusion_vae(
    *,
    files: Callable[[], Mapping[str, Path]] | None = None,
    is_usual: bool = True,
    purpose: str = "decoding latents",
) -> Any:
    """A VAE as diffusers' AutoencoderKL, frozen, float32; never one of a pickle.

    files: gives where the config and weights of the VAE lie, by name. is_usual: that it is VAE_NAME, which diffusers
    may have in its cache: that comes first. purpose: what it is needed for, in errors.
    Raises SidaError without diffusers, and where the VAE is not there or does not fit its config.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise SidaError(
            f"{purpose} needs the VAE of diffusers, which is not installed",
            "Install it with: pip install 'sidactl[vae]'.",
        ) from error
    # The last option only saves memory, needs another package, and warns where that is missing.
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    if is_usual:
        with suppress(OSError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what diffusers asks of its own parts
            return _frozen(AutoencoderKL.from_pretrained(VAE_NAME, **options))
    if files is None:
        raise SidaError(
            f"{purpose} needs the VAE {VAE_NAME}, which diffusers does not have in its cache",
            f"Get it once with: hf download {VAE_NAME} {' '.join(VAE_FILES)}",
        )
    with TemporaryDirectory() as folder:
        for name, path in files().items():
            (Path(folder) / name).symlink_to(path.absolute())
        try:
            vae, loading_info = AutoencoderKL.from_pretrained(folder, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            lines = [line.strip() for line in str(error).replace(folder, "its folder").splitlines()]
            reason = " ".join([*filter(None, lines), *([] if any(lines) else [type(error).__name__])][:2]).rstrip(". ")
            raise SidaError(f"the VAE cannot be loaded ({reason})", "Get its files again.") from error
    wrong = [f"{name} {kind}" for kind in ("missing", "unexpected") for name in loading_info[f"{kind}_keys"]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise SidaError(
            f"the VAE must have the tensors of its config, got {', '.join(wrong[:5])}{more}", "Get its files again."
        )
    return _frozen(vae)


def _frozen(vae: Any) -> Any:
    return vae.eval().requires_grad_(False)
