"""Commands that train: train-teacher, distill, finetune-sid2a; and bench."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperCommand

from sidactl.cli import console
from sidactl.cli import display as cli_display
from sidactl.cli.entry import app
from sidactl.cli.options import (
    Device,
    DryRun,
    Force,
    Json,
    Log,
    Name,
    Run,
    Vae,
    piped,
    recipe_flags,
    ref_option,
    with_processes,
    with_signature,
)
from sidactl.cli.shown import Shown, print_artifact, print_generator
from sidactl.errors import SidaError
from sidactl.recipes import (
    FROM_GENERATOR,
    MODES,
    Adversarial,
    Execution,
    NetSpec,
    SamplingForm,
    TeacherRecipe,
    names_of,
    recipe_classes,
)

if TYPE_CHECKING:
    from sidactl.training.state import Event


@app.command("train-teacher")
@recipe_flags(TeacherRecipe, NetSpec)
def train_teacher(
    dataset: Annotated[
        str,
        typer.Argument(
            help="a dataset artifact, a name, or a folder or file of images; - reads a pipe", callback=piped
        ),
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="what to call the teacher")],
    overrides: Mapping[str, Any],
    net: Annotated[str | None, typer.Option(metavar="NAME", help="ddpmpp (if not given), ncsnpp, adm or edm2")] = None,
    log: Log = None,
    run: Run = None,
    device: Device = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Train a diffusion teacher; prints its oid.

    Example: sidactl train-teacher tiny-digits --name my-teacher --duration 50k
    """
    from sidactl.commands import train

    with watching(log) as watch:
        artifact = train.train_teacher(
            dataset, name=name, net=net, run=run, device=device, force=force, say=console.note, watch=watch, **overrides
        )
    print_artifact(artifact, as_json)


TeacherRef = Annotated[str, ref_option("a teacher artifact or a name from ls --catalog")]

RealImages = Annotated[str | None, ref_option("real images; the teacher's own if not given")]

Compared = Annotated[
    str | None, ref_option("what to score against; the dataset's published statistics, or else its images", "--ref")
]

NoScore = Annotated[bool, typer.Option("--no-score", help="score nothing; the last generator is the result")]

RunDetector = Annotated[
    str | None,
    typer.Option(
        "--detector",
        metavar="NAME",
        help="what scores the run: inception, dinov2, efficientnet-lite0, tiny-digits, tiny-digits-ssl, "
        "random-features, timm:NAME or a file; by default the reference's detector, for a dataset of your own "
        "random-features",
    ),
]

TeacherScore = Annotated[
    str | None,
    typer.Option(
        metavar="published|measure|none",
        help="what the generator is compared with: the published score where there is one, else measured at the end",
    ),
]

AllowUntrained = Annotated[
    bool,
    typer.Option(
        "--allow-untrained", help="go on where the run ends before the generator, or its adversarial part, trains"
    ),
]


_HEADINGS: Mapping[str, str] = {
    "What to distill": "teacher mode generator guide teacher_guidance score_guidance guidance_interval "
    "score_label_dropout dataset vae allow_untrained duration_nimg",
    "Method": "steps step_levels step_noise step_graphs student_times lambda_distill distillation_weight "
    "loss_detector moments_rate direction alpha regression lambda_reg num_pairs generator_weight loss_unit "
    "score_weight f_divergence ratio_rate sigma_init tmax "
    "lambda_sid lambda_adv adversarial_from_nimg joint_weight generator_from_nimg generator_every order alternate "
    "share share_fakes forced_normalization logvar",
    "Discriminator": "discriminator_features discriminator_maps discriminator_detector discriminator_loss "
    "discriminator_time discriminator_scale r1_gamma time_priority sign_target adapt_every adapt_kimg",
    "Optimisation": "batch_size num_accumulation_rounds fake_score_lr generator_lr discriminator_lr fake_score_beta1 "
    "generator_beta1 beta1 beta2 adam_eps weight_decay lr_warmup_nimg clip_gradient_value clip_gradient_norm "
    "ema_halflife_nimg ema_rampup_ratio stop_if_nan_steps nonfinite",
    "Data and noise": "P_mean P_std generator_time score_time augment_p dropout direction_dropout seed",
    "Evaluation and checkpoints": "reference detector no_score teacher_score evaluate_by evaluate_every_nimg "
    "evaluate_num evaluate_early_nimg evaluate_labels evaluate_also patience checkpoint_every_nimg",
    "Memory and speed": "device precision teacher_precision batch_per_device shard checkpoint_activations ema_on_cpu "
    "channels_last compile form hang_timeout",
    "Run directory": "name run force dry_run as_json log help",
}
"""of `distill --help`: what its options are about"""


