"""EDM's non-leaking augmentation of images, with the labels that tell a network what was done; no loss, no data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sidactl.errors import SidaError
from sidactl.nets.constants import constant
from sidactl.noise import Draws, JoinedDraws
from sidactl.recipes import NetSpec
from sidactl.scopes import scope

# Low-pass filter of the symlet wavelet with six vanishing moments (sym6), as PyWavelets tabulates it.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip

SUPPORT = len(SYM6) // 4  # half the filter's width in pixels of the input: its taps sit at twice that resolution

SCALE_STD = 0.2  # log2 units, for isotropic and for anisotropic scaling

ANISO_ROTATE_PROB = 0.5

TRANSLATE_STD = 0.125  # of the image's width and height


@dataclass(frozen=True, kw_only=True)
class AugmentPipe:
    """Flips, scaling, rotation, stretching and translation, each applied with probability `p` times its own factor.

    `p` is the overall probability in [0, 1]. A factor of 0 leaves that transformation, its draws and its labels out;
    the defaults are those of the published runs, whose horizontal flip (1e8) fires for half of the images at any
    p > 1e-8.

    Source: EDM (2206.00364), appendix F.2, table 6.
    """

    p: float
    xflip: float = 1e8
    yflip: float = 1
    scale: float = 1
    rotate_frac: float = 1
    aniso: float = 1
    translate_frac: float = 1

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise SidaError(f"augment probability must be in [0, 1], got {self.p}", "Pass a share such as 0.12.")

    @property
    def num_labels(self) -> int:
        """Number of label channels: one each for flips and scale, two each for the others."""
        single, double = (self.xflip, self.yflip, self.scale), (self.rotate_frac, self.aniso, self.translate_frac)
        return sum(factor > 0 for factor in single) + 2 * sum(factor > 0 for factor in double)

    def __call__(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augmented images [N, C, H, W], differentiable with respect to `images`, and labels [N, num_labels] float32.

        `images` are [N, C, H, W] of any value range. `draws` is asked in the published order and for all samples
        on every call, so a recorded or seeded sequence gives the published result. A label is 0 where nothing was
        done. The margin of reflected pixels is that of the batch's largest transformation, so a sample's border
        depends a little on the others.
        """
        num, _, height, width = images.shape
        labels: list[Tensor] = []

        def gated(value: Tensor, factor: float, shape: Sequence[int]) -> Tensor:
            return torch.where(draws.uniform(shape) < factor * self.p, value, 0)

        for factor, axis in ((self.xflip, 3), (self.yflip, 2)):
            if factor > 0:
                shape = (num, 1, 1, 1)
                flip = gated(draws.integers(2, shape), factor, shape)
                images = torch.where(flip == 1, images.flip(axis), images)
                labels.append(flip.flatten())

        # The map from output to input pixels, in coordinates with the origin at the centre: x -> linear @ x + shift.
        linear = torch.eye(2, device=images.device).expand(num, 2, 2)
        shift = torch.zeros(num, 2, device=images.device)
        if self.scale > 0:
            log_scale = gated(draws.normal((num,)), self.scale, (num,))
            linear = linear * torch.exp2(-SCALE_STD * log_scale)[:, None, None]
            labels.append(log_scale)
        if self.rotate_frac > 0:
            angle = gated((2 * draws.uniform((num,)) - 1) * math.pi, self.rotate_frac, (num,))
            linear = linear @ _rotation(angle)
            labels += [angle.cos() - 1, angle.sin()]
        if self.aniso > 0:
            log_stretch = draws.normal((num,))
            angle = (2 * draws.uniform((num,)) - 1) * math.pi
            log_stretch = gated(log_stretch, self.aniso, (num,))
            angle = torch.where(draws.uniform((num,)) < ANISO_ROTATE_PROB, angle, 0)
            stretch = torch.exp2(SCALE_STD * log_stretch)
            linear = linear @ _rotation(-angle) @ torch.diag_embed(torch.stack([1 / stretch, stretch], 1))
            linear = linear @ _rotation(angle)
            labels += [log_stretch * angle.cos(), log_stretch * angle.sin()]
        if self.translate_frac > 0:
            offset = gated(draws.normal((2, num)), self.translate_frac, (1, num))
            pixels = torch.stack([offset[0] * width, offset[1] * height], 1) * TRANSLATE_STD
            shift = shift - (linear @ pixels[:, :, None])[:, :, 0]
            labels += [offset[0], offset[1]]

        if self.scale > 0 or self.rotate_frac > 0 or self.aniso > 0 or self.translate_frac > 0:
            images = _resample(images, linear, shift)
        return images, torch.stack([label.float() for label in labels], 1) if labels else images.new_zeros(num, 0)


