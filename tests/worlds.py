"""The little worlds that tests are about: images, files and nets small enough to reason about."""

import dataclasses
import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sidactl import catalog, nets
from sidactl.data.dataset import Dataset
from sidactl.data.images import encode_png
from sidactl.data.prepare import prepare
from sidactl.errors import SidaError
from sidactl.methods import base
from sidactl.recipes import Adversarial, Execution, NetSpec, SidRecipe
from sidactl.training import batches as training_batches
from sidactl.training import distillation as training_distillation

EXPECTED = "datasets/expected.json"


def refusal(*arguments: Any, **options: Any) -> str:
    """The line in which a preparation is refused."""
    with pytest.raises(SidaError) as caught:
        prepare(*arguments, **options)
    return str(caught.value)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def make_zip(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def layout(count: int, size: int = 4) -> list[tuple[str, bytes]]:
    """The members of a zip of so many images, as it is published."""
    return [(f"00000/img{i:08d}.png", encode_png(noise(size, size, 3, seed=i))) for i in range(count)]


def labelled(members: list[tuple[str, bytes]], *classes: object) -> list[tuple[str, bytes]]:
    labels = [[name, c] for (name, _), c in zip(members, classes, strict=True)]
    return [*members, ("dataset.json", json.dumps({"labels": labels}).encode())]


def idx_file(path: Path, array: np.ndarray) -> Path:
    data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def cifar_archive(path: Path, batch: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for number in range(5, 0, -1):
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{number}")
            member.size = len(batch)
            archive.addfile(member, io.BytesIO(batch))
    return path


def cifar_batch(labels: list[int], planes: bytes) -> bytes:
    """The opcodes of a Python-2 batch that matter: labels, then data."""
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    data = b"T" + struct.pack("<I", len(planes)) + planes
    return b"\x80\x02}(U\x06labels](" + numbers + b"eU\x04data" + data + b"u."


class Stop(Exception):
    """In place of Ctrl-C, which pytest would take for its own."""


def stopping_at(image: int, seen: list[int]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == image:
            raise Stop

    return progress


def mixed_folder(folder: Path) -> Path:
    """Twelve usable images in two classes, one that is none at position 5."""
    for number in range(12):
        save(folder / str(number // 6) / f"{number:02}.png", noise(16, 16, 3, seed=number))
    (folder / "0/04a.png").write_bytes(b"hello")
    return folder


def load(path: Path) -> str:
    """The line in which a dataset is refused when its images are read."""
    with pytest.raises(SidaError) as caught:
        Dataset(path).images([0, 1])
    return str(caught.value)


TINY = catalog.TEACHERS["tiny-digits"].net


TINY_EDM2 = NetSpec(
    architecture="EDM2",
    img_resolution=8,
    img_channels=4,
    label_dim=10,
    model_channels=8,
    channel_mult=(1, 2),
    channel_mult_emb=None,
    channel_mult_noise=None,
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=8,
    logvar_channels=16,
)


RECIPE = SidRecipe(
    teacher="tiny",
    mode="sida",
    dataset="made up",
    alpha=1.0,
    batch_size=8,
    duration_nimg=10**6,
    fake_score_lr=1e-3,
    generator_lr=1e-3,
    ema_halflife_nimg=100,
    adversarial=Adversarial(adversarial_from_nimg=32),
    generator_from_nimg=16,
)


class MadeUp:
    """Forty images of noise with classes, as a dataset."""

    num_images = 40
    is_latents = False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)

    def images(self, indices: Any) -> Tensor:
        return self._images[torch.as_tensor(indices)]

    def one_hot(self, indices: Any) -> Tensor:
        return torch.eye(10)[torch.as_tensor(indices) % 10]


class InOrder:
    def __init__(self, num_images: int = MadeUp.num_images) -> None:
        self._num_images = num_images

    def indices(self, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count) % self._num_images


class MadeUpLatents(MadeUp):
    """The same classes with means and standard deviations of a VAE's posterior."""

    is_latents = True

    def __init__(self) -> None:
        self._images = torch.rand(40, 8, 8, 8, generator=torch.Generator().manual_seed(4))


def distillation(
    spec: NetSpec = TINY,
    source: training_batches.ImageSource | None = None,
    execution: Execution | None = None,
    **changed: Any,
) -> training_distillation.Distillation:
    recipe = dataclasses.replace(RECIPE, **changed)
    torch.manual_seed(0)
    teacher = nets.build(spec)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    dataset = source or (MadeUpLatents() if spec.img_channels == 4 else MadeUp())
    batches = training_batches.DatasetBatches(
        dataset,
        InOrder(dataset.num_images),
        batch_size=recipe.batch_size,
        num_rounds=recipe.num_accumulation_rounds,
        seed=recipe.seed,
        device=torch.device("cpu"),
    )
    return training_distillation.Distillation(recipe, teacher, None, batches, execution)


def roomy() -> tuple[int, int]:
    """A device's memory, free and in all, that nothing fills."""
    return 1 << 50, 1 << 50


def stopped_clock() -> float:
    return 0.0


def compute_gradients(run: training_distillation.Distillation, turn: base.Turn) -> dict[str, Tensor]:
    """Gives an update's parameters their gradients, without a step; returns its losses."""
    gradients, stats = run._gradients(turn, run.passes, None)
    gradients.finish()
    return stats


def weights(net: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients_of(net: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
