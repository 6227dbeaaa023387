"""The sidactl command: parses, calls ops inside each command's body, prints. stdout is data, stderr is for people."""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import signal
import stat
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, get_args, get_origin

import click
import typer
from click_default_group import DefaultGroup
from typer.core import TyperGroup

from sidactl import __version__, ui, units
from sidactl.commands import inputs
from sidactl.engine import heartbeat
from sidactl.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, SidaError
from sidactl.recipes import Adversarial, Execution, HeunSpec, NetSpec, Recipe, Setting, TeacherRecipe, flag_of

if TYPE_CHECKING:
    from sidactl.catalog import Published, Row
    from sidactl.commands.scores import Score
    from sidactl.loop import Event
    from sidactl.store import Artifact


class RefGroup(DefaultGroup, TyperGroup):  # type: ignore[misc]  # click-default-group has no types
    """A group whose default command is `show`, reached only by words that are shaped like an oid or a ref."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.default_cmd_name = "show"

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        is_oid = len(word) >= 4 and all(c in "0123456789abcdef" for c in word)
        if word in self.commands or is_oid or "/" in word:
            resolved: tuple[str | None, click.Command | None, list[str]] = super().resolve_command(ctx, args)
            return resolved
        near = difflib.get_close_matches(word, self.commands, n=1)
        what = "option" if word.startswith("-") else "command"
        raise SidaError(f"No such {what} {word!r}", f"Did you mean {near[0]!r}?" if near else "Try it with --help.")


app = typer.Typer(
    cls=RefGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", envvar="SIDACTL_RUN", help="run directory; ./sida-run if not given"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead")]
Force = Annotated[bool, typer.Option("--force", help="do it again even if it was asked before")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N; a GPU if there is one")]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="a ref of your own for the result")]
Offline = Annotated[bool, typer.Option("--offline", envvar="SIDACTL_OFFLINE", help="never touch the network")]
Mirror = Annotated[
    str | None, typer.Option(metavar="URL", envvar="SIDACTL_MIRROR", help="base URL or folder to fetch from")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and write nothing")]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="PATH|NAME",
        help="the VAE of latents: a folder that diffusers saved, or OWNER/NAME in huggingface.co; if not given that of "
        "the network, or stabilityai/sd-vae-ft-mse",
    ),
]
Ref = Annotated[
    str | None, typer.Argument(metavar="[REF]", help="oid, prefix, ref or name; read from a pipe if left out")
]


def _is_device(stream: TextIO) -> bool:
    """Whether it is a terminal, or /dev/null as in cron and CI."""
    with suppress(OSError, ValueError):
        return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return False


def _from_pipe(ref: str | None) -> str:
    """The artifact named, or the one line that the command before wrote into the pipe."""
    if ref not in (None, "-"):
        assert ref is not None
        return ref
    if _is_device(sys.stdin):
        raise SidaError("an artifact is needed, got none", "Name one (see sidactl ls), or pipe one in.")
    try:
        text = sys.stdin.read(_MOST_PIPED).strip()
    except (UnicodeDecodeError, OSError):
        text = "\0"
    if not text:
        raise SidaError("the pipe is empty: the command before this one gave no artifact", "See its message.")
    if "\0" in text:
        raise SidaError(
            "a pipe must bring the name of an artifact, got bytes", "Give the file's name, not its content."
        )
    if text.startswith(("{", "[")):
        return _oid_in(text)
    if (num_lines := len(text.splitlines())) > 1:
        raise SidaError(f"a pipe must bring one artifact, got {num_lines} lines", "Name one at a time.")
    return text


_MOST_PIPED = 1 << 24
"""characters read from a pipe at most: far more than any artifact as JSON"""


def _oid_in(text: str) -> str:
    """The oid in what a command prints with --json."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    oid = document.get("oid") if isinstance(document, dict) else None
    if not isinstance(oid, str):
        raise SidaError('a JSON document in a pipe must hold an "oid", got none', "Pipe in the oid or name alone.")
    return oid


def _piped(ref: str | None) -> str | None:
    """What was named; - stands for a line of the pipe."""
    return _from_pipe(ref) if ref == "-" else ref


def _ref_option(doc: str, *names: str) -> Any:
    """An option that names an artifact."""
    return typer.Option(*names, metavar="REF", help=doc, callback=_piped)


