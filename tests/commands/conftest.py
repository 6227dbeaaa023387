"""What tests of commands share."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sidactl
from sidactl import catalog, fetch_teacher, prepare_data
from sidactl.commands import plan as commands_plan
from sidactl.errors import SidaError
from sidactl.recipes import NetSpec
from sidactl.store import Artifact, Store, rehash
from sidactl.training import state
from tests.conftest import SHORT
from tests.golden import golden
from tests.web import Site, serving
from tests.worlds import cifar_archive, cifar_batch

SMALL = "edm_ddpmpp_uncond"


SPEC = NetSpec(
    architecture="SongUNet",
    img_resolution=8,
    img_channels=3,
    model_channels=8,
    channel_mult=(1, 2),
    channel_mult_emb=2,
    num_blocks=1,
    attn_resolutions=(4,),
    dropout=0.13,
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("no_proxy", "*")
    for name in ("SIDACTL_MIRROR", "SIDACTL_OFFLINE", "SIDACTL_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def site(run: Path) -> Iterator[Site]:
    with serving({"/net.pkl": network(SMALL).read_bytes()}) as site:
        yield site


def network(name: str) -> Path:
    return golden(f"networks/{name}.pkl")


def silent(line: str) -> None:
    pass


def refused(source: str | Path, run: Path, **options: Any) -> str:
    """The one line in which an import is refused; it leaves neither an artifact nor a temporary file."""
    before = list(Store(run).artifacts())
    with pytest.raises(SidaError) as caught:
        fetch_teacher(str(source), run=run, say=silent, **options)
    assert "\n" not in str(caught.value)
    assert list(Store(run).artifacts()) == before
    assert not list(run.glob("tmp/import-*"))
    return str(caught.value)


def exported(run: Path, source: str, to: Path) -> Artifact:
    artifact = fetch_teacher(source, run=run, say=silent)
    sidactl.export(artifact.oid, to, form="safetensors", run=run)
    return artifact


CIFAR_FILE = "cifar-10-python.tar.gz"


@pytest.fixture
def cifar(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of 15 images, also on the site; the catalog's cifar10 is this one."""
    planes = np.random.default_rng(0).integers(0, 256, 3 * 3072, dtype=np.uint8)
    path = cifar_archive(tmp_path / CIFAR_FILE, cifar_batch([0, 9, 3], planes.tobytes()))
    data = site.files[f"/{CIFAR_FILE}"] = path.read_bytes()
    source = catalog.Download(
        url=f"{site.url}/{CIFAR_FILE}", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)
    )
    entry = dataclasses.replace(catalog.DATASETS["cifar10"], source=source, num_images=15)
    monkeypatch.setitem(catalog.DATASETS, "cifar10", entry)
    return path


def nothing_left(run: Path) -> bool:
    """Neither an artifact nor anything half-written."""
    store = Store(run)
    return not [*store.artifacts(), *run.glob("live/*"), *run.glob("tmp/*"), *run.glob("asked/*")]


def refused_data(run: Path, source: str | Path | None, **options: Any) -> str:
    """The one line in which a source is refused with exit code 2; it leaves nothing."""
    with pytest.raises(SidaError) as caught:
        prepare_data(source if source is None else str(source), run=run, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert nothing_left(run)
    return str(caught.value)


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 8), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert(mode).save(path, **options)
    return path


def flat(path: Path, value: int) -> None:
    """A picture whose file has one size for any value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).convert("RGB").save(path, format="BMP")
    os.utime(path, ns=(315532800 * 10**9,) * 2)


AT_ITS_END = {"evaluate_every_nimg": 96, "checkpoint_every_nimg": 96}
"""for what does not ask how a run goes on: to write a checkpoint takes as long as a step"""


SHORT_SID = {name: value for name, value in SHORT.items() if name != "adversarial_from_nimg"} | AT_ITS_END


def nothing_is_wrong(root: Path) -> bool:
    return list(rehash(Store.open(root))) == [] and os.listdir(root / "live") == []


def refs(root: Path) -> dict[str, str]:
    return Store.open(root).refs()


def never(event: state.Event) -> None:
    raise AssertionError(f"nothing must run, got {event}")


def interrupting(number: int, kind: str, nimg: int, seen: list[state.Event]) -> Callable[[state.Event], None]:
    """A watcher that sends this process a signal once, at an event."""

    def watch(event: state.Event) -> None:
        seen.append(event)
        if (event.kind, event.nimg) == (kind, nimg):
            os.kill(os.getpid(), number)

    return watch


def planned(root: Path, **options: Any) -> commands_plan.Plan:
    """The plan of a distillation of tiny-digits; everything that plan refuses, distill refuses before it begins."""
    chosen: dict[str, Any] = {"teacher": "tiny-digits", "mode": "sida", "generator": None, "dataset": None}
    return commands_plan.plan(**(chosen | {"overrides": {}} | options), store=Store.open(root))


TEACHER = {"duration_nimg": 96, "batch_size": 32, "model_channels": 4, "channel_mult": (1,), "attn_resolutions": ()}


def one_step(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "adversarial_from_nimg"} | {"duration_nimg": 16}


@pytest.fixture(scope="module")
def edm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run directory with a tiny EDM2 teacher, and its oid."""
    root = tmp_path_factory.mktemp("edm2") / "run"
    return root, sidactl.train_teacher(
        "tiny-digits", name="e", net="edm2", duration_nimg=512, batch_size=64, run=root
    ).oid


def messages(events: list[state.Event]) -> list[str]:
    return [event.values["message"] for event in events if event.kind == "note"]
