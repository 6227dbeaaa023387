"""LPIPS (1801.03924), by the package of its authors, which ships its weights and fetches those of VGG."""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from sidactl.errors import SidaError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIDE = 224
"""pixels, to which images are resized, as DMD (2311.18828) has it"""


def check_lpips() -> None:
    """Raises SidaError where the package is not there."""
    if not all(importlib.util.find_spec(name) for name in ("lpips", "torchvision")):
        raise SidaError(
            "the regression by lpips needs the packages lpips and torchvision, which are not installed",
            "pip install 'sidactl[lpips]', or pass --regression mse.",
        )


def lpips_distance(device: "torch.device") -> "Callable[[Tensor, Tensor], Tensor]":
    """The distance of VGG's features of images [B, C, H, W] in [-1, 1], grey or RGB: [B]. Raises SidaError."""
    check_lpips()
    import lpips
    from torch.nn import functional as F

    net = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

    def resized(images: "Tensor") -> "Tensor":
        return F.interpolate(
            images.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
        )

    def distance(images: "Tensor", others: "Tensor") -> "Tensor":
        found: Tensor = net(resized(images), resized(others)).flatten()
        return found

    return distance
