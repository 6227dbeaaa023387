"""The shape of a network: all that is needed to build it."""

import math
from dataclasses import dataclass
from typing import Literal

from sidactl.errors import SidaError
from sidactl.recipes.fields import (
    JsonFields,
    at_least,
    at_most,
    below_one,
    in_unit_interval,
    moderate,
    not_negative,
    positive,
    refusal,
)


@dataclass(frozen=True, kw_only=True)
class NetSpec(JsonFields):
    """The shape of a denoiser: all that is needed to build it, without its weights.

    `architecture` is the U-Net; options that it does not have are ignored by it and stay at their default.
    """

    _later = frozenset({"res_balance", "attn_balance", "clip_act", "sigma_min", "sigma_max"})

    architecture: Literal["SongUNet", "DhariwalUNet", "EDM2"]
    img_resolution: int
    """pixels, or latents, in height and width"""
    img_channels: int
    """1, 3, or 4 of latents"""
    model_channels: int
    """channels at the highest resolution, times channel_mult"""
    channel_mult: tuple[int, ...]
    """channels of each resolution, as multiples of model_channels, from the highest on; each next one has half"""
    num_blocks: int
    """residual blocks per resolution"""
    attn_resolutions: tuple[int, ...]
    """resolutions whose blocks have self-attention"""
    label_dim: int = 0
    """number of classes; 0 = unconditional"""
    channel_mult_emb: int | None = 4
    """EDM2: None = the largest of channel_mult"""
    channel_mult_noise: int | None = 1
    """EDM2: None = the smallest of channel_mult"""
    dropout: float = 0.0
    """probability of dropout in training"""
    resample_filter: tuple[int, ...] = (1, 1)
    """taps of the filter between resolutions"""
    sigma_data: float = 0.5
    """standard deviation of the data, for the preconditioning"""
    augment_dim: int = 0
    """SongUNet and DhariwalUNet: number of augmentation labels"""
    embedding_type: Literal["positional", "fourier"] = "positional"
    """SongUNet: positional or fourier"""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    """SongUNet: standard, skip or residual"""
    decoder_type: Literal["standard", "skip"] = "standard"
    """SongUNet: standard or skip"""
    channels_per_head: int = 64
    """DhariwalUNet and EDM2: channels of an attention head"""
    logvar_channels: int = 0
    """EDM2 only: width of the uncertainty head u(sigma); 0 = the net has none"""
    label_balance: float = 0.5
    """EDM2: share of the class in its sum with the noise level"""
    concat_balance: float = 0.5
    """EDM2: share of the encoder's features in their concatenation with the decoder's"""
    res_balance: float = 0.3
    """EDM2: share of a block's residual branch in its sum with the main one"""
    attn_balance: float = 0.3
    """EDM2: share of the attention in its sum with the main branch"""
    clip_act: float | None = 256.0
    """EDM2: largest magnitude of activations; None = no limit"""
    sigma_min: float = 0.0
    """lowest noise level that the net takes; Heun's sampler of convention edm keeps to it"""
    sigma_max: float = math.inf
    """highest noise level that the net takes, likewise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "img_resolution", "img_channels", "model_channels", "num_blocks", "channels_per_head")
        at_least(self, 1, "channel_mult", "channel_mult_emb", "channel_mult_noise", "attn_resolutions")
        at_least(self, 0, "label_dim", "augment_dim", "logvar_channels")
        # Ten times what any published network has: whatever says more is no network, and costs hours to lay out.
        at_most(self, 100, "num_blocks", "channel_mult", "channel_mult_emb", "channel_mult_noise")
        at_most(self, 100_000, "img_resolution", "img_channels", "model_channels", "augment_dim", "logvar_channels")
        at_most(self, 1_000_000, "label_dim", "channels_per_head", "attn_resolutions")
        if len(self.resample_filter) > 100:
            raise refusal("resample_filter", "100 taps or fewer", f"{len(self.resample_filter):,}")
        for name in ("channel_mult", "resample_filter"):
            if not getattr(self, name):
                raise refusal(name, "one number or more", [])
        if len(self.resample_filter) % 2 or sum(self.resample_filter) <= 0:
            what = "an even number of taps with a positive sum"
            raise refusal("resample_filter", what, list(self.resample_filter))
        below_one(self, "dropout")
        positive(self, "sigma_data", "clip_act")
        moderate(self, "sigma_data", "clip_act")
        in_unit_interval(self, "label_balance", "concat_balance", "res_balance", "attn_balance")
        not_negative(self, "sigma_min")
        if not self.sigma_min < self.sigma_max:
            raise refusal("sigma_max", f"above sigma_min, {self.sigma_min:g}", self.sigma_max)
        depth = len(self.channel_mult) - 1
        if self.img_resolution % (1 << depth):
            raise SidaError(
                f"img_resolution must be divisible by {1 << depth}, got {self.img_resolution}",
                "Use fewer entries in channel_mult.",
            )
        if self.architecture != "EDM2":
            for channels in {self.model_channels * mult for mult in self.channel_mult}:
                groups = min(32, channels // 4)
                if groups == 0 or channels % groups:
                    raise SidaError(
                        f"channel counts must be divisible by their GroupNorm groups, got {channels} channels",
                        "Choose model_channels such as 16, 32, 64 or 128.",
                    )
