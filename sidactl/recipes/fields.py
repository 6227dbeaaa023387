"""What every description has: a strict JSON form, types that are checked, and bounds of numbers."""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union

from sidactl.errors import SidaError

HIGH_LR = 0.1
"""learning rates above it are warned of"""


@dataclass(frozen=True, kw_only=True)
class JsonFields:
    """Conversion of a frozen dataclass to plain JSON values and back, strictly.

    Every field must be of its declared type, and within its bounds, of which each class knows its own.
    """

    _later: ClassVar[frozenset[str]] = frozenset()
    """fields that came later: left out of the JSON at their default, so that what was stored before keeps its oid"""

    def __post_init__(self) -> None:
        for name, declared in _types(type(self)).items():
            value = _typed(declared, getattr(self, name))
            if not _is_a(declared, value):
                raise refusal(name, _called(declared), value)
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; nested dataclasses as objects, tuples as lists."""
        kept = [f for f in dataclasses.fields(self) if f.name not in self._later or getattr(self, f.name) != f.default]
        return {f.name: _plain(getattr(self, f.name)) for f in kept}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The dataclass written by `to_json`. Raises SidaError for a name that is not a field."""
        types = _types(cls)
        unknown = sorted(set(value) - set(types))
        if unknown:
            raise SidaError(f"unknown {cls.__name__} field {unknown[0]!r}", f"It has {', '.join(sorted(types))}.")
        return cls(**value)


def _plain(value: object) -> object:
    if isinstance(value, JsonFields):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _typed(declared: Any, value: Any) -> Any:
    for option in typing.get_args(declared) or (declared,):
        if isinstance(option, type) and issubclass(option, JsonFields) and isinstance(value, Mapping):
            return option.from_json(value)
    if not isinstance(value, bool) and isinstance(value, Real):
        return _number(typing.get_args(declared) or (declared,), value)
    return tuple(value) if isinstance(value, list) else value


def _number(kinds: Sequence[Any], value: Real) -> Any:
    """Python's own number of the field's type, of any other: 1 and 1.0 are one recipe, in Python and as JSON."""
    if int in kinds and isinstance(value, Integral):
        return int(value)
    try:
        return float(value) + 0.0 if float in kinds else value  # which makes -0.0 the 0.0 that it equals
    except OverflowError:
        return math.inf  # which no field takes


def _declared(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


_types: Callable[[Any], dict[str, Any]] = cache(_declared)
"""the declared types of a dataclass's fields"""


def _is_a(declared: Any, value: object) -> bool:
    """Whether a value is of a field's declared type: whole numbers are numbers, true and false are not."""
    origin, options = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(options[0], item) for item in value)
    if origin in (Union, UnionType):
        return any(_is_a(option, value) for option in options)
    if declared in (int, float):
        return isinstance(value, Integral if declared is int else Real) and not isinstance(value, bool)
    return isinstance(value, declared)


def _called(declared: Any) -> str:
    """A field's type, for people."""
    origin, options = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return f"one of {', '.join(options)}"
    if origin in (Union, UnionType):
        return " or ".join(_called(option) for option in options)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "none"}
    if origin is tuple and typing.get_origin(options[0]) is Literal:
        return f"some of {', '.join(typing.get_args(options[0]))}"
    if origin is tuple and options[0] is float:
        return "numbers"
    return "whole numbers" if origin is tuple else names.get(declared, f"a {declared.__name__}")


def refusal(name: str, what: str, got: object) -> SidaError:
    shown = repr(got) if isinstance(got, str) else list(got) if isinstance(got, tuple) else got
    return SidaError(f"{name} must be {what}, got {shown}", f"Pass another {flag_of(name)}.")


def flag_of(field: str) -> str:
    """The command-line option of a recipe's field, or of a sampler's."""
    return "--steps" if field == "num_steps" else "--" + field.removesuffix("_nimg").replace("_", "-").lower()


def within(value: JsonFields, names: Sequence[str], what: str, holds: Callable[[Any], bool]) -> None:
    """Refuses the first of these fields for which it does not hold; None, where the type allows it, always does."""
    for name in names:
        got = getattr(value, name)
        if got is not None and not all(map(holds, got if isinstance(got, tuple) else [got])):
            raise refusal(name, what, got)


def at_least(value: JsonFields, least: int, *names: str) -> None:
    within(value, names, f"at least {least}", lambda got: got >= least)


def finite(value: JsonFields, *names: str) -> None:
    within(value, names, "finite", math.isfinite)


def positive(value: JsonFields, *names: str) -> None:
    within(value, names, "positive and finite", lambda got: 0 < got < math.inf)


def not_negative(value: JsonFields, *names: str) -> None:
    within(value, names, "at least 0 and finite", lambda got: 0 <= got < math.inf)


def below_one(value: JsonFields, *names: str) -> None:
    within(value, names, "in [0, 1)", lambda got: 0 <= got < 1)


def in_unit_interval(value: JsonFields, *names: str) -> None:
    within(value, names, "in [0, 1]", lambda got: 0 <= got <= 1)


def moderate(value: JsonFields, *names: str) -> None:
    """Noise levels and their like, whose squares float32 must hold."""
    within(value, names, "from 1e-9 to 1e9", lambda got: 1e-9 <= got <= 1e9)


def at_most(value: JsonFields, most: int, *names: str) -> None:
    within(value, names, f"at most {most:,}", lambda got: got <= most)


def check_seed(value: JsonFields) -> None:
    at_least(value, 0, "seed")
    within(value, ["seed"], "at most 2^63 - 1", lambda got: got < 1 << 63)


def high_rates(recipe: JsonFields, *names: str) -> list[str]:
    return [
        f"{name} is {getattr(recipe, name):g}; Adam's rates above {HIGH_LR:g} rarely train anything"
        for name in names
        if getattr(recipe, name) > HIGH_LR
    ]
