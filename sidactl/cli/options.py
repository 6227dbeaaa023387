"""Options that several commands share, and flags made of a recipe's fields."""

import ast
import dataclasses
import inspect
import json
import os
import stat
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, get_args, get_origin

import typer

from sidactl import units
from sidactl.commands import inputs
from sidactl.engine import heartbeat
from sidactl.errors import SidaError
from sidactl.recipes import HeunSpec, NetSpec, SamplingForm, TeacherRecipe, flag_of, recipe_classes

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


def is_device(stream: TextIO) -> bool:
    """Whether it is a terminal, or /dev/null as in cron and CI."""
    with suppress(OSError, ValueError):
        return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return False


def from_pipe(ref: str | None) -> str:
    """The artifact named, or the one line that the command before wrote into the pipe."""
    if ref not in (None, "-"):
        assert ref is not None
        return ref
    if is_device(sys.stdin):
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


def piped(ref: str | None) -> str | None:
    """What was named; - stands for a line of the pipe."""
    return from_pipe(ref) if ref == "-" else ref


def ref_option(doc: str, *names: str) -> Any:
    """An option that names an artifact."""
    return typer.Option(*names, metavar="REF", help=doc, callback=piped)


def with_signature(
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
    return with_signature(with_flag, command, [*inspect.signature(command).parameters.values(), flag])


_NOT_FLAGS: Mapping[type, set[str]] = {
    **{cls: {"teacher", "mode", "dataset", "adversarial"} for cls in recipe_classes()},
    TeacherRecipe: {"dataset", "net"},
    NetSpec: {"architecture", "sigma_min", "sigma_max"},
    HeunSpec: {"num_steps", "convention"},
}

_NONE = object()
"""what "none" on the command line becomes until the field is set, since None means that a flag was not given"""


@cache
def _field_docs(cls: type) -> Mapping[str, str]:
    """The documentation strings below a dataclass's fields, those that it inherits included."""
    docs: dict[str, str] = {}
    for base in cls.__bases__:
        docs |= _field_docs(base) if dataclasses.is_dataclass(base) else {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
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
                return tuple((float if "float" in str(field.type) else int)(part) for part in text.split(","))
            return (int if field.type in (int, int | None) else float)(text)
        except ValueError:
            several = "numbers such as 1,0.5" if "float" in str(field.type) else "whole numbers such as 1,2,2"
            what = several if "tuple" in str(field.type) else "a number"
            raise SidaError(f"{flag} must be {what}, got {text!r}", "Pass another value.") from None

    return parse


def recipe_flags(*classes: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per field of these dataclasses; it gets those that were given, as `overrides`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags: dict[str, tuple[dataclasses.Field[Any], str]] = {}
        for cls in classes:
            docs = _field_docs(cls)
            for field in dataclasses.fields(cls):
                if field.name not in _NOT_FLAGS.get(cls, ()) and field.name not in flags:
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
        return with_signature(with_flags, command, [*own, *options])

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

Steps = Annotated[int | None, typer.Option(help="number of sampling steps; the network's own if not given")]

Sampler = Annotated[str | None, typer.Option(metavar="NAME", help="one-step, or heun for a teacher")]


def drawn_by(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of SamplingForm and HeunSpec, as functions take them that draw images."""
    settings = {f.name for f in dataclasses.fields(SamplingForm)}
    heun = {name: value for name, value in overrides.items() if name not in settings}
    return {"setting": SamplingForm(**{n: v for n, v in overrides.items() if n in settings}), "heun": heun or None}


def parsed_count(text: str | None, flag: str, least: int = 1, what: str = "images") -> int | None:
    count = None if text is None else units.parse_count(text, flag, what)
    if count is not None and count < least:
        named = "sample count" if flag == "--num" else flag
        raise SidaError(f"{named} must be >= {least}, got {count}", f"Pass {flag} {least} or more.")
    return count
