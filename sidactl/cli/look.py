"""Commands that look: show, ls, look, verify."""

import math
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from sidactl import units
from sidactl.cli import console
from sidactl.cli.entry import app
from sidactl.cli.options import Json, Ref, Run, from_pipe
from sidactl.cli.shown import (
    images_text,
    named_classes,
    print_entries,
    published_text,
    row_json,
    score_lines,
    short_text,
    size_text,
)
from sidactl.errors import EXIT_FAILED, SidaError


@app.command()
def show(
    ref: Ref = None,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Show an artifact (a bare oid or ref does, too).

    Example: sidactl show generator/best
    """
    from sidactl.commands import inventory
    from sidactl.commands import scores as commands_scores

    ref = from_pipe(ref)
    if rows := inventory.unfetched(ref, run=run):
        print_entries(rows, as_json)
        return
    described = inventory.show(ref, run=run)
    if as_json:
        console.print_json(described.to_json())
        return
    artifact = described.artifact
    console.print_data(f"{artifact.kind} {artifact.oid}")
    for name in described.names:
        console.print_data(f"  name     {name}")
    for role, parent in described.ancestors:
        console.print_data(f"  {'from':8} {role}: {parent.kind} {parent.oid[:12]}")
    for name, path in described.paths.items():
        console.print_data(f"  {'file':8} {name} ({units.format_bytes(artifact.files[name].size_bytes)}): {path}")
    for title, values in (("setting", artifact.params), ("result", artifact.results)):
        for key, value in values.items():
            shown = named_classes(value) if key == "class_names" else value
            console.print_data(f"  {title:8} {key}: {short_text(shown)}")
    for score in described.scores:
        for line in score_lines(score, commands_scores.against(score, run)):
            console.print_data(f"  {'score':8} {line}")
    for name, number in described.published.items():
        console.print_data(f"  {number.source:8} {published_text(name, number)}")


@app.command("ls")
def list_artifacts(
    kind: Annotated[str | None, typer.Argument(help="teacher, generator, dataset, samples, score, ...")] = None,
    catalog: Annotated[bool, typer.Option("--catalog", help="list what can be fetched by name instead")] = False,
    live: Annotated[bool, typer.Option("--live", help="list unfinished work and what goes on with it")] = False,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """List artifacts, unfinished work, or the catalog of names.

    Example: sidactl ls generator
    """
    if sum((catalog, live, kind is not None)) > 1:
        raise SidaError("one list at a time: a kind, --live or --catalog", "Pass one of them.")
    if catalog:
        _print_catalog(as_json)
        return
    if live:
        _print_unfinished(run, as_json)
        return
    from sidactl.commands import inventory

    if as_json:
        found = inventory.ls(kind, run=run)
        console.print_json([{"oid": a.oid, "kind": a.kind, "names": names} for a, names in found])
        return
    parts = inventory.ls_in_parts(kind, run=run)
    for part in chain([next(parts, [])], parts):  # a table without a row says that there is none
        rows = [[a.kind, a.oid[:12], ", ".join(names), size_text(a)] for a, names in part]
        console.table(["kind", "oid", "names", "size"], rows)


def _print_unfinished(run: Path | None, as_json: bool) -> None:
    from datetime import UTC, datetime

    from sidactl.commands import inventory

    found = inventory.unfinished(run=run)
    place = None if run is None else str(run)
    if as_json:
        console.print_json(
            [
                {
                    "key": each.key,
                    "command": each.task and each.task.command,
                    "title": each.task and each.task.title,
                    "nimg": each.nimg,
                    "total_nimg": each.total_nimg,
                    "checkpoint_nimg": each.checkpoint_nimg,
                    "size_bytes": each.size_bytes,
                    "is_worked_on": each.is_worked_on,
                    "process": each.process,
                    "touched": datetime.fromtimestamp(each.touched, UTC).isoformat(timespec="seconds"),
                    "go_on": each.go_on(place),
                }
                for each in found
            ]
        )
        return
    rows = [
        [
            each.key[:12],
            each.task.title if each.task else "unknown, of an older version",
            images_text(each.nimg, each.total_nimg),
            None if each.checkpoint_nimg is None else f"{each.checkpoint_nimg:,}",
            units.format_bytes(each.size_bytes),
            f"process {each.process or '?'} works on it" if each.is_worked_on else "waits",
            datetime.fromtimestamp(each.touched).strftime("%Y-%m-%d %H:%M"),
        ]
        for each in found
    ]
    if not rows:
        console.note("no unfinished work")
        return
    head = ["key", "what", "images", "checkpoint", "size", "state", "touched"]
    ways = [each.go_on(place) or "repeat its command, which says whether it goes on" for each in found]
    if not sys.stdout.isatty():
        console.table([*head, "to go on"], [[*row, way] for row, way in zip(rows, ways, strict=True)])
        return
    console.table(head, rows)
    for row, way in zip(rows, ways, strict=True):  # in lines of their own, so that they can be copied
        print(f"to go on with {row[0]}: {way}")


def _print_catalog(as_json: bool) -> None:
    from sidactl import catalog as catalog_module

    rows = catalog_module.rows()
    if as_json:
        console.print_json([row_json(row) for row in rows])
        return
    cells = [
        [r.kind, r.name, ", ".join(f"{n} {s.value:g}" for n, s in r.scores.items()), r.about, r.licence] for r in rows
    ]
    console.table(["kind", "name", "published", "about", "licence"], cells)


@app.command()
def look(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a .pkl or .safetensors file")],
    as_json: Json = False,
) -> None:
    """List what a network file holds; nothing in it is executed or built.

    Example: sidactl look network-snapshot.pkl
    """
    from sidactl.commands import inventory

    held = inventory.look(file)
    if as_json:
        console.print_json(held)
        return
    named: Mapping[str, Any] = held.get("contents", {file.name: held})
    for name, value in named.items():
        if not isinstance(value, dict) or "tensors" not in value:
            console.print_data(f"{name}: {short_text(value)}")
            continue
        tensors = value["tensors"]
        numel = sum(math.prod(tensor["shape"]) for tensor in tensors)
        of_class = f"{value['class']}, " if "class" in value else ""
        console.print_data(f"{name}: {of_class}{len(tensors)} tensors, {numel:,} numbers")
        options = value.get("options") or value.get("metadata") or {}
        for option, given in options.items() if isinstance(options, dict) else options:
            console.print_data(f"  option   {option}: {short_text(given)}")
        for kind, count in Counter(part["class"] for part in value.get("parts", [])).items():
            console.print_data(f"  part     {count} x {kind}")
        for tensor in tensors:
            console.print_data(f"  tensor   {tensor['name']} {tensor['dtype']} {tensor['shape']}")


@app.command()
def verify(
    signature: Annotated[
        Path | None, typer.Option(metavar="PATH", help="check PATH.sig, of an export that was signed, instead")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="the public key for it, PEM")] = None,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Check every object of the run directory, or the signature of an export.

    Example: sidactl verify
    """
    from sidactl.commands import inventory

    if (signature is None) != (key is None):
        raise SidaError("--signature and --key belong together, got one", "Pass both, or neither.")
    if signature and key:
        inventory.verify_signature(signature, key)
        if as_json:
            console.print_json({"path": str(signature), "signed_by": str(key)})
        card = signature.with_name(f"{signature.name}.md")
        beside = f"; {card} beside it is not part of that" if card.exists() and not signature.is_dir() else ""
        console.note(f"{signature} is what was signed by this key{beside}")
        return
    problems = inventory.verify(run=run)
    if as_json:
        console.print_json([{"object": name, "problem": problem} for name, problem in problems])
    else:
        for name, problem in problems:
            console.print_data(f"{name}: {problem}")
    if problems:
        message = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the run directory"
        raise SidaError(message, "Each line says what helps.", exit_code=EXIT_FAILED)
    console.note("no problem found")
