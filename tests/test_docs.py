"""What the README shows works: commands parse, the two set-up scripts come first, Python blocks run."""

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
import typer

from sidactl.cli import app
from tests.conftest import Finished
from tests.test_floors import ORDER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    part.strip()
    for block in SHELL
    for line in block.splitlines()
    for part in line.split("|")
    if part.strip().startswith("sidactl ")
]


def test_the_quickstart_exports_to_where_an_export_may_go_and_again(finished: Finished) -> None:
    """At the end of minutes of work."""
    script = (ROOT / "examples/quickstart.sh").read_text().splitlines()
    (line,) = [line for line in script if "sidactl export" in line]
    command = f'sidactl() {{ {shlex.quote(sys.executable)} -m sidactl "$@"; }}'
    shell = f"{command}; generator=generator/best; {line}; echo $folder"
    environment = os.environ | {"SIDACTL_RUN": str(finished.root)}
    for _ in range(2):
        done = subprocess.run(["sh", "-euc", shell], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (Path(done.stdout.strip()) / "grid.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("modes",), ("edm2",)])
def test_the_smoke_test_for_ci_passes(words: Sequence[str]) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["sh", str(ROOT / "examples/ci_smoke.sh"), *words]
    done = subprocess.run(script, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "no problem found"), done.stderr


def test_first_blocks_are_the_two_scripts_that_set_up_everything() -> None:
    assert [block.strip() for block in SHELL[:2]] == ["sh examples/quickstart.sh", "sh tests/run.sh"]
    for script in ("examples/quickstart.sh", "tests/run.sh", "examples/install.sh"):
        subprocess.run(["sh", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_in_the_readme_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("generator/best\n"))  # what a - stands for
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    words = shlex.split(command)[1:]
    name, found, rest = group.resolve_command(click.Context(group), words)
    assert found is not None
    found.make_context(name, list(rest), resilient_parsing=False)


@pytest.mark.parametrize("block", PYTHON)
def test_python_in_the_readme_runs(block: str, tmp_path: Path) -> None:
    environment = os.environ | {"SIDACTL_RUN": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "(8, 8, 8, 1)" in done.stdout


def test_every_command_is_in_the_readme() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    missing = [name for name in group.commands if f"sidactl {name}" not in README]
    assert not missing


def test_examples_say_at_their_top_what_to_expect() -> None:
    for path in sorted((ROOT / "examples").glob("*")):
        if path.suffix in (".py", ".sh") and path.name != "install.sh":
            assert re.search(r"\bExpect\b", path.read_text()[:800]), path.name


def test_changelog_has_an_entry_for_what_is_new() -> None:
    unreleased = (ROOT / "CHANGELOG.md").read_text().split("## [Unreleased]")[1]
    assert "- " in unreleased


def test_the_tree_in_the_readme_is_that_of_the_package() -> None:
    section = README.partition("## Where things are")[2].partition("\n## ")[0]
    tree = section.split("```")[1].strip().splitlines()
    names = [line.split()[0] for line in tree]
    package = ROOT / "sidactl"
    found = [path.name + "/" * path.is_dir() for path in package.iterdir() if not path.name.startswith(("__", "py."))]
    assert sorted(names) == sorted(found)
    assert [name.removesuffix("/").removesuffix(".py") for name in names if name != "assets/"] == ORDER
    assert all(len(line.split(maxsplit=1)) == 2 for line in tree)
    for path in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", section):
        assert (package / path).exists() or (ROOT / path).exists(), path
