"""The ways by which bytes from outside come in, and a sound file for each of them."""

import gzip
import io
import json
import pickle
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from sidactl import fetch_teacher, nets, prepare_data
from sidactl.commands import reference
from sidactl.commands.files import read_state_dict
from sidactl.errors import SidaError
from sidactl.store import Artifact, Store, rehash

NET = {
    "architecture": "SongUNet",
    "img_resolution": 8,
    "img_channels": 1,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}
EDM2 = NET | {"architecture": "EDM2", "channels_per_head": 8, "channel_mult_emb": None, "channel_mult_noise": None}


@dataclass(frozen=True)
class Door:
    """A kind of file: its name, what is called with its path and a run directory, and the bytes of a sound one."""

    name: str
    enter: Callable[[Path, Path], object]
    sound: Callable[[], bytes]
    is_checked: bool = False
    """the format has a checksum over all that counts, so what is read of a damaged file is what the sound one holds"""


def described(net: dict[str, Any] = NET, **changes: Any) -> dict[str, Any]:
    """What a safetensors file of ours says of its network."""
    params = {
        "name": "mine",
        "net": net,
        "sampler": {"num_steps": 1, "sigma_init": 2.5},
        "dataset": "tiny-digits",
        "licence": "none",
        "source_url": None,
        "source_sha256": None,
        "recipe": None,
    }
    return {"kind": "generator", "params": params | changes}


@cache
def weights(net: str = json.dumps(NET)) -> dict[str, torch.Tensor]:
    """Small weights of a network, from its description as JSON."""
    from sidactl.recipes import NetSpec

    torch.manual_seed(0)
    state = nets.build(NetSpec.from_json(json.loads(net))).state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def safetensors_net(metadata: str | None = None, state: dict[str, torch.Tensor] | None = None) -> bytes:
    told = json.dumps(described()) if metadata is None else metadata
    return safetensors.torch.save(weights() if state is None else state, {"sidactl": told})


def pth(value: object = None, *, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)} if value is None else value, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def moments() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 8))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def stats_pickle() -> bytes:
    found = moments()
    return pickle.dumps({"fid": {"mu": found["mu"], "sigma": found["sigma"]}}, protocol=4)


def picture(
    format: str = "PNG", size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0, **more: Any
) -> bytes:
    shape = (size[1], size[0]) if mode in ("L", "P") else (size[1], size[0], len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, None if mode == "P" else mode).save(buffer, format, **more)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def layout(labels: object = None, **more: bytes) -> bytes:
    """A zip as our own export and EDM's tool write it."""
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    told = json.dumps({"labels": [[name, i % 2] for i, name in enumerate(names)] if labels is None else labels})
    return zipped({name: picture(seed=i) for i, name in enumerate(names)} | {"dataset.json": told.encode()} | more)


