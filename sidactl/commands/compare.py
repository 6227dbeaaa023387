"""The command `compare`: which generator is better, by how much, under which eyes."""

import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sidactl import launch
from sidactl.commands import reference as commands_reference
from sidactl.commands.blindness import built_in_eyes
from sidactl.commands.inputs import Count, Ref, count_of, ref_text, whole, words_of
from sidactl.commands.moments import detector_name
from sidactl.commands.pairs import problem_of_picture, teacher_of
from sidactl.commands.question import rank0_first
from sidactl.commands.resolve import resolve
from sidactl.commands.running import OnEvent
from sidactl.commands.runs import Training, trained
from sidactl.commands.samplers import sampler_of
from sidactl.commands.score import evaluate
from sidactl.commands.scores import METRICS, SCORED, Score
from sidactl.commands.words import NETS, OnCount, RunDir
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import FakeScoreRecipe, Recipe
from sidactl.store import Artifact, Store, outputs

CONFIDENCE = 0.95

_HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "IS", "Vendi", "AuthPct", "FLD")
"""numbers, by the first word of their names; of all others the lower is the better"""

_IDLE_SEC = 600.0
"""a longer gap between two events of a run is an interruption, and no time that it took"""


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
    """Rows from the best to the worst by `ordered_by`, a blind distance where there is one for all of them."""

    rows: Sequence[Row]
    numbers: Sequence[str]
    ordered_by: str
    is_blind: bool
    differences: Sequence[Difference]
    num: int
    trials: int

    def to_json(self) -> dict[str, Any]:
        return {
            "ordered_by": self.ordered_by,
            "blind": self.is_blind,
            "images_per_trial": self.num,
            "trials": self.trials,
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


def compare(
    refs: Sequence[Ref] = (),
    *,
    training: Training | None = None,
    part: tuple[int, int] = (1, 1),
    metrics: Sequence[str] | str = ("fid",),
    num: Count = "10k",
    trials: int = 10,
    reference: Ref | None = None,
    detectors: Sequence[str] | str | None = None,
    run: RunDir = None,
    device: str | None = None,
    say: download.OnLine | None = download.to_stderr,
    watch: OnEvent | None = None,
    tick: OnCount | None = None,
) -> Comparison | None:
    """Networks, samples and folders beside each other, all under the same seeds, detectors and reference.

    training: methods that are compared, too, and trained first where the run directory has no answer yet. part: this
    job's share of that, (1, 8) to (8, 8); with a share there is no comparison (None), since others are not done. Of
    processes that torchrun started each trains a share of the runs by itself, and waits for the others; then all of
    them score together.
    detectors: by default that of the reference, and one built in that did not choose any generator.
    Differences of the number that orders are given with confidence intervals: over runs by Welch's t test, over trials
    of single runs, which share their seeds, by the paired t test. Raises SidaError as `evaluate` and `distill` do.
    """
    store, metrics = Store.open(run), words_of(metrics)
    if not 1 <= part[0] <= part[1]:
        raise SidaError(f"a part must be from 1/{part[1]} to {part[1]}/{part[1]}, got {part[0]}/{part[1]}", "Pass 1/8.")
    groups: dict[str, list[Artifact]] = {}
    if training:
        # Processes that train a share each are answered about all runs, once all are there.
        shares = [own] if (own := _rank_and_size())[1] == 1 or part[1] > 1 else [own, (0, 1)]
        for number, share in enumerate(shares):
            with launch.alone():
                told = (None, None) if number else (say, watch)
                made = list(trained(store, training, part, share, device, *told))
            if own[1] > 1 and not number:
                _wait_for_all()
        if part[1] > 1:
            return None
        for method, artifact in made:
            groups.setdefault(method, []).append(artifact)
    with rank0_first():
        for ref in refs:
            subject = resolve(store, ref_text(ref), SCORED, any_size=True)
            groups.setdefault(_name_of(store, ref_text(ref), subject, groups), []).append(subject)
    if not groups:
        raise SidaError("a comparison needs something to compare, got nothing", "Name artifacts, or pass --methods.")
    everything = [artifact for artifacts in groups.values() for artifact in artifacts]
    first = next((artifact for artifact in everything if artifact.kind != "dataset"), everything[0])
    text = None if reference is None else ref_text(reference, "the reference")
    with rank0_first():
        compared = commands_reference.find(store, text, first, "moments")
        eyes = [detector_name(compared), *built_in_eyes(store, first, text)]
    of_teacher = [metric for metric in metrics if metric in METRICS and METRICS[metric].has_teacher]
    if len(of_teacher) == len(metrics):  # refused before anything is drawn
        for artifact in everything:
            teacher_of(store, artifact)
    chosen = words_of(detectors) if detectors else tuple(dict.fromkeys(eyes))
    rows, wanted = [], count_of(num, "--num")
    for name, artifacts in groups.items():
        scores = []
        for artifact in artifacts:
            drawn: Any = {"num": wanted, "trials": whole(trials, "trials")}
            if artifact.kind not in NETS:
                held = int(artifact.results["num_images"])
                drawn = {"num": min(held, wanted)}  # a distance depends on how many there are
                if held < wanted and say:
                    say(f"{name} holds {held:,} images, fewer than the {wanted:,} of the others")
            against = text or (compared.oid if artifact.kind == "dataset" else None)
            asked = [metric for metric in metrics if metric not in of_teacher or _has_teacher(store, artifact)]
            if len(asked) > len(of_teacher):  # what compares with the teacher has neither
                drawn |= {"reference": against, "detectors": chosen}
            scores.append(evaluate(artifact.oid, asked, **drawn, run=store.root, device=device, say=None, tick=tick))
        rows.append(_row(store, name, artifacts, scores))
    return _compared(rows, scores[0].num if scores else 0, trials)


def _has_teacher(store: Store, artifact: Artifact) -> bool:
    with suppress(SidaError):
        return bool(teacher_of(store, artifact))
    return False


def _rank_and_size() -> tuple[int, int]:
    if launch.world_size() == 1:
        return 0, 1
    from sidactl.engine import ranks

    return ranks.rank_and_size()


def _wait_for_all() -> None:
    from sidactl.engine import ranks

    ranks.barrier()


@contextmanager
def plotted(path: Path | None, run: RunDir) -> Iterator[Callable[[Comparison], None]]:
    """What draws a comparison, to be called once within the block; into nothing without a path.

    Refuses a place that cannot be written, or holds anything but an earlier plot, before anything is scored.
    """
    if path is None:
        yield lambda found: None
        return
    with outputs.whole([outputs.Output(path, problem_of_picture)], force=True, run=Store.open(run).root) as (staged,):

        def draw(found: Comparison) -> None:
            from sidactl import report

            panels = []
            for number in found.numbers:
                rows = [row for row in found.rows if number in row.values]
                marks = [report.Mark(r.name, r.mean(number), r.std(number), number not in r.seen) for r in rows]
                order = ", which orders the table" if number == found.ordered_by else ""
                best = "higher" if higher_is_better(number) else "lower"
                panels.append((f"{number}: {best} is better{order}", marks))
            staged.write_bytes(report.dots(panels))

        yield draw


def _name_of(store: Store, text: str, subject: Artifact, taken: Mapping[str, object]) -> str:
    name = text if "/" in text and text in store.refs() else str(subject.params.get("name") or subject.oid[:12])
    return name if name not in taken else f"{name} {subject.oid[:8]}"


def _row(store: Store, name: str, artifacts: Sequence[Artifact], scores: Sequence[Score]) -> Row:
    artifact = artifacts[0]
    stored = artifact.params.get("recipe") if artifact.kind == "generator" else None
    recipe = Recipe.from_json(stored) if stored else None
    images = artifact.results.get("images_seen", 0)
    seconds = [sec for each in artifacts if (sec := seconds_of(store, each)) is not None]
    numbers = {number: _told_with_detector(number, scores[0]) for number in scores[0].values}
    seen = frozenset(numbers[number] for score in scores for number in score.seen)
    return Row(
        name=name if len(artifacts) == 1 else f"{name} x {len(artifacts)}",
        oids=[each.oid for each in artifacts],
        images=recipe.generator_nimg(images) if recipe else None,
        updates=recipe.fake_score_updates(images) if isinstance(recipe, FakeScoreRecipe) else None,
        seconds=statistics.fmean(seconds) if seconds else None,
        evaluations=sampler_of(artifact).nfe if artifact.kind in NETS else None,
        needs=recipe.needs if recipe else None,
        values={name: [score.values[number] for score in scores] for number, name in numbers.items()},
        seen=seen,
    )


def _told_with_detector(number: str, score: Score) -> str:
    """A number under a name that says by which detector it is, where there are several and its own does not."""
    if number not in ("precision", "recall", "density", "coverage", "AuthPct", "FLD gap"):
        return number
    return f"{number} {score.detectors[number].partition('@')[0]}" if len({*score.detectors.values()}) > 1 else number


def seconds_of(store: Store, artifact: Artifact) -> float | None:
    """How long the run took that an artifact came of, by the times in its log; None where there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
        answers = map(json.loads, reversed((store.root / "log.jsonl").read_text().splitlines()))
        key = next(line["key"] for line in answers if line["oid"] == artifact.oid)
        events = (store.root / "logs" / str(key)[:16] / "events.jsonl").read_text().splitlines()
        times = [datetime.fromisoformat(json.loads(event)["time"]).timestamp() for event in events]
        return sum(gap for before, after in itertools.pairwise(times) if (gap := after - before) < _IDLE_SEC)
    return None


def _compared(rows: Sequence[Row], num: int, trials: int) -> Comparison:
    everything = list(dict.fromkeys(number for row in rows for number in row.values))
    shared = [number for number in everything if all(number in row.values for row in rows)]
    if not shared:
        raise SidaError("these have no number in common", "Compare under one detector and reference: --detectors.")
    distances = [number for number in shared if number == "FID" or "FD" in number] or shared
    blind = [number for number in distances if not any(number in row.seen for row in rows)]
    by = (blind or distances)[0]
    ordered = sorted(rows, key=lambda row: row.mean(by), reverse=higher_is_better(by))
    kinds = list(dict.fromkeys(map(_kind, [by, *everything])))
    numbers = sorted([by, *(n for n in everything if n != by)], key=lambda number: kinds.index(_kind(number)))
    differences = [_difference(a, b, by) for a, b in itertools.combinations(ordered, 2)]
    return Comparison(ordered, numbers, by, bool(blind), differences, num, trials)


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
        why = "one is of single runs, the other of several"
    elif min(len(a), len(b)) < 2:
        why = "more trials are needed"
    else:
        why = ""
    if why:
        return Difference(first.name, second.name, number, mean, None, None, why)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of values that are nearly equal
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
