"""The built-in detector's network, of 8x8 digits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        return F.relu(self.embed(self.maps(images)[-1].flatten(1)))

    def maps(self, images: Tensor) -> list[Tensor]:
        """What each convolution gives, [N, 32, 8, 8] and twice [N, 64, 4, 4]."""
        found = [F.relu(self.conv0(images))]
        for convolution in (self.conv1, self.conv2):
            found.append(F.relu(convolution(found[-1])))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [N, 10]."""
        logits: Tensor = self.classifier(F.dropout(self.raw_features(images), 0.25, self.training))
        return logits
