"""Stand-ins of the published files, in small: what a mirror holds, in the real formats, and a catalog that expects it.

Of the catalog's files the TorchScript one alone is left out. Networks keep the resolution and channels of the real
ones; their width and depth are the least there are, and of ImageNet's classes there are three. `python -m
tests.standins MIRROR WORDS` is sidactl on them, for several processes.
"""

import hashlib
import importlib.util
import io
import json
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sidactl import catalog, nets
from sidactl.commands import evaluation, preflight
from sidactl.nets import Preconditioned, inception, vit
from sidactl.recipes import NetSpec
from tests.foreign.test_pickles import Persistent, install_published_modules
from tests.hostile.doors import cifar, picture, tarred, zipped
from tests.playback import save_vae

NETS = tuple(name for name, entry in catalog.TEACHERS.items() if entry.source)
GENERATORS = tuple(name for name, entry in catalog.GENERATORS.items() if entry.source)
FEW = ["--batch-size", "4", "--num-accumulation-rounds", "2", "--duration", "24", "--generator-from", "4"]
FEW += ["--evaluate-every", "16", "--evaluate-num", "3", "--checkpoint-every", "16", "--precision", "fp32"]
"""flags of a distillation that takes seconds"""
SIDA = ["--adversarial-from", "8"]
DINO_FEATURES = 16
SMALL_VIT = partial(vit.VisionTransformer, DINO_FEATURES, 1, 2, grid=2)
"""in place of DINOv2's: one block"""
_EPOCH = (0, (1 << 5) | 1)
_FLUSH_BYTES = 1 << 20


class SmallInception(nn.Module):
    """In place of Inception: one convolution, and as few features."""

    NUM_FEATURES = 12

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, self.NUM_FEATURES, 8, stride=4, bias=False)
        self.fc = nn.Linear(self.NUM_FEATURES, 1008)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images.float().expand(-1, 3, -1, -1) / 128 - 1).relu().mean((2, 3))
        return features

    def logits(self, features: Tensor, *, bias: bool = False) -> Tensor:
        return nn.functional.linear(features, self.fc.weight, self.fc.bias if bias else None)


def small(spec: NetSpec) -> NetSpec:
    return replace(
        spec,
        label_dim=min(spec.label_dim, 3),
        model_channels=8,
        channel_mult=(1, 1),
        num_blocks=1,
        attn_resolutions=(),
        channels_per_head=8,
        logvar_channels=8 if spec.logvar_channels else 0,
    )


def small_catalog(patch: pytest.MonkeyPatch, mirror: Path) -> None:
    """Lets the catalog expect what `write_mirror` wrote."""
    teachers = {name: replace(entry, net=small(entry.net)) for name, entry in catalog.TEACHERS.items() if name in NETS}
    # Published with 35 to 511 evaluations of a network.
    teachers = {name: replace(entry, sampler=replace(entry.sampler, num_steps=3)) for name, entry in teachers.items()}
    generators = {
        name: replace(entry, net=small(entry.net)) for name, entry in catalog.GENERATORS.items() if name in GENERATORS
    }
    detectors = {name: _as_written(catalog.DETECTORS[name], mirror) for name in ("inception", "dinov2")}
    cifar_entry = _as_written(catalog.DATASETS["cifar10"], mirror)
    for name, entry in teachers.items():
        patch.setitem(catalog.TEACHERS, name, entry)
    for name, entry in generators.items():
        patch.setitem(catalog.GENERATORS, name, entry)
    for name, entry in detectors.items():
        patch.setitem(catalog.DETECTORS, name, entry)
    patch.setitem(catalog.DATASETS, "cifar10", cifar_entry)
    patch.setattr(inception, "FIDInception", SmallInception)
    patch.setattr(inception, "NUM_FEATURES", SmallInception.NUM_FEATURES)
    patch.setattr(vit, "VisionTransformer", SMALL_VIT)
    features = {"inception": SmallInception.NUM_FEATURES, "dinov2": DINO_FEATURES}
    patch.setattr(preflight, "_NUM_FEATURES", {**preflight._NUM_FEATURES, **features})
    patch.setattr(evaluation, "PREVIEW_SEEDS", range(1))  # a picture of 512 pixels takes longer than a step


