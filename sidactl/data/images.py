"""Single images and latents as files: which names are theirs, and their bytes in PNG and npy."""

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sidactl.errors import SidaError

IMAGE_FORMATS = frozenset(
    ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
)
"""Pillow's names of the formats that it decodes itself: no Ghostscript, and no readers that others plug in"""

IMAGE_SUFFIXES = frozenset(
    f".{word}"
    for words in (
        ("apng", "avif", "bmp", "dib", "gif", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx"),
        ("mpo", "pbm", "pcx", "pgm", "png", "pnm", "ppm", "qoi", "rgb", "rgba", "sgi", "tga", "tif", "tiff", "webp"),
    )
    for word in words
)
"""lower case; fixed, so that no image is passed over where Pillow was built without its format"""

_SYSTEM_NAMES = frozenset(("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"))

LAYOUT = re.compile(r"\d{5}/(img\d{8}\.png|img-mean-std-\d{8}\.npy)")
"""names of images and latents as the published tools and prepare-data give them"""


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_item(name: str) -> bool:
    """Whether a member of a dataset zip is an image or the latents of one, and not hidden."""
    if LAYOUT.fullmatch(name):  # by far the most
        return True
    return (is_image(name) or name.lower().endswith(".npy")) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a relative path is, or lies in, what systems and tools hide there: `.DS_Store`, `__MACOSX/x.png`."""
    parts = name.split("/")
    return any((part.startswith(".") and part != ".") or part.lower() in _SYSTEM_NAMES for part in parts)


def printable(name: str) -> str:
    """A file's name for messages and JSON: bytes that are no UTF-8, line breaks and the like are escaped."""

    def escaped(letter: str) -> str:
        byte = ord(letter) - 0xDC00  # how Python holds a byte of a file's name that is no UTF-8
        return f"\\x{byte:02x}" if 0x80 <= byte < 0x100 else letter.encode("unicode_escape").decode()

    return name if name.isprintable() else "".join(c if c.isprintable() else escaped(c) for c in name)


@cache
def image_formats() -> tuple[str, ...]:
    """Those of IMAGE_FORMATS that Pillow was built with."""
    Image.init()
    return tuple(sorted(IMAGE_FORMATS & set(Image.OPEN)))


def first_line(error: Exception) -> str:
    """What another library's error says, cut to fit into our one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")


def decode_latents(data: bytes, where: str) -> NDArray[np.float32]:
    """VAE statistics of one image from the bytes of an .npy: float32 [8, h, w], 4 channels of mean, 4 of std."""
    try:
        array: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SidaError(
            f"{where} must be an .npy array, got {first_line(error)}", "Encode the dataset again."
        ) from error
    if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] != 8 or not np.isfinite(array).all():
        raise SidaError(
            f"{where} must hold finite float32 latents [8, h, w], got {array.dtype} {list(array.shape)}",
            "Encode the dataset again.",
        )
    return array


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def check_png(data: bytes) -> None:
    """Raises ValueError where a PNG is cut or a chunk's checksum is wrong; Pillow looks at neither in pixel data.

    Whatever is no PNG passes. Source: PNG specification (W3C), section 5.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return
    position, kind = len(_PNG_SIGNATURE), b""
    view = memoryview(data)
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ValueError("the PNG ends too early")
        (length,), kind = struct.unpack_from(">I", data, position), data[position + 4 : position + 8]
        end = position + 8 + length
        if end + 4 > len(data):
            raise ValueError("the PNG ends too early")
        if zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError("a checksum in the PNG is wrong")
        position = end + 4


def decode_pixels(data: bytes, where: str, hint: str = "Convert it with prepare-data.") -> NDArray[np.uint8]:
    """Pixels of one grey or RGB image: uint8 [C, H, W] with C = 1 or 3. `hint`: what to do about other modes."""
    try:
        check_png(data)
        with Image.open(io.BytesIO(data), formats=image_formats()) as image:
            mode = image.mode
            pixels = np.array(image)
    except Exception as error:  # Pillow's readers raise whatever their parser trips over.
        raise SidaError(
            f"{where} cannot be read as an image ({first_line(error)})", "Prepare the dataset again."
        ) from error
    if mode not in ("L", "RGB"):
        raise SidaError(f"{where} must be 8-bit grey or RGB, got mode {mode}", hint)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


Pixels = NDArray[np.uint8]


def encode_png(pixels: Pixels) -> bytes:
    """An uncompressed PNG of uint8 [H, W] (grey) or [H, W, 3] (RGB).

    Written here because a library's compressor, even at level 0, may change its bytes from version to version.
    Source: PNG specification (W3C), RFC 1950 and 1951.
    """
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)  # each row begins with its filter, 0 for none
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    starts = range(0, len(raw), 0xFFFF)
    blocks = []
    for start in starts:
        block = raw[start : start + 0xFFFF]
        blocks.append(struct.pack("<BHH", start == starts[-1], len(block), len(block) ^ 0xFFFF) + block)
    packed = b"\x78\x01" + b"".join(blocks) + struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def encode_npy(array: NDArray[np.float32]) -> bytes:
    """The .npy file of an array, version 1.0."""
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's remarks on odd files are dropped, but images of absurd size become errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
