"""The machine that reads a pickle's operations and makes plain records of them; it calls nothing."""

import math
import mmap
import pickle  # for the names of the opcodes alone
import pickletools
import struct
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from sidactl.foreign.records import (
    FORMAT_VERSION,
    MAX_DIMS,
    NORMALIZATION_HOOK,
    NUMPY_DTYPES,
    OF_WEIGHTS,
    STORAGES,
    Global,
    Hook,
    Outline,
    Record,
    RefusedError,
    Storage,
    declared_storage,
    is_tensor,
    shown,
)

# The largest published network takes 100,000 opcodes, those of its storages included, and 20,000 values 18 levels deep.
MAX_OPCODES = 500_000

MAX_VALUES = 500_000

MAX_DEPTH = 100

MAX_TEXT_BYTES = 1 << 20

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before the zip format

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


def _global(module: object, name: object, allowed: Collection[str]) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("global")
    full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)  # numpy 2 renamed it
    if full_name not in allowed:
        listed = "which is not on the list of what a network file may contain"
        raise RefusedError(f"the pickle names {shown(f'{module}.{name}')}, {listed}")
    return Global(full_name)


def _record(meta: dict[Any, Any]) -> Record:
    match meta:
        case {"version": int(version)} if version != FORMAT_VERSION:
            raise RefusedError(f"its persistence format is not version {FORMAT_VERSION}")
        case {"type": str("class"), "version": int(), "class_name": str(class_name), "state": dict(state)}:
            # the half-built owner of a hook has no _init_args yet
            init_args, init_kwargs = state.get("_init_args", ()), state.get("_init_kwargs", {})
            if isinstance(init_args, tuple) and isinstance(init_kwargs, dict):
                return Record(shown(class_name), init_args, init_kwargs, state)
    raise TypeError("record")


class Reader:
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
            raise RefusedError(f"it has a text of {length} bytes")
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
            raise RefusedError("its tensors are larger than the file")

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
                raise RefusedError(f"it has more than {MAX_OPCODES} opcodes")
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
                raise RefusedError(f"the pickle uses the opcode {names[0]}, which no network file uses")
        if below_marks:
            raise ValueError("open mark")
        (value,) = stack
        return value

    def make(self, function: object, arguments: object) -> object:
        """What a published call stands for. `function` is one of the names in `GLOBALS`, never a callable."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("call")
        # values are matched by type alone, and compared later: an array or tensor compares element by element
        match function.name, arguments:
            case "torch._utils._rebuild_tensor_v2", (
                Storage() as storage,
                int(start),
                tuple(size),
                tuple(step),
                bool(),
                dict(),
            ):
                return self.tensor(storage, start, size, step)
            case "torch._utils._rebuild_parameter", (tensor, bool(), dict()) if is_tensor(tensor):
                return tensor
            case "torch.storage._load_from_bytes", (slice() as span,):
                return self.storage(span)
            case "torch.nn.modules.container.ModuleDict", ():
                return Record("ModuleDict")
            case "collections.OrderedDict" | "dnnlib.util.EasyDict", ():
                return {}
            case "torch_utils.persistence._reconstruct_persistent_obj", (dict(meta),):
                return _record(meta)
            case "builtins.getattr", (Record(), str(name)) if name == NORMALIZATION_HOOK:
                return Hook(name)
            case "builtins.set", (list(items),):  # protocol 3 and below have no opcode for it
                made: set[object] = set()
                _add(made, items)
                return made
            case "numpy.dtype", (str(code), bool(), bool()) if code in NUMPY_DTYPES:
                return np.dtype(f"<{code}")
            case "numpy.core.multiarray._reconstruct", (Global("numpy.ndarray"), tuple(), slice()):
                return np.empty(0)  # to be completed by build
            case "numpy.core.multiarray.scalar", (np.dtype() as dtype, slice() as span):
                return np.frombuffer(self.view[span], dtype).item()
            case "numpy.core.numeric._frombuffer", (slice() as span, np.dtype() as dtype, tuple(shape), str(order)):
                array = np.empty(0)
                self.build(array, (1, shape, dtype, order == "F", span))
                return array
        raise RefusedError(f"{function.name} has arguments here that it has in no network file")

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
                raise RefusedError("it sets a state that no network file sets")

    def storage(self, span: slice) -> Storage:
        """What a nested torch.save stream holds: five pickles, the number of elements, the elements."""
        outer = self.position, self.end
        self.position, self.end = span.start, span.stop
        declared, keys = self.head(STORAGES, lambda declared: declared)
        key, new_storage = declared_storage(declared if isinstance(declared, tuple) else ())
        if keys != [key]:
            raise ValueError("no storage")
        raw = self.take(self.numel((self.uint(8),)) * new_storage.element_bytes)
        if self.position != self.end or len(raw) != new_storage.num_bytes:
            raise ValueError("storage size")
        self.position, self.end = outer
        self.spend(len(raw))
        return new_storage if self.outlines else new_storage.of(raw)

    def head(self, allowed: Collection[str], storages: Callable[[Any], object]) -> tuple[object, object]:
        """The five pickles before the elements in torch's format before the zip: the object and its storages' keys."""
        magic, version, system, value, keys = (self.run(allowed, storages) for _ in range(5))
        if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION) or not isinstance(system, dict):
            raise ValueError("no torch.save stream")
        if system.get("little_endian") is not True:
            raise RefusedError("it was not written on a little-endian machine")
        return value, keys

    def stream(self) -> object:
        """The object in a file of torch's format before the zip; its storages are filled after it has been read."""
        made: dict[str, Storage] = {}

        def storage(declared: tuple[Any, ...]) -> Storage:
            key, new_storage = declared_storage(declared)
            if key not in made:
                self.numel((new_storage.numel,))
                self.spend(new_storage.num_bytes)
                made[key] = new_storage.of(bytes(new_storage.num_bytes))
            return made[key].agreeing(new_storage)

        value, keys = self.head(OF_WEIGHTS, storage)
        if not isinstance(keys, list) or set(keys) != set(made) or len(keys) != len(made):
            raise ValueError("keys of storages")
        for key in keys:
            new_storage = made[key]
            if self.uint(8) != new_storage.numel:
                raise ValueError("storage size")
            read = new_storage.of(self.take(new_storage.num_bytes))
            assert new_storage.data is not None
            assert read.data is not None
            new_storage.data.copy_(read.data)  # in place: tensors are views of it
        if self.position != self.end:
            raise ValueError("bytes after the end")
        return value

    def tensor(self, storage: Storage, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> object:
        numel = self.numel(size)
        self.numel((*stride, offset))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
        if numel > storage.numel or (numel and last >= storage.numel):
            raise ValueError("outside its storage")
        self.spend(numel * storage.element_bytes)
        return Outline(storage.dtype, size) if storage.data is None else storage.data.as_strided(size, stride, offset)
