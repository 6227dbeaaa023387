"""Stand-ins for what is too large to keep: files of the published size and layout with next to nothing in them."""

import json
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_EPOCH = (0, (1 << 5) | 1)
_FLUSH_BYTES = 1 << 20


def sparse_latents(path: Path, num_images: int, *, num_classes: int = 1000, size: int = 64) -> None:
    """A dataset zip of latents as prepare-data and EDM2's tool write it: stored float32 [8, size, size], and labels.

    Every latent is zero, and the zeros are a hole in the file: of each member a block or two of the disk are taken.
    Classes follow each other, as many of each. Source: APPNOTE 6.3.10 (PKWARE), sections 4.3 and 4.5.
    """
    latents: NDArray[np.float32] = np.zeros((8, size, size), np.float32)
    buffer = BytesIO()
    np.lib.format.write_array(buffer, latents, version=(1, 0), allow_pickle=False)
    npy = buffer.getvalue()
    head, checksum = npy[: len(npy) - latents.nbytes], zlib.crc32(npy)
    directory, labels = BytesIO(), []
    with path.open("wb", buffering=0) as file:
        offset = 0
        for index in range(num_images):
            name = f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"
            offset += _add(file.fileno(), directory, offset, name, head, len(npy), checksum)
            labels.append([name, index * num_classes // num_images])
        text = json.dumps({"labels": labels}).encode()
        offset += _add(file.fileno(), directory, offset, "dataset.json", text, len(text), zlib.crc32(text))
        start, listed, count = offset, directory.getbuffer(), num_images + 1
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(listed), start)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(listed), 1)
        end += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        for position in range(0, len(listed), _FLUSH_BYTES):
            os.pwrite(file.fileno(), listed[position : position + _FLUSH_BYTES], start + position)
        os.pwrite(file.fileno(), end, start + len(listed))


def _add(fd: int, directory: BytesIO, offset: int, name: str, written: bytes, num_bytes: int, checksum: int) -> int:
    """Writes a stored member, of whose bytes all after `written` are zero; returns the bytes that it takes."""
    encoded = name.encode()
    fields = (*_EPOCH, checksum, num_bytes, num_bytes, len(encoded))
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, *fields, 0) + encoded
    data = memoryview(local + written)
    while data:
        data = data[os.pwrite(fd, data, offset + len(local + written) - len(data)) :]
    is_far = offset >= 1 << 31
    extra = struct.pack("<HHQ", 1, 8, offset) if is_far else b""
    version = 45 if is_far else 20
    entry = struct.pack("<4sBBBBHHHHIIIH", b"PK\x01\x02", version, 3, version, 0, 0, 0, *fields)
    entry += struct.pack("<HHHHII", len(extra), 0, 0, 0, 0o644 << 16, 0xFFFFFFFF if is_far else offset)
    directory.write(entry + encoded + extra)
    return len(local) + num_bytes
