"""Reading zips in the EDM layout: a million members cost little memory and time."""

import mmap
import os
import struct
import weakref
import zipfile
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidactl.data.images import LAYOUT, first_line, is_item, printable
from sidactl.errors import SidaError

MAX_MEMBER_BYTES = 1 << 29

_MEMBER_HEAD_BYTES = 256
"""of a member's name and extra field, which are read with what stands before or after them"""

_ROWS_AT_ONCE = 4096

_FEW_ALIKE = 100

_DIRECTORY_BYTES_AT_ONCE = 1 << 20

_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")


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
            # Unmapped after parsing the directory: pages touched through a long-lived map count as our memory.
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
