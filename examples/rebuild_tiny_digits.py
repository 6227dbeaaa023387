"""Rebuild the built-in tiny setting from the raw data: dataset, detector and teacher, with fixed seeds.

Expect: three files in the folder given (sidactl/assets by default), the detector's accuracy on held-out digits, about
two minutes on one core. Needs scikit-learn (pip install "sidactl[test]"), which ships the raw digits.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import sidactl
from sidactl import catalog
from sidactl.nets import digits as nets_digits
from sidactl.store import Store

NUM_HELD_OUT = 360


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


def build_detector(num_epochs: int = 30) -> tuple[bytes, float]:
    """A classifier trained on all but the last 360 of the shuffled digits, and its accuracy on those."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    train, held_out = order[:-NUM_HELD_OUT], order[-NUM_HELD_OUT:]
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


def build_teacher(run: Path) -> bytes:
    """The teacher, by the public command's function, with its default recipe."""
    teacher = sidactl.train_teacher("tiny-digits", name="tiny-digits-rebuilt", run=run)
    return Store.open(run).read(teacher, "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=catalog.ASSETS, help="folder to write to")
    parser.add_argument("--run", type=Path, default=Path("sida-run"), help="run directory for the teacher's training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would change the last bits
    arguments.assets.mkdir(parents=True, exist_ok=True)
    (arguments.assets / "tiny-digits.npz").write_bytes(build_dataset())
    weights, accuracy = build_detector()
    (arguments.assets / "tiny-digits-detector.safetensors").write_bytes(weights)
    print(f"detector: {accuracy:.1%} of {NUM_HELD_OUT} held-out digits")
    (arguments.assets / "tiny-digits-teacher.safetensors").write_bytes(build_teacher(arguments.run))


if __name__ == "__main__":
    main()