class GroupedCommand(TyperCommand):
    """A command that lists its options under headings, of a recipe's those that the mode has."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """With the example of the mode that help is asked of."""
        mode, text = str(ctx.params.get("mode", "sida")), str(self.help)
        if mode in MODES and mode != "sida":
            start = " --generator generator/tiny-digits-sid" if mode in FROM_GENERATOR else ""
            text = text.replace("--mode sida", f"--mode {mode}{start}")
        asked, self.help = self.help, text
        super().format_help_text(ctx, formatter)
        self.help = asked

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        mode = str(ctx.params.get("mode", "sid2a"))
        of_others = set().union(*map(names_of, MODES)) - (names_of(mode) if mode in MODES else names_of("sida"))
        shown = {parameter.name: parameter.get_help_record(ctx) for parameter in self.get_params(ctx)}
        for heading, names in _HEADINGS.items():
            records = [found for name in names.split() if name not in of_others and (found := shown.get(name))]
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
        if "mode" in shown:
            formatter.write_paragraph()
            formatter.write_text("Each mode has options of its own: sidactl distill --mode dmd2 --help")


@app.command("distill", cls=GroupedCommand)
@with_processes
@recipe_flags(*recipe_classes(), Adversarial, Execution)
def distill(
    teacher: TeacherRef,
    overrides: Mapping[str, Any],
    mode: Annotated[str, typer.Option(metavar="NAME", help=", ".join(MODES), is_eager=True)] = "sida",
    generator: Annotated[str | None, ref_option("where sid2a and fd-loss start")] = None,
    guide: Annotated[str | None, ref_option("a weaker teacher that the teacher is moved away from")] = None,
    dataset: RealImages = None,
    reference: Compared = None,
    detector: RunDetector = None,
    no_score: NoScore = False,
    vae: Vae = None,
    teacher_score: TeacherScore = None,
    allow_untrained: AllowUntrained = False,
    log: Log = None,
    name: Name = None,
    run: Run = None,
    device: Device = None,
    as_json: Json = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Distill a one-step generator; prints its oid.

    Example: sidactl distill --teacher tiny-digits --mode sida | sidactl sample --num 10k | sidactl fid
    """
    planned: dict[str, Any] = {
        "teacher": teacher,
        "mode": mode,
        "generator": generator,
        "dataset": dataset,
        "reference": reference,
    }
    planned |= {"score": not no_score, "detector": detector, "allow_untrained": allow_untrained, "device": device}
    planned |= {"vae": vae, "teacher_score": teacher_score, "guide": guide}
    others = {"name": name, "run": run, "force": force}
    _distill(planned, others, overrides, log, as_json, dry_run)


def _of_mode(mode: str, start: str, name: str, doc: str) -> Callable[..., None]:
    """The command `distill` with this mode, which starts from a generator that must be given."""

    def command(**arguments: Any) -> None:
        distill(mode=mode, **arguments)

    parameters = dict(inspect.signature(distill).parameters)
    parameters.pop("mode")
    generator = parameters["generator"].replace(
        annotation=Annotated[str, ref_option(start)], default=inspect.Parameter.empty
    )
    command.__name__, command.__doc__ = name, doc
    return with_signature(command, command, [*(parameters | {"generator": generator}).values()])


app.command("finetune-sid2a", cls=GroupedCommand)(
    _of_mode(
        "sid2a",
        "the generator to start from, such as generator/best",
        "finetune_sid2a",
        """Go on from a SiD generator; prints an oid.

    Example: sidactl finetune-sid2a --teacher tiny-digits --generator generator/tiny-digits-sid
    """,
    )
)


