"""The random weights that the golden numbers of the detectors were made with: each key seeds its own generator."""

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]
Shapes = Mapping[str, Sequence[int]]


def inception_weights(shapes: Shapes) -> dict[str, Tensor]:
    """Weights of the golden Inception, by its keys and their shapes."""
    return {key: _weight(key, shape, _inception) for key, shape in shapes.items()}


def dinov2_weights(shapes: Shapes) -> dict[str, Tensor]:
    """Weights of a golden DINOv2, by its keys and their shapes."""
    return {key: _weight(key, shape, _dinov2) for key, shape in shapes.items()}


def fingerprint(weight: Tensor) -> dict[str, Any]:
    """What the golden files say of a weight: its first values, their sum, and the start of the bytes' SHA-256."""
    array = weight.numpy()
    digest = hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()
    return {
        "first3": array.ravel()[:3].tolist(),
        "sum": float(array.astype(np.float64).sum()),
        "sha256_float32_le": digest[:16],
    }


def _weight(key: str, shape: Sequence[int], scaled: Callable[[str, Array], Array]) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    z = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape))
    return torch.from_numpy(scaled(key, z).astype(np.float32))


def _inception(key: str, z: Array) -> Array:
    if key.endswith("conv.weight"):
        return z * math.sqrt(2 / math.prod(z.shape[1:]))
    if key == "fc.weight":
        return z * 3 * math.sqrt(1 / 2048)
    if key.endswith("bn.weight"):
        return 1 + 0.1 * z
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(z)
    return 0.1 * z


def _dinov2(key: str, z: Array) -> Array:
    if key in ("cls_token", "pos_embed", "mask_token"):
        return 0.5 * z
    if key.endswith("gamma"):
        return 0.5 + 0.1 * z
    if key.endswith(".bias"):
        return 0.1 * z
    if "norm" in key:
        return 1 + 0.1 * z
    return z * math.sqrt(1 / math.prod(z.shape[1:])) * (2 if key.endswith("attn.qkv.weight") else 1)
