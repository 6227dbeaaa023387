"""DINOv2's vision transformer, the network behind FD-DINOv2, and the preparation of its images. No file is read here.

Module names equal the state keys of the published `dinov2_vitl14_pretrain.pth`, since those are the interface.
Source: DINOv2 (2304.07193); FD-DINOv2: 2306.04675, as EDM2 (2312.02696) computes it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Literal, assert_never

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 14
RESOLUTION = 224
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """[N, 3, H, W] -> one token per patch, row by row: [N, H/14 * W/14, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of tokens [N, T, dim]; the rows of `qkv` are ordered (q or k or v, head, channel)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with scaled residual branches."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """DINOv2's ViT with patches of 14 pixels and no registers; ViT-L/14 unless other sizes are given.

    `grid` is the side, in patches, of the position embedding: 37 for the published 518 pixels (and for 526).
    """

    def __init__(self, dim: int = 1024, depth: int = 24, num_heads: int = 16, *, grid: int = 37) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # read in pretraining only, but part of the file
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, dim], the class token's row after the last norm, of prepared images [N, 3, H, W].

        Height and width are multiples of 14.
        """
        return self.tokens(x)[:, 0]

    def tokens(self, x: Tensor) -> Tensor:
        """All tokens [N, 1 + H/14 * W/14, dim] after the last norm: the class token, then the patches row by row."""
        (last,) = deque(self.maps(x), maxlen=1)
        out: Tensor = self.norm(last)
        return out

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """All tokens after each block, [N, 1 + H/14 * W/14, dim], held by nobody but who asks."""
        assert x.shape[2] % PATCH == x.shape[3] % PATCH == 0
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        tokens = tokens + self.position_embedding(x.shape[2] // PATCH, x.shape[3] // PATCH)
        for block in self.blocks:
            tokens = block(tokens)
            yield tokens

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Position embedding [1, 1 + rows * columns, dim], resampled bicubically unless it is the grid of training.

        The published network asks for the scale (rows + 0.1) / grid, once a guard against rounding; as this scale, not
        the ratio of the sizes, sets where the grid is sampled, its features depend on the 0.1.
        """
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        patches = F.interpolate(patches.to(torch.float32), scale_factor=scale, mode="bicubic").to(patches.dtype)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)


def preprocess(images: Tensor, resize: Literal["torch", "pil"] = "torch") -> Tensor:
    """Images uint8 [N, 1 or 3, H, W] as the network's float32 input [N, 3, 224, 224].

    They are resized bicubically, without keeping the aspect ratio, and normalised by ImageNet's mean and deviation.
    "torch", behind the published statistics, neither rounds nor clips; "pil" does both, as Pillow's resize.
    """
    images = images.expand(-1, 3, -1, -1)
    if resize == "torch":
        x = F.interpolate(images.to(torch.float32), (RESOLUTION, RESOLUTION), mode="bicubic", antialias=True)
    elif resize == "pil":
        x = _resize_pil(images).to(images.device, torch.float32)
    else:
        assert_never(resize)
    mean, std = (torch.tensor(value, device=x.device)[:, None, None] for value in (PIXEL_MEAN, PIXEL_STD))
    return (x / 255 - mean) / std


def _resize_pil(images: Tensor) -> Tensor:
    size = (RESOLUTION, RESOLUTION)
    pixels = images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    resized = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
