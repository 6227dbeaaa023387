"""Commands that score: fid, fd-dinov2, prec-recall, inception-score, evaluate."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from sidactl.cli import console
from sidactl.cli.entry import app
from sidactl.cli.options import (
    Device,
    Force,
    Json,
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
    with_signature,
)
from sidactl.cli.shown import print_score, ticking
from sidactl.commands.inputs import words_of
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.recipes import HeunSpec, SamplingForm


def _own_options(
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="the metrics to print, fid,kid,mind,coverage,vendi,pairs and others; if not given fid, prec-recall "
            "and kid where it compares with images, and inception-score where there are classes",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        ref_option(
            "real images that were not trained on, for --metrics fdr,memorisation; AuthPct of fresh images, too, is "
            "some 50 in few dimensions and far more in many"
        ),
    ] = None,
    resize: Annotated[
        str, typer.Option(metavar="NAME", help="of dinov2: torch, as in published statistics, or pil")
    ] = "torch",
    neighbours: Annotated[int, typer.Option(help="k of the k-nearest-neighbour manifolds")] = 3,
    num_splits: Annotated[int, typer.Option(help="parts that the inception score is averaged over")] = 10,
    fail_above: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="exit code 1 where the score is above it, for checks")
    ] = None,
) -> None:
    """Options that some scoring commands have."""


_COMMANDS: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "fid": (
        "Print the Frechet distance to statistics or images.",
        "fid generator/best --num 10k --trials 10",
        ["fail_above"],
    ),
    "fd-dinov2": ("Print FD-DINOv2.", "fd-dinov2 generator/best --ref imagenet512", ["resize", "fail_above"]),
    "prec-recall": (
        "Print precision and recall, in this order.",
        "prec-recall generator/best --num 10k",
        ["neighbours"],
    ),
    "kid": ("Print the kernel distance, without bias where images are few.", "kid generator/best --num 5k", []),
    "inception-score": ("Print the inception score.", "inception-score generator/best --num 10k", ["num_splits"]),
    "evaluate": (
        "Print several scores in one pass over the images, and one by a blind detector where there is one.",
        "evaluate generator/best --num 10k --trials 10",
        ["metrics", "held_out", "resize", "neighbours", "num_splits"],
    ),
}
"""by name, which but for `evaluate` is the metric's: help, an example, and which options it has beside those of all"""


def _options(
    ref: Ref = None,
    reference: Annotated[str | None, ref_option("dataset or statistics: oid, name, URL or file", "--ref")] = None,
    num: Annotated[
        str | None, typer.Option(metavar="COUNT", help="images per trial; 50k, or all of samples and folders")
    ] = None,
    subset_seed: Annotated[
        int | None, typer.Option(help="what draws --num images where samples or folders hold more; 0")
    ] = None,
    trials: Annotated[int, typer.Option(help="repetitions with fresh seeds")] = 1,
    first_seed: Annotated[int, typer.Option(help="seed of the first image of the first trial")] = 0,
    labels: Annotated[
        str, typer.Option(metavar="NAME", help="classes drawn uniform, or as in the dataset")
    ] = "uniform",
    steps: Steps = None,
    sampler: Sampler = None,
    vae: Vae = None,
    detector: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="inception, dinov2, efficientnet-lite0, tiny-digits, tiny-digits-ssl, random-features, timm:NAME or "
            "a file; the reference's own",
        ),
    ] = None,
    detectors: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="several detectors in one pass, the main one first")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="run a TorchScript detector that is not the published one")
    ] = False,
    convention: Annotated[
        str, typer.Option(metavar="NAME", help="whose arithmetic: edm, sid or guided-diffusion")
    ] = "edm",
    run: Run = None,
    device: Device = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Options that every scoring command has."""


def _register(name: str, text: str, example: str, own: Sequence[str]) -> None:
    def command(ref: str | None, as_json: bool, overrides: Mapping[str, Any], **arguments: Any) -> None:
        from sidactl.commands import score as commands_score
        from sidactl.commands import scores as commands_scores

        limit = arguments.pop("fail_above", None)
        arguments |= drawn_by(overrides)
        arguments["num"] = parsed_count(arguments["num"], "--num", least=2)
        if limit is not None and not limit >= 0:
            raise SidaError(f"--fail-above must be a number of at least 0, got {limit}", "Pass another.")
        asked = arguments.pop("metrics", None)
        metrics = [name] if name != "evaluate" else None if asked is None else words_of(asked)
        with ticking(name) as tick:
            score = commands_score.evaluate(from_pipe(ref), metrics, **arguments, tick=tick, say=console.note)
        # The display has ended: what it draws last would erase a result that is printed within.
        against = commands_scores.against(score, arguments["run"])
        print_score(score, against, as_json, all_lines=name == "evaluate")
        if limit is not None and float(score) > limit:
            raise SidaError(f"the score {float(score):.6g} is above {limit:g}", "", exit_code=EXIT_FAILED)

    command.__doc__ = f"{text}\n\n    Example: sidactl {example}\n    "
    command.__name__ = name.replace("-", "_")
    parameters = dict(inspect.signature(_own_options).parameters)
    listed = [*inspect.signature(_options).parameters.values(), *(parameters[option] for option in own)]
    flags = recipe_flags(SamplingForm, HeunSpec)(with_signature(command, command, listed))
    app.command(name)(with_processes(flags))


for _name, _of_command in _COMMANDS.items():
    _register(_name, *_of_command)
