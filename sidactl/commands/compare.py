"""The command `compare`: which generator is better, by how much, under which eyes."""

import itertools
import json
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sidactl import catalog, launch
from sidactl.commands import reference as commands_reference
from sidactl.commands.blindness import built_in_eyes
from sidactl.commands.differences import Comparison, Row, compared, higher_is_better
from sidactl.commands.inputs import Count, Ref, count_of, ref_text, whole, words_of
from sidactl.commands.moments import OF_TINY_DIGITS, is_detector_file
from sidactl.commands.pairs import has_teacher, problem_of_picture, teacher_of
from sidactl.commands.question import rank0_first
from sidactl.commands.resolve import resolve
from sidactl.commands.running import OnEvent
from sidactl.commands.runs import Training, check_training, trained
from sidactl.commands.samplers import sampler_of
from sidactl.commands.score import evaluate
from sidactl.commands.score_question import held_out_images
from sidactl.commands.scorers import default_detector
from sidactl.commands.scores import METRICS, SCORED, Score
from sidactl.commands.words import NETS, RunDir, part_of
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import FakeScoreRecipe, Recipe
from sidactl.store import Artifact, Store, outputs

_IDLE_SEC = 600.0
"""a longer gap between two events of a run is an interruption, and no time that it took"""


@dataclass(frozen=True)
class _Asked:
    """What is asked for, every word of it resolved and checked."""

    metrics: Sequence[str]
    detectors: Sequence[str]
    """none = the reference's own, and blind ones"""
    reference: str | None
    held_out: Artifact | None
    num: int
    trials: int
    named: Mapping[str, Artifact]

    @property
    def of_teacher(self) -> set[str]:
        """The metrics that compare with the teacher, by no detector."""
        return {name for name in self.metrics if METRICS[name].has_teacher}


def check(
    refs: Sequence[Ref] = (),
    *,
    training: Training | None = None,
    metrics: Sequence[str] | str = ("fid",),
    num: Count = "10k",
    trials: int = 10,
    reference: Ref | None = None,
    held_out: Ref | None = None,
    detectors: Sequence[str] | str | None = None,
    run: RunDir = None,
    say: download.OnLine | None = None,
) -> _Asked:
    """Raises SidaError for whatever of a comparison can be known to be wrong before anything is trained or scored."""
    store, metrics = Store.open(run), words_of(metrics)
    if not metrics:
        raise SidaError("a comparison needs metrics, got none", "Leave out --metrics, or pass --metrics fid,kid.")
    for name in metrics:
        if name not in METRICS:
            raise SidaError(f"unknown metric {name!r}", f"Metrics are {', '.join(METRICS)}.")
        if by := METRICS[name].detector:
            raise SidaError(f"{name} is by a detector of its own", f"Pass --metrics fid --detectors {by}.")
    chosen = None if detectors is None else words_of(detectors)
    if chosen == ():
        raise SidaError("detectors are needed where they are asked for, got none", "Leave out --detectors.")
    for name in chosen or ():
        if not is_detector_file(name):
            catalog.detector(name)
    count, how_often = count_of(num, "--num"), whole(trials, "trials")
    if count < 2 or how_often < 1:
        what = f"images per trial must be >= 2 and trials >= 1, got {count} and {how_often}"
        raise SidaError(what, "Pass --num 10k --trials 10.")
    if training:
        with launch.alone():  # each run is one process's
            check_training(store, training)
    named: dict[str, Artifact] = {}
    with rank0_first():
        for ref in refs:
            word = ref_text(ref)
            subject = resolve(store, word, SCORED, any_size=True)
            if known := next((name for name, other in named.items() if other.oid == subject.oid), None):
                if say:
                    say(f"{word} is {known}: it is compared once")
                continue
            named[_name_of(store, word, subject, named)] = subject
        if not (named or training):
            raise SidaError(
                "a comparison needs something to compare, got nothing", "Name artifacts, or pass --methods."
            )
        text = None if reference is None else ref_text(reference, "the reference")
        if text is not None and named:
            commands_reference.find(store, text, _first(named.values()), "moments")
        held = held_out_images(store, metrics, None if held_out is None else ref_text(held_out), {}, recheck=False)
    asked = _Asked(metrics, chosen or (), text, held, count, how_often, named)
    if len(asked.of_teacher) == len(metrics):
        if chosen or text is not None:
            what = f"{', '.join(metrics)} compares with the teacher by pixels, which no detector or reference changes"
            raise SidaError(what, "Leave them out.")
        if not training and not any(has_teacher(store, each) for each in named.values()):
            teacher_of(store, _first(named.values()))
    return asked


def _first(artifacts: Collection[Artifact]) -> Artifact:
    """The one whose reference and detectors are everybody's."""
    return next((artifact for artifact in artifacts if artifact.kind != "dataset"), next(iter(artifacts)))


