"""The U-Net of EDM2, whose layers keep magnitudes, and its uncertainty head. Source: EDM2 (2312.02696), appendix B.

Module names equal those of the published checkpoints, since those names are the interface. Weights stay float32; they
are normalised in float32 and then cast to the type of the activations. Forced weight normalisation is a function that
the trainer calls (`force_normalize_`), not something that a forward pass does.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.nets.constants import constant
from sidactl.nets.denoiser import Encoded, Preconditioned, as_sigma, with_own_grad_node
from sidactl.nets.dropout import dropout
from sidactl.recipes import NetSpec

Resample = Literal["up", "down"]


def normalize(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x / (1e-4 + RMS of x over `dim`), in the type of x; the RMS is taken in float32, or float64 of that."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=_wide(x))
    count = math.prod(x.shape[d] for d in ((dim,) if isinstance(dim, int) else dim))
    rms = norm * math.sqrt(1 / count)
    return x.div((rms + 1e-4).to(x.dtype))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596, of unit magnitude for unit normal x. Source: EDM2, eq. 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The blend (1 - t) a + t b, of unit magnitude for independent unit a and b. Source: EDM2, eq. 88."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and b, b with the share t of the magnitude whatever their numbers. Source: EDM2, eq. 103."""
    num_a, num_b = a.shape[1], b.shape[1]
    scale = math.sqrt(num_a + num_b) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(num_a)), b * (scale * t / math.sqrt(num_b))], dim=1)


def resample(x: Tensor, mode: Resample, taps: tuple[int, ...]) -> Tensor:
    """x [B, C, H, W] at twice or half the resolution, by a separable filter normalised to keep constants."""
    if taps == (1, 1):  # the box, which all published nets use: pooling and repetition are several times faster
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2)
    channels, pad = x.shape[1], (len(taps) - 1) // 2
    line = constant(taps, x.device, x.dtype) / sum(taps)
    kernel = line.outer(line).expand(channels, 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, kernel, groups=channels, stride=2, padding=pad)
    return F.conv_transpose2d(x, kernel * 4, groups=channels, stride=2, padding=pad)


