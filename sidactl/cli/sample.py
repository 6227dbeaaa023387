"""The command sample."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from sidactl import units
from sidactl.cli import console
from sidactl.cli.entry import app
from sidactl.cli.options import (
    Device,
    Force,
    Json,
    Name,
    Ref,
    Run,
    Sampler,
    Steps,
    Vae,
    drawn_by,
    from_pipe,
    parsed_count,
    recipe_flags,
    ref_option,
    with_processes,
)
from sidactl.cli.shown import print_artifact, ticking
from sidactl.errors import SidaError
from sidactl.recipes import HeunSpec, SamplingForm


@app.command()
@with_processes
@recipe_flags(SamplingForm, HeunSpec)
def sample(
    overrides: Mapping[str, Any],
    ref: Ref = None,
    num: Annotated[
        str | None, typer.Option(metavar="COUNT", help="how many images, from seed 0 on, such as 10k; 64 if not given")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="LIST", help="which seeds, such as 0-63 or 5,7,100-199")] = None,
    class_index: Annotated[
        str | None, typer.Option("--class", metavar="K|NAME", help="one class for all images: its index, or its name")
    ] = None,
    steps: Steps = None,
    sampler: Sampler = None,
    guide: Annotated[str | None, ref_option("a weaker teacher to move away from")] = None,
    guidance: Annotated[
        float, typer.Option(help="how far from it, or without --guide from itself without labels; 1 = not at all")
    ] = 1.0,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="the noise levels at which it is guided; all if not given")
    ] = None,
    vae: Vae = None,
    name: Name = None,
    run: Run = None,
    device: Device = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Draw images, one per seed; prints an oid.

    Example: sidactl sample generator/best --num 10k
    """
    if num is not None and seeds is not None:
        raise SidaError("--num and --seeds cannot both be given", "Pass one of them.")
    chosen = units.parse_seeds(seeds) if seeds is not None else range(parsed_count(num, "--num") or 64)
    from sidactl.commands import sample as commands_sample

    with ticking("sample") as tick:
        result = commands_sample.sample(
            from_pipe(ref),
            seeds=chosen,
            class_index=int(class_index) if class_index and re.fullmatch("-?[0-9]{1,9}", class_index) else class_index,
            steps=steps,
            sampler=sampler,  # type: ignore[arg-type]  # ops checks it, with a better error
            guide=guide,
            guidance=guidance,
            guidance_interval=_levels(guidance_interval),
            vae=vae,
            **drawn_by(overrides),
            name=name,
            run=run,
            device=device,
            force=force,
            say=console.note,
            tick=tick,
        )
    print_artifact(result.artifact, as_json)


def _levels(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        what = f"--guidance-interval must be LOW,HIGH, got {text!r}"
        raise SidaError(what, "Pass --guidance-interval 0.2,3.") from None
