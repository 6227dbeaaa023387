"""The restricted reader of pickles: networks and statistics as EDM, EDM2, SiD and SiDA publish them, and state dicts.

It builds no nets, and is not `pickle` but an interpreter of the few opcodes that such files use: nothing a file says is
imported, called or executed. A global is a name on a list, nothing more, and each name stands for code of ours that
checks its arguments and makes plain data. Bytes stay slices of the file until a tensor of checked size takes them, so
the file bounds the memory. Outlines leave them there, and need no torch.
"""

import dataclasses
import math
import mmap
import pickle  # for the names of the opcodes alone
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sidactl.errors import SidaError

if TYPE_CHECKING:
    import torch

# The largest published network takes 100,000 opcodes, those of its storages included, and 20,000 values 18 levels deep.
MAX_OPCODES = 500_000
MAX_VALUES = 500_000
MAX_DEPTH = 100
MAX_DIMS = 8
MAX_TEXT_BYTES = 1 << 20

_FORMAT_VERSION = 6  # of the published persistence format
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before the zip format
_NORMALIZATION_HOOK = "_apply_forced_weight_normalization"

_GLOBALS = frozenset(
    {
        "torch_utils.persistence._reconstruct_persistent_obj",
        "dnnlib.util.EasyDict",
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
        "torch.nn.modules.container.ModuleDict",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy.ndarray",
        "numpy.dtype",
        "builtins.getattr",
        "builtins.set",
    }
)
_STORAGES = {  # dtype and bytes of an element
    "torch.HalfStorage": ("float16", 2),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.FloatStorage": ("float32", 4),
    "torch.DoubleStorage": ("float64", 8),
    "torch.CharStorage": ("int8", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.ShortStorage": ("int16", 2),
    "torch.IntStorage": ("int32", 4),
    "torch.LongStorage": ("int64", 8),
    "torch.BoolStorage": ("bool", 1),
}
_OF_WEIGHTS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        *_STORAGES,
    }
)
_NUMPY_DTYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})

_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_CONTAINERS: dict[bytes, type] = {pickle.EMPTY_DICT: dict, pickle.EMPTY_LIST: list, pickle.EMPTY_SET: set}
# opcode -> how many bytes its argument, or the length before its argument, takes
_INTS = {pickle.BININT1: 1, pickle.BININT2: 2}
_GETS = {pickle.BINGET: 1, pickle.LONG_BINGET: 4}
_PUTS = {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
_TEXTS = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}
_BYTES = {pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4, pickle.BINBYTES8: 8, pickle.BYTEARRAY8: 8}
# opcode -> how many values it takes from the stack; those in _FROM_MARK take all above the last mark
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_ADDS = {pickle.APPEND: 1, pickle.SETITEM: 2}
_FROM_MARK = (pickle.TUPLE, pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS)


@dataclass(eq=False)
class Record:
    """What a file says of one persistent object (network, layer, loss, augmentation): data, without behaviour.

    `state` holds the object's attributes; those of a module include `_parameters`, `_buffers` and `_modules`, where a
    parameter is a plain tensor and a submodule a Record. `init_args` and `init_kwargs` are what it was built with.
    """

    class_name: str
    init_args: tuple[Any, ...] = ()
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def forced_normalization_hook(self) -> bool:
        """Whether this or a submodule normalised its weights before every forward when it was saved.

        The weights of such a snapshot stand for their normalised values: normalise them once after loading.
        """
        hooked = any(isinstance(hook, Hook) for hook in _part(self, "_forward_pre_hooks").values())
        return hooked or any(
            child.forced_normalization_hook for child in _part(self, "_modules", _is_record, "Records").values()
        )


@dataclass(frozen=True)
class Outline:
    """A tensor or array whose elements were not read."""

    dtype: str
    """such as "float32" """
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Hook:
    """The mark left where a file bound a method as a hook: a name, not callable."""

    name: str


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True, eq=False)
class _Storage:
    dtype: str
    element_bytes: int
    numel: int
    data: "torch.Tensor | None" = None
    """1-D; None before it is read, and in an outline"""

    @property
    def num_bytes(self) -> int:
        return self.numel * self.element_bytes

    def of(self, raw: bytes | memoryview) -> "_Storage":
        """The same with elements."""
        import torch

        if len(raw) != self.num_bytes:
            raise ValueError("storage size")
        dtype = getattr(torch, self.dtype)
        # frombuffer refuses an empty buffer
        data = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return dataclasses.replace(self, data=data)

    def agreeing(self, told: "_Storage") -> "_Storage":
        """Itself, where it is what is said of it once more."""
        if (self.dtype, self.numel) != (told.dtype, told.numel):
            raise ValueError("storage size")
        return self