def _print_version(asked: bool) -> None:
    if asked:
        ui.print_data(__version__)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="show a traceback with an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Distill diffusion models into one-step generators (SiD, SiDA, SiD2A), sample them, score them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # an option of every command, as it is added to one that has failed
    given = [word for word in given if word != "--debug"]
    ui.mend_streams()
    # Training has handlers of its own; everything else ends on SIGTERM as it does on Ctrl-C.
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, handler if callable(handler) else signal.default_int_handler)
    try:
        _check_processes()
        code = app(given, standalone_mode=False, prog_name="sidactl") or 0
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # typer had made a mere number of it
    except SidaError as error:
        if debug:
            traceback.print_exc()
        code = ui.fail(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = EXIT_USAGE
    except click.NoSuchOption as error:
        near = " or ".join(map(repr, sorted(error.possibilities or [])))
        hint = f"Did you mean {near}?" if near else "Try it with --help."
        code = ui.fail(SidaError(f"No such option {error.option_name!r}", hint))
    except click.ClickException as error:
        code = ui.fail(SidaError(error.format_message().rstrip("."), "Try it with --help."))
    except (KeyboardInterrupt, click.exceptions.Abort):
        code = ui.fail(SidaError("interrupted", "Repeat the same command to go on.", exit_code=EXIT_INTERRUPTED))
    except Exception as error:  # the last resort: a bug of ours, told in one line
        if debug:
            raise
        code = ui.fail(_told_plainly(error))
    sys.exit(code)


def _check_processes() -> None:
    """Raises SidaError where torchrun's variables are there in part or do not fit: some process would be silent."""
    names = ("RANK", "WORLD_SIZE")
    if there := [name for name in names if name in os.environ]:
        if len(there) < len(names):
            (missing,) = set(names) - set(there)
            raise SidaError(f"{there[0]} is set, {missing} is not", f"Start it with torchrun, or unset {there[0]}.")
        rank, size = (os.environ[name] for name in names)
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise SidaError(
                f"RANK must be a number from 0 to WORLD_SIZE - 1, got RANK={rank} and WORLD_SIZE={size}",
                "Start it with torchrun, or unset both.",
            )
        if int(size) > 1 and "MASTER_ADDR" not in os.environ:
            raise SidaError(
                f"WORLD_SIZE is {size}, but MASTER_ADDR, where the processes meet, is not set",
                "Start it with torchrun, or unset RANK and WORLD_SIZE.",
            )


def _told_plainly(error: Exception) -> SidaError:
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError) and frames[-1].startswith("click."):  # in printing --help
        return ui.stdout_error(error)
    if "torch" in sys.modules:
        from sidactl.engine.failures import told_plainly

        if plain := told_plainly(error):
            return plain
    told = f"this is a bug in sidactl: {type(error).__name__}: {error}"
    return SidaError(told, "Repeat with --debug and report what it prints.", exit_code=EXIT_FAILED)