def _rotation(angle: Tensor) -> Tensor:
    """Matrices [N, 2, 2] of the rotations by `angle` [N] in radians."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)


def _resample(images: Tensor, linear: Tensor, shift: Tensor) -> Tensor:
    """`images` seen through the maps x -> linear @ x + shift from output to input pixels, filtered against aliasing."""
    channels, height, width = images.shape[1:]
    size = constant((width, height), images.device)

    # How far the output's corners reach outside of the input, largest of the batch; the one read-back to the host.
    centre = (size - 1) / 2
    reach = linear.abs() @ centre
    overshoot = torch.stack([(reach - shift).amax(0), (reach + shift).amax(0)]) + 2 * SUPPORT - centre
    (left, top), (right, bottom) = torch.minimum(overshoot.clamp(min=0), size - 1).ceil().int().tolist()
    images = F.pad(images, (left, right, top, bottom), mode="reflect")
    shift = shift + constant(((left - right) / 2, (top - bottom) / 2), images.device)

    taps = constant(SYM6, images.device, images.dtype)
    row, column = taps.expand(channels, 1, 1, -1), taps[:, None].expand(channels, 1, -1, 1)
    pad = len(SYM6) // 2 - 1
    images = F.conv_transpose2d(images, row, stride=(1, 2), padding=(0, pad), groups=channels)
    images = F.conv_transpose2d(images, column, stride=(2, 1), padding=(pad, 0), groups=channels)

    # Twice the resolution, whose pixel centres lie half a pixel off; then the -1 to 1 coordinates of affine_grid.
    shift = 2 * shift - 0.5 + linear.sum(2) / 2
    size_in = constant((images.shape[3], images.shape[2]), images.device)
    size_out = 2 * (size + 2 * SUPPORT)
    linear, shift = linear * size_out / size_in[:, None], 2 * shift / size_in
    shape = (len(images), channels, 2 * (height + 2 * SUPPORT), 2 * (width + 2 * SUPPORT))
    grid = F.affine_grid(torch.cat([linear, shift[:, :, None]], 2), list(shape), align_corners=False)
    images = F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)

    images = images[:, :, 1:-1, 1:-1]  # of the margin, what the filter needs to come out at the original size
    images = F.conv2d(images, row, stride=(1, 2), groups=channels)
    return F.conv2d(images, column, stride=(2, 1), groups=channels)


def augmentation(probability: float, spec: NetSpec) -> Callable[[Tensor, Draws], tuple[Tensor, Tensor | None]]:
    """What gives a net's inputs their augmentation and its labels: nothing, where the net takes no such labels."""
    if not probability or not spec.augment_dim:
        return lambda images, draws: (images, None)
    pipe = AugmentPipe(p=probability)

    @scope("augmentation")
    def augmented(images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        if not isinstance(draws, JoinedDraws):
            return pipe(images, draws)
        # An image's border depends on the others of its micro-batch.
        parts = images.split(len(images) // len(draws.parts))
        found = [pipe(part, own) for part, own in zip(parts, draws.parts, strict=True)]
        return torch.cat([part for part, _ in found]), torch.cat([labels for _, labels in found])

    return augmented
