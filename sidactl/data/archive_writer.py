"""Writing zips in the EDM layout, of which a half can be gone on with."""

import hashlib
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Self

from sidactl.data.images import Pixels, encode_png
from sidactl.data.labels import LABEL_FILE

# Of a member, on its way to the zip's directory: offset, size, CRC-32, class or -1, length of the name that follows.
_MEMBER = struct.Struct("<QIIiH")

_ZIP64_LIMIT = (1 << 31) - 1  # what Python's zipfile leaves to 32-bit fields

BLOCK_BYTES = 1 << 20


class ZipWriter:
    """Writes images one by one as a zip in the EDM layout; a context manager that adds dataset.json at its end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._zip = UnfinishedZip(self._file, BytesIO())
        self.num_images = 0

    def add(self, pixels: Pixels, label: int | None = None) -> None:
        """One image, uint8 [H, W, C] with 1 or 3 channels, and its class; either all images have one or none."""
        png = encode_png(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        self._zip.add(member_name(self.num_images), png, label)
        self.num_images += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            if exception[0] is None:
                self._zip.finish()


class UnfinishedZip:
    """An uncompressed zip in the EDM layout as it grows, byte for byte what Python's zipfile makes of it.

    What is to stand in its directory waits in a file of its own, so that no number of members needs memory.
    `sha256`: of what was added, images and members.
    """

    def __init__(self, images: IO[bytes], members: IO[bytes]) -> None:
        self.images, self.members = images, members
        self.sha256 = (hashlib.sha256(), hashlib.sha256())

    def add(self, name: str, data: bytes, label: int | None) -> None:
        """One member; -1 or more as `label`, None for an image without a class."""
        encoded = name.encode()
        checksum, offset = zlib.crc32(data), self.images.tell()
        local = struct.pack("<HHHHHIIIHH", 20, 0, 0, *_EPOCH, checksum, len(data), len(data), len(encoded), 0)
        local = b"PK\x03\x04" + local + encoded
        known = -1 if label is None else label
        listed = _MEMBER.pack(offset, len(data), checksum, known, len(encoded)) + encoded
        for file, sha256, text in zip((self.images, self.members), self.sha256, (local + data, listed), strict=True):
            file.write(text)
            sha256.update(text)

    def finish(self, class_names: Sequence[str] | None = None) -> Counter[int]:
        """Adds dataset.json, with the classes' names, and the directory; returns the number of images of each class."""
        counts: Counter[int] = Counter()
        text = bytearray()
        for name, *_, label in self._listed():
            if label >= 0:
                counts[label] += 1
                text += b"%s[%s, %d]" % (b", " if text else b"", json.dumps(name.decode()).encode(), label)
        names = b', "class_names": %s' % json.dumps(list(class_names)).encode() if text and class_names else b""
        self.add(LABEL_FILE, b'{"labels": %s%s}' % (b"[%s]" % text if text else b"null", names), None)
        start, count = self.images.tell(), 0
        for name, offset, size, checksum, _ in self._listed():
            is_far = offset > _ZIP64_LIMIT
            extra = struct.pack("<HHQ", 1, 8, offset) if is_far else b""
            version = 45 if is_far else 20
            fields = (version, 3, version, 0, 0, 0, *_EPOCH, checksum, size, size, len(name), len(extra), 0, 0, 0)
            entry = struct.pack("<BBBBHHHHIIIHHHHH", *fields)
            entry += struct.pack("<II", 0o644 << 16, 0xFFFFFFFF if is_far else offset)
            self.images.write(b"PK\x01\x02" + entry + name + extra)
            count += 1
        end = self.images.tell()
        size = end - start
        if count > 0xFFFF or start > _ZIP64_LIMIT or size > _ZIP64_LIMIT:
            self.images.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start))
            self.images.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        count, size, start = min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
        self.images.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0))
        return counts

    def _listed(self) -> Iterator[tuple[bytes, int, int, int, int]]:
        """Name, offset, size, CRC-32 and class or -1 of every member so far."""
        self.members.seek(0)
        while record := self.members.read(_MEMBER.size):
            offset, size, checksum, label, length = _MEMBER.unpack(record)
            yield self.members.read(length), offset, size, checksum, label


_EPOCH = (0, (1 << 5) | 1)  # midnight of 1980-01-01 in the zip's words, whenever it was made


def member_name(index: int, stem: str = "img", suffix: str = ".png") -> str:
    number = f"{index:08d}"
    return f"{number[:5]}/{stem}{number}{suffix}"