def _signed(
    function: Callable[..., None], command: Callable[..., Any], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """The function under the command's name and help, with these parameters as its options."""
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    function.__name__, function.__doc__ = command.__name__, command.__doc__
    return function


def with_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that torchrun may start the option by which its processes watch each other."""
    option = typer.Option(
        "--hang-timeout",
        metavar="SECONDS",
        envvar=heartbeat.VARIABLE,
        help="under torchrun: how long a process may give no sign of life before the run ends",
    )

    def with_flag(hang_timeout: str, **arguments: Any) -> None:
        os.environ[heartbeat.VARIABLE] = str(heartbeat.seconds_of(hang_timeout))
        command(**arguments)

    flag = inspect.Parameter(
        "hang_timeout",
        inspect.Parameter.KEYWORD_ONLY,
        default=str(heartbeat.DEFAULT_SEC),
        annotation=Annotated[str, option],
    )
    return _signed(with_flag, command, [*inspect.signature(command).parameters.values(), flag])


# Getting started: teachers and datasets


@app.command("fetch-teacher")
def fetch_teacher(
    source: Annotated[str, typer.Argument(help="a name from ls --catalog, a URL, or a .pkl or .safetensors file")],
    kind: Annotated[str | None, typer.Option("--as", metavar="KIND", help="teacher or generator, for a file")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="what a file's network was trained on")] = None,
    name: Name = None,
    offline: Offline = False,
    mirror: Mirror = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="refuse more, such as 500M; 16G where no size is known")
    ] = None,
    run: Run = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Fetch a network by name; prints its oid.

    Example: sidactl fetch-teacher tiny-digits
    """
    from sidactl.commands import fetch

    if kind not in (None, "teacher", "generator"):
        raise SidaError(f"--as must be teacher or generator, got {kind!r}", "Leave it out to go by the file.")
    with _ticking("fetch-teacher", unit="bytes") as tick:
        artifact = fetch.fetch_teacher(
            source,
            kind=kind,  # type: ignore[arg-type]  # checked above
            dataset=dataset,
            name=name,
            offline=offline,
            mirror=mirror,
            max_bytes=_count(max_bytes, "--max-bytes", what="bytes"),
            run=run,
            force=force,
            progress=tick,
            say=ui.note,
        )
    _print_artifact(artifact, as_json)


@app.command("prepare-data")
@with_processes
def prepare_data(
    source: Annotated[
        str | None, typer.Argument(help="tiny-digits, cifar10, a folder, zip, tar.gz, IDX or npz file; see above")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="the paper's preparation of cifar10, imagenet64, ffhq64, afhqv2-64, imagenet512 or fashion32",
        ),
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="center-crop, center-crop-wide, center-crop-dhariwal or pad"),
    ] = None,
    resolution: Annotated[str | None, typer.Option(metavar="WxH", help="size to scale to, such as 64x64")] = None,
    max_images: Annotated[
        str | None, typer.Option(metavar="COUNT", help="only so many, by class in turn; at random without classes")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(metavar="1|3", help="1 makes all images grey (ITU-R 601), 3 all RGB")
    ] = None,
    exif_rotate: Annotated[
        bool, typer.Option("--exif-rotate", help="turn images as their orientation tag says; ignored if not given")
    ] = False,
    class_order: Annotated[
        str, typer.Option(metavar="NAME", help="of folders that are whole numbers: numeric, or text (1, 10, 2)")
    ] = "numeric",
    convention: Annotated[
        str | None, typer.Option(metavar="NAME", help="edm or edm2: classes, order and modes as its tool takes them")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="decoding threads; one per core if not given")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out images that cannot be read")] = False,
    latents: Annotated[
        bool, typer.Option("--latents", help="the VAE's latents of the images, for EDM2; the images are not kept")
    ] = False,
    vae: Vae = None,
    labels_only: Annotated[
        bool,
        typer.Option(
            "--labels-only",
            help="classes without images, of a dataset.json, its URL or imagenet512-labels, for mode sid",
        ),
    ] = False,
    classes: Annotated[
        int | None, typer.Option(metavar="K", help="classes without images or source: K of them, equally often")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="feature statistics, too, which scores compare with")] = False,
    detector: Annotated[str | None, typer.Option(metavar="NAME", help="of --stats; the dataset's own")] = None,
    name: Name = None,
    offline: Offline = False,
    mirror: Mirror = None,
    run: Run = None,
    device: Device = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Make a dataset from images; prints its oid.

    SOURCE is a folder or zip of images (a zip in the EDM or EDM2 layout is verified and taken as it is), ImageNet as a
    folder, Kaggle's zip or ILSVRC2012_img_train.tar, cifar-10-python.tar.gz, MNIST's IDX files, an npz batch,
    tiny-digits, or cifar10, which is downloaded; with --latents a dataset artifact, too.

    With --latents images are encoded as they are read, and kept nowhere. To score against your own images make their
    dataset first: prepare-data PATH --name NAME, then prepare-data dataset/NAME --latents.

    Classes come from dataset.json, or else from the folders, in a zip as well: numbered from 0 in the order of their
    names, and by number where all are whole numbers. Hidden and system files are passed over.

    Image files become 8-bit RGB unless --channels says otherwise: grey, palette and CMYK images are converted, alpha is
    dropped, the first frame of an animation is taken, RGB of 16 bits is cut to 8, orientation tags are ignored unless
    --exif-rotate is given. Refused: 16-bit grey, damaged files, absurd sizes.

    An interrupted preparation goes on with the same command.

    Example: sidactl prepare-data tiny-digits
    """
    from sidactl.commands import dataset_stats, prepare

    if detector and not stats:
        raise SidaError("--detector is for --stats, got it alone", "Pass --stats, or leave it out.")
    with _ticking("prepare-data") as tick:
        artifact = prepare.prepare_data(
            source,
            preset=preset,
            transform=transform,
            resolution=None if resolution is None else inputs.size_of(resolution, "--resolution"),
            max_images=_count(max_images, "--max-images"),
            channels=channels,
            exif_rotate=exif_rotate,
            class_order=class_order,  # type: ignore[arg-type]  # prepare checks it, as the next
            convention=convention,  # type: ignore[arg-type]
            workers=workers,
            skip_bad=skip_bad,
            latents=latents,
            with_stats=stats,
            vae=vae,
            labels_only=labels_only,
            classes=classes,
            name=name,
            offline=offline,
            mirror=mirror,
            run=run,
            device=device,
            force=force,
            say=ui.note,
            tick=tick,
        )
    _tell_skipped(artifact.results)
    _tell_classes(artifact.results)
    if stats:
        with _ticking("feature statistics") as tick:
            made = dataset_stats.dataset_stats(
                artifact.oid, detector=detector, run=run, device=device, force=force, tick=tick
            )
        ui.note(f"feature statistics: {made.oid}")
    _print_artifact(artifact, as_json)


def _tell_skipped(results: Mapping[str, Any]) -> None:
    """One warning with the first few of the images that were left out."""
    skipped = results["skipped"]
    if skipped:
        first = "; ".join(f"{name} {reason}" for name, reason in skipped[:3])
        rest = f"; and {len(skipped) - 3:,} more" if len(skipped) > 3 else ""
        total = results["num_images"] + len(skipped)
        ui.warn(f"{len(skipped):,} of {total:,} images were left out: {first}{rest}")


def _tell_classes(results: Mapping[str, Any]) -> None:
    """One line with the first few classes by index and name, and those without images."""
    names, counts = results.get("class_names"), results["class_counts"]
    if names:
        empty = sum(not count for count in counts)
        ui.note(f"{_named_classes(names)}{f'; {empty:,} of them without images' if empty else ''}")


def _named_classes(names: Sequence[str]) -> str:
    first = ", ".join(f"{index} {name}" for index, name in enumerate(names[:5]))
    return f"{len(names):,} classes: {first}{', ...' if len(names) > 5 else ''}"


# Training. A command's recipe flags are made from the recipe's fields, so that each is written once.

_NOT_FLAGS: Mapping[type, set[str]] = {
    Recipe: {"teacher", "mode", "dataset", "adversarial"},
    TeacherRecipe: {"dataset", "net"},
    NetSpec: {"architecture", "sigma_min", "sigma_max"},
    HeunSpec: {"num_steps", "convention"},
}
_NONE = object()
"""what "none" on the command line becomes until the field is set, since None means that a flag was not given"""


@cache
def _field_docs(cls: type) -> Mapping[str, str]:
    """The documentation strings below a dataclass's fields."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[ast.unparse(field.target)] = str(text.value.value)
    return docs


