"""Commands that clear up and take out: gc, export; and env."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from sidactl import units
from sidactl.cli import console
from sidactl.cli.entry import app
from sidactl.cli.options import DryRun, Json, Run, piped


@app.command()
def gc(
    dry_run: DryRun = False,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="forget this ref first; may be repeated")
    ] = None,
    live: Annotated[
        list[str] | None,
        typer.Option("--live", metavar="KEY", help="remove this unfinished work of ls --live, alone; may be repeated"),
    ] = None,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Remove what no ref reaches.

    Example: sidactl gc --dry-run
    """
    from sidactl.commands import inventory

    report = inventory.gc(dry_run=dry_run, drop=drop or [], unfinished=live or [], run=run)
    if as_json:
        console.print_json(dataclasses.asdict(report))
        return
    for name in report.removed:
        console.print_data(name)
    verb = "would be removed" if dry_run else "removed"
    what = f"{len(report.removed)} unfinished" if live else f"{report.num_objects} objects"
    console.note(f"{what}, {units.format_bytes(report.num_bytes)} {verb}")
    if report.num_young:
        console.note(
            f"{report.num_young} objects that no ref reaches are spared: within the last hour a process made them"
        )


@app.command()
def export(
    ref: Annotated[str, typer.Argument(help="oid, prefix or ref; - reads it from a pipe", callback=piped)],
    destination: Annotated[Path, typer.Argument(help="file or folder to make")],
    form: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="files, png, npz, safetensors, state-dict or onnx; by the destination's suffix, else files",
        ),
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="sign it with this private key (PEM): DESTINATION.sig")
    ] = None,
    run: Run = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export there; nothing else")] = False,
    as_json: Json = False,
) -> None:
    """Write an artifact out; prints where.

    Example: sidactl export generator/best my-generator
    """
    from sidactl.commands import export as commands_export

    path = commands_export.export(ref, destination, form=form, sign=sign, run=run, force=force)  # type: ignore[arg-type]
    if as_json:
        console.print_json({"path": str(path)})
    else:
        console.print_data(str(path))


@app.command()
def env(run: Run = None, as_json: Json = False) -> None:
    """Print what a bug report needs.

    Example: sidactl env
    """
    from sidactl.commands import inventory

    described = inventory.env(run=run)
    if as_json:
        console.print_json(described)
        return
    for name, value in described.items():
        console.print_data(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
