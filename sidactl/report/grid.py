"""A grid of images as PNG bytes; nothing here reads or writes a file."""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from sidactl.errors import SidaError

GRID_GAP = 2


def grid(
    images: NDArray[np.uint8], *, columns: int | None = None, min_tile: int = 32, software: str | None = None
) -> bytes:
    """PNG of `images` in reading order, white between and behind them; the same input gives the same bytes.

    `images`: [N, H, W, C] uint8, C = 1 (grey) or 3 (RGB). `columns` defaults to the square root of N, rounded up.
    Images with a side shorter than `min_tile` pixels are enlarged by a whole factor, each pixel becoming a square.
    software: what the file says that it was drawn by. SidaError for any other shape or type, no image, or columns < 1.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or images.shape[3] not in (1, 3):
        raise SidaError(
            f"a grid must have uint8 images [N, H, W, C] with 1 or 3 channels, got {images.dtype} {list(images.shape)}",
            "Pass at least one grey or RGB image.",
        )
    num_images, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(num_images)) if columns is None else columns
    if columns < 1:
        raise SidaError(f"columns of a grid must be >= 1, got {columns}", "Leave it out for a square grid.")
    scale = max(1, math.ceil(min_tile / min(height, width)))
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    down, across = height * scale + GRID_GAP, width * scale + GRID_GAP
    columns = min(columns, num_images)
    rows = math.ceil(num_images / columns)
    canvas = np.full((rows * down - GRID_GAP, columns * across - GRID_GAP, channels), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * down, index % columns * across
        canvas[top : top + height * scale, left : left + width * scale] = tile
    return png_of(Image.fromarray(canvas[..., 0] if channels == 1 else canvas), software)


def png_of(image: Image.Image, software: str | None = None) -> bytes:
    """software: what the file says that it was drawn by."""
    buffer, said = io.BytesIO(), PngImagePlugin.PngInfo()
    if software:
        said.add_text("Software", software)
    image.save(buffer, "PNG", pnginfo=said)
    return buffer.getvalue()