def _metavar(field: dataclasses.Field[Any]) -> str:
    for kind in (field.type, *get_args(field.type)):
        if get_origin(kind) is Literal:
            several = ",..." if get_origin(field.type) is tuple else ""
            return "|".join(get_args(kind)) + several
    if inputs.is_count(field):
        return "COUNT,..." if "tuple" in str(field.type) else "COUNT"
    return "true|false" if field.type is bool else "VALUE"


def _parser(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    flag, allows_none = flag_of(field.name), "None" in str(field.type)

    def parse(text: str) -> Any:
        if allows_none and text.lower() == "none":
            return _NONE
        if field.type is bool:
            if text.lower() not in ("true", "false"):
                raise SidaError(f"{flag} must be true or false, got {text!r}", f"Pass {flag} true.")
            return text.lower() == "true"
        if inputs.is_count(field) and "tuple" in str(field.type):
            return inputs.counts_of(text, flag) if text != "none" else ()
        if inputs.is_count(field):
            return units.parse_count(text, flag)
        if "tuple[typing.Literal" in str(field.type):
            return inputs.words_of(text)
        if "Literal" in str(field.type) or field.type is str:
            return text
        try:
            if "tuple" in str(field.type):
                return tuple(int(part) for part in text.split(","))
            return (int if field.type in (int, int | None) else float)(text)
        except ValueError:
            what = "whole numbers such as 1,2,2" if "tuple" in str(field.type) else "a number"
            raise SidaError(f"{flag} must be {what}, got {text!r}", "Pass another value.") from None

    return parse


def recipe_flags(*classes: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per field of these dataclasses; it gets those that were given, as `overrides`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags: dict[str, tuple[dataclasses.Field[Any], str]] = {}
        for cls in classes:
            docs = _field_docs(cls)
            for field in dataclasses.fields(cls):
                if field.name not in _NOT_FLAGS.get(cls, ()):
                    # Of a distillation the catalog's recipe has numbers of its own.
                    default = f" [default: {field.default}]" if cls is TeacherRecipe else ""
                    flags[field.name] = field, docs.get(field.name, "") + default

        def with_flags(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in flags}
            overrides = {name: None if v is _NONE else v for name, v in given.items() if v is not None}
            command(**arguments, overrides=overrides)

        own = [p for p in inspect.signature(command).parameters.values() if p.name != "overrides"]
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_option(name, field, doc),
            )
            for name, (field, doc) in flags.items()
        ]
        return _signed(with_flags, command, [*own, *options])

    return decorate


def _option(name: str, field: "dataclasses.Field[Any]", doc: str) -> Any:
    """The annotation of a field's option; what is off by default is a switch."""
    if field.default is False:
        return Annotated[bool | None, typer.Option(flag_of(name), help=doc)]
    return Annotated[Any, typer.Option(flag_of(name), parser=_parser(field), metavar=_metavar(field), help=doc)]


Log = Annotated[
    list[str] | None,
    typer.Option("--log", metavar="NAME", help="tensorboard or wandb, beside events.jsonl; may be given twice"),
]


