"""Rows of a comparison, and what can be said of their differences."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter

from sidactl.errors import SidaError

CONFIDENCE = 0.95

_HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "IS", "Vendi", "AuthPct", "FLD")
"""numbers, by the first word of their names; of all others the lower is the better"""

_METRICS = {
    "FD": "fid",
    "IS": "inception-score",
    "KID": "kid",
    "MIND": "mind",
    "precision": "prec-recall",
    "recall": "prec-recall",
    "density": "coverage",
    "coverage": "coverage",
    "Vendi": "vendi",
    "FDr": "fdr",
    "AuthPct": "memorisation",
    "FLD": "memorisation",
    "pair": "pairs",
}
"""which metric a number is of, by what it is"""


def higher_is_better(number: str) -> bool:
    """Which way round a number is."""
    return number.split()[0] in _HIGHER_IS_BETTER


@dataclass(frozen=True)
class Row:
    """One network or set of images of a comparison, or a method with all its runs."""

    name: str
    oids: Sequence[str]
    images: int | None
    """that its generator was stepped with, by each run"""
    updates: int | None
    """of the fake score, by each run"""
    seconds: float | None
    """of each run, on average, by its log; evaluations and checkpoints included"""
    evaluations: int | None
    """of the network for one image (NFE)"""
    needs: str | None
    """what training asks for beside the teacher: real images, or classes alone"""
    values: Mapping[str, Sequence[Sequence[float]]]
    """by number, of each run, of each trial"""
    seen: frozenset[str]
    """numbers that are not blind"""

    def samples(self, number: str) -> list[float]:
        """What its spread is over: means of runs where there are several, else trials."""
        of_runs = self.values.get(number, [])
        return [statistics.fmean(trials) for trials in of_runs] if len(of_runs) > 1 else [*itertools.chain(*of_runs)]

    def mean(self, number: str) -> float:
        return statistics.fmean(self.samples(number) or [math.nan])

    def std(self, number: str) -> float | None:
        samples = self.samples(number)
        return statistics.stdev(samples) if len(samples) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Of two rows under one number, the first minus the second, with its confidence interval."""

    first: str
    second: str
    number: str
    mean: float
    low: float | None
    high: float | None
    test: str
    """how the interval was made, or why there is none"""

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return f"no interval: {self.test}"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        is_first = (self.low > 0) == higher_is_better(self.number)
        return f"{self.first if is_first else self.second} is better"


@dataclass(frozen=True)
class Comparison:
    """Rows from the best to the worst by `ordered_by`: the first number that is blind for all of them, if any is."""

    rows: Sequence[Row]
    numbers: Sequence[str]
    ordered_by: str
    is_blind: bool
    differences: Sequence[Difference]
    num: int
    trials: int
    reference: str = ""
    """what all were scored against, in words"""
    warnings: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "ordered_by": self.ordered_by,
            "blind": self.is_blind,
            "images_per_trial": self.num,
            "trials": self.trials,
            "reference": self.reference,
            "warnings": list(self.warnings),
            "rows": [
                {
                    **{name: getattr(row, name) for name in ("name", "images", "updates", "seconds")},
                    **{"evaluations": row.evaluations, "needs": row.needs, "oids": list(row.oids)},
                    "scores": {
                        number: {
                            "mean": row.mean(number),
                            "std": row.std(number),
                            "runs": [list(trials) for trials in row.values[number]],
                            "blind": number not in row.seen,
                        }
                        for number in self.numbers
                        if number in row.values
                    },
                }
                for row in self.rows
            ],
            "differences": [
                {name: getattr(d, name) for name in ("first", "second", "number", "mean", "low", "high", "test")}
                | {"verdict": d.verdict}
                for d in self.differences
            ],
        }


def compared(
    rows: Sequence[Row],
    num: int,
    trials: int,
    *,
    metrics: Sequence[str] = ("fid",),
    detectors: Sequence[str] = (),
    reference: str = "",
    warnings: Sequence[str] = (),
) -> Comparison:
    """Rows in their order, with every difference; numbers in the order in which metrics and detectors were asked for.

    Rows without any number come last. Raises SidaError where the others have none in common.
    """

    def place(number: str) -> tuple[int, int]:
        metric, by = _METRICS.get(_kind(number), ""), [i for i, name in enumerate(detectors) if name in number.split()]
        return (metrics.index(metric) if metric in metrics else len(metrics)), (by or [0])[0]

    scored = [row for row in rows if row.values]
    everything = sorted(dict.fromkeys(number for row in scored for number in row.values), key=place)
    shared = [number for number in everything if all(number in row.values for row in scored)]
    if not shared:
        raise SidaError("these have no number in common", "Compare under one detector and reference: --detectors.")
    blind = [number for number in shared if not any(number in row.seen for row in scored)]
    by = (blind or shared)[0]
    ordered = sorted(scored, key=lambda row: row.mean(by), reverse=higher_is_better(by))
    numbers = [by, *(n for n in everything if n != by and _kind(n) == _kind(by))]
    numbers += [n for n in everything if n not in numbers]
    differences = [
        _difference(a, b, number)
        for number in numbers
        for a, b in itertools.combinations([row for row in ordered if number in row.values], 2)
    ]
    ordered += [row for row in rows if not row.values]
    return Comparison(ordered, numbers, by, bool(blind), differences, num, trials, reference, tuple(warnings))


def _kind(number: str) -> str:
    """What a number is, by whichever detector."""
    words = number.split()
    return "FD" if "FD" in words or number == "FID" else words[0]


def _difference(first: Row, second: Row, number: str) -> Difference:
    a, b = first.samples(number), second.samples(number)
    mean = first.mean(number) - second.mean(number)
    kinds = {len(row.values[number]) > 1 for row in (first, second)}
    if fixed := [row.name for row in (first, second) if row.evaluations is None]:
        why = f"{' and '.join(fixed)} {'is' if len(fixed) == 1 else 'are'} of fixed images, which have no trials"
    elif len(kinds) > 1:
        why = "one is of a single run, the other of several: compare single ones, or several of both"
    elif min(len(a), len(b)) < 2:
        why = "more trials are needed"
    else:
        why = ""
    if why:
        return Difference(first.name, second.name, number, mean, None, None, why)
    with catch_warnings():
        simplefilter("ignore", RuntimeWarning)  # of values that are nearly equal
        found, test = _test(a, b, is_of_runs=kinds == {True})
        interval = found.confidence_interval(CONFIDENCE)
    low, high = float(interval.low), float(interval.high)
    if math.isnan(low):  # differences without any spread
        low = high = mean
    return Difference(first.name, second.name, number, mean, low, high, test)


def _test(a: Sequence[float], b: Sequence[float], *, is_of_runs: bool) -> tuple[Any, str]:
    from scipy import stats

    if is_of_runs:
        return stats.ttest_ind(a, b, equal_var=False), f"Welch's t over {len(a)} and {len(b)} runs"
    return stats.ttest_rel(a, b), f"paired t over {len(a)} trials"
