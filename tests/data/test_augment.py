"""Augmentation: the published numbers, what the labels say, and where gradients go."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sidactl.data import augment
from sidactl.data.augment import AugmentPipe
from sidactl.errors import SidaError
from tests.golden import golden

OFF = dict.fromkeys(("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac"), 0.0)


class TorchDraws:
    """torch's global generator."""

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape))

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(high, tuple(shape))


class Playback:
    """Recorded draws, which insists on their order, kinds and shapes."""

    def __init__(self, draws: list[tuple[str, Tensor]]) -> None:
        self.left = draws

    def _next(self, kind: str, shape: Sequence[int]) -> Tensor:
        name, value = self.left.pop(0)
        assert name.rsplit("_", 1)[1] == kind
        assert value.shape == torch.Size(shape), name
        return value

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._next("rand", shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._next("randn", shape)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        assert high == 2
        return self._next("randint", shape)


def load(name: str) -> dict[str, Tensor]:
    with np.load(golden(f"augment/{name}.npz"), allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def recorded(arrays: dict[str, Tensor]) -> Playback:
    return Playback([(name, arrays[name]) for name in sorted(arrays) if name.startswith("draw")])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 10, 14, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["augment_p012_rgb16", "augment_p015_rgb32", "augment_p1_gray12", "augment_p1_rgb16"])
def test_published_pipe_images_labels_and_gradient(name: str) -> None:
    arrays = load(name)
    pipe = AugmentPipe(**json.loads(golden(f"augment/{name}.json").read_text())["init_kwargs"])
    assert pipe == AugmentPipe(p=pipe.p)
    source = arrays["images"].requires_grad_()
    draws = recorded(arrays)
    out, labels = pipe(source, draws)
    assert not draws.left
    torch.testing.assert_close(out, arrays["out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(labels, arrays["labels"], atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(out, source, arrays["vjp_cotangent"])
    torch.testing.assert_close(gradient, arrays["vjp_images"], atol=1e-4, rtol=0)

    torch.manual_seed(int(arrays["seed"]))
    seeded, _ = pipe(source, TorchDraws())
    assert torch.equal(seeded, out)


@pytest.mark.parametrize(
    "name",
    [
        "single_aniso",
        "single_rotate_frac",
        "single_scale",
        "single_translate_frac",
        "single_xflip",
        "single_yflip",
    ],
)
def test_one_transformation_alone_on_images_that_are_not_square(name: str) -> None:
    arrays = load(name)
    pipe = AugmentPipe(p=1, **OFF | {name.removeprefix("single_"): 1})
    draws = recorded(arrays)
    out, labels = pipe(arrays["images"], draws)
    assert not draws.left
    assert labels.shape == (4, pipe.num_labels)
    torch.testing.assert_close(out, arrays["out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(labels, arrays["labels"], atol=1e-6, rtol=0)


def test_published_constants_are_the_recorded_defaults() -> None:
    defaults = json.loads(golden("augment/default_attributes.json").read_text())
    assert defaults["scale_std"] == defaults["aniso_std"] == augment.SCALE_STD
    assert defaults["aniso_rotate_prob"] == augment.ANISO_ROTATE_PROB
    assert defaults["translate_frac_std"] == augment.TRANSLATE_STD


def test_probability_zero_returns_the_images_and_no_labels(images: Tensor) -> None:
    torch.manual_seed(0)
    out, labels = AugmentPipe(p=0)(images, TorchDraws())
    torch.testing.assert_close(out, images, atol=1e-5, rtol=0)
    assert torch.equal(labels, torch.zeros(6, 9))


def test_tiny_probability_only_mirrors_half_of_the_images(images: Tensor) -> None:
    torch.manual_seed(1)
    out, labels = AugmentPipe(p=1e-7)(images, TorchDraws())
    mirrored = labels[:, 0].bool()
    assert 0 < mirrored.sum() < 6
    torch.testing.assert_close(out[mirrored], images[mirrored].flip(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[~mirrored], images[~mirrored], atol=1e-5, rtol=0)
    assert not labels[:, 1:].any()


def test_flips_alone_are_exact(images: Tensor) -> None:
    torch.manual_seed(2)
    out, labels = AugmentPipe(p=1, **OFF | {"xflip": 1, "yflip": 1})(images, TorchDraws())
    for image, augmented, (across, down) in zip(images, out, labels, strict=True):
        axes = [axis for axis, flip in ((2, across), (1, down)) if flip]
        assert torch.equal(augmented, image.flip(axes))


def test_labels_are_zero_exactly_where_the_gate_is_shut() -> None:
    torch.manual_seed(3)
    _, labels = AugmentPipe(p=0.3)(torch.zeros(4000, 1, 4, 4), TorchDraws())
    # x flip, y flip, scale, rotation (2), stretch (2, the sine also needs the inner gate), translation (2)
    expected = torch.tensor([0.5, 0.15, 0.3, 0.3, 0.3, 0.3, 0.15, 0.3, 0.3])
    torch.testing.assert_close((labels != 0).float().mean(0), expected, atol=0.03, rtol=0)
    assert torch.equal(labels[:, 7] == 0, labels[:, 8] == 0)


class Fixed(TorchDraws):
    """All gates open, all normals `value`."""

    def __init__(self, value: float) -> None:
        self.value = value

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), 0.75)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), self.value)


def test_translation_by_whole_pixels_shifts_right_and_down() -> None:
    smooth = torch.linspace(-2, 2, 16).exp().reshape(1, 1, 1, 16) * torch.linspace(1, 2, 16).reshape(1, 1, 16, 1)
    out, labels = AugmentPipe(p=1, **OFF | {"translate_frac": 1})(smooth, Fixed(1.0))
    torch.testing.assert_close(out[..., 6:, 6:], smooth[..., 4:-2, 4:-2], atol=0.02, rtol=0)
    assert labels.tolist() == [[1.0, 1.0]]


def test_rotation_by_a_quarter_turns_the_picture() -> None:
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)
    out, labels = AugmentPipe(p=1, **OFF | {"rotate_frac": 1})(ramp, Fixed(0.0))
    torch.testing.assert_close(out[..., 4:-4, 4:-4], -ramp.mT[..., 4:-4, 4:-4], atol=0.02, rtol=0)
    torch.testing.assert_close(labels, torch.tensor([[-1.0, 1.0]]))


def test_a_constant_image_stays_constant(images: Tensor) -> None:
    torch.manual_seed(4)
    out, _ = AugmentPipe(p=1)(torch.full_like(images, 0.7), TorchDraws())
    torch.testing.assert_close(out, torch.full_like(images, 0.7), atol=1e-3, rtol=0)


def test_gradient_agrees_with_finite_differences() -> None:
    images = torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).requires_grad_()

    def augmented(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return AugmentPipe(p=1)(x, TorchDraws())[0]

    assert torch.autograd.gradcheck(augmented, (images,))


def test_a_pipe_with_everything_off_is_the_identity(images: Tensor) -> None:
    out, labels = AugmentPipe(p=1, **OFF)(images, TorchDraws())
    assert torch.equal(out, images)
    assert labels.shape == (6, 0)


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_probability_outside_of_its_range_is_refused(p: float) -> None:
    with pytest.raises(SidaError) as caught:
        AugmentPipe(p=p)
    assert str(caught.value) == f"augment probability must be in [0, 1], got {p}. Pass a share such as 0.12."
