"""Rebuild the built-in tiny setting from the raw data: dataset, detectors, teacher and its guide, with fixed seeds.

Expect: five files in the folder given (sidactl/assets by default), or the one of --only, and how good the
detectors are on held-out digits; about three minutes on one core. Needs scikit-learn (pip install "sidactl[test]"),
which ships the raw digits.
"""

import argparse
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

import sidactl
from sidactl import catalog
from sidactl.metrics import frechet_distance
from sidactl.nets import digits as nets_digits
from sidactl.nets.digits_ssl import DigitsEncoder
from sidactl.store import Store

NUM_HELD_OUT = 360

PARTS = ("dataset", "detector", "ssl", "teacher", "guide")


def build_dataset() -> bytes:
    """The digits as counts 0..16, uint8 [1797, 8, 8], and their classes; the bytes do not depend on the date."""
    digits = load_digits()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in (("images", digits.images), ("labels", digits.target)):
            member = io.BytesIO()
            np.lib.format.write_array(member, array.astype(np.uint8), allow_pickle=False)
            # ZipInfo's fixed date, 1980-01-01, keeps the file the same from run to run.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()


def shuffled_digits(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1], classes [1797], and which to train with and which to hold out."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=generator)
    return images, torch.from_numpy(digits.target), order[:-NUM_HELD_OUT], order[-NUM_HELD_OUT:]


def build_detector(num_epochs: int = 30) -> tuple[bytes, float]:
    """A classifier trained on all but the last 360 of the shuffled digits, and its accuracy on those."""
    generator = torch.Generator().manual_seed(0)
    images, labels, train, held_out = shuffled_digits(generator)
    torch.manual_seed(0)
    net = nets_digits.DigitsClassifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs=num_epochs, steps_per_epoch=len(train) // 64)
    for _ in range(num_epochs):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for chosen in shuffled[: len(train) // 64 * 64].split(64):
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = float((net(images[held_out]).argmax(1) == labels[held_out]).float().mean())
        net.feature_scale.copy_(net.raw_features(images).var(dim=0).mean().rsqrt())
    return safetensors.torch.save({k: v.contiguous() for k, v in net.state_dict().items()}), accuracy


def changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 1, 8, 8] moved, turned and sheared; blurred, lighter or darker, and noisy, each a little."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    angle, shear = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    wider, higher, right, down = uniform(0.85, 1.15), uniform(0.85, 1.15), uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos * wider, (shear - sin) * wider, right], 1)]
    rows.append(torch.stack([sin * higher, cos * higher, down], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [*images.shape], align_corners=False)
    x = F.grid_sample(images + 1, grid, align_corners=False)  # what comes in is 0: black
    tap = torch.tensor([0.25, 0.5, 0.25])
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), torch.outer(tap, tap)[None, None])
    x = torch.lerp(x, blurred, uniform(0, 0.3, 1, 1, 1))
    x = (x * uniform(0.8, 1.2, 1, 1, 1)).clamp(max=2) - 1
    return x + torch.randn(x.shape, generator=generator) * uniform(0, 0.03, 1, 1, 1)


