"""Reading datasets: zips in the EDM layout, the built-in digits, and the order in which training sees them.

Making such zips from other sources is prepare.py's work.
"""

import io
import json
import mmap
import os
import re
import struct
import weakref
import zipfile
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sidactl.catalog import ASSETS
from sidactl.errors import SidaError

MAX_MEMBER_BYTES = 1 << 29
MAX_LABEL = 999_999
LABEL_FILE = "dataset.json"
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
_MEMBER_HEAD_BYTES = 256
"""of a member's name and extra field, which are read with what stands before or after them"""
_ROWS_AT_ONCE = 4096
_FEW_ALIKE = 100
_DIRECTORY_BYTES_AT_ONCE = 1 << 20
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")
LAYOUT = re.compile(r"\d{5}/(img\d{8}\.png|img-mean-std-\d{8}\.npy)")
"""names of images and latents as the published tools and prepare-data give them"""
_LABELS = re.compile(rb'\s*\{\s*"labels"\s*:\s*\[')
_PAIR = re.compile(rb'\["([^"\\\x00-\x1f]*)", ?(0|[1-9]\d{0,5})\](, ?|\])')


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


class _Member(NamedTuple):
    """What a zip's directory says of a member; `offset` is that of its own header in the file, `entry` that of this."""

    entry: int
    name: str
    flags: int
    method: int
    checksum: int
    packed_size: int
    size: int
    offset: int


class _Span(NamedTuple):
    """Where a zip's directory lies in its file, what stands before the zip, and how many members it says it has."""

    start: int
    end: int
    shift: int
    total: int
    modulus: int
    """some tools count no further than 16 bits, and write no 64-bit record"""


def _span(data: mmap.mmap) -> _Span:
    """Raises BadZipFile. Source: APPNOTE 6.3.10 (PKWARE), sections 4.3 and 4.5."""
    end = data.rfind(b"PK\x05\x06", max(len(data) - (1 << 16) - 22, 0))
    if end < 0 or end + 22 > len(data):
        raise zipfile.BadZipFile("File is not a zip file")
    total, size, start = struct.unpack_from("<HII", data, end + 10)
    modulus = 1 << 16
    if data[max(end - 20, 0) : end].startswith(b"PK\x06\x07"):
        # The 64-bit record stands right before its locator; where it says it is may count from another beginning.
        end -= 76
        if end < 0 or data[end : end + 4] != b"PK\x06\x06":
            raise zipfile.BadZipFile("Corrupt zip64 end of central directory record")
        total, size, start = struct.unpack_from("<QQQ", data, end + 32)
        modulus = 1 << 64
    shift = end - size - start
    if shift < 0:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return _Span(end - size, end, shift, total, modulus)


def _member(data: mmap.mmap | bytes, position: int, end: int, entry: int, shift: int) -> tuple[_Member, int]:
    """The member whose entry of the directory stands at `position`, and where it ends. Raises BadZipFile."""
    if position + 46 > end:
        raise zipfile.BadZipFile("Bad magic number for central directory")
    magic, flags, method, checksum, packed, full, *lengths, offset = _ENTRY.unpack_from(data, position)
    if magic != b"PK\x01\x02":
        raise zipfile.BadZipFile("Bad magic number for central directory")
    name_length, extra_length, comment_length = lengths
    begin = position + 46
    after = begin + name_length
    position = after + extra_length + comment_length
    if position > end:
        raise zipfile.BadZipFile("Truncated central directory")
    if 0xFFFFFFFF in (full, packed, offset):
        full, packed, offset = _in_64_bits(data[after : after + extra_length], (full, packed, offset))
        if max(full, packed, offset) >= 1 << 62:
            raise zipfile.BadZipFile("Sizes beyond any file")
    name = data[begin:after].decode(_encoding(flags))
    return _Member(entry, name, flags, method, checksum, packed, full, offset + shift), position


