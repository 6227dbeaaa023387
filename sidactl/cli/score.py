"""Commands that score: fid, fd-dinov2, prec-recall, inception-score, evaluate."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

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
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.recipes import HeunSpec, SamplingForm

if TYPE_CHECKING:
    from sidactl.commands.scores import Score


def score_flags(command: Callable[..., "Score"]) -> Callable[..., None]:
    """Gives a scoring command the options of all, as `options` for `commands.score.evaluate`; prints its score."""

    def shared(
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
                metavar="NAME", help="inception, dinov2, tiny-digits, random-features or a file; the reference's own"
            ),
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
    ) -> None: ...

    own = [p for p in inspect.signature(command).parameters.values() if p.name not in ("ref", "options")]

    def with_flags(ref: str | None, as_json: bool, overrides: Mapping[str, Any], **arguments: Any) -> None:
        from sidactl.commands import scores as commands_scores

        special = {p.name: arguments.pop(p.name) for p in own}
        arguments |= drawn_by(overrides)
        arguments["num"] = parsed_count(arguments["num"], "--num", least=2)
        limit = special.pop("fail_above", None)
        if limit is not None and not limit >= 0:
            raise SidaError(f"--fail-above must be a number of at least 0, got {limit}", "Pass another.")
        with ticking(command.__name__.replace("_", "-")) as tick:
            score = command(from_pipe(ref), arguments | {"tick": tick, "say": console.note}, **special)
        # The display has ended: what it draws last would erase a result that is printed within.
        against = commands_scores.against(score, arguments["run"])
        print_score(score, against, as_json, all_lines=command.__name__ == "evaluate")
        if limit is not None and float(score) > limit:
            raise SidaError(f"the score {float(score):.6g} is above {limit:g}", "", exit_code=EXIT_FAILED)

    parameters = [*inspect.signature(shared).parameters.values(), *own]
    return with_processes(recipe_flags(SamplingForm, HeunSpec)(with_signature(with_flags, command, parameters)))


FailAbove = Annotated[
    float | None, typer.Option(metavar="NUMBER", help="exit code 1 where the score is above it, for checks")
]

Resize = Annotated[str, typer.Option(metavar="NAME", help="of dinov2: torch, as in published statistics, or pil")]

Neighbours = Annotated[int, typer.Option(help="k of the k-nearest-neighbour manifolds")]

NumSplits = Annotated[int, typer.Option(help="parts that the inception score is averaged over")]


@app.command()
@score_flags
def fid(ref: str, options: Mapping[str, Any], fail_above: FailAbove = None) -> "Score":
    """Print the Frechet distance to statistics or images.

    Example: sidactl fid generator/best --num 10k --trials 10
    """
    from sidactl.commands import score as commands_score

    return commands_score.fid(ref, **options)


@app.command("fd-dinov2")
@score_flags
def fd_dinov2(ref: str, options: Mapping[str, Any], resize: Resize = "torch", fail_above: FailAbove = None) -> "Score":
    """Print FD-DINOv2.

    Example: sidactl fd-dinov2 generator/best --ref imagenet512
    """
    from sidactl.commands import score as commands_score

    return commands_score.fd_dinov2(ref, resize=resize, **options)


@app.command("prec-recall")
@score_flags
def prec_recall(ref: str, options: Mapping[str, Any], neighbours: Neighbours = 3) -> "Score":
    """Print precision and recall, in this order.

    Example: sidactl prec-recall generator/best --num 10k
    """
    from sidactl.commands import score as commands_score

    return commands_score.prec_recall(ref, neighbours=neighbours, **options)


@app.command("inception-score")
@score_flags
def inception_score(ref: str, options: Mapping[str, Any], num_splits: NumSplits = 10) -> "Score":
    """Print the inception score.

    Example: sidactl inception-score generator/best --num 10k
    """
    from sidactl.commands import score as commands_score

    return commands_score.inception_score(ref, num_splits=num_splits, **options)


@app.command()
@score_flags
def evaluate(
    ref: str,
    options: Mapping[str, Any],
    resize: Resize = "torch",
    neighbours: Neighbours = 3,
    num_splits: NumSplits = 10,
) -> "Score":
    """Print all scores that apply, in one pass over the images.

    Example: sidactl evaluate generator/best --num 10k --trials 10
    """
    from sidactl.commands import score as commands_score

    return commands_score.evaluate(ref, resize=resize, neighbours=neighbours, num_splits=num_splits, **options)
