"""The U-Nets of EDM: SongUNet (its DDPM++ and NCSN++ forms) and DhariwalUNet (ADM). Preconditioning lives elsewhere.

Module names equal those of the published checkpoints, since those names are the interface. Weights stay float32 and
are cast to the type of the activations where they are used, so one set of weights serves every precision.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.nets.denoiser import Encoded, with_own_grad_node
from sidactl.nets.dropout import dropout
from sidactl.recipes import NetSpec

Resample = Literal["up", "down"]


class Linear(nn.Module):
    """Affine map in the type of its input; weights uniform with Xavier's bound (or Kaiming's) times `gain`."""

    def __init__(
        self, num_in: int, num_out: int, *, bias: bool = True, kaiming: bool = False, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(_uniform((num_out, num_in), num_in, num_out, kaiming, gain))
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution, optionally after (or, fused, around) a 2x resampling by a fixed separable filter.

    kernel 0 resamples only and has no weights. `fused` runs the convolution before the strided filter, with both
    paddings at once, as the residual branch of NCSN++ does.
    """

    resample_filter: Tensor

    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: int,
        *,
        resample: Resample | None = None,
        filter_taps: tuple[int, ...] = (1, 1),
        fused: bool = False,
        kaiming: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        assert not fused or resample == "down"
        self.out_channels = num_out
        self.resample, self.fused, self.pad = resample, fused, kernel // 2
        self.weight = self.bias = None
        if kernel:
            fans = num_in * kernel**2, num_out * kernel**2
            self.weight = nn.Parameter(_uniform((num_out, num_in, kernel, kernel), *fans, kaiming, gain))
            self.bias = nn.Parameter(torch.zeros(num_out))
        if resample:
            taps = torch.tensor(filter_taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])
            # A two-tap box is pooling (down) or repetition (up), which run several times faster than the filter.
            self.is_box = filter_taps in ((1, 1), [1, 1])

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            filter_pad = (self.resample_filter.shape[-1] - 1) // 2
            return self._filter(self._convolve(x, self.pad + filter_pad), pad=0)
        if self.resample:
            x = self._filter(x, pad=(self.resample_filter.shape[-1] - 1) // 2)
        return self._convolve(x, self.pad)

    def _convolve(self, x: Tensor, pad: int) -> Tensor:
        if self.weight is None or self.bias is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=pad)

    def _filter(self, x: Tensor, pad: int) -> Tensor:
        channels = x.shape[1]
        if self.is_box:
            return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2)
        taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, groups=channels, stride=2, padding=pad)
        return F.conv_transpose2d(x, taps * 4, groups=channels, stride=2, padding=pad)