def _directory(data: mmap.mmap) -> Iterator[tuple[_Member, range]]:
    """The members in a zip's directory, each with where its entry stands and those of the ones right after it.

    These are alike, see `_num_alike`. Raises BadZipFile.
    """
    span = _span(data)
    position, count, pause, to_wait = span.start, 0, 0, 0
    while position < span.end:
        start = position
        member, position = _member(data, start, span.end, start, span.shift)
        num_bytes, num_alike = position - start, 1
        if to_wait:
            to_wait -= 1
        elif LAYOUT.fullmatch(member.name):
            num_alike = _num_alike(data[start : min(start + num_bytes * _ROWS_AT_ONCE, span.end)], num_bytes)
            # To look in vain costs as much as a hundred entries: where there is no order, it is done ever more rarely.
            pause = 0 if num_alike > _FEW_ALIKE else min(2 * pause + 1, _ROWS_AT_ONCE)
            to_wait = pause
        position = start + num_bytes * num_alike
        count += num_alike
        yield member, range(start, position, num_bytes)
    if count % span.modulus != span.total:
        raise zipfile.BadZipFile(f"Central directory holds {count} members, not {span.total}")


def _num_alike(data: bytes, num_bytes: int) -> int:
    """How many entries of a directory from the first on, which is sound and has an ASCII name, are alike.

    They take as many bytes, their fields lie within the same bounds, and their names differ in digits alone and ascend.
    One by one a million of them would take a minute.
    """
    entries = np.frombuffer(data, np.uint8, len(data) // num_bytes * num_bytes).reshape(-1, num_bytes)
    first, (name_length, extra_length) = entries[0], struct.unpack_from("<HH", data, 28)
    end = 46 + name_length

    def numbers(start: int, kind: str) -> NDArray[Any]:
        width = np.dtype(kind).itemsize
        return np.ascontiguousarray(entries[:, start : start + width]).view(kind)[:, 0]

    packed, full, offset = (numbers(start, "<u4") for start in (20, 24, 42))
    is_far = offset == 0xFFFFFFFF
    same = [*range(4), *range(8, 12), *range(28, 34)]  # the magic, flags and method, all lengths
    good = (entries[:, same] == first[same]).all(axis=1) & (is_far == is_far[0])
    good &= (packed != 0xFFFFFFFF) & (full <= MAX_MEMBER_BYTES)
    if is_far[0]:
        if data[end : end + 4] != b"\1\0\x08\0" or extra_length != 12:
            return 1
        good &= (entries[:, end : end + 4] == first[end : end + 4]).all(axis=1) & (numbers(end + 4, "<u8") < 1 << 62)
    letters = entries[:, 46:end]
    is_digit = (letters >= ord("0")) & (letters <= ord("9"))
    good &= ((letters == letters[0]) | (is_digit & is_digit[0])).all(axis=1)
    names = numbers(46, f"S{name_length}")
    good[1:] &= names[1:] > names[:-1]
    good[0] = True
    return len(good) if good.all() else int(good.argmin())


def check_directory(path: Path) -> None:
    """Raises BadZipFile where a zip's directory does not hold as many members as it says; Python's reader lets it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in _directory(data):
            pass


def _encoding(flags: int) -> str:
    return "utf-8" if flags & 0x800 else "cp437"


def _in_64_bits(extra: bytes, fields: tuple[int, int, int]) -> Iterator[int]:
    """Each of the fields, but those that are all ones from the directory entry's extra field, where they follow."""
    values: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            values = [*struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4)]
        extra = extra[4 + length :]
    for field in fields:
        if field == 0xFFFFFFFF and not values:
            raise zipfile.BadZipFile("Corrupt zip64 extra field")
        yield values.pop(0) if field == 0xFFFFFFFF else field


