"""The restricted reader of pickles: networks and statistics as EDM, EDM2, SiD and SiDA publish them, and state dicts.

It builds no nets, and is not `pickle` but an interpreter of the few opcodes that such files use: nothing a file says is
imported, called or executed. A global is a name on a list, nothing more, and each name stands for code of ours that
checks its arguments and makes plain data. Bytes stay slices of the file until a tensor of checked size takes them, so
the file bounds the memory. Outlines leave them there, and need no torch.
"""

import mmap
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sidactl.errors import SidaError
from sidactl.foreign.records import (
    GLOBALS,
    OF_WEIGHTS,
    Hook,
    Record,
    RefusedError,
    Storage,
    declared_storage,
    is_record,
    is_tensor,
    part_of,
    shown,
)
from sidactl.foreign.unpickler import MAX_DEPTH, MAX_VALUES, Reader

if TYPE_CHECKING:
    import torch


def read(path: str | Path) -> dict[str, Any]:
    """The top-level dict of a network or statistics pickle, as plain data; nothing in the file is executed.

    Values are None, bool, int, float, str, tuple, list, dict, set, numpy arrays, CPU tensors, `Record` and `Hook`, and
    form a finite tree. Raises SidaError for a file that cannot be read, is damaged, or holds anything else.
    """
    return _read(path, Reader(_mapped(path)))


def outline(path: str | Path) -> dict[str, Any]:
    """As `read`, with an `Outline` in place of each tensor: all but the weights, without torch."""
    return _read(path, Reader(_mapped(path), outlines=True))


def _read(path: str | Path, reader: "Reader") -> dict[str, Any]:
    with _refusing(path, "a network pickle (protocol 2 to 5)", reader):
        result = reader.run(GLOBALS)
        if reader.position != reader.end:
            raise ValueError("bytes after the end")
        if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
            raise RefusedError("it does not hold named networks or statistics")
        _check_tree(result)
    return result


def read_weights(path: str | Path) -> "dict[str, torch.Tensor]":
    """The tensors by name of a state dict in a .pth file, of torch's zip format or the one before it.

    Nothing in the file is executed. Raises SidaError for a file that cannot be read, is damaged, or holds anything but
    dense tensors of floating-point, integer or boolean dtypes by name.
    """
    reader = Reader(_mapped(path))
    with _refusing(path, "a state dict of torch", reader):
        is_zip = bytes(reader.view[:2]) == b"PK"
        found = _of_zip(path, reader.end) if is_zip else reader.stream()
        if not isinstance(found, dict) or not all(isinstance(k, str) and is_tensor(v) for k, v in found.items()):
            raise RefusedError("it does not hold tensors by name")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _of_zip(path: str | Path, num_bytes: int) -> object:
    """What torch.save writes today: a zip of one pickle, `data.pkl`, and a member `data/KEY` for each storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise RefusedError("two of its members have one name")

        def content(name: str) -> bytes:
            # Stored as they are, so the file bounds the memory; the end of each is checked against its checksum.
            info = members[name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > num_bytes:
                raise RefusedError(f"its member {shown(name)} is not stored as torch stores it")
            return archive.read(info)

        if "byteorder" in members and content("byteorder") != b"little":
            raise RefusedError("it was not written on a little-endian machine")
        reader = Reader(content("data.pkl"), limit=num_bytes)
        made: dict[str, Storage] = {}

        def storage(declared: tuple[Any, ...]) -> Storage:
            key, new_storage = declared_storage(declared)
            if key not in made:
                raw = content(f"data/{key}")
                reader.spend(len(raw))
                made[key] = new_storage.of(raw)
            return made[key].agreeing(new_storage)

        result = reader.run(OF_WEIGHTS, storage)
        if reader.position != reader.end:
            raise ValueError("bytes after the end")
        return result


def _mapped(path: str | Path) -> mmap.mmap | bytes:
    if not Path(path).is_file():
        raise SidaError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            is_empty = not file.read(1)  # which cannot be mapped
            return b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SidaError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _refusing(path: str | Path, what: str, reader: "Reader") -> Iterator[None]:
    """Turns what a reader raises into words."""
    try:
        yield
    except RefusedError as error:
        hint = "Nothing was executed. Get the file from its publisher, or export it as safetensors there."
        raise SidaError(f"{path}: refused, {error}", hint) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SidaError(f"{path}: damaged ({reason})", "Nothing was executed. Download the file again.") from error
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        message = f"{path}: damaged or not {what} at byte {reader.position}"
        raise SidaError(message, "Nothing was executed. Download the file again.") from error


def state_dict(record: Record) -> "dict[str, torch.Tensor]":
    """Parameters and buffers of a network under their published names, such as `model.enc.8x8_conv.weight`.

    Of one in an outline, the outlines of them.
    """
    tensors = part_of(record, "_parameters", is_tensor, "Tensors") | part_of(record, "_buffers", is_tensor, "Tensors")
    for name, child in part_of(record, "_modules", is_record, "Records").items():
        tensors |= {f"{name}.{inner}": tensor for inner, tensor in state_dict(child).items()}
    return tensors


def parts(record: Record) -> Iterator[tuple[str, Record]]:
    """The modules within a network, at every depth, by name."""
    for name, child in part_of(record, "_modules", is_record, "Records").items():
        yield name, child
        yield from ((f"{name}.{inner}", part) for inner, part in parts(child))


def _check_tree(root: object) -> None:
    """Refuse what is not plain data, and cycles and sharing that would make a walk over the result endless."""
    level, num_values = [root], 1
    for _ in range(MAX_DEPTH):
        groups: list[Collection[Any]] = []
        for value in level:
            match value:
                case Record():
                    groups.append((value.init_args, value.init_kwargs, value.state))
                case dict():
                    groups.append(value.values())
                case tuple() | list() | set():
                    groups.append(value)
                case None | bool() | int() | float() | str() | np.ndarray() | Hook():
                    pass
                case _ if is_tensor(value):
                    pass
                case _:
                    raise RefusedError("it leaves raw bytes or a bare name where data should be")
        num_values += sum(map(len, groups))
        if num_values > MAX_VALUES:
            raise RefusedError(f"it amounts to more than {MAX_VALUES} values")
        level = [child for group in groups for child in group]
        if not level:
            return
    raise RefusedError(f"it is nested more than {MAX_DEPTH} levels deep or contains itself")
