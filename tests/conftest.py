"""What several test files share: run directories with a very short distillation, or with all that one needs."""

import errno
import importlib
import os
import pkgutil
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch comes in: tiny nets gain nothing from threads, and every process must add up in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL takes other kernels on other processors. With those for AVX-512 of one that has AMX, an element whose gradient is
# rounding noise stepped the other way, and a golden trajectory ended 1.6e-3 away; with these it is 5e-6 everywhere.
os.environ.setdefault("MKL_CBWR", "AVX2")
# Shells start background jobs with Ctrl-C ignored, which the processes that tests interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from sidactl.store import Artifact, Store
    from sidactl.training.state import Event

SHORT: dict[str, Any] = {
    "duration_nimg": 96,
    "batch_size": 16,
    "generator_from_nimg": None,
    "adversarial_from_nimg": 32,
    "evaluate_every_nimg": 32,
    "evaluate_num": 64,
    "checkpoint_every_nimg": 32,
}
"""recipe overrides that make a distillation of tiny-digits take a second: 6 steps, 3 evaluations and checkpoints"""


@contextmanager
def read_only(store: "Store", lock: int = 0) -> "Iterator[ExitStack]":
    """Takes the place of `Store._writing` on a file system that is mounted read-only; root may write anywhere else."""
    from sidactl.store.files import telling_os_errors

    with telling_os_errors(store.root, "written"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    yield ExitStack()


@cache
def _import_the_package() -> None:
    import sidactl

    for found in pkgutil.walk_packages(sidactl.__path__, "sidactl."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)


def instead_of(function: Callable[..., Any], other: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
    """Puts `other` in the place of one of our functions: where it is defined, and wherever we import it by name."""
    _import_the_package()  # what came in later would keep `other` for good
    name = function.__name__
    assert getattr(sys.modules[function.__module__], name) is function
    for module in [module for title, module in sys.modules.items() if title.startswith("sidactl.")]:
        if vars(module).get(name) is function:
            patch.setattr(module, name, other)


Forbid = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def forbidden() -> Forbid:
    """Within `forbidden(f, g)` the test fails if one of these functions of ours is called, by whatever name."""

    @contextmanager
    def forbid(*functions: Callable[..., Any]) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for function in functions:

                def refuse(*arguments: object, name: str = function.__name__, **options: object) -> None:
                    pytest.fail(f"{name} was called")

                instead_of(function, refuse, patch)
            yield

    return forbid


@dataclass(frozen=True)
class Finished:
    """A distillation that ran undisturbed: its run directory, its best generator, its events."""

    root: Path
    best: "Artifact"
    events: "list[Event]"


def short_distill(root: Path, watch: "Callable[[Event], None] | None" = None, **overrides: Any) -> "Artifact":
    """A very short distillation of tiny-digits in mode sida."""
    import sidactl

    return sidactl.distill(
        teacher="tiny-digits", mode="sida", run=root, watch=watch, device="cpu", **(SHORT | overrides)
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with teacher, dataset, statistics, and the teacher's score; to be copied."""
    import sidactl

    root = tmp_path_factory.mktemp("prepared") / "run"
    sidactl.fid("tiny-digits", num=SHORT["evaluate_num"], run=root, device="cpu")
    return root


@pytest.fixture
def fresh_run(prepared: Path, tmp_path: Path) -> Path:
    """A run directory of one's own in which nothing was distilled yet."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


@pytest.fixture(scope="session")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished distillation; tests may add to its run directory, but not take away."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("finished") / "run"))
    events: list[Event] = []
    return Finished(root, short_distill(root, events.append), events)


@pytest.fixture
def two_threads() -> Iterator[None]:
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)