class GroupNorm(nn.Module):
    """Group normalisation over min(32, C // 4) groups."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    """Residual block with embedding and optional self-attention, in the style of either U-Net.

    Song: GroupNorm eps 1e-6, the embedding is added, sums are scaled by sqrt(1/2), one attention head, resampling
    skips always have a 1x1 convolution. Dhariwal: eps 1e-5, the embedding scales and shifts, sums are not scaled,
    heads of `channels_per_head` channels (none below that width: no attention), resampling skips have no weights.
    """

    def __init__(
        self,
        spec: NetSpec,
        num_in: int,
        num_out: int,
        emb_channels: int,
        *,
        resample: Resample | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        song = spec.architecture == "SongUNet"
        eps = 1e-6 if song else 1e-5
        kaiming, gain, zero_gain = (False, 1.0, 1e-5) if song else (True, math.sqrt(1 / 3), 0.0)
        attention_gain = math.sqrt(0.2) if song else gain
        self.in_channels, self.out_channels = num_in, num_out
        self.num_heads = 0 if not attention else 1 if song else num_out // spec.channels_per_head
        self.dropout = spec.dropout
        self.skip_scale = math.sqrt(0.5) if song else 1.0
        self.adaptive_scale = not song

        taps = spec.resample_filter
        self.norm0 = GroupNorm(num_in, eps)
        self.conv0 = Conv2d(num_in, num_out, 3, resample=resample, filter_taps=taps, kaiming=kaiming, gain=gain)
        self.affine = Linear(emb_channels, num_out * (1 if song else 2), kaiming=kaiming, gain=gain)
        self.norm1 = GroupNorm(num_out, eps)
        self.conv1 = Conv2d(num_out, num_out, 3, kaiming=kaiming, gain=zero_gain)
        self.skip = None
        if num_in != num_out or resample:
            kernel = 1 if song or num_in != num_out else 0
            self.skip = Conv2d(num_in, num_out, kernel, resample=resample, filter_taps=taps, kaiming=kaiming, gain=gain)
        if self.num_heads:
            self.norm2 = GroupNorm(num_out, eps)
            self.qkv = Conv2d(num_out, num_out * 3, 1, kaiming=kaiming, gain=attention_gain)
            self.proj = Conv2d(num_out, num_out, 1, kaiming=kaiming, gain=zero_gain)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        residual = x = with_own_grad_node(x)
        x = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(with_own_grad_node(emb))[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + params))
        x = self.conv1(dropout(x, self.dropout, self.training) if self.dropout else x)
        x = (x + (residual if self.skip is None else self.skip(residual))) * self.skip_scale
        if self.num_heads:
            x = (x + self.proj(self._attend(self.norm2(x)))) * self.skip_scale
        return x

    def _attend(self, x: Tensor) -> Tensor:
        # qkv channels are ordered (head, channel, {q, k, v}), the last fastest.
        qkv = self.qkv(x).reshape(x.shape[0], self.num_heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # fused kernels want a token's channels side by side
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


class PositionalEmbedding(nn.Module):
    """cos and sin of the noise level at frequencies from 1 down to 1e-4 (reached only with `endpoint`)."""

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.num_frequencies, self.endpoint = channels // 2, endpoint

    def forward(self, x: Tensor) -> Tensor:
        k = torch.arange(self.num_frequencies, dtype=torch.float32, device=x.device)
        frequencies = (1 / 10000) ** (k / (self.num_frequencies - int(self.endpoint)))
        angles = x.to(torch.float32).outer(frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """cos and sin of the noise level at fixed random frequencies, normal with standard deviation 16."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, x: Tensor) -> Tensor:
        angles = x.to(torch.float32).outer(2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class SongUNet(nn.Module):
    """The DDPM++ (standard) and NCSN++ (fourier, residual or skip branches) U-Nets. Source: EDM, appendix F.2.

    x: [B, C, H, W], c_noise: [B] or [1], labels: one-hot [B, K] or None, augment_labels: [B, A] or None.
    """

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        assert spec.channel_mult_emb is not None
        assert spec.channel_mult_noise is not None
        base, taps = spec.model_channels, spec.resample_filter
        noise_channels, emb = base * spec.channel_mult_noise, base * spec.channel_mult_emb
        self.label_scale = math.sqrt(spec.label_dim)
        self.map_noise: nn.Module
        if spec.embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(spec.label_dim, noise_channels) if spec.label_dim else None
        self.map_augment = Linear(spec.augment_dim, noise_channels, bias=False) if spec.augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb)
        self.map_layer1 = Linear(emb, emb)

        image, aux = spec.img_channels, spec.img_channels
        self.enc = nn.ModuleDict()
        channels = image
        skips: list[int] = []
        for level, mult in enumerate(spec.channel_mult):
            res = spec.img_resolution >> level
            if level == 0:
                channels = base
                self.enc[f"{res}x{res}_conv"] = Conv2d(image, base, 3)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(spec, channels, channels, emb, resample="down")
                if spec.encoder_type == "skip":
                    self.enc[f"{res}x{res}_aux_down"] = Conv2d(aux, aux, 0, resample="down", filter_taps=taps)
                    self.enc[f"{res}x{res}_aux_skip"] = Conv2d(aux, channels, 1)
                elif spec.encoder_type == "residual":
                    residual = Conv2d(aux, channels, 3, resample="down", filter_taps=taps, fused=True)
                    self.enc[f"{res}x{res}_aux_residual"] = residual
                    aux = channels
            skips.append(channels)
            for index in range(spec.num_blocks):
                num_in, channels = channels, base * mult
                attention = res in spec.attn_resolutions
                self.enc[f"{res}x{res}_block{index}"] = UNetBlock(spec, num_in, channels, emb, attention=attention)
                skips.append(channels)

        self.dec = nn.ModuleDict()
        deepest = len(spec.channel_mult) - 1
        for level, mult in reversed(list(enumerate(spec.channel_mult))):
            res = spec.img_resolution >> level
            if level == deepest:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(spec, channels, channels, emb, attention=True)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(spec, channels, channels, emb)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(spec, channels, channels, emb, resample="up")
            for index in range(spec.num_blocks + 1):
                num_in, channels = channels + skips.pop(), base * mult
                attention = index == spec.num_blocks and res in spec.attn_resolutions
                self.dec[f"{res}x{res}_block{index}"] = UNetBlock(spec, num_in, channels, emb, attention=attention)
            if spec.decoder_type == "skip" or level == 0:
                if level < deepest and spec.decoder_type == "skip":
                    self.dec[f"{res}x{res}_aux_up"] = Conv2d(image, image, 0, resample="up", filter_taps=taps)
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels, 1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, image, 3, gain=1e-5)

    def encode(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Encoded:
        """The encoder half."""
        emb = self.map_noise(c_noise)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)  # the published nets were trained with sin before cos
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * self.label_scale)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb)))).to(x.dtype)

        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if name.endswith("aux_down"):
                aux = block(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + block(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        return Encoded(x, skips, emb)

    def decode(self, encoded: Encoded) -> Tensor:
        """The decoder half: F_x, [B, C, H, W]."""
        x, skips, emb = encoded.features, list(encoded.skips), encoded.embedding
        image: Tensor | None = None
        for name, block in self.dec.items():
            if name.endswith("aux_up"):
                image = block(image)
            elif name.endswith("aux_norm"):
                normalised = block(x)
            elif name.endswith("aux_conv"):
                part = block(F.silu(normalised))
                image = part if image is None else image + part
            else:
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, emb)
        assert image is not None
        return image


class DhariwalUNet(nn.Module):
    """The ADM U-Net. Source: EDM, appendix F.2, after Dhariwal and Nichol (2105.05233). Shapes as in SongUNet."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        assert spec.channel_mult_emb is not None
        base, emb, gain = spec.model_channels, spec.model_channels * spec.channel_mult_emb, math.sqrt(1 / 3)
        self.map_noise = PositionalEmbedding(base, endpoint=False)
        self.map_augment = None
        if spec.augment_dim:
            self.map_augment = Linear(spec.augment_dim, base, bias=False, kaiming=True, gain=0.0)
        self.map_layer0 = Linear(base, emb, kaiming=True, gain=gain)
        self.map_layer1 = Linear(emb, emb, kaiming=True, gain=gain)
        self.map_label = None
        if spec.label_dim:
            self.map_label = Linear(spec.label_dim, emb, bias=False)
            nn.init.normal_(self.map_label.weight)

        def attends(res: int) -> bool:
            return res in spec.attn_resolutions

        channels = base
        self.enc = nn.ModuleDict()
        skips: list[int] = []
        for level, mult in enumerate(spec.channel_mult):
            res = spec.img_resolution >> level
            if level == 0:
                channels = base * mult
                self.enc[f"{res}x{res}_conv"] = Conv2d(spec.img_channels, channels, 3, kaiming=True, gain=gain)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(spec, channels, channels, emb, resample="down")
            skips.append(channels)
            for index in range(spec.num_blocks):
                num_in, channels = channels, base * mult
                self.enc[f"{res}x{res}_block{index}"] = UNetBlock(spec, num_in, channels, emb, attention=attends(res))
                skips.append(channels)

        self.dec = nn.ModuleDict()
        deepest = len(spec.channel_mult) - 1
        for level, mult in reversed(list(enumerate(spec.channel_mult))):
            res = spec.img_resolution >> level
            if level == deepest:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(spec, channels, channels, emb, attention=True)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(spec, channels, channels, emb)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(spec, channels, channels, emb, resample="up")
            for index in range(spec.num_blocks + 1):
                num_in, channels = channels + skips.pop(), base * mult
                self.dec[f"{res}x{res}_block{index}"] = UNetBlock(spec, num_in, channels, emb, attention=attends(res))
        self.out_norm = GroupNorm(channels, 1e-5)
        self.out_conv = Conv2d(channels, spec.img_channels, 3, kaiming=True, gain=0.0)

    def encode(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Encoded:
        """The encoder half."""
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels)
        emb = F.silu(emb).to(x.dtype)
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        return Encoded(x, skips, emb)

    def decode(self, encoded: Encoded) -> Tensor:
        """The decoder half: F_x, [B, C, H, W]."""
        x, skips, emb = encoded.features, list(encoded.skips), encoded.embedding
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        F_x: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return F_x


def _uniform(shape: tuple[int, ...], fan_in: int, fan_out: int, kaiming: bool, gain: float) -> Tensor:
    bound = math.sqrt(3 / fan_in) if kaiming else math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(shape).uniform_(-1, 1) * (gain * bound)