class ZipArchive:
    """The members of a zip, read at random.

    A member is known by its row, its place among the files in the zip's directory. `is_item`: of each row, whether it
    is an image or latents; `folders` that the zip lists, without their "/". Of a member stay in memory 9 bytes, or 17
    where the zip does not list its files by name: its entry is read again with it. No read depends on a file position,
    so threads and forked processes may share it; a pickled copy opens the file again. Raises SidaError for a file that
    is no zip, and for one whose names are absolute, climb out with '..' or occur twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        entries, are_items, folders = array("q"), bytearray(), []
        last, seen = "", None
        try:
            self._fd = self._open()
            # Mapped for this alone: pages of a map that was read all over would count as this process's memory.
            with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as data:
                self._shift = _span(data).shift
                for member, alike in _directory(data):
                    if member.name.endswith("/"):
                        if member.size:
                            raise zipfile.BadZipFile("A folder with content")
                        folders.append(member.name[:-1])
                        continue
                    if seen is None and member.name <= last:
                        seen = set(_names(data, entries))
                    if seen is None:
                        self._check(member, ())
                    else:
                        for name in _names(data, alike):
                            self._check(member._replace(name=name), seen)
                            seen.add(name)
                    (last,) = _names(data, alike[-1:])
                    entries.extend(alike)
                    are_items.extend(bytes([is_item(member.name)]) * len(alike))
        except FileNotFoundError as error:
            raise SidaError(f"dataset {path} does not exist", "Check the path.") from error
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise self._unreadable(error) from error
        self._entries = np.frombuffer(entries, dtype=np.int64)
        self.is_item = np.frombuffer(are_items, dtype=bool)
        self.folders = tuple(folders)
        self._by_name: NDArray[np.int64] | None = None
        if seen is not None:
            names = self.names
            self._by_name = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)

    def _check(self, member: _Member, seen: Container[str]) -> None:
        """`seen`: the names before, where the zip does not list them in their order."""
        name = member.name
        is_drive = name[1:2] == ":" and name[0].isascii() and name[0].isalpha()
        if name.startswith("/") or "\\" in name or is_drive or (".." in name and ".." in name.split("/")):
            raise SidaError(
                f"names in {self.path} must be relative and without '..', got {name!r}", "Make the zip again."
            )
        if name in seen:
            raise SidaError(f"names in {self.path} must be unique, got {name!r} twice", "Make the zip again.")
        if member.flags & 1 or member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SidaError(
                f"{printable(name)} in {self.path} must be stored or deflated, got an encrypted or otherwise packed "
                "member",
                "Make the zip again without encryption.",
            )
        if member.size > MAX_MEMBER_BYTES:
            raise SidaError(
                f"{printable(name)} in {self.path} must be at most {MAX_MEMBER_BYTES} bytes, got {member.size}",
                "Split it, or leave it out.",
            )

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, fd)
        if not os.fstat(fd).st_size:
            raise zipfile.BadZipFile("File is not a zip file")
        return fd

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_fd"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fd = self._open()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all rows; made anew at every call."""
        return tuple(self.names_of(np.arange(len(self))))

    @property
    def by_name(self) -> NDArray[np.int64]:
        """All rows in the order of their names."""
        return np.arange(len(self)) if self._by_name is None else self._by_name

    def names_of(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """Their names, one by one."""
        with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as data:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                entries = self._entries[rows[start : start + _ROWS_AT_ONCE]]
                try:
                    yield from _names_at_once(data, entries) or _names(data, entries.tolist())
                except (ValueError, struct.error) as error:  # written over since
                    raise self._unreadable(error) from error

    def row_of(self, name: str) -> int | None:
        """The row of that name; None where there is none."""

        def at(place: int) -> int:
            return place if self._by_name is None else int(self._by_name[place])

        place = bisect_left(range(len(self)), name, key=lambda place: self.member(at(place)).name)
        return at(place) if place < len(self) and self.member(at(place)).name == name else None

    def __contains__(self, name: str) -> bool:
        return self.row_of(name) is not None

    def member(self, row: int) -> _Member:
        """What the directory says of a row, read again."""
        entry = int(self._entries[row])
        found = os.pread(self._fd, 46 + _MEMBER_HEAD_BYTES, entry)
        try:
            num_bytes = 46 + sum(struct.unpack_from("<HHH", found, 28))
            if num_bytes > len(found):
                found = os.pread(self._fd, num_bytes, entry)
            return _member(found, 0, len(found), entry, self._shift)[0]
        except (zipfile.BadZipFile, ValueError, struct.error) as error:  # written over since
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> SidaError:
        return SidaError(f"{self.path} is not a readable zip ({first_line(error)})", "Copy or download it again.")

    def check(self, rows: Iterable[int]) -> None:
        """Compares the directory's entries of these members with their own headers; SidaError where they differ.

        That is a part of every read: it is for members that are left out for what the directory says of them.
        """
        rows = np.fromiter(rows, np.int64)
        offsets = np.fromiter((self.member(row).offset for row in rows), np.int64, len(rows))
        for row in rows[np.argsort(offsets, kind="stable")]:
            member = self.member(row)
            if self._data_start(member, os.pread(self._fd, 30 + _MEMBER_HEAD_BYTES, member.offset)) is None:
                raise self._damaged(member.name)

    def _data_start(self, member: _Member, head: bytes) -> int | None:
        """Where the data begins after its own header, whose first bytes are `head`; None where the header is another.

        Source: APPNOTE 6.3.10 (PKWARE), section 4.3.7.
        """
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            return None
        own_flags, own_method, own_checksum, own_packed, own_size = struct.unpack_from("<HH4xIII", head, 6)
        # The local header's own extra field may differ in length from the central directory's.
        name_length, extra_length = struct.unpack_from("<HH", head, 26)
        own_name = head[30 : 30 + name_length]
        if len(own_name) < name_length:
            own_name = os.pread(self._fd, name_length, member.offset + 30)
        if own_name != member.name.encode(_encoding(member.flags)) or own_method != member.method:
            return None
        if not own_flags & 8:  # else these three follow the data
            sizes = ((own_packed, member.packed_size), (own_size, member.size))
            if own_checksum != member.checksum or any(own not in (said, 0xFFFFFFFF) for own, said in sizes):
                return None
        return int(30 + name_length + extra_length)

    def _damaged(self, name: str) -> SidaError:
        return SidaError(f"{printable(name)} in {self.path} is damaged", "Copy or download the zip again.")

    def read(self, name: str) -> bytes:
        """The bytes of the member of that name, as `read_member`; KeyError where there is none."""
        row = self.row_of(name)
        if row is None:
            raise KeyError(name)
        return self.read_row(row)

    def read_row(self, row: int) -> bytes:
        """The bytes of the member of that row, as `read_member`."""
        return self.read_member(self.member(row))

    def read_member(self, member: _Member) -> bytes:
        """The bytes of one member, its checksum and its own header verified."""
        # In one read, unless the name and the extra field of its own header are very long.
        found = os.pread(self._fd, 30 + _MEMBER_HEAD_BYTES + member.packed_size, member.offset)
        start = self._data_start(member, found)
        if start is None:
            raise self._damaged(member.name)
        is_whole = start <= 30 + _MEMBER_HEAD_BYTES
        size = member.packed_size
        data = found[start : start + size] if is_whole else os.pread(self._fd, size, member.offset + start)
        if member.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(member.size, 1))
            except zlib.error:
                data = b""
        if len(data) != member.size or zlib.crc32(data) != member.checksum:
            raise self._damaged(member.name)
        return data