def tarred(members: dict[str, bytes], mode: Any = "w:gz", infos: list[tarfile.TarInfo] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in infos or []:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def cifar(labels: list[int] | None = None, planes: bytes | None = None, before: bytes = b"") -> dict[str, bytes]:
    """Five batches, with the opcodes of a Python 2 pickle that matter."""
    labels = [1, 2] if labels is None else labels
    planes = bytes(range(256)) * 12 * len(labels) if planes is None else planes
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    data = b"T" + len(planes).to_bytes(4, "little") + planes
    batch = b"\x80\x02}(" + before + b"U\x06labels](" + numbers + b"eU\x04data" + data + b"u."
    return {f"cifar-10-batches-py/data_batch_{i}": batch for i in range(1, 6)}


def idx(dims: tuple[int, ...] = (3, 8, 8), content: bytes | None = None, kind: int = 8) -> bytes:
    head = bytes([0, 0, kind, len(dims)]) + b"".join(d.to_bytes(4, "big") for d in dims)
    return head + (
        bytes(range(int(np.prod(dims)) % 256)).ljust(int(np.prod(dims)), b"\1") if content is None else content
    )


def _net(path: Path, run: Path) -> object:
    from sidactl import look, sample

    with suppress(SidaError):  # what fetching says counts
        json.dumps(look(path))
    made = fetch_teacher(str(path), run=run, say=lambda line: None)
    if made.params["sampler"].get("num_steps", 0) > 100:  # right, and of no interest here
        return made.oid
    return made.oid, sample(made.oid, num=1, run=run, device="cpu", say=None).artifact.oid


def _weights(path: Path, run: Path) -> object:
    from sidactl import detectors

    found = read_state_dict(path)
    digest = detectors.weights_digest(found)
    detectors.load("inception", found)
    return digest


@cache
def _digits_at_hand() -> tempfile.TemporaryDirectory[str]:
    """A run directory with tiny-digits, to be copied; it goes with the process that made it."""
    made = tempfile.TemporaryDirectory(prefix="hostile-")
    prepare_data("tiny-digits", run=Path(made.name) / "run", say=None)
    return made


def _with_digits(run: Path) -> Store:
    return Store.open(Path(shutil.copytree(Path(_digits_at_hand().name) / "run", run)))


def _stats(path: Path, run: Path) -> object:
    store = _with_digits(run)
    subject = prepare_data("tiny-digits", run=run, say=None)
    found = reference.find(store, str(path), subject, "moments")
    return {name: file.sha256 for name, file in found.files.items()}


def _data(path: Path, run: Path) -> object:
    made: Artifact = prepare_data(str(path), any_size=True, run=run, say=None)
    return made.oid, made.results


def _digits(path: Path, run: Path) -> object:
    """IDX images with the labels of three beside them."""
    path.with_name("train-labels-idx1-ubyte" + path.suffix).write_bytes(
        gzip.compress(idx((3,))) if path.suffix else idx((3,))
    )
    return _data(path, run)


def _image(path: Path, run: Path) -> object:
    """A folder with two sound pictures and this one."""
    folder = run.with_name("pictures")
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(seed=i))
    path.rename(folder / f"z{path.suffix}")
    return _data(folder, run)


def _labels(path: Path, run: Path) -> object:
    """A folder of pictures with this as its dataset.json."""
    folder = run.with_name("labelled")
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(seed=i))
    path.rename(folder / "dataset.json")
    return _data(folder, run)


def _live(path: Path, run: Path) -> object:
    """An unfinished distillation whose events are these."""
    import sidactl
    from sidactl.commands import tasks

    place = run / "live" / ("0" * 64)
    store = _with_digits(run)
    place.mkdir(parents=True)
    path.rename(place / "events.jsonl")
    (place / "lock").touch()
    (place / "checkpoint-0000000160-0.bak").mkdir()
    return len(list(tasks.unfinished(store))), len(list(rehash(store))), sidactl.gc(run=run, dry_run=True).num_young


def _published(name: str) -> bytes:
    from tests.golden import golden

    return golden(f"networks/{name}.pkl").read_bytes()


EVENTS = b'{"event":"started","nimg":0}\n{"event":"progress","nimg":160,"sec":1.5}\n'
DOORS = {
    door.name: door
    for door in (
        Door("net.safetensors", _net, safetensors_net),
        Door("net.pkl", _net, lambda: _published("sid_v1_gen_edm")),
        Door("weights.pth", _weights, pth),
        Door("old.pth", _weights, lambda: pth(is_zip=False)),
        Door("weights.safetensors", _weights, lambda: safetensors.torch.save({"a": torch.arange(6.0)})),
        Door("stats.npz", _stats, lambda: npz(**moments()), is_checked=True),
        Door("stats.pkl", _stats, stats_pickle),
        Door("data.zip", _data, layout, is_checked=True),
        Door(
            "data.npz", _data, lambda: npz(arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.arange(3)), is_checked=True
        ),
        Door("cifar-10-python.tar.gz", _data, lambda: tarred(cifar()), is_checked=True),
        Door("data.tar", _data, lambda: tarred(cifar(), "w")),
        Door("train-images-idx3-ubyte", _digits, idx),
        Door("train-images-idx3-ubyte.gz", _digits, lambda: gzip.compress(idx(), mtime=0), is_checked=True),
        Door("image.png", _image, picture, is_checked=True),
        Door("image.jpg", _image, lambda: picture("JPEG")),
        Door("image.webp", _image, lambda: picture("WEBP", lossless=True)),
        Door("image.bmp", _image, lambda: picture("BMP")),
        Door("image.gif", _image, lambda: picture("GIF", mode="L")),
        Door("image.tif", _image, lambda: picture("TIFF")),
        Door("dataset.json", _labels, lambda: b'{"labels": [["0.png", 1], ["1.png", 0]]}'),
        Door("events.jsonl", _live, lambda: EVENTS),
    )
}
