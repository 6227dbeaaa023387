"""A detector's network with drawn weights, which nobody trained on anything."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.errors import SidaError

RANDOM_FEATURES = "random-features"


class RandomFeatures(nn.Module):
    """Three convolutions with weights drawn from a seed: statistics of colours, edges and layout, 128 features.

    Nothing was trained, and nothing is to be got: a distance of these features tells which of two sets of images of
    any kind is nearer to a third, no more. Images keep their size, since tiny ones have no detail to be resized for;
    those of more than 128 pixels are halved until they are smaller. Whoever changes what is computed here must take
    another seed, by which the identity changes.
    """

    SEED, CHANNELS, NUM_FEATURES, SMALLEST, LARGEST = 0, 16, 128, 4, 128
    SCALE = 4.0
    """brings distances of photographs and drawings to where people read them easily"""

    def __init__(self) -> None:
        super().__init__()
        for index, channels in enumerate((3, self.CHANNELS, self.CHANNELS)):
            self.register_buffer(f"conv{index}", torch.empty(self.CHANNELS, channels, 3, 3))

    @classmethod
    def drawn(cls) -> dict[str, Tensor]:
        """The weights. Integers of PCG64, which stay as they are for ever, times one factor per layer."""
        bits = np.random.PCG64(cls.SEED)
        state = {}
        for name, tensor in cls().state_dict().items():
            fan_in = tensor[0].numel()
            raw = (bits.random_raw(tensor.numel()) >> np.uint64(40)).astype(np.int64) - (1 << 23)
            filters = raw.reshape(cls.CHANNELS, fan_in)
            # Every other filter sums to zero and so sees edges alone, which flat areas would drown.
            filters[::2] -= np.roll(filters[::2], 1, axis=1)
            scaled = filters * (math.sqrt(6 / fan_in) / (1 << 23))
            state[name] = torch.from_numpy(scaled.astype(np.float32)).reshape(tensor.shape)
        return state

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, 128] of uint8 images [N, 1 or 3, H, W]."""
        height, width = images.shape[2:]
        if min(height, width) < self.SMALLEST:
            raise SidaError(
                f"detector {RANDOM_FEATURES} needs images of 4x4 pixels or more, got {width}x{height}",
                "Score larger images.",
            )
        found = []
        for index, x in enumerate(self.maps(images)):
            # The quarters say where things are; the smallest images have no more than these left here.
            found.append(F.adaptive_avg_pool2d(x, 2).flatten(1) if index == 1 else x.mean((2, 3)))
            if index < 2:
                found.append(x.std((2, 3), unbiased=False))
        return torch.cat(found, 1) * self.SCALE

    def maps(self, images: Tensor) -> list[Tensor]:
        """What each convolution gives, [N, 16, h, w], halved after the first; of images in 0..255."""
        x = (images.to(torch.float32) / 127.5 - 1).expand(-1, 3, -1, -1)
        while min(x.shape[2:]) > self.LARGEST:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        found = []
        for index in range(3):
            padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = F.relu(F.conv2d(padded, self.get_buffer(f"conv{index}"), stride=1 if index == 0 else 2))
            found.append(x)
        return found