class _RefusedError(Exception):
    """The file says something that no network file says."""


def read(path: str | Path) -> dict[str, Any]:
    """The top-level dict of a network or statistics pickle, as plain data; nothing in the file is executed.

    Values are None, bool, int, float, str, tuple, list, dict, set, numpy arrays, CPU tensors, `Record` and `Hook`, and
    form a finite tree. Raises SidaError for a file that cannot be read, is damaged, or holds anything else.
    """
    return _read(path, _Reader(_mapped(path)))


def outline(path: str | Path) -> dict[str, Any]:
    """As `read`, with an `Outline` in place of each tensor: all but the weights, without torch."""
    return _read(path, _Reader(_mapped(path), outlines=True))


def _read(path: str | Path, reader: "_Reader") -> dict[str, Any]:
    with _refusing(path, "a network pickle (protocol 2 to 5)", reader):
        result = reader.run(_GLOBALS)
        if reader.position != reader.end:
            raise ValueError("bytes after the end")
        if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
            raise _RefusedError("it does not hold named networks or statistics")
        _check_tree(result)
    return result


def read_weights(path: str | Path) -> "dict[str, torch.Tensor]":
    """The tensors by name of a state dict in a .pth file, of torch's zip format or the one before it.

    Nothing in the file is executed. Raises SidaError for a file that cannot be read, is damaged, or holds anything but
    dense tensors of floating-point, integer or boolean dtypes by name.
    """
    reader = _Reader(_mapped(path))
    with _refusing(path, "a state dict of torch", reader):
        is_zip = bytes(reader.view[:2]) == b"PK"
        found = _of_zip(path, reader.end) if is_zip else reader.stream()
        if not isinstance(found, dict) or not all(isinstance(k, str) and _is_tensor(v) for k, v in found.items()):
            raise _RefusedError("it does not hold tensors by name")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _of_zip(path: str | Path, num_bytes: int) -> object:
    """What torch.save writes today: a zip of one pickle, `data.pkl`, and a member `data/KEY` for each storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise _RefusedError("two of its members have one name")

        def content(name: str) -> bytes:
            # Stored as they are, so the file bounds the memory; the end of each is checked against its checksum.
            info = members[name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > num_bytes:
                raise _RefusedError(f"its member {_shown(name)} is not stored as torch stores it")
            return archive.read(info)

        if "byteorder" in members and content("byteorder") != b"little":
            raise _RefusedError("it was not written on a little-endian machine")
        reader = _Reader(content("data.pkl"), limit=num_bytes)
        made: dict[str, _Storage] = {}

        def storage(declared: tuple[Any, ...]) -> _Storage:
            key, told = _declared(declared)
            if key not in made:
                raw = content(f"data/{key}")
                reader.spend(len(raw))
                made[key] = told.of(raw)
            return made[key].agreeing(told)

        result = reader.run(_OF_WEIGHTS, storage)
        if reader.position != reader.end:
            raise ValueError("bytes after the end")
        return result


def _declared(persistent_id: tuple[Any, ...]) -> tuple[str, _Storage]:
    """The key of a storage, and what is said of it."""
    match persistent_id:
        case ("storage", _Global(name), str(key), str(), int(numel)) | (
            "storage",
            _Global(name),
            str(key),
            str(),
            int(numel),
            None,
        ):
            return key, _Storage(*_STORAGES[name], numel)
    raise ValueError("no storage")


def _is_tensor(value: object) -> bool:
    if isinstance(value, Outline):
        return True
    import torch

    return isinstance(value, torch.Tensor)


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
def _refusing(path: str | Path, what: str, reader: "_Reader") -> Iterator[None]:
    """Turns what a reader raises into words."""
    try:
        yield
    except _RefusedError as error:
        hint = "Nothing was executed. Get the file from its publisher, or export it as safetensors there."
        raise SidaError(f"{path}: refused, {error}", hint) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        told = str(error).partition("\n")[0] or type(error).__name__
        raise SidaError(f"{path}: damaged ({told})", "Nothing was executed. Download the file again.") from error
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        message = f"{path}: damaged or not {what} at byte {reader.position}"
        raise SidaError(message, "Nothing was executed. Download the file again.") from error


def state_dict(record: Record) -> "dict[str, torch.Tensor]":
    """Parameters and buffers of a network under their published names, such as `model.enc.8x8_conv.weight`.

    Of one in an outline, the outlines of them.
    """
    tensors = _part(record, "_parameters", _is_tensor, "Tensors") | _part(record, "_buffers", _is_tensor, "Tensors")
    for name, child in _part(record, "_modules", _is_record, "Records").items():
        tensors |= {f"{name}.{inner}": tensor for inner, tensor in state_dict(child).items()}
    return tensors


def parts(record: Record) -> Iterator[tuple[str, Record]]:
    """The modules within a network, at every depth, by name."""
    for name, child in _part(record, "_modules", _is_record, "Records").items():
        yield name, child
        yield from ((f"{name}.{inner}", part) for inner, part in parts(child))


def _is_record(value: object) -> bool:
    return isinstance(value, Record)


def _part(record: Record, part: str, fits: Callable[[object], bool] | None = None, what: str = "") -> dict[str, Any]:
    """The entries of `_parameters`, `_buffers` and the like by printable name, without those that are None."""
    entries = record.state.get(part, {})
    if not isinstance(entries, dict) or not all(e is None or fits is None or fits(e) for e in entries.values()):
        raise SidaError(f"{part} of {record.class_name} must hold {what or 'objects'} by name")
    return {_shown(str(name)): entry for name, entry in entries.items() if entry is not None}


def _shown(name: str) -> str:
    """A name from a foreign file, fit to print: ASCII, one line, short."""
    return ascii(name[:100])[1:-1]


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
                case _ if _is_tensor(value):
                    pass
                case _:
                    raise _RefusedError("it leaves raw bytes or a bare name where data should be")
        num_values += sum(map(len, groups))
        if num_values > MAX_VALUES:
            raise _RefusedError(f"it amounts to more than {MAX_VALUES} values")
        level = [child for group in groups for child in group]
        if not level:
            return
    raise _RefusedError(f"it is nested more than {MAX_DEPTH} levels deep or contains itself")


def _pop(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _add(container: object, items: list[Any]) -> None:
    # keys are str or small int: hashing shared tuples takes exponential time, and large ints may all share one hash
    keys = items[::2] if isinstance(container, dict) else items
    if not isinstance(container, list) and not all(
        type(k) is str or (type(k) is int and abs(k) < 1 << 31) for k in keys
    ):
        raise TypeError("key")
    match container:
        case dict():
            container.update(zip(keys, items[1::2], strict=True))
        case list():
            container.extend(items)
        case set():
            container.update(items)
        case _:
            raise TypeError("not a container")


def _global(module: object, name: object, allowed: Collection[str]) -> _Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("global")
    full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)  # numpy 2 renamed it
    if full_name not in allowed:
        listed = "which is not on the list of what a network file may contain"
        raise _RefusedError(f"the pickle names {_shown(f'{module}.{name}')}, {listed}")
    return _Global(full_name)


def _record(meta: dict[Any, Any]) -> Record:
    match meta:
        case {"version": int(version)} if version != _FORMAT_VERSION:
            raise _RefusedError(f"its persistence format is not version {_FORMAT_VERSION}")
        case {"type": str("class"), "version": int(), "class_name": str(class_name), "state": dict(state)}:
            # the half-built owner of a hook has no _init_args yet
            init_args, init_kwargs = state.get("_init_args", ()), state.get("_init_kwargs", {})
            if isinstance(init_args, tuple) and isinstance(init_kwargs, dict):
                return Record(_shown(class_name), init_args, init_kwargs, state)
    raise TypeError("record")


class _Reader:
    """A position in the file, what may still be spent, and the machine that reads one pickle from there."""

    def __init__(self, source: mmap.mmap | bytes, *, limit: int | None = None, outlines: bool = False) -> None:
        self.view = memoryview(source)
        self.position, self.end = 0, len(self.view)
        self.limit = limit or len(self.view)
        self.outlines = outlines
        self.opcodes_left = MAX_OPCODES
        self.bytes_left = 2 * self.limit  # each storage once, and the tensors in it once

    def take(self, count: int) -> memoryview:
        start = self.position
        if count > self.end - start:
            raise ValueError("truncated")
        self.position = start + count
        return self.view[start : start + count]

    def uint(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, width: int) -> str:
        length = self.uint(width)
        if length > MAX_TEXT_BYTES:
            raise _RefusedError(f"it has a text of {length} bytes")
        return str(self.take(length), "utf-8")

    def line(self) -> str:
        window = bytes(self.view[self.position : min(self.position + 256, self.end)])
        return str(self.take(window.index(b"\n") + 1)[:-1], "utf-8")

    def span(self, width: int) -> slice:
        length = self.uint(width)
        self.take(length)
        return slice(self.position - length, self.position)

    def numel(self, shape: tuple[Any, ...]) -> int:
        if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n <= self.limit for n in shape):
            raise ValueError("more than the file can hold")
        return math.prod(shape)

    def spend(self, num_bytes: int) -> None:
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise _RefusedError("its tensors are larger than the file")

    def run(self, allowed: Collection[str], storages: "Callable[[Any], object] | None" = None) -> object:
        """The value of the one pickle that starts here. storages: what stands for a persistent id, where it may be."""
        if bytes(self.take(1)) != pickle.PROTO or self.uint(1) not in (2, 3, 4, 5):
            raise ValueError("no header")
        stack: list[Any] = []
        below_marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while (opcode := bytes(self.take(1))) != pickle.STOP:
            self.opcodes_left -= 1
            if self.opcodes_left < 0:
                raise _RefusedError(f"it has more than {MAX_OPCODES} opcodes")
            if opcode in _GETS:
                stack.append(memo[self.uint(_GETS[opcode])])
            elif opcode in _PUTS:
                memo[self.uint(_PUTS[opcode])] = stack[-1]
            elif opcode == pickle.MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            elif opcode in _CONTAINERS:
                stack.append(_CONTAINERS[opcode]())
            elif opcode in _INTS:
                stack.append(self.uint(_INTS[opcode]))
            elif opcode == pickle.BININT:
                stack.append(int.from_bytes(self.take(4), "little", signed=True))
            elif opcode == pickle.LONG1:
                stack.append(int.from_bytes(self.take(self.uint(1)), "little", signed=True))
            elif opcode == pickle.BINFLOAT:
                stack.extend(struct.unpack(">d", self.take(8)))
            elif opcode in _TEXTS:
                stack.append(self.text(_TEXTS[opcode]))
            elif opcode in _BYTES:
                stack.append(self.span(_BYTES[opcode]))
            elif opcode == pickle.MARK:
                below_marks.append(stack)
                stack = []
            elif opcode in _TUPLES:
                stack.append(tuple(_pop(stack, _TUPLES[opcode])))
            elif opcode in _ADDS:
                items = _pop(stack, _ADDS[opcode])
                _add(stack[-1], items)
            elif opcode in _FROM_MARK:
                items, stack = stack, below_marks.pop()
                if opcode == pickle.TUPLE:
                    stack.append(tuple(items))
                else:
                    _add(stack[-1], items)
            elif opcode in (pickle.REDUCE, pickle.NEWOBJ):
                function, arguments = _pop(stack, 2)
                stack.append(self.make(function, arguments))
            elif opcode == pickle.BUILD:
                target, state = _pop(stack, 2)
                self.build(target, state)
                stack.append(target)
            elif opcode == pickle.GLOBAL:
                stack.append(_global(self.line(), self.line(), allowed))
            elif opcode == pickle.STACK_GLOBAL:
                module, name = _pop(stack, 2)
                stack.append(_global(module, name, allowed))
            elif opcode == pickle.BINPERSID and storages:
                stack.append(storages(stack.pop()))
            elif opcode == pickle.FRAME:
                if self.uint(8) > self.end - self.position:
                    raise ValueError("truncated")
            else:
                names = [known.name for known in pickletools.opcodes if known.code == opcode.decode("latin-1")]
                if not names:
                    raise ValueError("no opcode")
                raise _RefusedError(f"the pickle uses the opcode {names[0]}, which no network file uses")
        if below_marks:
            raise ValueError("open mark")
        (value,) = stack
        return value

    def make(self, function: object, arguments: object) -> object:
        """What a published call stands for. `function` is one of the names in `_GLOBALS`, never a callable."""
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError("call")
        # values are matched by type alone, and compared later: an array or tensor compares element by element
        match function.name, arguments:
            case "torch._utils._rebuild_tensor_v2", (
                _Storage() as storage,
                int(start),
                tuple(size),
                tuple(step),
                bool(),
                dict(),
            ):
                return self.tensor(storage, start, size, step)
            case "torch._utils._rebuild_parameter", (tensor, bool(), dict()) if _is_tensor(tensor):
                return tensor
            case "torch.storage._load_from_bytes", (slice() as span,):
                return self.storage(span)
            case "torch.nn.modules.container.ModuleDict", ():
                return Record("ModuleDict")
            case "collections.OrderedDict" | "dnnlib.util.EasyDict", ():
                return {}
            case "torch_utils.persistence._reconstruct_persistent_obj", (dict(meta),):
                return _record(meta)
            case "builtins.getattr", (Record(), str(name)) if name == _NORMALIZATION_HOOK:
                return Hook(name)
            case "builtins.set", (list(items),):  # protocol 3 and below have no opcode for it
                made: set[object] = set()
                _add(made, items)
                return made
            case "numpy.dtype", (str(code), bool(), bool()) if code in _NUMPY_DTYPES:
                return np.dtype(f"<{code}")
            case "numpy.core.multiarray._reconstruct", (_Global("numpy.ndarray"), tuple(), slice()):
                return np.empty(0)  # to be completed by build
            case "numpy.core.multiarray.scalar", (np.dtype() as dtype, slice() as span):
                return np.frombuffer(self.view[span], dtype).item()
            case "numpy.core.numeric._frombuffer", (slice() as span, np.dtype() as dtype, tuple(shape), str(order)):
                array = np.empty(0)
                self.build(array, (1, shape, dtype, order == "F", span))
                return array
        raise _RefusedError(f"{function.name} has arguments here that it has in no network file")

    def build(self, target: object, state: object) -> None:
        """Complete an object that `make` began."""
        match target, state:
            case Record(class_name="ModuleDict"), dict() if not target.state:
                target.state = state  # by reference: copies of one shared dict could grow without bound
            case dict(), dict() if state.keys() == {"_metadata"}:
                pass  # the versions of modules, an attribute of every state dict
            case np.dtype(), (int(), str("<" | "|"), None, None, None, int(), int(), int()):
                pass
            case np.ndarray(), (int(), tuple(shape), np.dtype() as dtype, bool(is_fortran), slice() as span):
                raw = self.view[span]
                if self.numel(shape) * dtype.itemsize != len(raw):
                    raise ValueError("array size")
                self.spend(len(raw))
                # in place: the memo may hold the array already
                target.__setstate__((1, shape, dtype, is_fortran, bytes(raw)))  # type: ignore[arg-type]
            case _:
                raise _RefusedError("it sets a state that no network file sets")

    def storage(self, span: slice) -> _Storage:
        """What a nested torch.save stream holds: five pickles, the number of elements, the elements."""
        outer = self.position, self.end
        self.position, self.end = span.start, span.stop
        declared, keys = self.head(_STORAGES, lambda declared: declared)
        key, told = _declared(declared if isinstance(declared, tuple) else ())
        if keys != [key]:
            raise ValueError("no storage")
        raw = self.take(self.numel((self.uint(8),)) * told.element_bytes)
        if self.position != self.end or len(raw) != told.num_bytes:
            raise ValueError("storage size")
        self.position, self.end = outer
        self.spend(len(raw))
        return told if self.outlines else told.of(raw)

    def head(self, allowed: Collection[str], storages: Callable[[Any], object]) -> tuple[object, object]:
        """The five pickles before the elements in torch's format before the zip: the object and its storages' keys."""
        magic, version, system, value, keys = (self.run(allowed, storages) for _ in range(5))
        if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION) or not isinstance(system, dict):
            raise ValueError("no torch.save stream")
        if system.get("little_endian") is not True:
            raise _RefusedError("it was not written on a little-endian machine")
        return value, keys

    def stream(self) -> object:
        """The object in a file of torch's format before the zip; its storages are filled after it has been read."""
        made: dict[str, _Storage] = {}

        def storage(declared: tuple[Any, ...]) -> _Storage:
            key, told = _declared(declared)
            if key not in made:
                self.numel((told.numel,))
                self.spend(told.num_bytes)
                made[key] = told.of(bytes(told.num_bytes))
            return made[key].agreeing(told)

        value, keys = self.head(_OF_WEIGHTS, storage)
        if not isinstance(keys, list) or set(keys) != set(made) or len(keys) != len(made):
            raise ValueError("keys of storages")
        for key in keys:
            told = made[key]
            if self.uint(8) != told.numel:
                raise ValueError("storage size")
            read = told.of(self.take(told.num_bytes))
            assert told.data is not None
            assert read.data is not None
            told.data.copy_(read.data)  # in place: tensors are views of it
        if self.position != self.end:
            raise ValueError("bytes after the end")
        return value

    def tensor(self, storage: _Storage, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> object:
        numel = self.numel(size)
        self.numel((*stride, offset))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
        if numel > storage.numel or (numel and last >= storage.numel):
            raise ValueError("outside its storage")
        self.spend(numel * storage.element_bytes)
        return Outline(storage.dtype, size) if storage.data is None else storage.data.as_strided(size, stride, offset)