def _names(data: mmap.mmap, entries: Iterable[int]) -> Iterator[str]:
    """The names in these entries of a zip's directory."""
    for entry in entries:
        flags, length = struct.unpack_from("<H18xH", data, entry + 8)
        yield data[entry + 46 : entry + 46 + length].decode(_encoding(flags))


def _names_at_once(data: mmap.mmap, entries: NDArray[np.int64]) -> list[str]:
    """As `_names`, where the entries lie together and all names are of one length and ASCII; else none."""
    begin, end = int(entries.min()), int(entries.max()) + 46 + 0xFFFF
    if end - begin > _DIRECTORY_BYTES_AT_ONCE:
        return []
    listed = np.frombuffer(data[begin:end], np.uint8)
    places = entries - begin
    lengths = listed[places + 28] + 256 * listed[places + 29].astype(np.int64)
    length = int(lengths[0])
    if (lengths != length).any() or not length:
        return []
    text = listed[places[:, None] + np.arange(46, 46 + length)].tobytes()
    if not text.isascii():
        return []
    letters = text.decode()
    return [letters[start : start + length] for start in range(0, len(letters), length)]


def first_line(error: Exception) -> str:
    """What another library's error says, cut to fit into our one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")


class LabelFile(NamedTuple):
    """What a dataset.json says: the class index of each image by its name, and the names of the classes.

    None where it says `"labels": null`, or has no names.
    """

    labels: dict[str, int] | None
    class_names: list[str] | None = None

    @property
    def label_dim(self) -> int:
        """Number of classes: one more than the highest, or as many as have names."""
        return max(max((self.labels or {}).values(), default=-1) + 1, len(self.class_names or ()))


def parse_labels(text: bytes, where: str) -> LabelFile:
    """The labels of a dataset.json, where `where` names the file in errors.

    Raises SidaError for anything that is neither null nor a list of [name, integer >= 0], for an empty list, and for a
    name with two labels.
    """
    hint = 'Write {"labels": [["name.png", 0], ...]} with integer classes from 0.'

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]:
            raise ValueError(f"the key {json.dumps(twice[0])[:60]} twice")
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise SidaError(f"{where} must be JSON, got {first_line(error)}", hint) from error
    if isinstance(document, dict) and "labels" not in document:
        got = ", ".join(json.dumps(key)[:60] for key in list(document)[:5]) or "nothing"
        raise SidaError(f'{where} must hold "labels", got {got}', hint)
    entries = document["labels"] if isinstance(document, dict) else document
    if isinstance(document, dict) and entries is None:
        return LabelFile(None)
    if isinstance(document, dict) and entries == []:
        raise SidaError(
            f"{where} must label images, got an empty list", 'Label them, or write {"labels": null} for none.'
        )
    labels: dict[str, int] = {}
    for entry in entries if isinstance(document, dict) and isinstance(entries, list) else [entries]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise SidaError(f"{where} must hold pairs of name and class, got {json.dumps(entry)[:60]}", hint)
        name, label = entry[0], check_label(entry[1], f"{printable(entry[0])} in {where}")
        if labels.setdefault(name, label) != label:
            raise SidaError(
                f"{where} must give each image one class, got {labels[name]} and {label} for {printable(name)}",
                "Correct it.",
            )
    names = document.get("class_names")
    if names is not None and not (
        isinstance(names, list)
        and len(names) > max(labels.values())
        and all(isinstance(name, str) and name.isprintable() for name in names)
    ):
        raise SidaError(f"class_names in {where} must be a list with a name for each class", "Correct it, or drop it.")
    return LabelFile(labels, names)


def _labels_in_order(text: bytes, names: Iterable[str], count: int) -> tuple[NDArray[np.int64], bytes] | None:
    """The labels of a dataset.json that lists just these `count` names, in this order, as tools write it.

    With them the text that is left when one pair, of the highest class, stands for all. None for any other text:
    `parse_labels` takes all, but as objects the labels of a million images would take half a gigabyte.
    """
    head = _LABELS.match(text)
    if head is None:
        return None
    labels, position = np.empty(count, np.int64), head.end()
    for index, name in enumerate(names):
        pair = _PAIR.match(text, position)
        if pair is None or pair[1] != name.encode() or (pair[3] == b"]") != (index == count - 1):
            return None
        labels[index], position = int(pair[2]), pair.end()
    return labels, b'%s["", %d]]%s' % (text[: head.end()], labels.max(), text[position:])


def read_labels(path: Path) -> LabelFile:
    """The labels of a dataset.json on its own, by image name. Raises SidaError where it has none."""
    hint = "Give a dataset.json with labels."
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SidaError(f"{path} cannot be read: {error.strerror}", "Check the path.") from error
    found = parse_labels(text, str(path))
    if found.labels is None:
        raise SidaError(f"{path} must hold labels, got none", hint)
    return found


def class_counts(labels: Sequence[int] | NDArray[np.int64], label_dim: int = 0) -> list[int]:
    """How many of each class there are, from class 0 to the highest, of `label_dim` at least; empty without labels."""
    return [int(count) for count in np.bincount(labels, minlength=label_dim)] if len(labels) else []


def check_label(label: object, where: str) -> int:
    """The class index itself, an integer from 0 to 999999; raises SidaError naming `where` for all else."""
    if type(label) is not int or not 0 <= label <= MAX_LABEL:
        raise SidaError(f"label of {where} must be an integer from 0 to {MAX_LABEL}, got {label!r}", "Correct it.")
    return label


def labels_of(
    labels: Mapping[str, int], names: Sequence[str], where: str, *, allow_more: bool = False
) -> NDArray[np.int64]:
    """The label of each image in `names`; `where` names the dataset.json.

    Raises SidaError where an image has none, instead of dropping all labels without a word, and where one is named that
    is not there.
    """
    hint = f'or set "labels" to null in {LABEL_FILE} to go without.'
    missing = next((name for name in names if name not in labels), None)
    if missing is not None:
        raise SidaError(f"{where} must label every image, got none for {printable(missing)}", f"Add its label, {hint}")
    if len(labels) > len(names) and not allow_more:
        unknown = set(labels) - set(names)
        raise SidaError(
            f"{where} names {len(unknown):,} images that are not there, the first {printable(min(unknown))}",
            f"Put them there, remove their labels, {hint}",
        )
    return np.fromiter((labels[name] for name in names), np.int64, len(names))


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


class Dataset:
    """A dataset zip in the EDM layout: images (or .npy latents) and a dataset.json with their classes.

    `num_images`, `resolution` (height), `width` (the same for what a net is trained on), `num_channels` (1, 3, or 8 for
    latents), `is_latents`;
    `labels`: int64 [N] or None; `label_dim`: number of classes, 0 without labels; `class_names`: theirs, or None.
    Items are decoded at random from the zip, in any number of processes. Where all of them fit into `cache_bytes`
    (per process) they stay decoded in memory once read. Raises SidaError for a zip that is not of this layout.
    Source: the dataset format of EDM (2206.00364) and EDM2 (2312.02696).
    """

    def __init__(self, path: Path, *, cache_bytes: int = 1 << 30) -> None:
        self.path = Path(path)
        self._archive = ZipArchive(self.path)
        by_name = self._archive.by_name
        self._rows = by_name[self._archive.is_item[by_name]]
        # An image would be missing, were its name damaged in the zip's directory alone.
        self._archive.check(np.flatnonzero(~self._archive.is_item))
        if not len(self._rows):
            raise SidaError(f"{self.path} must hold images, got none", "Make a dataset with prepare-data.")
        self.num_images = len(self._rows)
        self.is_latents = self.name(0).lower().endswith(".npy")
        first = self._decode(0)
        self._shape = first.shape
        self.num_channels, self.resolution, self.width = first.shape
        self.labels, self.class_names, self.label_dim = self._read_labels()
        # Not touched until written: the system commits this memory image by image.
        fits = self.num_images * first.nbytes <= cache_bytes
        self._cache = np.empty((self.num_images, *first.shape), first.dtype) if fits else None
        self._cached = np.zeros(self.num_images if fits else 0, dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        cache = None if self._cache is None else np.empty_like(self._cache[:0])
        return self.__dict__ | {"_cache": cache, "_cached": np.zeros_like(self._cached)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._cache is not None:
            self._cache = np.empty((self.num_images, *self._shape), self._cache.dtype)

    @property
    def names(self) -> list[str]:
        """Of all images, in their order; made anew at every call."""
        return list(self._archive.names_of(self._rows))

    def name(self, index: int) -> str:
        """Of one image."""
        return self._archive.member(self._rows[index]).name

    def _read_labels(self) -> tuple[NDArray[np.int64] | None, list[str] | None, int]:
        row = self._archive.row_of(LABEL_FILE)
        if row is None:
            return None, None, 0
        where = f"{LABEL_FILE} in {self.path}"
        text = self._archive.read_row(row)
        if plain := _labels_in_order(text, self._archive.names_of(self._rows), self.num_images):
            labels, rest = plain
            with suppress(SidaError):  # which is of the whole text, below
                found = parse_labels(rest, where)
                return labels, found.class_names, found.label_dim
        found = parse_labels(text, where)
        if found.labels is None:
            return None, None, 0
        return labels_of(found.labels, self.names, where), found.class_names, found.label_dim

    def _decode(self, index: int) -> NDArray[Any]:
        member = self._archive.member(self._rows[index])
        decode = decode_latents if self.is_latents else decode_pixels
        return decode(self._archive.read_member(member), f"{printable(member.name)} in {self.path}")

    def _item(self, index: int) -> NDArray[Any]:
        item = self._decode(index)
        if item.shape != self._shape:
            got = f"{list(item.shape)} for {printable(self.name(index))}"
            raise SidaError(
                f"images in {self.path} must all be {list(self._shape)}, got {got}", "Convert it with prepare-data."
            )
        return item

    def images(self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor) -> torch.Tensor:
        """Items by position: uint8 [B, C, H, W] in 0..255, or float32 [B, 8, h, w] for latents."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and (index.min() < 0 or index.max() >= self.num_images):
            raise IndexError(f"dataset positions must be in 0..{self.num_images - 1}")
        if self._cache is None:
            items = [self._item(int(i)) for i in index]
            dtype = np.float32 if self.is_latents else np.uint8
            return torch.from_numpy(np.stack(items) if items else np.empty((0, *self._shape), dtype))
        for i in np.unique(index[~self._cached[index]]):
            self._cache[i] = self._item(int(i))
            self._cached[i] = True
        return torch.from_numpy(self._cache[index])

    def one_hot(self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor) -> torch.Tensor:
        """Classes by position: one-hot float32 [B, label_dim]; [B, 0] without labels."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        vectors = torch.zeros(len(index), self.label_dim)
        if self.labels is not None:
            vectors[torch.arange(len(index)), torch.from_numpy(self.labels[index])] = 1
        return vectors

    def class_counts(self) -> list[int]:
        """Number of images of each class, `label_dim` long; empty without labels."""
        return [] if self.labels is None else class_counts(self.labels, self.label_dim)


def drawn_subset(num_items: int, size: int, seed: int) -> NDArray[np.int64]:
    """`size` of the positions 0 .. num_items - 1 in ascending order, drawn as EDM's and EDM2's tools draw a subset."""
    positions = np.arange(num_items)
    np.random.RandomState(seed % (1 << 31)).shuffle(positions)
    return np.sort(positions[:size])


class DataOrder:
    """An endless shuffled order of `num_items` positions that depends on the seed alone.

    Position p of the order is entry p mod num_items of the permutation of epoch p // num_items, so any batch can be
    found from its counter, whatever the batch size, the number of processes or the interruptions before it.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        assert num_items >= 1
        assert seed >= 0
        self.num_items = num_items
        self.seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        order = self._permutations.get(epoch)
        if order is None:
            bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            # Raw PCG64 output is fixed for ever; numpy may change what Generator.permutation makes of it.
            order = np.argsort(bits.random_raw(self.num_items), kind="stable")
            # Two epochs at most: a batch may straddle one boundary.
            self._permutations = dict([*self._permutations.items(), (epoch, order)][-2:])
        return order  # not looked up again: another thread may have needed other epochs meanwhile

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Entries start .. start+count-1 of the order: int64 [count], each in 0..num_items-1."""
        assert start >= 0
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_items)
            parts.append(self._permutation(epoch)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def tiny_digits_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The built-in digits: pixels uint8 [1797, 1, 8, 8] and classes int64 [1797] in 0..9.

    The stored ink counts v = 0..16 become round(255 v / 16), so that pixel / 127.5 - 1 is v / 8 - 1 within 1/255.
    Source: UCI Optical Recognition of Handwritten Digits (CC BY 4.0), test part.
    """
    with np.load(ASSETS / "tiny-digits.npz", allow_pickle=False) as stored:
        pixels = np.rint(stored["images"] * (255 / 16)).astype(np.uint8)
        return pixels[:, None], stored["labels"].astype(np.int64)
