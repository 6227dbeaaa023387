"""Feature detectors: uint8 images in, float32 features out, under an identity that every statistic carries."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.catalog import ASSETS
from sidactl.errors import SidaError
from sidactl.metrics import FeatureStats

BUILT_IN = "tiny-digits"


class DigitsClassifier(nn.Module):
    """The built-in detector's network: three convolutions over 8x8 digits, 64 features, 10 classes.

    `feature_scale` is one scalar that brings the features of the dataset to mean variance 1.
    """

    feature_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.embed = nn.Linear(64 * 4 * 4, 64)
        self.classifier = nn.Linear(64, 10)
        self.register_buffer("feature_scale", torch.ones(()))

    def raw_features(self, images: Tensor) -> Tensor:
        """Features [N, 64] before scaling; images float32 [N, 1, 8, 8] in [-1, 1]."""
        x = F.relu(self.conv0(images))
        x = F.relu(self.conv1(x))
        return F.relu(self.embed(F.relu(self.conv2(x)).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [N, 10]."""
        logits: Tensor = self.classifier(F.dropout(self.raw_features(images), 0.25, self.training))
        return logits


@dataclass(frozen=True)
class Detector:
    """Maps uint8 images [N, C, H, W] to float32 features [N, num_features].

    Scores under two identities do not compare.
    """

    name: str
    num_features: int
    identity: str
    net: nn.Module
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1:] != (1, 8, 8):
            raise SidaError(
                f"detector {self.name} needs grey uint8 images of 8x8 pixels, got {images.dtype} {list(images.shape)}",
                "Score these images with another --detector.",
            )
        assert isinstance(self.net, DigitsClassifier)
        pixels = images.to(self.device).to(torch.float32) / 127.5 - 1
        return (self.net.raw_features(pixels) * self.net.feature_scale).cpu()


def load(name: str, state_dict: Mapping[str, Tensor] | None = None, *, device: torch.device | str = "cpu") -> Detector:
    """The named detector, with the weights it is known by or those of `state_dict`.

    Raises SidaError for a name that is not known, and for weights that do not fit.
    """
    if name != BUILT_IN:
        raise SidaError(f"detector {name!r} is not there yet", f"Use --detector {BUILT_IN}.")
    if state_dict is None:
        state_dict = safetensors.torch.load_file(ASSETS / "tiny-digits-detector.safetensors")
    net = DigitsClassifier()
    net.load_state_dict(dict(state_dict))
    return Detector(name, 64, f"{name}@{weights_digest(state_dict)[:16]}", net.to(device).eval(), torch.device(device))


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, whatever file they came from."""
    total = hashlib.sha256()
    for name in sorted(state_dict):
        total.update(name.encode() + state_dict[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def features_of(detector: Detector, batches: Iterable[Tensor]) -> Tensor:
    """Features of all images, float32 [N, F]."""
    return torch.cat([detector(images) for images in batches])


def stats_of(detector: Detector, batches: Iterable[Tensor]) -> FeatureStats:
    """Mean and covariance of the features of all images, in one pass and bounded memory."""
    stats = FeatureStats()
    for images in batches:
        stats.add(detector(images))
    return stats