def _as_written(entry: Any, mirror: Path) -> Any:
    """The entry with the digest and size of its stand-in."""
    content = (mirror / _file_of(entry)).read_bytes()
    source = replace(entry.source, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    return replace(entry, source=source)


def write_mirror(folder: Path) -> None:
    """Every stand-in, by the last part of its address."""
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        install_published_modules(patch.setitem)
        entries: Mapping[str, Any] = {**catalog.TEACHERS, **catalog.GENERATORS}
        for seed, name in enumerate((*NETS, *GENERATORS)):
            (folder / _file_of(entries[name])).write_bytes(_network(small(entries[name].net), seed, name in GENERATORS))
    for entry in catalog.REFERENCES.values():
        sizes = {"fid": SmallInception.NUM_FEATURES, "fd_dinov2": DINO_FEATURES}
        moments = {name: {"mu": np.full(size, 0.3), "sigma": np.eye(size)} for name, size in sizes.items()}
        if _file_of(entry).endswith(".npz"):
            np.savez(folder / _file_of(entry), **moments["fid"])
        else:
            (folder / _file_of(entry)).write_bytes(pickle.dumps(moments, protocol=4))
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    np.savez(folder / _file_of(catalog.REFERENCES["imagenet64-images"]), arr_0=images, arr_1=np.arange(6) % 3)
    labels = {"labels": [[f"{index}.png", index % 3] for index in range(6)]}
    (folder / _file_of(catalog.DATASETS["imagenet512-labels"])).write_text(json.dumps(labels))
    (folder / "cifar-10-python.tar.gz").write_bytes(tarred(cifar([0, 1, 2, 3])))
    if importlib.util.find_spec("diffusers"):
        save_vae(folder / "sd-vae-ft-mse")
    for name, net in (("inception", SmallInception()), ("dinov2", SMALL_VIT())):
        torch.save(_drawn(net).state_dict(), folder / _file_of(catalog.DETECTORS[name]))


def write_imagenet(folder: Path) -> Path:
    """ImageNet's training images as they are laid out, three classes of two; returns the root of all."""
    for wnid in ("n01440764", "n01443537", "n01484850"):
        for index in range(2):
            path = folder / f"ILSVRC/Data/CLS-LOC/train/{wnid}/{wnid}_{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture("JPEG", (80, 70), seed=index))
    return folder


def latents_zip(num: int = 6) -> bytes:
    """Somebody's img512-sd.zip: means and deviations of latents, and their classes."""
    rng, members = np.random.default_rng(0), dict[str, bytes]()
    for index in range(num):
        buffer = io.BytesIO()
        np.save(buffer, np.abs(rng.normal(size=(8, 64, 64))).astype(np.float32))
        members[f"00000/img-mean-std-{index:08d}.npy"] = buffer.getvalue()
    labels = [[name, index % 3] for index, name in enumerate(members)]
    return zipped({**members, "dataset.json": str({"labels": labels}).replace("'", '"').encode()})


def sparse_latents(path: Path, num_images: int, *, num_classes: int = 1000, size: int = 64) -> None:
    """A dataset zip of latents as prepare-data and EDM2's tool write it: stored float32 [8, size, size], and labels.

    Every latent is zero, and the zeros are a hole in the file: of each member a block or two of the disk are taken.
    Classes follow each other, as many of each. Source: APPNOTE 6.3.10 (PKWARE), sections 4.3 and 4.5.
    """
    latents: NDArray[np.float32] = np.zeros((8, size, size), np.float32)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, latents, version=(1, 0), allow_pickle=False)
    npy = buffer.getvalue()
    head, checksum = npy[: len(npy) - latents.nbytes], zlib.crc32(npy)
    directory, labels = io.BytesIO(), []
    with path.open("wb", buffering=0) as file:
        offset = 0
        for index in range(num_images):
            name = f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"
            offset += _add(file.fileno(), directory, offset, name, head, len(npy), checksum)
            labels.append([name, index * num_classes // num_images])
        text = json.dumps({"labels": labels}).encode()
        offset += _add(file.fileno(), directory, offset, "dataset.json", text, len(text), zlib.crc32(text))
        start, listed, count = offset, directory.getbuffer(), num_images + 1
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(listed), start)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(listed), 1)
        end += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        for position in range(0, len(listed), _FLUSH_BYTES):
            os.pwrite(file.fileno(), listed[position : position + _FLUSH_BYTES], start + position)
        os.pwrite(file.fileno(), end, start + len(listed))


def _add(fd: int, directory: io.BytesIO, offset: int, name: str, written: bytes, num_bytes: int, checksum: int) -> int:
    """Writes a stored member, of whose bytes all after `written` are zero; returns the bytes that it takes."""
    encoded = name.encode()
    fields = (*_EPOCH, checksum, num_bytes, num_bytes, len(encoded))
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, *fields, 0) + encoded
    data = memoryview(local + written)
    while data:
        data = data[os.pwrite(fd, data, offset + len(local + written) - len(data)) :]
    is_far = offset >= 1 << 31
    extra = struct.pack("<HHQ", 1, 8, offset) if is_far else b""
    version = 45 if is_far else 20
    entry = struct.pack("<4sBBBBHHHHIIIH", b"PK\x01\x02", version, 3, version, 0, 0, 0, *fields)
    entry += struct.pack("<HHHHII", len(extra), 0, 0, 0, 0o644 << 16, 0xFFFFFFFF if is_far else offset)
    directory.write(entry + encoded + extra)
    return len(local) + num_bytes


def _file_of(entry: catalog.Entry) -> str:
    assert entry.source
    return entry.source.url.rpartition("/")[2]


def _drawn(net: nn.Module, seed: int = 0) -> Any:
    """The net with weights as they would be at the start of a training, of any layer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
        parameter.data.normal_(0, fan_in**-0.5, generator=generator)
    return net.eval()


def _network(spec: NetSpec, seed: int, is_generator: bool) -> bytes:
    """A network as EDM, EDM2 and SiD pickled theirs."""
    net: Preconditioned = _drawn(nets.build(spec), seed)
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in spec.to_json().items()}
    architecture = options.pop("architecture")
    if architecture != "EDM2":
        options["model_type"] = architecture
    state = {"_init_args": (), "_init_kwargs": {k: v for k, v in options.items() if v is not None}}
    tree = dict(_tree(net)) | state
    pickled = Persistent("Precond" if architecture == "EDM2" else "EDMPrecond", **tree)
    others = {} if is_generator else {"loss_fn": None, "dataset_kwargs": {}}
    return pickle.dumps({"ema": pickled, **others}, protocol=4)


def _tree(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "_parameters", dict(module._parameters)
    yield "_buffers", dict(module._buffers)
    children = {name: Persistent(type(m).__name__, **dict(_tree(m))) for name, m in module.named_children()}
    yield "_modules", children


if __name__ == "__main__":
    from sidactl import cli

    os.environ["SIDACTL_MIRROR"] = sys.argv[1]
    with pytest.MonkeyPatch.context() as everywhere:
        small_catalog(everywhere, Path(sys.argv[1]))
        cli.main(sys.argv[2:])