def vicreg(pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Near each other in a pair, and spread over all directions, with four times the published weight of covariances.

    Source: VICReg (2105.04906), eqs. 1-6.
    """
    loss = 25 * F.mse_loss(*pairs)
    for embeddings in pairs:
        num, width = embeddings.shape
        centred = embeddings - embeddings.mean(0)
        covariance = centred.T @ centred / (num - 1)
        off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
        spread = F.relu(1 - (centred.var(0) + 1e-4).sqrt()).mean()
        loss = loss + 12.5 * spread + 4 * off_diagonal / width
    return loss


def build_ssl(num_epochs: int = 200, batch_size: int = 256, width: int = 256) -> tuple[bytes, dict[str, float]]:
    """An encoder trained without labels on all but the last 360 of the shuffled digits, and how good it is on those."""
    generator = torch.Generator().manual_seed(0)
    images, labels, train, held_out = shuffled_digits(generator)
    torch.manual_seed(0)
    net = DigitsEncoder()
    head = nn.Sequential(nn.Linear(net.NUM_FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], 3e-3, weight_decay=1e-4)
    steps = len(train) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=num_epochs, steps_per_epoch=steps)
    for _ in range(num_epochs):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for chosen in shuffled[: steps * batch_size].split(batch_size):
            one, other = (head(net(changed(images[chosen], generator))) for _ in range(2))
            loss = vicreg((one, other))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        net.feature_scale.copy_(net(images).var(dim=0).mean().rsqrt())
        quality = quality_of(net, images, labels, train, held_out)
    return safetensors.torch.save({k: v.contiguous() for k, v in net.state_dict().items()}), quality


def quality_of(net: nn.Module, images: Tensor, labels: Tensor, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Accuracies on what was held out, and Fréchet distances from the training set, which should rise in this order."""
    features = net(images)
    scaled = (features - features[train].mean(0)) / features[train].std(0)
    probe = LogisticRegression(max_iter=2000).fit(scaled[train].numpy(), labels[train].numpy())
    nearest = torch.cdist(features[held_out], features[train]).argmin(1)
    generator = torch.Generator().manual_seed(0)
    sets = {"held out": features[held_out]}
    for sigma in (0.1, 0.2, 0.4, 0.8):
        noise = sigma * torch.randn(images[held_out].shape, generator=generator)
        sets[f"noise of {sigma:g}"] = net((images[held_out] + noise).clamp(-1, 1))
    sets["threes alone"] = features[labels == 3]
    sets["one image"] = features[held_out[:1]].repeat(NUM_HELD_OUT, 1)

    def moments(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return rows.double().numpy().mean(0), np.cov(rows.double().numpy(), rowvar=False)

    return {
        "linear probe": float(probe.score(scaled[held_out].numpy(), labels[held_out].numpy())),
        "nearest neighbour": float((labels[train][nearest] == labels[held_out]).float().mean()),
        **{f"FD {name}": frechet_distance(*moments(rows), *moments(features[train])) for name, rows in sets.items()},
    }


def build_teacher(run: Path) -> bytes:
    """The teacher, by the public command's function, with its default recipe."""
    teacher = sidactl.train_teacher("tiny-digits", name="tiny-digits-rebuilt", run=run)
    return Store.open(run).read(teacher, "model.safetensors")


def build_guide(run: Path) -> bytes:
    """A weaker teacher, of half the width and with two fifths of the images, in half precision."""
    options: dict[str, Any] = {"model_channels": 8, "duration_nimg": 20_000}
    guide = sidactl.train_teacher("tiny-digits", name="tiny-digits-guide-rebuilt", run=run, **options)
    weights = safetensors.torch.load(Store.open(run).read(guide, "model.safetensors"))
    return safetensors.torch.save({name: tensor.to(torch.float16) for name, tensor in weights.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one of the files; all by default")
    parser.add_argument("--assets", type=Path, default=catalog.ASSETS, help="folder to write to")
    parser.add_argument("--run", type=Path, default=Path("sida-run"), help="run directory for the teacher's training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would change the last bits
    assets, parts = arguments.assets, (arguments.only,) if arguments.only else PARTS
    assets.mkdir(parents=True, exist_ok=True)
    if "dataset" in parts:
        (assets / "tiny-digits.npz").write_bytes(build_dataset())
    if "detector" in parts:
        weights, accuracy = build_detector()
        (assets / "tiny-digits-detector.safetensors").write_bytes(weights)
        print(f"detector: {accuracy:.1%} of {NUM_HELD_OUT} held-out digits")
    if "ssl" in parts:
        weights, quality = build_ssl()
        (assets / "tiny-digits-ssl.safetensors").write_bytes(weights)
        print("detector without labels:", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))
    if "teacher" in parts:
        (assets / "tiny-digits-teacher.safetensors").write_bytes(build_teacher(arguments.run))
    if "guide" in parts:
        (assets / "tiny-digits-guide.safetensors").write_bytes(build_guide(arguments.run))


if __name__ == "__main__":
    main()
