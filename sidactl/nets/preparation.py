"""How images become the input of a network that was trained on photographs of one size."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl.errors import SidaError


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Images are resized to `size / crop` without keeping the aspect ratio, cropped about the centre, and normalised.

    size: [height, width] of the input. Resizing is antialiased, and neither rounds nor clips. mean, std: by channel, of
    values in [0, 1].
    """

    size: tuple[int, int]
    interpolation: Literal["bicubic", "bilinear"]
    crop: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        is_sound = min(self.size) >= 1 and 0 < self.crop <= 1 and min(self.std) > 0
        if len(self.mean) != 3 or len(self.std) != 3 or self.interpolation not in ("bicubic", "bilinear"):
            is_sound = False
        if not is_sound:
            raise SidaError(
                f"a detector's images must be RGB, resized bicubically or bilinearly, got {self}", "Take another."
            )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preparation":
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def label(self) -> str:
        """All of it in a word, for a detector's identity; mean and std as the first 8 hex digits of their SHA-256."""
        digest = hashlib.sha256(json.dumps([self.mean, self.std]).encode()).hexdigest()[:8]
        return f"{self.interpolation}{self.size[0]}x{self.size[1]}-crop{self.crop:g}-{digest}"

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 1 or 3, H, W] as the network's float32 input [N, 3, height, width]; grey ones repeated."""
        large = [int(side / self.crop) for side in self.size]
        x = images.expand(-1, 3, -1, -1).to(torch.float32) / 255
        if [*x.shape[2:]] != large:
            x = F.interpolate(x, large, mode=self.interpolation, antialias=True)
        top, left = (round((side - inner) / 2) for side, inner in zip(large, self.size, strict=True))
        x = x[:, :, top : top + self.size[0], left : left + self.size[1]]
        mean, std = (torch.tensor(value, device=x.device)[:, None, None] for value in (self.mean, self.std))
        return (x - mean) / std