def _distill(
    planned: Mapping[str, Any],
    others: Mapping[str, Any],
    overrides: Mapping[str, Any],
    log: Sequence[str] | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Distills and prints the generator; or prints the plan, which the arguments in `planned` alone shape."""
    from sidactl.commands import distill as commands_distill

    settings = {f.name for f in dataclasses.fields(Execution)}
    execution = Execution(**{name: value for name, value in overrides.items() if name in settings})
    overrides = {name: value for name, value in overrides.items() if name not in settings}
    if dry_run:
        from sidactl.cli import loggers

        loggers.check(log or ())
        _print_plan(planned, others["run"], overrides, execution)
        return
    with watching(log) as watch:
        artifact = commands_distill.distill(
            **planned, **others, execution=execution, say=console.note, watch=watch, **overrides
        )
    print_generator(artifact, as_json)


def _print_plan(
    arguments: Mapping[str, Any],
    run: Path | None,
    overrides: Mapping[str, Any],
    execution: Execution,
) -> None:
    from sidactl.commands import plan, preflight
    from sidactl.store import Store

    planned = plan.plan(**arguments, store=Store.open(run), overrides=overrides, execution=execution)
    for warning in planned.warnings:
        console.warn(warning)
    for note in planned.notes:
        console.note(note)
    recipe, cost, one = planned.recipe, planned.cost, planned.memory[1, execution.shard]
    pace = f"{cost.sec_per_kimg:g} s per 1,000 images on {cost.machine}, as published" if cost else "not published"
    at_once = execution.batch_per_device or recipe.batch_size // recipe.num_accumulation_rounds
    estimate = {
        "parameters": one.num_parameters,
        "state_gb": round(one.state_bytes / 1e9, 2),
        "gradients_gb": round(one.gradient_bytes / 1e9, 2),
        "activations_gb": round(one.activation_bytes / 1e9, 2),
        "of": f"{recipe.precision}, {at_once} images at a time",
        "memory_gb_per_device": [
            {
                "devices": num_devices,
                "whole": round(planned.memory[num_devices, False].total_bytes / 1e9, 2),
                "sharded": round(planned.memory[num_devices, True].total_bytes / 1e9, 2),
            }
            for num_devices, is_sharded in planned.memory
            if not is_sharded
        ],
        "hours": None if planned.hours is None else round(planned.hours, 1),
        "pace": pace,
    }
    scoring = planned.scoring and {
        "score": planned.scoring.score_name,
        **({"further scores": list(recipe.evaluate_also)} if recipe.evaluate_also else {}),
        "detector": planned.scoring.detector,
        "reference": planned.scoring.reference.text,
        "evaluations": planned.num_evaluations,
        "images": recipe.evaluate_num,
        "teacher_score": arguments["teacher_score"] or planned.teacher_score,
    }
    console.print_json(
        {
            "inputs": dict(planned.inputs),
            "recipe": recipe.to_json(),
            "stages": [{"trains": name, "from_nimg": start} for name, start in recipe.stages().items()],
            "scoring": scoring,
            "first": [dataclasses.asdict(need) for need in planned.needs],
            "missing": [str(problem) for problem in planned.missing],
            "estimate": estimate
            | {
                "disk_gb": round(preflight.disk_bytes(one.num_parameters) / 1e9, 2),
                "disk_free_gb": round(planned.free_bytes / 1e9, 2),
            },
        }
    )


_LOSS_NAMES = {
    "fake_score_loss": "fake score",
    "discriminator_loss": "discriminator",
    "generator_sid_loss": "SiD",
    "generator_matching_loss": "matching",
    "generator_regression_loss": "regression",
    "generator_distillation_loss": "distillation",
    "generator_adversarial_loss": "adversarial",
    "denoising_loss": "denoising",
}


@contextmanager
def watching(log: Sequence[str] | None = None) -> Iterator[Shown]:
    """A display of a training run, opened by its first event, and the loggers that were asked for."""
    from sidactl.cli import loggers

    with cli_display.display() as display:
        shown: Callable[[], cli_display.Progress] | None = None
        score_name = "score"

        def watch(event: "Event") -> None:
            nonlocal shown, score_name
            values = event.values
            if event.kind == "started":
                score_name = values.get("score_name", score_name)
                title, total = values["title"], values["duration_nimg"]
                display.begin(title, total)
                shown = partial(display.show, title, total)
                return
            assert shown
            progress = shown()
            if event.kind == "progress":
                losses = {
                    _LOSS_NAMES.get(k, k.replace("_", " ")): f"{v:.3g}"
                    for k, v in values.items()
                    if k not in ("stage", "skipped_steps") and isinstance(v, int | float)
                }
                skipped = {"skipped updates": values["skipped_steps"]} if values["skipped_steps"] else {}
                progress.update(event.nimg, {"stage": values["stage"], **losses, **skipped})
            elif event.kind == "evaluation":
                scores = {score_name: values["score"], **{name: v for name, v in values.items() if name != "score"}}
                shown_scores = {name: f"{value:.4g}" for name, value in scores.items()}
                progress.update(event.nimg, shown_scores)
                listed = ", ".join(f"{name} {value}" for name, value in shown_scores.items())
                progress.note(f"{listed} after {event.nimg:,} images")
            elif event.kind == "resumed":
                progress.note(f"going on from the checkpoint at {event.nimg:,} images")
                progress.update(event.nimg)
            elif "message" in values:
                progress.note(f"{'warning: ' if event.kind == 'warning' else ''}{values['message']}")

        with loggers.watching(log or (), watch) as watcher:
            yield Shown(watcher, display.part)


@app.command()
@recipe_flags(SamplingForm)
def bench(
    overrides: Mapping[str, Any],
    teacher: Annotated[
        str, typer.Argument(metavar="[TEACHER]", help="a name from ls --catalog")
    ] = "edm-cifar10-uncond",
    mode: Annotated[str, typer.Option(help="sid, sida or sid2a")] = "sida",
    batch_size: Annotated[
        int | None, typer.Option(help="images per pass; the recipe's micro-batch if not given")
    ] = None,
    rounds: Annotated[int, typer.Option(help="passes per step")] = 1,
    steps: Annotated[int, typer.Option(help="how often everything is timed; medians are printed")] = 3,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="eager|FOLDER",
            help="time in turn with it: the eager fp32 step, or the published code that you have in a folder",
        ),
    ] = None,
    against_command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="what trains there on one GPU and prints sec/kimg; started --steps times"),
    ] = None,
    against_within: Annotated[
        float, typer.Option(metavar="SECONDS", help="the longest that a start of it may take to tell its pace")
    ] = 900.0,
    sweep: Annotated[bool, typer.Option("--sweep", help="try all settings of the device")] = False,
    detector: Annotated[bool, typer.Option("--detector/--no-detector", help="whether to time the detector")] = True,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time training steps and their parts, sampling and scoring, on random weights; prints tables.

    Utilisation compares with the larger of a matrix product and a convolution, measured in the same run and precision.

    Example: sidactl bench tiny-digits --against eager
    """
    from sidactl.commands import against as commands_against
    from sidactl.commands import bench as commands_bench

    options: dict[str, Any] = {"mode": mode, "batch_size": batch_size, "num_rounds": rounds, "num_steps": steps}
    options |= {"device": device, "tell": console.note}
    report: Any
    if against in (None, "eager"):
        if against_command is not None:
            raise SidaError("--against-command needs --against FOLDER, which it is started in", "Name the folder.")
        settings = commands_bench.sweep(device) if sweep else [SamplingForm(**overrides)]
        is_beside = against is not None
        report = commands_bench.run(
            teacher, **options, settings=settings, against_eager=is_beside, with_detector=detector
        )
    elif sweep:
        raise SidaError("--sweep tries settings of ours alone, got --against FOLDER as well", "Leave one of them out.")
    else:
        folder = Path(against)
        report = commands_against.run(
            folder, against_command, teacher, **options, form=overrides, within_sec=against_within
        )
    if as_json:
        console.print_json(report.to_json())
        return
    for columns, rows, title in report.tables():
        console.table(columns, rows, title=title)
