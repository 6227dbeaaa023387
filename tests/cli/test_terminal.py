"""Where output goes: results outlive the display on a terminal; streams that take nothing; pipes; Ctrl-C at once."""

import io
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sidactl import cli, errors
from sidactl.store import Store
from tests.conftest import SHORT
from tests.golden import golden

OID = r"[0-9a-f]{64}"
NUMBER = r"\d+\.\d+(e-\d+)?"
SHORT_FLAGS = [
    word
    for name, value in SHORT.items()
    for word in ("--" + name.removesuffix("_nimg").replace("_", "-"), "none" if value is None else str(value))
]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "sample": (["sample", "tiny-digits", "--num", "4", "--steps", "2"], OID),
    "prepare-data": (["prepare-data", "tiny-digits", "--max-images", "20", "--stats"], OID),
    "fetch-teacher": (["fetch-teacher", golden("networks/sida_gen_edm.pkl").absolute().as_uri()], OID),
    "train-teacher": (
        ["train-teacher", "tiny-digits", "--name", "x", "--duration", "64", "--batch-size", "32"],
        OID,
    ),
    "distill": (["distill", "--teacher", "tiny-digits", "--mode", "sida", *SHORT_FLAGS], OID),
    "fid": (["fid", "tiny-digits", "--num", "70"], NUMBER),
    "prec-recall": (["prec-recall", "tiny-digits", "--num", "70"], f"{NUMBER} {NUMBER}"),
    "inception-score": (["inception-score", "tiny-digits", "--num", "70"], NUMBER),
    "evaluate": (
        ["evaluate", "tiny-digits", "--num", "70"],
        r"FD tiny-digits \S+; 1 x 70 images, tiny-digits@\S+, against dataset tiny-digits",
    ),
}
"""every command with a display, and the result that it must leave in a line of its own"""


