"""What is done to an image on its way into a dataset: crops, sizes, orientation."""

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sidactl.data.archive import MAX_MEMBER_BYTES
from sidactl.data.images import Pixels, check_png, decode_latents, decode_pixels, encode_png, first_line, image_formats
from sidactl.data.listing import Convention, Item
from sidactl.errors import SidaError

Transform = Callable[[Image.Image, int, int], Image.Image | None]


class Transformed(NamedTuple):
    """An image: bytes for the zip, or pixels uint8 [C, H, W] for the VAE; `shape` = (channels, height, width).

    is_turned: whether an orientation tag says that it is to be shown otherwise than stored.
    """

    content: bytes | Pixels
    shape: tuple[int, int, int]
    is_turned: bool = False

    @property
    def data(self) -> bytes:
        assert isinstance(self.content, bytes)
        return self.content

    @property
    def pixels(self) -> Pixels:
        assert isinstance(self.content, np.ndarray)
        return self.content


class Change(NamedTuple):
    """What is done to every image; see `prepare`."""

    transform: str | None
    resolution: tuple[int, int] | None
    convention: Convention | None
    channels: int | None
    exif_rotate: bool
    is_for_latents: bool


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).convert("RGB")
    return square.resize((width, height), Image.Resampling.LANCZOS)


def _center_crop_wide(image: Image.Image, width: int, height: int) -> Image.Image | None:
    crop_height = round(width * image.height / image.width)
    if image.width < width or crop_height < height:
        return None
    top, bottom = (image.height - crop_height) // 2, (image.height + crop_height) // 2
    strip = image.crop((0, top, image.width, bottom)).convert("RGB")
    canvas = Image.new("RGB", (width, width))
    canvas.paste(strip.resize((width, height), Image.Resampling.LANCZOS), (0, (width - height) // 2))
    return canvas


def _center_crop_dhariwal(image: Image.Image, width: int, height: int) -> Image.Image:
    while min(image.size) >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = width / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.width > width or image.height > height:
        raise ValueError(f"must be at most {width}x{height} to be padded, got {image.width}x{image.height}")
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


TRANSFORMS: Mapping[str, Transform] = MappingProxyType(
    {
        "center-crop": _center_crop,
        "center-crop-wide": _center_crop_wide,
        "center-crop-dhariwal": _center_crop_dhariwal,
        "pad": _pad,
    }
)


def transformed(item: Item, *, change: Change) -> Transformed | SidaError | str:
    """One image for the zip; the error for one that cannot be used; a reason for one that its transform leaves out."""
    transform, resolution, is_turned = change.transform, change.resolution, False
    if change.is_for_latents and item.keep_as is not None and item.keep_as.endswith(".npy"):
        raise SidaError(f"latents are made of pixels, got latents: {item.name}", "Leave out --latents.")
    try:
        loaded = item.load()
        if item.keep_as is not None:
            assert isinstance(loaded, bytes)
            if item.keep_as.endswith(".npy"):
                return Transformed(loaded, decode_latents(loaded, item.name).shape)
            hint = "Pass --channels 3, which makes every image RGB, or 1 for grey."
            planes = decode_pixels(loaded, item.name, hint)
            return Transformed(planes if change.is_for_latents else loaded, planes.shape)
        if isinstance(loaded, np.ndarray):
            image = Image.fromarray(loaded)
        else:
            image, is_turned = _read_image(loaded, item.name, change)
        if resolution is not None and transform is not None:
            result = TRANSFORMS[transform](image, *resolution)
            if result is None:
                return f"is too small for {transform} to {resolution[0]}x{resolution[1]}"
            image = result
        elif resolution is not None and image.size != resolution:
            image = image.resize(resolution, Image.Resampling.LANCZOS)
        if change.channels is not None:
            image = image.convert("L" if change.channels == 1 else "RGB")
    except SidaError as error:
        return error
    except ValueError as error:
        return SidaError(f"{item.name} {error}", "Choose another transform or resolution.")
    shape, pixels = (len(image.getbands()), image.height, image.width), np.asarray(image)
    planes = pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return Transformed(planes if change.is_for_latents else encode_png(pixels), shape, is_turned)


_ORIENTATION = 0x0112
"""the EXIF tag; 1 where an image is stored as it is to be shown"""


def _read_image(file: Path | bytes, name: str, change: Change) -> tuple[Image.Image, bool]:
    """The first frame as mode L or RGB, and whether its orientation tag asks for a turn."""
    hint = "Mend or remove it, or go on without: prepare-data --skip-bad."
    is_edm = change.convention == "edm"
    try:
        if isinstance(file, Path) and file.stat().st_size > MAX_MEMBER_BYTES:
            raise ValueError(f"it is larger than {MAX_MEMBER_BYTES:,} bytes")
        data = file if isinstance(file, bytes) else file.read_bytes()
        check_png(data)
        with Image.open(BytesIO(data), formats=image_formats()) as opened:
            image: Image.Image = opened
            is_turned = bool(image.info.get("exif")) and image.getexif().get(_ORIENTATION, 1) != 1
            if is_turned and change.exif_rotate:
                image = ImageOps.exif_transpose(image)
            mode = image.mode
            if is_edm:
                # Palette indices become grey levels, as in the published tool; 8 bits in any case.
                readable = mode in ("L", "RGB", "P")
                pixels = Image.fromarray(np.asarray(image)) if readable else image
            else:
                readable = mode not in ("I", "F") and not mode.startswith("I;")
                pixels = image.convert("RGB") if readable else image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SidaError(f"{name} must have at most {Image.MAX_IMAGE_PIXELS} pixels, got more", hint) from error
    except UnidentifiedImageError as error:
        raise SidaError(f"{name} must be an image, got bytes that Pillow does not know", hint) from error
    except Exception as error:  # Pillow's readers raise whatever their parser trips over.
        raise SidaError(f"{name} cannot be read as an image ({first_line(error)})", hint) from error
    if not readable:
        allowed = "8-bit grey or RGB" if is_edm else "8 bits per channel"
        raise SidaError(
            f"{name} must have {allowed}, got Pillow's mode {mode}",
            "Convert it, or go on without: prepare-data --skip-bad.",
        )
    return pixels, is_turned


def check_shape(
    name: str,
    shape: tuple[int, int, int],
    first_name: str,
    first_shape: tuple[int, int, int],
    *,
    any_size: bool = False,
    is_for_latents: bool,
) -> None:
    hint = "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    channels, height, width = shape
    if not any_size and (height != width or width & (width - 1)):
        raise SidaError(
            f"images must be square with a side that is a power of two, got {width}x{height} for {name}", hint
        )
    if is_for_latents and width < 8:
        raise SidaError(f"images must be at least 8x8 to have latents, got {width}x{height}", "Prepare larger images.")
    if shape[1:] != first_shape[1:]:
        first_size = f"{first_shape[2]}x{first_shape[1]}"
        raise SidaError(
            f"images must all have one size, got {first_size} for {first_name} and {width}x{height} for {name}", hint
        )
    if channels != first_shape[0]:
        got = f"{first_shape[0]} channels for {first_name} and {channels} for {name}"
        raise SidaError(
            f"images must all be grey or all RGB, got {got}", "Pass --channels 3 to prepare-data, or 1 for grey."
        )