class MPFourier(nn.Module):
    """sqrt(2) cos(f x + p) at fixed random frequencies and phases: [B] -> [B, channels]. Source: EDM2, eq. 75."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        return math.sqrt(2) * torch.cos(x.outer(self.freqs.to(x.dtype)) + self.phases.to(x.dtype))


class MPConv(nn.Module):
    """Convolution (kernel 0: linear map) without bias, whose output has the magnitude of its input times a gain.

    The weights of one output have unit RMS once normalised, and are divided by sqrt(fan-in). Source: EDM2, eq. 47.
    """

    def __init__(self, num_in: int, num_out: int, kernel: int = 0, *, has_gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in, *[kernel] * (2 if kernel else 0)))
        self.kernel, self.has_gain = kernel, has_gain
        self.held: Tensor | None = None
        """what `prepared` gave, while many passes take it; see `holding`"""

    def normalized(self) -> Tensor:
        """The weights in float32, or float64 of that, each output's row with unit RMS."""
        return normalize(self.weight.to(_wide(self.weight)), dim=tuple(range(1, self.weight.ndim)))

    def prepared(self, dtype: torch.dtype) -> Tensor:
        """All of the effective weights that inputs do not change: normalised; without a gain scaled and cast, too."""
        return self.normalized() if self.has_gain else self._scaled(self.normalized(), 1.0, dtype)

    def forward(self, x: Tensor, gain: Tensor | float | None = None) -> Tensor:
        weight = self.prepared(x.dtype) if self.held is None else self.held
        assert (gain is not None) == self.has_gain
        if gain is not None:
            weight = self._scaled(weight, gain, x.dtype)
        return F.conv2d(x, weight, padding=self.kernel // 2) if self.kernel else F.linear(x, weight)

    def gradient(self, of_held: Tensor) -> Tensor:
        """The gradient at the weights, in the type of that at `held`, or wider, by one way back through `prepared`."""
        with torch.enable_grad():
            weight = self.weight.detach().to(torch.promote_types(of_held.dtype, self.weight.dtype)).requires_grad_()
            given = normalize(weight, dim=tuple(range(1, weight.ndim)))
            given = given if self.has_gain else self._scaled(given, 1.0, of_held.dtype)
            return torch.autograd.grad(given, weight, of_held)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "held": None}  # a copy has weights of its own

    def _scaled(self, weight: Tensor, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
        return (weight * (gain / math.sqrt(self.weight[0].numel()))).to(dtype)


@contextmanager
def holding(net: Preconditioned, *, trains: bool = False) -> Iterator[None]:
    """Within the block the net's weights, which do not change in it, are normalised once instead of in every pass.

    Gradients end at what is held (`trains`), and `MPConv.gradient` brings their sum to the weights. What is held
    already stays so, and nets that normalise nothing are left alone.
    """
    taken = [m for m in net.modules() if isinstance(m, MPConv) and m.held is None]
    try:
        for module in taken:
            # The embedding is float32 whatever the type of activations, and with it all that is no convolution.
            dtype = net.compute_dtype if module.kernel else _wide(module.weight)
            with torch.no_grad():
                module.held = module.prepared(dtype)
            module.held.requires_grad_(trains)
        yield
    finally:
        for module in taken:
            module.held = None


@torch.no_grad()
def force_normalize_(net: nn.Module) -> None:
    """Overwrites every normalised weight with its normalised value; a net without such weights stays as it is.

    The effective weights change by about 1e-4 (relatively) at the first call, then by less than 1e-7, since
    normalisation is idempotent only up to its epsilon. Source: EDM2, eq. 66.
    """
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(module.normalized())


def drop_logvar_(net: Preconditioned) -> None:
    """Takes the uncertainty head away; a net without one stays as it is."""
    if net.spec.logvar_channels:
        net.spec = dataclasses.replace(net.spec, logvar_channels=0)
        del net.logvar_fourier, net.logvar_linear


class Block(nn.Module):
    """Residual block with embedding and optional cosine attention. Source: EDM2, appendix B (config G).

    The encoder's blocks normalise each pixel first, after the skip convolution; the decoder's apply the skip
    convolution on the residual path alone. Below `channels_per_head` channels there is no attention.
    """

    def __init__(
        self,
        spec: NetSpec,
        num_in: int,
        num_out: int,
        emb_channels: int,
        *,
        side: Literal["encoder", "decoder"],
        resample: Resample | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.side, self.resample, self.filter_taps = side, resample, spec.resample_filter
        self.dropout, self.clip_act = spec.dropout, spec.clip_act
        self.res_balance, self.attn_balance = spec.res_balance, spec.attn_balance
        self.num_heads = num_out // spec.channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(num_out if side == "encoder" else num_in, num_out, 3)
        self.emb_linear = MPConv(emb_channels, num_out, has_gain=True)
        self.conv_res1 = MPConv(num_out, num_out, 3)
        self.conv_skip = MPConv(num_in, num_out, 1) if num_in != num_out else None
        if self.num_heads:
            self.attn_qkv = MPConv(num_out, num_out * 3, 1)
            self.attn_proj = MPConv(num_out, num_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x, emb = with_own_grad_node(x), with_own_grad_node(emb)
        if self.resample:
            x = resample(x, self.resample, self.filter_taps)
        if self.side == "encoder":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=1)

        scale = self.emb_linear(emb, self.emb_gain)[:, :, None, None] + 1
        y = mp_silu(self.conv_res0(mp_silu(x)) * scale.to(x.dtype))
        y = self.conv_res1(dropout(y, self.dropout, self.training) if self.dropout else y)

        if self.side == "decoder" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self.attn_proj(self._attend(x)), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _attend(self, x: Tensor) -> Tensor:
        # qkv channels are ordered (head, channel, {q, k, v}), the last fastest.
        qkv = self.attn_qkv(x).reshape(x.shape[0], self.num_heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = normalize(qkv, dim=2).permute(3, 0, 1, 4, 2).contiguous()  # as fused kernels want them
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


class EDM2UNet(nn.Module):
    """The magnitude-preserving U-Net. Source: EDM2, appendix B (config G).

    x: [B, C, H, W], c_noise: [B] or [1], labels: one-hot [B, K] or None; augment_labels are not used. The embedding is
    float32 whatever the type of x.
    """

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        widths = [spec.model_channels * mult for mult in spec.channel_mult]
        noise_channels = spec.model_channels * (spec.channel_mult_noise or spec.channel_mult[0])
        emb = spec.model_channels * (spec.channel_mult_emb or max(spec.channel_mult))
        self.label_scale = math.sqrt(spec.label_dim)
        self.label_balance, self.concat_balance = spec.label_balance, spec.concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb)
        self.emb_label = MPConv(spec.label_dim, emb) if spec.label_dim else None

        def block(
            num_in: int,
            num_out: int,
            side: Literal["encoder", "decoder"],
            resample: Resample | None = None,
            attention: bool = False,
        ) -> Block:
            return Block(spec, num_in, num_out, emb, side=side, resample=resample, attention=attention)

        self.enc = nn.ModuleDict()
        channels = widths[0]
        skips: list[int] = []
        for level, width in enumerate(widths):
            res = spec.img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(spec.img_channels + 1, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, "encoder", "down")
            skips.append(channels)
            for index in range(spec.num_blocks):
                attention = res in spec.attn_resolutions
                self.enc[f"{res}x{res}_block{index}"] = block(channels, width, "encoder", attention=attention)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            res = spec.img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, "decoder", attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels, "decoder")
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, "decoder", "up")
            for index in range(spec.num_blocks + 1):
                attention = res in spec.attn_resolutions
                num_in = channels + skips.pop()
                self.dec[f"{res}x{res}_block{index}"] = block(num_in, width, "decoder", attention=attention)
                channels = width
        self.out_conv = MPConv(channels, spec.img_channels, 3, has_gain=True)

    def encode(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Encoded:
        """The encoder half."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            emb = mp_sum(emb, self.emb_label(labels * self.label_scale), self.label_balance)
        emb = mp_silu(emb)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # the constant channel takes the place of biases
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block) else block(x)
            skips.append(x)
        return Encoded(x, skips, emb)

    def decode(self, encoded: Encoded) -> Tensor:
        """The decoder half: F_x, [B, C, H, W]."""
        x, skips, emb = encoded.features, list(encoded.skips), encoded.embedding
        for name, block in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = block(x, emb)
        F_x: Tensor = self.out_conv(x, self.out_gain)
        return F_x


class EDM2Denoiser(Preconditioned):
    """EDM2's U-Net with preconditioning and, where spec.logvar_channels > 0, the uncertainty head u(sigma)."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__(spec, EDM2UNet(spec), "unet")
        if spec.logvar_channels:
            self.logvar_fourier = MPFourier(spec.logvar_channels)
            self.logvar_linear = MPConv(spec.logvar_channels, 1)

    def logvar(self, sigma: Tensor | float) -> Tensor:
        """u(sigma), the log of the expected loss at a noise level, float32 [B, 1, 1, 1] or [1, 1, 1, 1].

        sigma: scalar, [B] or [B, 1, 1, 1]. Source: EDM2, eq. 14-15. Raises SidaError where logvar_channels is 0.
        """
        if not self.spec.logvar_channels:
            return super().logvar(sigma)
        sigma = as_sigma(sigma, self.logvar_linear.weight)
        u: Tensor = self.logvar_linear(self.logvar_fourier(sigma.log().flatten() / 4))
        return u.reshape(-1, 1, 1, 1)