class Stream(io.StringIO):
    """A stream of a process: a terminal or a pipe."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end: it knows new lines, the cursor's way up, and erasing."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            number = int(part[2:-1] or "1") if part[2:-1].isdecimal() or part[2:-1] == "" else 0
            if part[-1] == "A":
                row = max(0, row - number)
            elif part[-1] == "K" and part[2:-1] == "2":
                lines[row] = ""
            else:
                assert part[-1] in "mhlK", f"the terminal of this test does not know {part!r}"
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


def cases() -> Iterator[Any]:
    """All commands with both streams on a terminal; with one or none in the quick tests two that stand for them."""
    for name in COMMANDS:
        for terminals in ("both", "stderr", "stdout", "none"):
            is_quick = terminals == "both" or name in ("sample", "fid")
            yield pytest.param(name, terminals, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "terminals"), list(cases()))
def test_every_result_is_there_after_the_display(
    name: str, terminals: str, fresh_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, result = COMMANDS[name]
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    stderr = Stream(terminals in ("both", "stderr"))
    stdout = stderr if terminals == "both" else Stream(terminals == "stdout")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--run", str(fresh_run)])
    monkeypatch.undo()
    assert stop.value.code == 0, stderr.getvalue()
    left = [line.rstrip() for line in screen(stdout.getvalue())]
    assert [line for line in left if re.fullmatch(result, line)], stdout.getvalue()
    if stderr.is_terminal:
        assert "\x1b[" in stderr.getvalue(), "nothing was drawn: this test shows nothing"
        drawn = "\n".join(screen(stderr.getvalue()))
        assert re.search(r"(images|[kM]B) \(\d+%\)", drawn)
        assert not re.search(r"\d\d:\d\d:\d\d ", drawn), "lines for those without a terminal"
    if terminals != "both":
        assert "\x1b" not in stdout.getvalue()
        assert all(re.fullmatch(f"{OID}|{NUMBER}( {NUMBER})?|.*@.*", line) for line in left[:-1])


def environment(run: Path, **changed: str) -> dict[str, str]:
    usual = {k: v for k, v in os.environ.items() if not k.startswith("SIDACTL_") and k != "NO_COLOR"}
    return usual | {"OMP_NUM_THREADS": "1", "SIDACTL_RUN": str(run), "TERM": "xterm-256color"} | changed


@pytest.mark.parametrize("name", ["fid", "evaluate"])
def test_a_process_in_a_real_terminal_shows_its_result(name: str, fresh_run: Path) -> None:
    words, result = COMMANDS[name]
    reading, writing = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sidactl", *words],
        stdout=writing,
        stderr=writing,
        env=environment(fresh_run, COLUMNS="80"),
    )
    os.close(writing)
    seen = b""
    try:
        while part := os.read(reading, 65536):
            seen += part
    except OSError:  # how Linux tells the end of a terminal
        pass
    os.close(reading)
    assert process.wait() == 0
    left = [line.rstrip() for line in screen(seen.decode().replace("\r\n", "\n"))]
    assert [line for line in left if re.fullmatch(result, line)], seen.decode()


# Streams that take or give nothing


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("streams") / "run"
    artifact = Store(run).put("samples", {"a.txt": b"hello"}, params={"name": "caf\u00e9"})
    Store(run).set_ref("samples", "x", artifact.oid)
    return run


def shell(command: str, run: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    """A command line of sh, in which $S is sidactl."""
    changed = {"S": f"{sys.executable} -m sidactl"} | changed
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=environment(run, **changed), timeout=120
    )


CLOSED = (
    "error: the result cannot be written to stdout: it is closed. "
    "What was made is kept: repeat the command with another stdout.\n"
)
FULL = CLOSED.replace("it is closed", "No space left on device")


@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        ("$S show x >&-", 1, "", CLOSED),
        ("$S show x >/dev/full", 1, "", FULL),
        ("$S ls --json >/dev/full", 1, "", FULL),
        ("$S --help >/dev/full", 1, "", FULL),
        ("$S --help >&-", 1, "", CLOSED),
        ("$S show nobody 2>&-", 2, "", ""),
        ("$S show nobody 2>/dev/full", 2, "", ""),
        ("$S gc --dry-run 2>&-", 0, "", ""),
        ("$S gc --dry-run 2>/dev/full", 0, "", ""),
        ("$S show x >&- 2>&- <&-", 1, "", ""),
        (
            "$S show <&-",
            2,
            "",
            "error: an artifact is needed, got none. Name one (see sidactl ls), or pipe one in.\n",
        ),
        ("$S show x | true", 0, "", ""),
        (
            "printf 'x\\ny\\n' | $S show",
            2,
            "",
            "error: a pipe must bring one artifact, got 2 lines. Name one at a time.\n",
        ),
        (
            "head -c 100 /dev/zero | $S show",
            2,
            "",
            "error: a pipe must bring the name of an artifact, got bytes. Give the file's name, not its content.\n",
        ),
        (
            "$S ls --json | $S show",
            2,
            "",
            'error: a JSON document in a pipe must hold an "oid", got none. Pipe in the oid or name alone.\n',
        ),
        (
            "RANK=1 $S ls",
            2,
            "",
            "process 1: error: RANK is set, WORLD_SIZE is not. Start it with torchrun, or unset RANK.\n",
        ),
        (
            "WORLD_SIZE=2 $S ls",
            2,
            "",
            "error: WORLD_SIZE is set, RANK is not. Start it with torchrun, or unset WORLD_SIZE.\n",
        ),
        (
            "RANK=2 WORLD_SIZE=2 $S ls",
            2,
            "",
            "process 2: error: RANK must be a number from 0 to WORLD_SIZE - 1, got RANK=2 and WORLD_SIZE=2. "
            "Start it with torchrun, or unset both.\n",
        ),
        (
            "RANK=0 WORLD_SIZE=2 $S ls",
            2,
            "",
            "error: WORLD_SIZE is 2, but MASTER_ADDR, where the processes meet, is not set. "
            "Start it with torchrun, or unset RANK and WORLD_SIZE.\n",
        ),
    ],
)
def test_streams_and_variables_that_do_not_do(command: str, code: int, out: str, err: str, stored: Path) -> None:
    done = shell(command, stored)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_result_is_printed_without_stderr_or_stdin(stored: Path) -> None:
    usual = shell("$S show x", stored).stdout
    assert usual.startswith("samples ")
    for streams in ("2>&-", "2>/dev/full", "<&-"):
        done = shell(f"$S show x {streams}", stored)
        assert (done.returncode, done.stdout) == (0, usual)


def test_what_stdout_has_no_bytes_for_is_written_as_escapes(stored: Path) -> None:
    assert "name: caf\u00e9\n" in shell("$S show x", stored, PYTHONIOENCODING="utf-8").stdout
    done = shell("$S show x", stored, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "name: caf\\xe9\n" in done.stdout


def test_json_with_an_oid_does_in_a_pipe(stored: Path) -> None:
    done = shell("$S show x --json | $S show", stored)
    assert (done.returncode, done.stdout) == (0, shell("$S show x", stored).stdout)


def test_the_run_directory_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SIDACTL_RUN", "~/x")
    assert Store.open().root == tmp_path / "x"
    assert Store.open("~/y").root == tmp_path / "y"
    assert Store.open("./~").root == Path("./~")
    with pytest.raises(errors.SidaError, match=r"^there is no home directory for ~nobody-at-all/x\. Write \./~nobody"):
        Store.open("~nobody-at-all/x")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("sidactl.cli", ["ls"]),
        ("typer", ["ls"]),
        ("sidactl.commands.inventory", ["ls"]),
        ("numpy", ["sample", "tiny-digits"]),
        ("urllib.request", ["fetch-teacher", "tiny-digits"]),
        ("torch", ["sample", "tiny-digits"]),
    ],
)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_while_something_is_imported_is_one_line(
    module: str, words: Sequence[str], name: str, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.{name})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv[1:] = {words!r}\n"
        "from sidactl.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(tmp_path / "run"), timeout=120
    )
    told = "error: interrupted. Repeat the same command to go on.\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", told)


def test_nothing_is_imported_before_an_interruption_is_handled() -> None:
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(cli.__file__).parents[2])!r})\n"
        "before = set(sys.modules)\n"
        "import sidactl.__main__\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "['sidactl', 'sidactl.__main__']\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [["ls"], ["sample", "tiny-digits", "--num", "1"], ["fetch-teacher", "tiny-digits"]])
@pytest.mark.parametrize("how", ["module", "script"])
def test_an_interruption_at_any_moment_is_one_line(how: str, words: list[str], tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("sidactl")
    if how == "script" and not script.exists():
        pytest.skip("sidactl is not installed as a command")
    command = [str(script)] if how == "script" else [sys.executable, "-m", "sidactl"]
    code = re.escape(str(Path(cli.__file__).parents[1])) + "/"
    moments, told = random.Random(0), 0
    for index in range(60):
        with subprocess.Popen(
            [*command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path / f"run-{index}"),
        ) as process:
            time.sleep(moments.uniform(0, 1.5))
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=120)[1]
        # Before main is called, Python and the script that calls it have no handler of ours; after it, it is done.
        assert not re.search(rf'"{code}|this is a bug', err), err
        if process.returncode == 130:
            assert err.splitlines()[-1] == "error: interrupted. Repeat the same command to go on."
            assert "Traceback" not in err
            told += 1
        else:
            assert process.returncode in (0, 1, -signal.SIGINT)
    assert told > 10, "this test shows nothing"


# Names of the catalog


def test_show_tells_what_the_catalog_knows_of_a_name_that_is_not_fetched(stored: Path) -> None:
    done = shell("$S show inception", stored)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "detector inception, in the catalog, not in the run directory"
    assert "  size     95.6 MB" in done.stdout.splitlines()
    entries = json.loads(shell("$S show edm2-s --json", stored).stdout)["catalog"]
    assert [(entry["kind"], entry["scores"]["FID"]["value"]) for entry in entries] == [("teacher", 2.56)]
    assert entries[0]["url"].endswith("/edm2-img512-s-2147483-0.130.pkl")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "imagenet64-edm2",
            "imagenet64-edm2 is a reference, not a network. A score fetches it: sidactl fid REF --ref imagenet64-edm2",
        ),
        ("cifar10", "cifar10 is a dataset, not a network. Use sidactl prepare-data cifar10."),
        (
            "ffhq64",
            "ffhq64 is a dataset, not a network. "
            "Get it from https://github.com/NVlabs/ffhq-dataset, then use sidactl prepare-data.",
        ),
    ],
)
def test_fetch_teacher_says_which_command_gets_what_is_no_network(name: str, text: str, stored: Path) -> None:
    done = shell(f"$S fetch-teacher {name}", stored)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {text}\n")


def test_fetch_teacher_fetches_a_detector_and_keeps_offline(stored: Path) -> None:
    done = shell("$S fetch-teacher inception --offline", stored)
    assert done.returncode == 2
    assert done.stderr.startswith("error: inception must be downloaded from https://")
    assert "which offline forbids" in done.stderr
