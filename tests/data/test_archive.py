"""The zip of a dataset: byte for byte that of Python's zipfile, of any size, and read as others write it."""

import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sidactl.data import archive as data_archive
from sidactl.data import archive_writer
from sidactl.data.archive import ZipArchive
from sidactl.data.archive_writer import ZipWriter
from sidactl.data.dataset import Dataset
from sidactl.data.images import encode_png
from sidactl.errors import SidaError
from tests.conftest import instead_of
from tests.worlds import labelled, layout, make_zip, noise


def zipfile_bytes(path: Path, members: list[tuple[str, bytes]]) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            member = zipfile.ZipInfo(name)
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return path.read_bytes()


@pytest.mark.parametrize("limit", [(1 << 31) - 1, 500])
def test_zip_is_that_of_zipfile_beyond_2_gb_too(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(archive_writer, "_ZIP64_LIMIT", limit)
    with ZipWriter(tmp_path / "ours.zip") as writer:
        for index in range(7):
            writer.add(noise(4, 4, 3, seed=index), index % 3)
    expected = zipfile_bytes(tmp_path / "theirs.zip", labelled(layout(7), *(i % 3 for i in range(7))))
    assert (tmp_path / "ours.zip").read_bytes() == expected
    with zipfile.ZipFile(tmp_path / "ours.zip") as archive:
        assert archive.testzip() is None
    dataset = Dataset(tmp_path / "ours.zip")
    np.testing.assert_array_equal(dataset.images([6])[0].permute(1, 2, 0).numpy(), noise(4, 4, 3, seed=6))
    assert dataset.class_counts() == [3, 2, 2]


def test_zip_of_more_members_than_16_bits_count(tmp_path: Path) -> None:
    pixel = noise(1, 1, 1)
    with ZipWriter(tmp_path / "ours.zip") as writer:
        for _ in range(65_536):
            writer.add(pixel)
    with zipfile.ZipFile(tmp_path / "ours.zip") as archive:
        theirs = archive.namelist()
    assert len(theirs) == 65_537
    assert ZipArchive(tmp_path / "ours.zip").names == tuple(theirs)


def test_zips_that_others_wrote_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"PK" * 9
        archive.mkdir("folder")
        with archive.open("folder/b\xfc.bin", "w", force_zip64=True) as member:
            member.write(b"x" * 99)
        info = zipfile.ZipInfo("a")
        info.extra = struct.pack("<HH400s", 0x7075, 400, b"abcd")
        info.comment = b"of a member"
        archive.writestr(info, b"y" * 50, zipfile.ZIP_DEFLATED)
    (tmp_path / "behind.zip").write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    for file in (path, tmp_path / "behind.zip"):
        read = ZipArchive(file)
        assert {name: read.read(name) for name in read.names} == {"folder/b\xfc.bin": b"x" * 99, "a": b"y" * 50}


def read_all(path: Path) -> str:
    """What is wrong with a zip; nothing, if all of it can be read."""
    try:
        archive = ZipArchive(path)
        for name in archive.names:
            archive.read(name)
    except SidaError as error:
        return str(error)
    return ""


def test_zip_with_a_damaged_directory_is_refused_in_one_line(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d.zip", layout(3))
    good = path.read_bytes()
    start = good.index(b"PK\x01\x02")
    rng = np.random.default_rng(0)
    told = []
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(start, len(data), 3):
            data[position] = rng.choice([0, 255, rng.integers(256)])
        path.write_bytes(data[: len(data) - rng.integers(0, 3)])
        told.append(read_all(path))
    assert all(str(path) in text and "\n" not in text for text in told if text)
    assert len(set(told)) > 10


def members_of(path: Path) -> object:
    """What the directory of a zip says of all members, or how it is refused."""
    try:
        archive = ZipArchive(path)
        return [archive.member(row) for row in archive.by_name], archive.is_item.tolist(), archive.names
    except SidaError as error:
        return str(error)


@pytest.mark.parametrize("limit", [(1 << 31) - 1, 500])
def test_entries_that_are_read_at_once_are_as_if_read_one_by_one(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path = make_zip(tmp_path / "d.zip", labelled(layout(40), *range(40)))
    good = path.read_bytes()
    start = good.index(b"PK\x01\x02")
    rng, kinds = np.random.default_rng(1), set()
    for trial in range(300):
        data = bytearray(good)
        for position in rng.integers(start, len(data), trial % 3):
            data[position] = rng.choice([0, 255, ord("0"), ord("9"), ord("/"), data[position] ^ 1])
        path.write_bytes(data)
        at_once = members_of(path)
        with monkeypatch.context() as patched:
            instead_of(data_archive._num_alike, lambda data, num_bytes: 1, patched)
            instead_of(data_archive._names_at_once, lambda data, entries: [], patched)
            assert members_of(path) == at_once
        kinds.add(re.sub(r"\d+|'[^']*'", "", at_once) if isinstance(at_once, str) else "read")
    assert len(kinds) > 5


def test_entries_out_of_order_are_not_compared_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"00000/img{index * 769 % 2000:08d}.png" for index in range(2000)]
    path = make_zip(tmp_path / "d.zip", [(name, b"") for name in names])
    looked: list[int] = []
    num_alike = data_archive._num_alike
    instead_of(data_archive._num_alike, lambda *a: looked.append(1) or num_alike(*a), monkeypatch)
    assert ZipArchive(path).names == tuple(names)
    assert len(looked) < 20


def test_names_in_any_order_are_sorted_and_found(tmp_path: Path) -> None:
    names = [f"{index % 7}/{index * 37 % 100:03d}.png" for index in range(100)]
    dataset = Dataset(make_zip(tmp_path / "d.zip", [(name, encode_png(noise(4, 4, 3))) for name in ("readme", *names)]))
    assert dataset.names == sorted(names)
    assert [dataset.name(index) for index in range(100)] == sorted(names)
    archive = ZipArchive(tmp_path / "d.zip")
    assert [archive.row_of(name) for name in ("readme", *names)] == list(range(101))
    assert "3/999.png" not in archive
    assert "" not in archive
    with pytest.raises(KeyError):
        archive.read("zzz")


def test_archive_refuses_a_member_larger_than_it_says(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d.zip", [("a", b"x" * 1000)], zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 1000), struct.pack("<I", 10)))
    with pytest.raises(SidaError, match=r"^a in .* is damaged"):
        ZipArchive(path).read("a")
