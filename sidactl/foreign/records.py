"""What a pickle of networks holds once it is read: plain records, and which names it may speak of."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sidactl.errors import SidaError

if TYPE_CHECKING:
    import torch


MAX_DIMS = 8

FORMAT_VERSION = 6  # of the published persistence format

NORMALIZATION_HOOK = "_apply_forced_weight_normalization"

GLOBALS = frozenset(
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

STORAGES = {  # dtype and bytes of an element
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

OF_WEIGHTS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        *STORAGES,
    }
)

NUMPY_DTYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})


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
        hooked = any(isinstance(hook, Hook) for hook in part_of(self, "_forward_pre_hooks").values())
        return hooked or any(
            child.forced_normalization_hook for child in part_of(self, "_modules", is_record, "Records").values()
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
class Global:
    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    dtype: str
    element_bytes: int
    numel: int
    data: "torch.Tensor | None" = None
    """1-D; None before it is read, and in an outline"""

    @property
    def num_bytes(self) -> int:
        return self.numel * self.element_bytes

    def of(self, raw: bytes | memoryview) -> "Storage":
        """The same with elements."""
        import torch

        if len(raw) != self.num_bytes:
            raise ValueError("storage size")
        dtype = getattr(torch, self.dtype)
        # frombuffer refuses an empty buffer
        data = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return dataclasses.replace(self, data=data)

    def agreeing(self, other: "Storage") -> "Storage":
        """Itself, where it is what is said of it once more."""
        if (self.dtype, self.numel) != (other.dtype, other.numel):
            raise ValueError("storage size")
        return self


class RefusedError(Exception):
    """The file says something that no network file says."""


def declared_storage(persistent_id: tuple[Any, ...]) -> tuple[str, Storage]:
    """The key of a storage, and what is said of it."""
    match persistent_id:
        case ("storage", Global(name), str(key), str(), int(numel)) | (
            "storage",
            Global(name),
            str(key),
            str(),
            int(numel),
            None,
        ):
            return key, Storage(*STORAGES[name], numel)
    raise ValueError("no storage")


def is_tensor(value: object) -> bool:
    if isinstance(value, Outline):
        return True
    import torch

    return isinstance(value, torch.Tensor)


def is_record(value: object) -> bool:
    return isinstance(value, Record)


def part_of(record: Record, part: str, fits: Callable[[object], bool] | None = None, what: str = "") -> dict[str, Any]:
    """The entries of `_parameters`, `_buffers` and the like by printable name, without those that are None."""
    entries = record.state.get(part, {})
    if not isinstance(entries, dict) or not all(e is None or fits is None or fits(e) for e in entries.values()):
        raise SidaError(f"{part} of {record.class_name} must hold {what or 'objects'} by name")
    return {shown(str(name)): entry for name, entry in entries.items() if entry is not None}


def shown(name: str) -> str:
    """A name from a foreign file, fit to print: ASCII, one line, short."""
    return ascii(name[:100])[1:-1]