@app.command("train-teacher")
@recipe_flags(TeacherRecipe, NetSpec)
def train_teacher(
    dataset: Annotated[
        str,
        typer.Argument(
            help="a dataset artifact, a name, or a folder or file of images; - reads a pipe", callback=_piped
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

    with _watching(log) as watch:
        artifact = train.train_teacher(
            dataset, name=name, net=net, run=run, device=device, force=force, say=ui.note, watch=watch, **overrides
        )
    _print_artifact(artifact, as_json)


TeacherRef = Annotated[str, _ref_option("a teacher artifact or a name from ls --catalog")]
RealImages = Annotated[str | None, _ref_option("real images; the teacher's own if not given")]
Compared = Annotated[
    str | None, _ref_option("what to score against; the dataset's published statistics, or else its images", "--ref")
]
NoScore = Annotated[bool, typer.Option("--no-score", help="score nothing; the last generator is the result")]
RunDetector = Annotated[
    str | None,
    typer.Option(
        "--detector",
        metavar="NAME",
        help="what scores the run: inception, dinov2, tiny-digits, random-features or a file; the reference's own, "
        "of a dataset of your own random-features",
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


@app.command("distill")
@with_processes
@recipe_flags(Recipe, Adversarial, Execution)
def distill(
    teacher: TeacherRef,
    overrides: Mapping[str, Any],
    mode: Annotated[str, typer.Option(help="sid, sida or sid2a")] = "sida",
    generator: Annotated[str | None, _ref_option("where sid2a starts")] = None,
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
    planned |= {"vae": vae, "teacher_score": teacher_score}
    others = {"name": name, "run": run, "force": force}
    _distill(planned, others, overrides, log, as_json, dry_run)


@app.command("finetune-sid2a")
@with_processes
@recipe_flags(Recipe, Adversarial, Execution)
def finetune_sid2a(
    teacher: TeacherRef,
    generator: Annotated[str, _ref_option("the generator to start from, such as generator/best")],
    overrides: Mapping[str, Any],
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
    """Go on from a SiD generator; prints an oid.

    Example: sidactl finetune-sid2a --teacher tiny-digits --generator generator/tiny-digits-sid
    """
    planned: dict[str, Any] = {
        "teacher": teacher,
        "mode": "sid2a",
        "generator": generator,
        "dataset": dataset,
        "reference": reference,
    }
    planned |= {"score": not no_score, "detector": detector, "allow_untrained": allow_untrained, "device": device}
    planned |= {"vae": vae, "teacher_score": teacher_score}
    others = {"name": name, "run": run, "force": force}
    _distill(planned, others, overrides, log, as_json, dry_run)


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
        from sidactl import logs

        logs.check(log or ())
        _print_plan(planned, others["run"], overrides, execution)
        return
    with _watching(log) as watch:
        artifact = commands_distill.distill(
            **planned, **others, execution=execution, say=ui.note, watch=watch, **overrides
        )
    _print_generator(artifact, as_json)


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
        ui.warn(warning)
    for note in planned.notes:
        ui.note(note)
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
    ui.print_json(
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
    "generator_adversarial_loss": "adversarial",
    "denoising_loss": "denoising",
}


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What functions call with events of training, or with how many images are done; `part` shows parts of the work."""

    tell: Callable[..., None]
    part: Callable[..., Callable[[int, int], None]]

    def __call__(self, *told: Any) -> None:
        self.tell(*told)


@contextmanager
def _watching(log: Sequence[str] | None) -> Iterator[_Shown]:
    """A display of a training run, opened by its first event, and the loggers that were asked for."""
    from sidactl import logs

    with ui.display() as display:
        shown: Callable[[], ui.Progress] | None = None
        score_name = "score"

        def watch(event: "Event") -> None:
            nonlocal shown, score_name
            values = event.values
            if event.kind == "started":
                score_name = values.get("score_name", score_name)
                shown = partial(display.show, values["title"], values["duration_nimg"])
                shown()
                return
            assert shown
            progress = shown()
            if event.kind == "progress":
                losses = {_LOSS_NAMES[k]: f"{v:.3g}" for k, v in values.items() if k in _LOSS_NAMES}
                skipped = {"skipped updates": values["skipped_steps"]} if values["skipped_steps"] else {}
                progress.update(event.nimg, {"stage": values["stage"], **losses, **skipped})
            elif event.kind == "evaluation":
                scores = {score_name: values["score"], **{name: v for name, v in values.items() if name != "score"}}
                told = {name: f"{value:.4g}" for name, value in scores.items()}
                progress.update(event.nimg, told)
                listed = ", ".join(f"{name} {value}" for name, value in told.items())
                progress.note(f"{listed} after {event.nimg:,} images")
            elif event.kind == "resumed":
                progress.note(f"going on from the checkpoint at {event.nimg:,} images")
                progress.update(event.nimg)
            elif "message" in values:
                progress.note(f"{'warning: ' if event.kind == 'warning' else ''}{values['message']}")

        with logs.watching(log or (), watch) as watcher:
            yield _Shown(watcher, display.part)


@contextmanager
def _ticking(title: str, unit: str = "images") -> Iterator[_Shown]:
    """A display of work that counts images, or bytes, opened when it first says how far it is."""
    with ui.display() as display:
        yield _Shown(lambda done, total: display.show(title, total or None, unit).update(done), display.part)


@app.command()
@recipe_flags(Setting)
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
    against: Annotated[str | None, typer.Option(metavar="eager", help="time the eager fp32 step in turn, too")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="try all settings of the device")] = False,
    detector: Annotated[bool, typer.Option("--detector/--no-detector", help="whether to time the detector")] = True,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time a training step part by part, sampling and scoring, on random weights; prints tables.

    Utilisation compares with the larger of a matrix product and a convolution, measured in the same run and precision.

    Example: sidactl bench tiny-digits --against eager
    """
    from sidactl import bench as benchmark

    if against not in (None, "eager"):
        raise SidaError(f"--against must be eager, got {against!r}", "Leave it out, or pass --against eager.")
    one = Setting(**overrides)
    report = benchmark.run(
        teacher,
        mode=mode,
        batch_size=batch_size,
        num_rounds=rounds,
        num_steps=steps,
        settings=benchmark.sweep(device) if sweep else [one],
        against_eager=against is not None,
        with_detector=detector,
        device=device,
        tell=ui.note,
    )
    if as_json:
        ui.print_json(report.to_json())
        return
    for columns, rows, title in report.tables():
        ui.table(columns, rows, title=title)


# Sampling and scores


Steps = Annotated[int | None, typer.Option(help="number of sampling steps; the network's own if not given")]
Sampler = Annotated[str | None, typer.Option(metavar="NAME", help="one-step, or heun for a teacher")]


def _drawn_by(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of Setting and HeunSpec, as functions take them that draw images."""
    settings = {f.name for f in dataclasses.fields(Setting)}
    heun = {name: value for name, value in overrides.items() if name not in settings}
    return {"setting": Setting(**{n: v for n, v in overrides.items() if n in settings}), "heun": heun or None}


@app.command()
@with_processes
@recipe_flags(Setting, HeunSpec)
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
    guide: Annotated[str | None, _ref_option("a weaker teacher to move away from")] = None,
    guidance: Annotated[float, typer.Option(help="how far, 1 = not at all")] = 1.0,
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
    chosen = units.parse_seeds(seeds) if seeds is not None else range(_count(num, "--num") or 64)
    from sidactl.commands import sample as commands_sample

    with _ticking("sample") as tick:
        result = commands_sample.sample(
            _from_pipe(ref),
            seeds=chosen,
            class_index=int(class_index) if class_index and re.fullmatch("-?[0-9]{1,9}", class_index) else class_index,
            steps=steps,
            sampler=sampler,  # type: ignore[arg-type]  # ops checks it, with a better error
            guide=guide,
            guidance=guidance,
            vae=vae,
            **_drawn_by(overrides),
            name=name,
            run=run,
            device=device,
            force=force,
            say=ui.note,
            tick=tick,
        )
    _print_artifact(result.artifact, as_json)


def score_flags(command: Callable[..., "Score"]) -> Callable[..., None]:
    """Gives a scoring command the options of all, as `options` for `scores.evaluate`; prints its score."""

    def shared(
        ref: Ref = None,
        reference: Annotated[str | None, _ref_option("dataset or statistics: oid, name, URL or file", "--ref")] = None,
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
        arguments |= _drawn_by(overrides)
        arguments["num"] = _count(arguments["num"], "--num", least=2)
        limit = special.pop("fail_above", None)
        if limit is not None and not limit >= 0:
            raise SidaError(f"--fail-above must be a number of at least 0, got {limit}", "Pass another.")
        with _ticking(command.__name__.replace("_", "-")) as tick:
            score = command(_from_pipe(ref), arguments | {"tick": tick, "say": ui.note}, **special)
        # The display has ended: what it draws last would erase a result that is printed within.
        against = commands_scores.against(score, arguments["run"])
        _print_score(score, against, as_json, all_lines=command.__name__ == "evaluate")
        if limit is not None and float(score) > limit:
            raise SidaError(f"the score {float(score):.6g} is above {limit:g}", "", exit_code=EXIT_FAILED)

    parameters = [*inspect.signature(shared).parameters.values(), *own]
    return with_processes(recipe_flags(Setting, HeunSpec)(_signed(with_flags, command, parameters)))


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


# The run directory


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

    ref = _from_pipe(ref)
    if rows := inventory.unfetched(ref, run=run):
        _print_entries(rows, as_json)
        return
    described = inventory.show(ref, run=run)
    if as_json:
        ui.print_json(described.to_json())
        return
    artifact = described.artifact
    ui.print_data(f"{artifact.kind} {artifact.oid}")
    for name in described.names:
        ui.print_data(f"  name     {name}")
    for role, parent in described.ancestors:
        ui.print_data(f"  {'from':8} {role}: {parent.kind} {parent.oid[:12]}")
    for name, path in described.paths.items():
        ui.print_data(f"  {'file':8} {name} ({units.format_bytes(artifact.files[name].size_bytes)}): {path}")
    for title, values in (("setting", artifact.params), ("result", artifact.results)):
        for key, value in values.items():
            told = _named_classes(value) if key == "class_names" else value  # type: ignore[arg-type]
            ui.print_data(f"  {title:8} {key}: {_short(told)}")
    for score in described.scores:
        for line in _score_lines(score, commands_scores.against(score, run)):
            ui.print_data(f"  {'score':8} {line}")
    for name, number in described.published.items():
        ui.print_data(f"  {number.source:8} {_published(name, number)}")


def _print_entries(rows: "Sequence[Row]", as_json: bool) -> None:
    """What the catalog says of a name that is not in the run directory."""
    if as_json:
        ui.print_json({"name": rows[0].name, "catalog": [_row_json(row) for row in rows]})
        return
    for row in rows:
        ui.print_data(f"{row.kind} {row.name}, in the catalog, not in the run directory")
        facts = {"about": row.about, "licence": row.licence, "url": row.url}
        facts["size"] = None if row.size_bytes is None else units.format_bytes(row.size_bytes)
        for name, fact in facts.items():
            if fact is not None:
                ui.print_data(f"  {name:8} {fact}")
        for name, number in row.scores.items():
            ui.print_data(f"  {number.source:8} {_published(name, number)}")


def _published(name: str, number: "Published") -> str:
    spread = "" if number.std is None else f" +- {number.std:g}"
    return f"{name} {number.value:g}{spread}; 50,000 images"


def _row_json(row: "Row") -> dict[str, Any]:
    return row._asdict() | {"scores": {name: score._asdict() for name, score in row.scores.items()}}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


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
        ui.print_json([{"oid": a.oid, "kind": a.kind, "names": names} for a, names in found])
        return
    parts = inventory.ls_in_parts(kind, run=run)
    for part in chain([next(parts, [])], parts):  # a table without a row says that there is none
        rows = [[a.kind, a.oid[:12], ", ".join(names), _size(a)] for a, names in part]
        ui.table(["kind", "oid", "names", "size"], rows)


def _print_unfinished(run: Path | None, as_json: bool) -> None:
    from datetime import UTC, datetime

    from sidactl.commands import inventory

    found = inventory.unfinished(run=run)
    place = None if run is None else str(run)
    if as_json:
        ui.print_json(
            [
                {
                    "key": each.key,
                    "command": each.question and each.question.command,
                    "title": each.question and each.question.title,
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
            each.question.title if each.question else "unknown, of an older version",
            _images(each.nimg, each.total_nimg),
            None if each.checkpoint_nimg is None else f"{each.checkpoint_nimg:,}",
            units.format_bytes(each.size_bytes),
            f"process {each.process or '?'} works on it" if each.is_worked_on else "waits",
            datetime.fromtimestamp(each.touched).strftime("%Y-%m-%d %H:%M"),
        ]
        for each in found
    ]
    if not rows:
        ui.note("no unfinished work")
        return
    head = ["key", "what", "images", "checkpoint", "size", "state", "touched"]
    ways = [each.go_on(place) or "repeat its command, which says whether it goes on" for each in found]
    if not sys.stdout.isatty():
        ui.table([*head, "to go on"], [[*row, way] for row, way in zip(rows, ways, strict=True)])
        return
    ui.table(head, rows)
    for row, way in zip(rows, ways, strict=True):  # in lines of their own, so that they can be copied
        print(f"to go on with {row[0]}: {way}")


def _images(done: int | None, total: int | None) -> str | None:
    if done is None:
        return None
    return f"{done:,}" if total is None else f"{done:,} / {total:,}"


def _size(artifact: "Artifact") -> str:
    return units.format_bytes(sum(entry.size_bytes for entry in artifact.files.values()))


def _print_catalog(as_json: bool) -> None:
    from sidactl import catalog as catalog_module

    rows = catalog_module.rows()
    if as_json:
        ui.print_json([_row_json(row) for row in rows])
        return
    cells = [
        [r.kind, r.name, ", ".join(f"{n} {s.value:g}" for n, s in r.scores.items()), r.about, r.licence] for r in rows
    ]
    ui.table(["kind", "name", "published", "about", "licence"], cells)


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
        ui.print_json(held)
        return
    named: Mapping[str, Any] = held.get("contents", {file.name: held})
    for name, value in named.items():
        if not isinstance(value, dict) or "tensors" not in value:
            ui.print_data(f"{name}: {_short(value)}")
            continue
        tensors = value["tensors"]
        numel = sum(math.prod(tensor["shape"]) for tensor in tensors)
        of_class = f"{value['class']}, " if "class" in value else ""
        ui.print_data(f"{name}: {of_class}{len(tensors)} tensors, {numel:,} numbers")
        options = value.get("options") or value.get("metadata") or {}
        for option, given in options.items() if isinstance(options, dict) else options:
            ui.print_data(f"  option   {option}: {_short(given)}")
        for kind, count in Counter(part["class"] for part in value.get("parts", [])).items():
            ui.print_data(f"  part     {count} x {kind}")
        for tensor in tensors:
            ui.print_data(f"  tensor   {tensor['name']} {tensor['dtype']} {tensor['shape']}")


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
            ui.print_json({"path": str(signature), "signed_by": str(key)})
        card = signature.with_name(f"{signature.name}.md")
        beside = f"; {card} beside it is not part of that" if card.exists() and not signature.is_dir() else ""
        ui.note(f"{signature} is what was signed by this key{beside}")
        return
    problems = inventory.verify(run=run)
    if as_json:
        ui.print_json([{"object": name, "problem": problem} for name, problem in problems])
    else:
        for name, problem in problems:
            ui.print_data(f"{name}: {problem}")
    if problems:
        told = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the run directory"
        raise SidaError(told, "Each line says what helps.", exit_code=EXIT_FAILED)
    ui.note("no problem found")


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
        ui.print_json(dataclasses.asdict(report))
        return
    for name in report.removed:
        ui.print_data(name)
    verb = "would be removed" if dry_run else "removed"
    what = f"{len(report.removed)} unfinished" if live else f"{report.num_objects} objects"
    ui.note(f"{what}, {units.format_bytes(report.num_bytes)} {verb}")
    if report.num_young:
        ui.note(f"{report.num_young} objects that no ref reaches are spared: within the last hour a process made them")


@app.command()
def export(
    ref: Annotated[str, typer.Argument(help="oid, prefix or ref; - reads it from a pipe", callback=_piped)],
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
        ui.print_json({"path": str(path)})
    else:
        ui.print_data(str(path))


@app.command()
def env(run: Run = None, as_json: Json = False) -> None:
    """Print what a bug report needs.

    Example: sidactl env
    """
    from sidactl.commands import inventory

    described = inventory.env(run=run)
    if as_json:
        ui.print_json(described)
        return
    for name, value in described.items():
        ui.print_data(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")


# What commands share


def _count(text: str | None, flag: str, least: int = 1, what: str = "images") -> int | None:
    count = None if text is None else units.parse_count(text, flag, what)
    if count is not None and count < least:
        named = "sample count" if flag == "--num" else flag
        raise SidaError(f"{named} must be >= {least}, got {count}", f"Pass {flag} {least} or more.")
    return count


def _print_artifact(artifact: "Artifact", as_json: bool) -> None:
    if as_json:
        ui.print_json(
            {
                "oid": artifact.oid,
                "kind": artifact.kind,
                "params": dict(artifact.params),
                "results": dict(artifact.results),
            }
        )
    else:
        ui.print_data(artifact.oid)


def _print_generator(artifact: "Artifact", as_json: bool) -> None:
    from sidactl.commands.scores import score_name

    results: Mapping[str, Any] = artifact.results
    recipe, seen = Recipe.from_json(artifact.params["recipe"]), results["images_seen"]  # type: ignore[arg-type]
    look = f"Look at it: sidactl export {artifact.oid[:12]} FOLDER"
    if untrained := recipe.untrained(seen):
        start = "its teacher" if recipe.mode != "sid2a" else "the generator that it started from"
        what = f"it is {start}, unchanged" if "generator" in untrained else "it is from before the adversarial part"
        ui.warn(f"nothing of the {untrained[0]} was trained in the {seen:,} images of this generator: {what}")
    if results["selection_score"] is None:
        ui.note(f"last generator, not scored: {seen:,} images, one step. {look}")
    else:
        teacher = results["teacher_score"]
        beside = "not scored" if teacher is None else f"{teacher:.4g}"
        beside += " (published)" if "teacher_score_is" in results else ""
        of_best = {name: dict(points).get(seen) for name, points in results.get("also", {}).items()}
        also = "".join(f", {name} {value:.4g}" for name, value in of_best.items() if value is not None)
        scored = f"{score_name(str(results['detector']))} {results['selection_score']:.4g}{also}"
        ui.note(f"best generator: {scored} after {seen:,} images, one step; its teacher: {beside}. {look}")
    _print_artifact(artifact, as_json)


def _print_score(score: "Score", against: Mapping[str, str], as_json: bool, all_lines: bool) -> None:
    """The numbers of one metric in one line on stdout, and how they were made on stderr; or all of it on stdout."""
    for warning in score.warnings:
        ui.warn(warning)
    if as_json:
        ui.print_json(score.to_json())
    else:
        for line in _score_lines(score, against):
            (ui.print_data if all_lines else ui.note)(line)
        if not all_lines:
            ui.print_data(" ".join(f"{numbers['value']:.6g}" for numbers in score.to_json()["scores"].values()))
    _refuse_unkept(score)


def _refuse_unkept(score: "Score") -> None:
    """Ends with exit code 1, after the numbers, where they unexpectedly could not be kept."""
    if score.unkept:
        raise SidaError(f"the score above is not kept: {score.unkept}", "Free some space.", exit_code=EXIT_FAILED)


def _score_lines(score: "Score", against: Mapping[str, str]) -> list[str]:
    """One line per number: mean, standard deviation, minimum, how it was made, and what it compares with."""
    told = score.to_json()
    trials = f"{len(told['seeds'])} x {score.num:,} images" if told["seeds"] else f"{score.num:,} images"
    if "subset_of" in score.settings:
        of, seed = score.settings["subset_of"], score.settings["subset_seed"]
        trials = f"{score.num:,} of {of:,} images, drawn by seed {seed}"
    if "sampler" in score.settings:
        trials += f", drawn by {_told_sampler(score.settings['sampler'])}"

    if "vae" in score.settings:
        trials += f", decoded by the VAE {score.settings['vae']}"

    def line(name: str, n: Mapping[str, Any]) -> str:
        spread = "" if n["std"] is None else f" +- {n['std']:.2g} (minimum {n['minimum']:.4g})"
        beside = f", against {against[name]}" if name in against else ""
        return f"{name} {n['value']:.4g}{spread}; {trials}, {n['detector']}{beside}"

    return [line(name, n) for name, n in told["scores"].items()]


def _told_sampler(sampler: Mapping[str, Any]) -> str:
    """A sampler that is not the net's own, by the flags that differ from its kind's defaults."""
    from sidactl.commands.samplers import sampler_from

    spec = sampler_from(sampler)
    usual = type(spec)(num_steps=spec.num_steps)
    apart = [f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(usual, f.name)]
    words = [f"{flag_of(name)} {getattr(spec, name)}" for name in ("num_steps", *apart) if name != "convention"]
    return " ".join(["heun" if isinstance(spec, HeunSpec) else "one-step", *words])
