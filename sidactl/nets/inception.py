"""The Inception v3 behind FID: features and class logits of images. No file is read here.

Module names equal the state keys of pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, since those are the
interface; the weights are TensorFlow's of 2015-12-05, whose graph differs from later Inceptions where noted.
Source: Rethinking the Inception architecture for computer vision (1512.00567); FID: 1706.08500.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.errors import SidaError
from sidactl.nets.assembly import misfits_of

RESOLUTION = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008  # 1000 and 8 unused ones; inception scores count them all


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU; padded to keep the size unless it is `valid` or has a stride."""

    def __init__(
        self, num_in: int, num_out: int, height: int = 1, width: int = 0, stride: int = 1, *, valid: bool = False
    ) -> None:
        super().__init__()
        padding = "valid" if valid or stride > 1 else "same"
        self.conv = nn.Conv2d(num_in, num_out, (height, width or height), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(num_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed35(nn.Module):
    """At 35 x 35: 1x1, 5x5, two 3x3, pool. [N, num_in, 35, 35] -> [N, 224 + num_pool, 35, 35]."""

    def __init__(self, num_in: int, num_pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBlock(num_in, 64)
        self.branch5x5_1 = ConvBlock(num_in, 48)
        self.branch5x5_2 = ConvBlock(48, 64, 5)
        self.branch3x3dbl_1 = ConvBlock(num_in, 64)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3)
        self.branch_pool = ConvBlock(num_in, num_pool)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average_pool(x))], 1)


class Reduce35(nn.Module):
    """From 35 x 35 to 17 x 17. [N, 288, 35, 35] -> [N, 768, 17, 17]."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = ConvBlock(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBlock(288, 64)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Mixed17(nn.Module):
    """At 17 x 17: 1x1, one and two factorised 7x7 of width `num_mid`, pool. [N, 768, 17, 17] -> the same."""

    def __init__(self, num_mid: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBlock(768, 192)
        self.branch7x7_1 = ConvBlock(768, num_mid)
        self.branch7x7_2 = ConvBlock(num_mid, num_mid, 1, 7)
        self.branch7x7_3 = ConvBlock(num_mid, 192, 7, 1)
        self.branch7x7dbl_1 = ConvBlock(768, num_mid)
        self.branch7x7dbl_2 = ConvBlock(num_mid, num_mid, 7, 1)
        self.branch7x7dbl_3 = ConvBlock(num_mid, num_mid, 1, 7)
        self.branch7x7dbl_4 = ConvBlock(num_mid, num_mid, 7, 1)
        self.branch7x7dbl_5 = ConvBlock(num_mid, 192, 1, 7)
        self.branch_pool = ConvBlock(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average_pool(x))], 1)


class Reduce17(nn.Module):
    """From 17 x 17 to 8 x 8. [N, 768, 17, 17] -> [N, 1280, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvBlock(768, 192)
        self.branch3x3_2 = ConvBlock(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBlock(768, 192)
        self.branch7x7x3_2 = ConvBlock(192, 192, 1, 7)
        self.branch7x7x3_3 = ConvBlock(192, 192, 7, 1)
        self.branch7x7x3_4 = ConvBlock(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class Mixed8(nn.Module):
    """At 8 x 8: 1x1, one and two 3x3 that end in a fork of 1x3 and 3x1, pool. [N, num_in, 8, 8] -> [N, 2048, 8, 8]."""

    def __init__(self, num_in: int, *, max_pool: bool = False) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvBlock(num_in, 320)
        self.branch3x3_1 = ConvBlock(num_in, 384)
        self.branch3x3_2a = ConvBlock(384, 384, 1, 3)
        self.branch3x3_2b = ConvBlock(384, 384, 3, 1)
        self.branch3x3dbl_1 = ConvBlock(num_in, 448)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3)
        self.branch3x3dbl_3a = ConvBlock(384, 384, 1, 3)
        self.branch3x3dbl_3b = ConvBlock(384, 384, 3, 1)
        self.branch_pool = ConvBlock(num_in, 192)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        threes = [self.branch3x3_2a(one), self.branch3x3_2b(one)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else average_pool(x)
        return torch.cat([self.branch1x1(x), *threes, *doubles, self.branch_pool(pooled)], 1)


class FIDInception(nn.Module):
    """Inception v3 as TensorFlow's graph of 2015-12-05 computes it; to be used in eval mode.

    Images are [N, 3, H, W] in 0..255, uint8 or float, of any size; grey ones [N, 1, H, W] are repeated to 3 channels.
    They are resized in float32, the rest runs in the type of the weights; for the published numbers that is float32,
    without TF32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3, valid=True)
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Reduce35()
        self.Mixed_6b = Mixed17(128)
        self.Mixed_6c = Mixed17(160)
        self.Mixed_6d = Mixed17(160)
        self.Mixed_6e = Mixed17(192)
        self.Mixed_7a = Reduce17()
        self.Mixed_7b = Mixed8(1280)
        # A slip in TensorFlow's graph, which these weights were trained with.
        self.Mixed_7c = Mixed8(2048, max_pool=True)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, 2048] after global average pooling, of images [N, 1 or 3, H, W] in 0..255."""
        x = resize_tf1_bilinear(images.to(torch.float32), RESOLUTION, RESOLUTION).expand(-1, 3, -1, -1)
        x = ((x - 128) / 128).to(self.fc.weight.dtype)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features: Tensor = x.mean((2, 3))
        return features

    def logits(self, features: Tensor, *, bias: bool = False) -> Tensor:
        """Class logits [N, 1008] of features; the published inception scores take them without bias."""
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


def average_pool(x: Tensor) -> Tensor:
    """3x3 averages at stride 1, in which what lies outside does not count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def resize_tf1_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """x [N, C, H, W] resized to [N, C, height, width] as TensorFlow 1 does: bilinear, pixel i at i * in / out.

    No half-pixel centres, no antialiasing, the last row and column repeated beyond. Columns first, as TensorFlow does,
    so that float32 results are equal.
    """
    for dim, size in ((3, width), (2, height)):
        last = x.shape[dim] - 1
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (torch.tensor(last + 1.0) / size)
        low = position.to(torch.int64)
        weight = (position - low).to(x.dtype)
        start = x.index_select(dim, low)
        change = x.index_select(dim, (low + 1).clamp(max=last)) - start
        x = start + change * (weight if dim == 3 else weight[:, None])
    return x


def load_weights(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies weights into `net`, as float32. Raises SidaError listing what is missing, unexpected or misshapen.

    Only batch norm's counters of training batches may be absent: nothing reads them, and converters leave them out.
    """
    own = net.state_dict()
    given = {name: own[name] for name in own if name.endswith(".num_batches_tracked")} | dict(state)
    if misfits := misfits_of(net, given):
        hint = "Check that the file holds this network under its published names."
        raise SidaError(f"the weights do not fit {type(net).__name__}: {misfits}", hint)
    net.load_state_dict(given)
