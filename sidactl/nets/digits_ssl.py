"""The network of the built-in detector that was trained without labels, of 8x8 digits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DigitsEncoder(nn.Module):
    """Three convolutions over 8x8 digits and a linear layer: 64 features, of either sign and without classes.

    Trained by VICReg (2105.04906) on digits that were moved, turned, sheared, blurred, lightened and made noisy
    (examples/rebuild_tiny_digits.py). `feature_scale` is one scalar that brings the features of the dataset to mean
    variance 1.
    """

    NUM_FEATURES = 64

    feature_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.conv1, self.norm1 = nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.GroupNorm(4, 48)
        self.conv2, self.norm2 = nn.Conv2d(48, 64, 3, padding=1, stride=2), nn.GroupNorm(4, 64)
        self.embed = nn.Linear(64 * 2 * 2, self.NUM_FEATURES)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, 64], scaled; images float32 [N, 1, 8, 8] in [-1, 1]."""
        features: Tensor = self.embed(self.maps(images)[-1].flatten(1)) * self.feature_scale
        return features

    def maps(self, images: Tensor) -> list[Tensor]:
        """What each convolution gives, [N, 32, 8, 8], [N, 48, 4, 4], [N, 64, 2, 2]."""
        found = [F.relu(self.norm0(self.conv0(images)))]
        for norm, convolution in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            found.append(F.relu(norm(convolution(found[-1]))))
        return found