def compare(
    refs: Sequence[Ref] = (),
    *,
    training: Training | None = None,
    part: tuple[int, int] = (1, 1),
    metrics: Sequence[str] | str = ("fid",),
    num: Count = "10k",
    trials: int = 10,
    reference: Ref | None = None,
    held_out: Ref | None = None,
    detectors: Sequence[str] | str | None = None,
    run: RunDir = None,
    device: str | None = None,
    say: download.OnLine | None = download.to_stderr,
    watch: OnEvent | None = None,
) -> Comparison | None:
    """Networks, samples and folders beside each other, all under the same seeds, detectors and reference.

    training: methods that are compared, too, and trained first where the run directory has no answer yet. part: this
    job's share of that, (1, 8) to (8, 8); with a share there is no comparison (None), since others are not done. Of
    processes that torchrun started each trains a share of the runs by itself, and waits for the others; then all of
    them score together.
    detectors: by default that of the reference, and those built in that did not choose any generator. reference: by
    default that of the first network. held_out: as in `evaluate`.
    The table is ordered by the first number asked for that is blind. Differences are given with confidence intervals:
    over runs by Welch's t test, over trials of single runs, which share their seeds, by the paired t test. Raises
    SidaError as `evaluate` and `distill` do.
    """
    if not 1 <= part[0] <= part[1]:
        raise SidaError(f"a part must be from 1/{part[1]} to {part[1]}/{part[1]}, got {part[0]}/{part[1]}", "Pass 1/8.")
    store, words = Store.open(run), {"metrics": metrics, "num": num, "trials": trials, "detectors": detectors}
    checked: Any = words | {"training": training, "reference": reference, "held_out": held_out, "run": run, "say": say}
    asked = check(refs, **checked)
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
    for name, artifact in asked.named.items():
        if known := next((other for other, runs in groups.items() if artifact in runs), None):
            if say:
                say(f"{name} is a run of {known}: it is compared once")
            continue
        groups[name] = [artifact]
    first = _first([artifact for artifacts in groups.values() for artifact in artifacts])
    with rank0_first():
        compared_with = commands_reference.find(store, asked.reference, first, "moments")
        own_detector = default_detector(first, compared_with, {"reference": asked.reference})
        eyes = dict.fromkeys([own_detector, *built_in_eyes(store, first, asked.reference)])
    chosen = asked.detectors or tuple(eyes)
    for name, artifacts in groups.items():
        _check_size(name, artifacts[0], chosen)
    rows, warnings = [], list[str]()
    for name, artifacts in groups.items():
        scores = list[Score]()
        for artifact in artifacts:
            metrics = [m for m in asked.metrics if m not in asked.of_teacher or has_teacher(store, artifact)]
            if not metrics:
                continue
            drawn: Any = {"num": asked.num, "trials": asked.trials}
            if artifact.kind not in NETS:
                held = int(artifact.results["num_images"])
                drawn = {"num": min(held, asked.num)}  # a distance depends on how many there are
                if held < asked.num:
                    warnings.append(f"{name} holds {held:,} images, fewer than the {asked.num:,} of the others")
            if set(metrics) - asked.of_teacher:  # what compares with the teacher has neither
                against = asked.reference or _unless_its_own(store, artifact, compared_with)
                drawn |= {"reference": against, "detectors": chosen, "held_out": asked.held_out}
            tick = part_of(watch, f"scoring {name}")
            scores.append(evaluate(artifact.oid, metrics, **drawn, run=run, device=device, say=None, tick=tick))
            warnings += [f"{name}: {warning}" for warning in scores[-1].warnings]
            warnings += [f"scores are not kept: {why}" for why in [scores[-1].unkept] if why]
        rows.append(_row(store, name, artifacts, scores))
    order: Any = {"metrics": asked.metrics, "detectors": chosen}
    if set(asked.metrics) - asked.of_teacher:
        order["reference"] = commands_reference.described(store, compared_with)
    return compared(rows, asked.num, asked.trials, **order, warnings=list(dict.fromkeys(warnings)))


def _unless_its_own(store: Store, artifact: Artifact, compared_with: Artifact) -> str | None:
    """What to score against by name, where by itself it would be something else."""
    with suppress(SidaError):
        if artifact.kind != "dataset" and commands_reference.find(store, None, artifact, "moments") == compared_with:
            return None
    return compared_with.oid


def _check_size(name: str, artifact: Artifact, detectors: Sequence[str]) -> None:
    """Refuses images that a detector of tiny ones does not take, before those that it takes are scored."""
    height = artifact.results.get("resolution") if artifact.kind == "dataset" else None
    if height in (None, 8):
        return
    if small := [detector for detector in detectors if detector in OF_TINY_DIGITS]:
        what = f"detector {small[0]} takes images of 8x8 pixels, those of {name} are of {height} rows"
        raise SidaError(what, "Pass --detectors random-features, or leave it out of the comparison.")


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
    numbers = {number: _told_with_detector(number, scores[0]) for number in (scores[0].values if scores else ())}
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
        told = [json.loads(event) for event in events]
        times = [datetime.fromisoformat(event["time"]).timestamp() for event in told]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        # Between an interruption and the new start nothing was done.
        anew = [b["event"] == "resumed" or b["nimg"] < a["nimg"] for a, b in itertools.pairwise(told)]
        return sum(gap for gap, is_start in zip(gaps, anew, strict=True) if not is_start and gap < _IDLE_SEC)
    return None
