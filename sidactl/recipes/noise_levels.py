"""Distributions of noise levels, as a recipe writes them; `sidactl.noise.draw_levels` draws from them."""

import math
from typing import Literal, NamedTuple

from sidactl.errors import SidaError
from sidactl.recipes.fields import flag_of

GRID = 1000
"""levels of a grid: number k is sigma_of_time(k / 999), in rising order"""

_FORMS = "uniform:A,B (of the time from 0 to 1), lognormal:MEAN,STD (of ln sigma) or grid:A,B (of levels 0 to 999)"


def sigma_at(time: float) -> float:
    """The noise level at a time from 0 to 1, as `sidactl.noise.sigma_of_time`."""
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return float((high + (1 - time) * (low - high)) ** 7)


class NoiseLevels(NamedTuple):
    """uniform: time in [a, b); lognormal: ln sigma with mean a and standard deviation b; grid: whole numbers a to b."""

    kind: Literal["uniform", "lognormal", "grid"]
    a: float
    b: float

    @classmethod
    def parse(cls, text: str, field: str) -> "NoiseLevels":
        """From its text, such as "grid:20,980". Raises SidaError for another form, or bounds that hold nothing."""
        kind, _, rest = text.partition(":")
        try:
            a, b = map(float, rest.split(","))
        except ValueError:
            a = b = math.nan
        holds = {
            "uniform": 0 <= a < b <= 1,
            "lognormal": abs(a) <= 10 and 0 < b <= 10,  # further ones float32 holds no squares of
            "grid": a.is_integer() and b.is_integer() and 0 <= a <= b < GRID,
        }
        for known in ("uniform", "lognormal", "grid"):
            if kind == known and holds[known]:
                return cls(known, a, b)
        raise SidaError(f"{field} must be {_FORMS}, got {text!r}", f"Pass another {flag_of(field)}.")
