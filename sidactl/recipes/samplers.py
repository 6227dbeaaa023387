"""Settings of the samplers: of one-step and few-step generators, and of the teachers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from sidactl.recipes.fields import JsonFields, at_least, at_most, moderate, not_negative, positive, refusal, within


@dataclass(frozen=True, kw_only=True)
class OneStepSpec(JsonFields):
    """Settings of sampling from a distilled generator. Source: SiDA (2410.14919), eq. 1, with a_t = 1."""

    num_steps: int = 1
    sigma_init: float = 2.5
    """noise level of the input, and the sigma argument; step k of N uses sigma_init (N - k) / N"""
    levels: tuple[float, ...] = ()
    """of a generator that was trained at these noise levels, falling from sigma_init: steps go through them"""
    noise: Literal["fresh", "fixed", "ddim"] = "fresh"
    """what an image gets between steps: fresh noise, the first step's again, or the noise that it was seen to have"""

    _later = frozenset({"levels", "noise"})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_steps")
        at_most(self, 1000, "num_steps")
        positive(self, "sigma_init")
        moderate(self, "sigma_init", "levels")
        if self.levels and self.num_steps > len(self.levels):
            what = f"at most {len(self.levels)}, as many as it was trained at"
            raise refusal("num_steps", what, self.num_steps)

    def sigma(self, step: int) -> float:
        """The noise level of a step, 0 to num_steps - 1."""
        if self.levels:
            return self.levels[step * len(self.levels) // self.num_steps]
        return self.sigma_init * (self.num_steps - step) / self.num_steps

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps


@dataclass(frozen=True, kw_only=True)
class HeunSpec(JsonFields):
    """Settings of a teacher's multi-step sampler. Source: EDM (2206.00364), Algorithm 2."""

    num_steps: int = 18
    sigma_min: float = 0.002
    """of Heun's sampler: lowest noise level before 0"""
    sigma_max: float = 80.0
    """of Heun's sampler: noise level that it starts from"""
    rho: float = 7.0
    """of Heun's sampler: how much closer together its noise levels are at the low end; 1 = evenly spaced"""
    S_churn: float = 0.0
    """of Heun's sampler: how much noise is added anew in all steps together; 0 = none"""
    S_min: float = 0.0
    """of Heun's sampler: lowest noise level at which noise is added anew"""
    S_max: float = math.inf
    """of Heun's sampler: highest noise level at which noise is added anew"""
    S_noise: float = 1.0
    """of Heun's sampler: standard deviation of the noise that is added anew"""
    convention: Literal["edm", "edm2"] = "edm"
    """edm: float64, and with churn noise is drawn in every step; edm2: float32, drawn where it is used"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_steps")
        positive(self, "sigma_min", "sigma_max", "rho")
        moderate(self, "sigma_min", "sigma_max", "rho")
        not_negative(self, "S_churn", "S_min", "S_noise")
        within(self, ["S_max"], "at least 0", lambda got: got >= 0)
        if self.sigma_min >= self.sigma_max:
            raise refusal("sigma_min", f"below sigma_max, {self.sigma_max:g}", self.sigma_min)

    @property
    def nfe(self) -> int:
        """Network evaluations per image: two per step, one in the last."""
        return 2 * self.num_steps - 1

    def to_json(self) -> dict[str, Any]:
        """As `JsonFields.to_json`; an infinite S_max is written as null, which JSON can hold."""
        return super().to_json() | {"S_max": None if math.isinf(self.S_max) else self.S_max}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """As `JsonFields.from_json`; reads a null S_max as infinite."""
        return super().from_json({k: math.inf if k == "S_max" and v is None else v for k, v in value.items()})
