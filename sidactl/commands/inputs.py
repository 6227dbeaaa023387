"""From what people write or pass, in a shell or from Python, to plain words and numbers; not what they mean."""

import dataclasses
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, TypeAlias

from sidactl.errors import SidaError
from sidactl.units import parse_count, parse_seeds

MAX_SEED = (1 << 32) - 1

_MAX_SIDE = 16_384

_COUNT_FIELDS = ("batch_size", "evaluate_num", "num_pairs")


class Stored(Protocol):
    """What has an oid: an Artifact, a Score, what `sample` returns."""

    @property
    def oid(self) -> str: ...


class ArrayLike(Protocol):
    """A numpy array or a torch tensor."""

    def tolist(self) -> Any: ...


Ref: TypeAlias = str | os.PathLike[str] | Stored
"""what names an artifact: an oid, a prefix, a ref, a catalog name, a URL or a file as text; a path; our own objects"""

Count: TypeAlias = str | SupportsIndex
"""a number of images: 500, "50k", "1.5M", an integer of numpy or torch"""

Seeds: TypeAlias = str | SupportsIndex | Iterable[SupportsIndex] | ArrayLike
"""seeds as `--seeds` takes them, one integer, or any sequence or array of integers"""

Size: TypeAlias = str | SupportsIndex | Sequence[SupportsIndex]
"""width and height: "64x64", (64, 64) or 64"""


def ref_text(ref: Ref, what: str = "a ref") -> str:
    """The text that names the same artifact; a path without a folder becomes ./path, which no ref can be taken for."""
    if isinstance(ref, str):
        if not ref:
            raise SidaError(f"{what} must name something, got nothing", "Pass an oid, a name or a file.")
        return ref
    if isinstance(ref, os.PathLike):
        path = os.fsdecode(ref)
        return path if os.path.dirname(path) else os.path.join(os.curdir, path)
    oid = getattr(ref, "oid", None)
    if not isinstance(oid, str):
        raise SidaError(
            f"{what} must be text, a path or an artifact, got {_described(ref)}", "Pass an oid, a name or a file."
        )
    return oid


def optional_ref(ref: Ref | None, what: str = "a ref") -> str | None:
    """As `ref_text`; None stays None."""
    return None if ref is None else ref_text(ref, what)


def run_of(ref: Ref, run: "os.PathLike[str] | str | None") -> "os.PathLike[str] | str | None":
    """The run directory asked for; else the one that the object passed as a ref lies in, where it knows it."""
    if run is None:
        root: os.PathLike[str] | str | None = getattr(getattr(ref, "store", None), "root", None)
        return root
    return run


def whole(value: object, what: str) -> int:
    """An integer of Python, numpy or torch as an int. SidaError for anything else."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SidaError(f"{what} must be a whole number, got {_described(value)}", "Pass an int.") from None


def count_of(value: Count, what: str, counted: str = "images") -> int:
    """A number of images or else, from text with a suffix or any integer."""
    return parse_count(value, what, counted) if isinstance(value, str) else whole(value, what)


def counts_of(value: Any, what: str) -> tuple[int, ...]:
    """Several numbers of images, from "100k,200k" or whatever can be gone through."""
    listed = value.split(",") if isinstance(value, str) else value.tolist() if hasattr(value, "tolist") else value
    return tuple(count_of(part, what) for part in listed)


def words_of(value: Any) -> tuple[str, ...]:
    """Several words, from "one,two" or whatever can be gone through; none from "none" or ""."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip()) if value != "none" else ()
    return tuple(value)


def seeds_of(value: Seeds, what: str = "seeds") -> Sequence[int]:
    """The seeds as ints, in the order given; a range where they come as one, or as an array of consecutive ones.

    Raises SidaError for one that is no whole number from 0 to 2^32 - 1: generators of random numbers take no others.
    """
    seeds = _listed_seeds(value, what)
    ends = (seeds[0], seeds[-1]) if isinstance(seeds, range) and seeds else seeds
    if wrong := [seed for seed in ends if not 0 <= seed <= MAX_SEED]:
        raise SidaError(f"{what} must be from 0 to {MAX_SEED}, got {wrong[0]}", "Choose others.")
    return seeds


def _listed_seeds(value: Seeds, what: str) -> Sequence[int]:
    if isinstance(value, str):
        return parse_seeds(value, what)
    if isinstance(value, range):
        return value
    is_array = hasattr(value, "tolist")
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, Iterable):
        first = whole(listed, what)
        return range(first, first + 1)
    seeds = [whole(seed, f"each of {what}") for seed in listed]
    if is_array and seeds and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return range(seeds[0], seeds[0] + len(seeds))
    return seeds


def size_of(value: Size, what: str) -> tuple[int, int]:
    """Width and height from "64x64", a pair of integers, or one of a square; up to 16,384, four times any dataset's."""
    width, height = _size_of(value, what)
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise SidaError(f"{what} must be from 1 to {_MAX_SIDE:,} pixels a side, got {width}x{height}", "Pass another.")
    return width, height


def _size_of(value: Size, what: str) -> tuple[int, int]:
    if not isinstance(value, str):
        if not isinstance(value, Iterable):
            return whole(value, what), whole(value, what)
        parts = [whole(part, what) for part in value]
        if len(parts) != 2:
            raise SidaError(f"{what} must be a width and a height, got {len(parts)} numbers", "Pass two whole numbers.")
        return parts[0], parts[1]
    width, x, height = value.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise SidaError(f"{what} must be WxH such as 64x64, got {value!r}", "Pass two whole numbers.")
    return int(width), int(height)


def is_count(field: "dataclasses.Field[Any]") -> bool:
    """Whether a recipe's field is a number of images, which takes suffixes."""
    return field.name.endswith("_nimg") or field.name in _COUNT_FIELDS


def word_of(field_name: str) -> str:
    """What a recipe's field is called by its flag and in Python: duration for duration_nimg."""
    return field_name.removesuffix("_nimg").lower()


def field_values(given: Mapping[str, Any], *classes: Any) -> dict[str, Any]:
    """Values for fields of these dataclasses by the fields' names, from those or the flags' words, as plain numbers.

    A name that is neither stays as it is, for others to refuse. SidaError where a field is given under both names.
    """
    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls)}
    by_word = {word_of(name): name for name in fields}
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = name if name in fields else by_word.get(name, name)
        if field in values:
            raise SidaError(f"{word_of(field)} and {field} are one and the same, got both", "Pass one of them.")
        values[field] = _field_value(fields[field], value) if field in fields else value
    return values


def _field_value(field: "dataclasses.Field[Any]", value: Any) -> Any:
    kinds = str(field.type)
    if value is None or type(value) in (bool, int, float):
        return value
    if is_count(field) and kinds.startswith("tuple"):
        return counts_of(value, word_of(field.name))
    if is_count(field):
        return count_of(value, word_of(field.name))
    if field.type in (int, int | None):
        return whole(value, field.name)
    if field.type in (float, float | None):
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value)
        except (TypeError, ValueError):
            raise SidaError(f"{field.name} must be a number, got {_described(value)}", "Pass a float.") from None
    if field.type is bool and type(value).__name__ in ("bool", "bool_"):  # numpy's
        return bool(value)
    if kinds.startswith("tuple[typing.Literal"):
        return words_of(value)
    if kinds.startswith(("tuple[int", "tuple[float")) and not isinstance(value, str):
        listed = value.tolist() if hasattr(value, "tolist") else value
        return tuple(float(part) if "float" in kinds else whole(part, field.name) for part in listed)
    return value


def _described(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float) else f"{type(value).__module__}.{type(value).__name__}"
