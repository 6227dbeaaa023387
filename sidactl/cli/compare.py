"""The command `compare`."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidactl import launch
from sidactl.cli import console
from sidactl.cli.entry import app
from sidactl.cli.options import Device, DryRun, Json, Run, ref_option, with_processes
from sidactl.cli.train import watching
from sidactl.errors import SidaError
from sidactl.text import markdown

if TYPE_CHECKING:
    from sidactl.commands.differences import Comparison, Row
    from sidactl.commands.runs import Training


_MOST_COLUMNS = 4
"""of a table of scores, beyond which it is turned where that makes it narrower"""


@app.command()
@with_processes
def compare(
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="[REF...]", help="generators, teachers, samples, folders of images")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="train these first where it is not done yet: modes of distill"),
    ] = None,
    teacher: Annotated[str | None, ref_option("the teacher of --methods")] = None,
    duration: Annotated[str | None, typer.Option(metavar="COUNT", help="images of each run; the recipe's")] = None,
    runs: Annotated[int, typer.Option(help="runs of each method, with training seeds 0, 1, ...")] = 1,
    part: Annotated[str, typer.Option(metavar="I/N", help="train this share alone, and compare nothing")] = "",
    metrics: Annotated[str, typer.Option(metavar="NAME,...", help="as in evaluate")] = "fid",
    num: Annotated[str, typer.Option(metavar="COUNT", help="images per trial")] = "10k",
    trials: Annotated[int, typer.Option(help="repetitions; all networks draw the same seeds")] = 10,
    reference: Annotated[str | None, ref_option("what all are scored against", "--ref")] = None,
    held_out: Annotated[
        str | None, ref_option("real images that were not trained on, for --metrics fdr,memorisation")
    ] = None,
    detectors: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="the reference's own, and those built in, if not given")
    ] = None,
    run: Run = None,
    device: Device = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print the table as CSV")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw the scores, too")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="draw what generators and their teacher's ODE make of the same noise"),
    ] = None,
) -> None:
    """Print which generator is better, by how much, and whether its detector is blind.

    Images are those that the generator was stepped with, updates the fake score's, seconds a run's on average, NFE the
    network's evaluations for one image; needs is what training asks for.

    Example: sidactl compare generator/best tiny-digits --num 10k --trials 10
    """
    from sidactl.commands import compare as commands_compare
    from sidactl.commands import pairs as commands_pairs
    from sidactl.commands import runs as commands_runs
    from sidactl.commands.inputs import words_of

    training = None
    if methods is not None:
        if teacher is None:
            raise SidaError("--methods needs a teacher, got none", "Pass --teacher REF.")
        training = commands_runs.Training(words_of(methods), teacher, duration, runs)
    elif teacher or duration or part or runs != 1:
        raise SidaError("--teacher, --duration, --runs and --part need --methods, got none", "Pass --methods sid,sida.")
    for flag, path in (("--plot", plot), ("--pairs", pairs)):
        if path and path.suffix.lower() != ".png":
            raise SidaError(f"a plot must be a PNG, got {path}", f"Pass {flag} FILE.png.")
        if path and part:
            what = f"a share compares nothing, so there is nothing to draw, got --part and {flag}"
            raise SidaError(what, "Leave out one.")
    forms = {"--json": as_json, "--csv": as_csv, "--markdown": as_markdown}
    if len(given := [flag for flag, is_given in forms.items() if is_given]) > 1:
        raise SidaError(f"a comparison is printed in one form, got {' and '.join(given)}", "Leave out all but one.")
    if not launch.is_rank0():  # the first of several processes alone writes
        plot = pairs = None
    share = _share(part)
    asked: dict[str, Any] = {"metrics": metrics, "num": num, "trials": trials, "detectors": detectors}
    asked |= {"training": training, "reference": reference, "held_out": held_out, "run": run}
    if dry_run:
        commands_compare.check(refs or (), **asked)
        _print_plan(training, share, run, as_json)
        if not part and not as_json:
            console.note(f"then everything is scored by {metrics}: of networks {trials} x {num} images each")
        return
    drawn: Sequence[str] = ()
    with (
        commands_compare.plotted(plot, run) as draw,
        commands_pairs.pictured(pairs, run, refs or () if training is None else None) as draw_pairs,
        watching() as watch,
    ):
        found = commands_compare.compare(refs or (), **asked, part=share, device=device, say=console.note, watch=watch)
        if found:
            draw(found)
            drawn = draw_pairs([oid for row in found.rows for oid in row.oids], device)
    if found is None:
        console.note("this share is trained; without --part the same command compares all of them")
        return
    for warning in found.warnings:
        console.warn(warning)
    if as_json:
        console.print_json(found.to_json())
    elif as_csv:
        for line in _as_csv(found).splitlines():
            console.print_data(line)
        for line in _differences(found):  # a file of one table is what reads it expects
            console.note(line)
    elif as_markdown:
        # A list ends a table without an empty line between them.
        for line in [*_as_markdown(found).splitlines(), *(f"- {markdown(line)}" for line in _differences(found))]:
            console.print_data(line)
    else:
        columns, rows = _scores(found)
        if len(columns) > max(_MOST_COLUMNS, len(rows)):  # many numbers of few things, which no terminal is wide for
            columns, *rows = map(list, zip(columns, *rows, strict=True))
        console.table(columns, rows)
        console.table(*_facts(found))
        for line in _differences(found):
            console.print_data(line)
        if found.reference:
            console.note(f"scored against {found.reference}; +- is over runs, of a single one over its trials")
        if any(row.seen for row in found.rows):
            console.note("* not blind: its detector chose it, or trained it")
        if len(found.numbers) > 1:
            console.note(f"these are the differences of {found.ordered_by}; --json has those of all numbers")
    if not found.is_blind:
        console.warn(f"no detector is blind here: {found.ordered_by} chose one of these, or more")
    if plot:
        console.note(f"drawn: {plot}")
    for line in (f"drawn: {pairs}", *drawn) if pairs else ():
        console.note(line)


def _share(part: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise SidaError(f"--part must be such as 2/8, got {part}", "Pass 1/8 to 8/8, one to each process.")
    return int(found[1]), int(found[2])


def _print_plan(training: "Training | None", share: tuple[int, int], run: Path | None, as_json: bool) -> None:
    from sidactl.commands import runs as commands_runs
    from sidactl.store import Store

    runs = list(commands_runs.planned(Store.open(run), training, share)) if training else []
    if as_json:
        told = [{"method": m, "seed": seed, "oid": made.oid if made else None} for m, seed, made in runs]
        console.print_json({"runs": told})
        return
    if training is None:
        console.note("nothing is trained: what was named is scored")
        return
    rows = [
        (method, seed, "done" if made else "to be trained", made.oid[:12] if made else None)
        for method, seed, made in runs
    ]
    console.table(("method", "seed", "state", "oid"), rows)
    of = f", share {share[0]} of {share[1]}" if share[1] > 1 else ""
    console.note(f"{sum(made is None for *_, made in runs)} of {len(runs)} runs are to be trained{of}")


def _scores(found: "Comparison") -> tuple[list[str], list[list[str | int | float | None]]]:
    from sidactl.commands.scores import told

    rows: list[list[str | int | float | None]] = []
    for row in found.rows:
        rows.append([row.name])
        for number in found.numbers:
            value = told(number, row.mean(number), row.std(number)) if number in row.values else None
            rows[-1].append(f"{value}{'*' if number in row.seen else ''}" if value else None)
    return ["name", *found.numbers], rows


def _facts(found: "Comparison") -> tuple[list[str], list[list[str | int | float | None]]]:
    rows: list[list[str | int | float | None]] = [
        [
            row.name,
            row.images,
            row.updates,
            None if row.seconds is None else round(row.seconds),
            row.evaluations,
            row.needs,
            row.oids[0][:12] if len(row.oids) == 1 else f"{len(row.oids)} runs",
        ]
        for row in found.rows
    ]
    return ["name", "images", "updates", "seconds", "NFE", "needs", "oid"], rows


def _oids(row: "Row") -> str:
    return " ".join(oid[:12] for oid in row.oids)


def _differences(found: "Comparison") -> list[str]:
    """Those of the number that orders."""
    lines = []
    for difference in found.differences:
        if difference.number != found.ordered_by:
            continue
        interval = ""
        if difference.low is not None and difference.high is not None:
            interval = f" [{difference.low:.3g}, {difference.high:.3g}], {difference.test}"
        pair = f"{difference.first} - {difference.second}"
        lines.append(f"{found.ordered_by}, {pair}: {difference.mean:.3g}{interval}: {difference.verdict}")
    return lines


def _as_csv(found: "Comparison") -> str:
    """Numbers apart from their spread, and one column that says whether each is blind."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    of_numbers = [f"{number}{kind}" for number in found.numbers for kind in ("", " std", " blind")]
    writer.writerow(["name", *of_numbers, "images", "updates", "seconds", "evaluations", "needs", "oid"])
    for row in found.rows:
        scores: list[float | bool | None] = []
        for number in found.numbers:
            has_it = number in row.values
            scores += [row.mean(number), row.std(number), number not in row.seen] if has_it else [None] * 3
        cost = row.images, row.updates, row.seconds, row.evaluations, row.needs
        writer.writerow([row.name, *scores, *cost, _oids(row)])
    return text.getvalue().rstrip("\n")


def _as_markdown(found: "Comparison") -> str:
    (columns, rows), (more_columns, more_rows) = _scores(found), _facts(found)
    columns = [*columns, *more_columns[1:]]
    cells = [
        ["-" if cell is None else markdown(console.fact(cell)) for cell in [*row, *more[1:]]]
        for row, more in zip(rows, more_rows, strict=True)
    ]
    lines = [[markdown(name) for name in columns], ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
