"""Feature detectors: uint8 images in, float32 features out, under an identity that every statistic carries."""

import hashlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl.catalog import ASSETS, DETECTORS, MAPPED, TIMM, digest_of_code, timm_name
from sidactl.engine.devices import keep_memory
from sidactl.engine.threads import one_thread_if
from sidactl.errors import SidaError
from sidactl.foreign import timm_models
from sidactl.nets import check_values, efficientnet, inception, vit
from sidactl.nets.digits import DigitsClassifier
from sidactl.nets.digits_ssl import DigitsEncoder
from sidactl.nets.preparation import Preparation
from sidactl.nets.random_features import RANDOM_FEATURES, RandomFeatures

Resize = Literal["torch", "pil"]

RESIZES: tuple[Resize, ...] = ("torch", "pil")

BUILT_IN = "tiny-digits"

SMALL = (BUILT_IN, RANDOM_FEATURES, "tiny-digits-ssl")
"""what needs no download"""

NAMES = (*SMALL, "inception", "dinov2", "efficientnet-lite0")

IMAGES_AT_ONCE = 64
"""images that a large network sees at a time"""


@dataclass(frozen=True)
class Detector:
    """Maps uint8 images [N, C, H, W] to float32 features [N, num_features].

    Scores under two identities, which name weights, resize and precision, do not compare. `shape`: the one [C, H, W]
    that it takes; None where any size does, grey or RGB. `classify`: class logits without bias of features, for the
    inception score; None where there is no class. `is_published`: whether the weights are known to be those behind the
    published scores, whose names no others may bear.
    """

    name: str
    num_features: int
    identity: str
    device: torch.device
    extract: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    shape: tuple[int, int, int] | None = None
    images_at_once: int = IMAGES_AT_ONCE
    is_published: bool = False
    maps: Callable[[Tensor], Sequence[Tensor]] | None = None
    """of images in 0..255, as tokens [N, C, L] of several depths; None where there are none to be had"""
    widths: Sequence[int] = ()
    """channels of each map"""

    def differentiable(self, images: Tensor) -> Tensor:
        """Features of images float32 [N, C, H, W] in [-1, 1], which a gradient goes back through."""
        with exact_float32():
            return self.extract(_pixels(images))

    def differentiable_maps(self, images: Tensor) -> Sequence[Tensor]:
        """Likewise the maps. Raises SidaError for a detector that has none."""
        if self.maps is None:
            raise SidaError(f"detector {self.name} gives no maps to train heads on", f"Use one of {', '.join(MAPPED)}.")
        with exact_float32():
            return self.maps(_pixels(images))

    @property
    def short_identity(self) -> str:
        """Name and digest of the weights, as numbers are called by them: inception@0123456789abcdef."""
        name, _, rest = self.identity.partition("@")
        return f"{name}@{rest.partition('-')[0]}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        got = f"{images.dtype} {list(images.shape)}"
        if self.shape and self.shape[0] == 1 and images.shape[1] == 3 and bool((images == images[:, :1]).all()):
            images = images[:, :1]  # grey images that a folder of them holds as RGB
        if self.shape and (images.dtype != torch.uint8 or images.shape[1:] != self.shape):
            grey, (_, height, width) = self.shape[0] == 1, self.shape
            what = f"{'grey' if grey else 'RGB'} uint8 images of {width}x{height} pixels"
            raise SidaError(
                f"detector {self.name} needs {what}, got {got}",
                "Score these images with --detector random-features or inception.",
            )
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise SidaError(
                f"detector {self.name} needs grey or RGB uint8 images, got {got}", "Convert them with prepare-data."
            )
        keep_memory()
        with exact_float32(), one_thread_if(self.name in SMALL):
            parts = [self._features(part.to(self.device)) for part in images.split(self.images_at_once)]
        return torch.cat(parts)

    def _features(self, images: Tensor) -> Tensor:
        num_images = len(images)
        if self.name in SMALL:
            # Always as many at a time: by their number libraries choose among ways to add, whose last digits differ.
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.images_at_once - num_images))
        features: object = self.extract(images)
        wanted = [len(images), self.num_features]
        if not _are_features(features, wanted):
            message = f"detector {self.short_identity} must give features {wanted} of {len(images)} images"
            raise SidaError(f"{message}, got {_described(features)}", "Give another --detector.")
        assert isinstance(features, Tensor)
        return features[:num_images].cpu()

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """Class logits [N, classes] without bias, on the CPU. Raises SidaError for a detector without classes."""
        if self.classify is None:
            raise SidaError(f"the inception score needs classes, detector {self.name} has none", "Use inception.")
        with exact_float32():
            return self.classify(features.to(self.device)).cpu()


def _pixels(images: Tensor) -> Tensor:
    """Of images in [-1, 1] those in 0..255, not rounded."""
    return (images.clamp(-1, 1) + 1) * 127.5


def _are_features(value: object, shape: list[int]) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and [*value.shape] == shape


def _described(value: object) -> str:
    return f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block a GPU computes in float32 all through: TF32 would move features by more than they may."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def load(
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    device: torch.device | str = "cpu",
    resize: Resize = "torch",
    preparation: Preparation | None = None,
) -> Detector:
    """The detector of this name with the weights of `state_dict`; those that are built in need none.

    `inception` gives FID, `dinov2` FD-DINOv2. Built in are `tiny-digits` and `tiny-digits-ssl`, of 8x8 digits, and
    `random-features`, of any images. resize: of dinov2; "torch" is behind the published statistics, "pil" rounds and
    clips as dgm-eval does. preparation: of a network of timm's, timm:NAME. Raises SidaError for a name that is not
    known, and for weights that do not fit.
    """
    if name not in NAMES and not timm_name(name):
        hint = f"Use one of {', '.join(NAMES)}, {TIMM}NAME, or a TorchScript file."
        raise SidaError(f"unknown detector {name!r}", hint)
    if resize not in RESIZES:
        raise SidaError(f"the resize must be one of {', '.join(RESIZES)}, got {resize!r}", "Pass --resize torch.")
    if state_dict is None:
        if name not in SMALL:
            raise SidaError(f"detector {name} does not ship with its weights, got none", "Pass its state_dict.")
        asset = DETECTORS[name].asset
        state_dict = safetensors.torch.load_file(ASSETS / asset) if asset else RandomFeatures.drawn()
    check_values({k: v for k, v in state_dict.items() if not k.endswith(".num_batches_tracked")})
    if name == "efficientnet-lite0":
        preparation = efficientnet.PREPARATION
    resized = f"-{resize}" if name == "dinov2" else f"-{preparation.label}" if preparation else ""
    identity, chosen = f"{name}@{weights_digest(state_dict)[:16]}{resized}-fp32", torch.device(device)
    if name == BUILT_IN:
        digits = DigitsClassifier()
        digits.load_state_dict(dict(state_dict))
        return _digits_detector(digits.to(chosen).eval().requires_grad_(False), identity, chosen)
    if name == RANDOM_FEATURES:
        return _random_detector(state_dict, identity, chosen)
    if name in SMALL:
        encoder = DigitsEncoder()
        encoder.load_state_dict(dict(state_dict))
        encoder = encoder.to(chosen).eval().requires_grad_(False)
        return Detector(
            name,
            encoder.NUM_FEATURES,
            identity,
            chosen,
            lambda images: encoder(_signed(images)),
            shape=(1, 8, 8),
            maps=lambda images: [each.flatten(2) for each in encoder.maps(_signed(images))],
            widths=(32, 48, 64),
        )
    if name == "inception":
        net = inception.FIDInception()
        inception.load_weights(net, state_dict)
        # Half as fast again in this order of memory.
        net = net.to(chosen).to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
        return Detector(name, inception.NUM_FEATURES, identity, chosen, net, net.logits)
    if preparation:
        of_timm = timm_name(name)
        prepared = timm_models.network(of_timm) if of_timm else efficientnet.EfficientNetLite0()
        inception.load_weights(prepared, state_dict)
        prepared = prepared.to(chosen).eval().requires_grad_(False)
        width = timm_models.num_features(prepared, preparation) if of_timm else efficientnet.NUM_FEATURES
        return Detector(name, width, identity, chosen, lambda images: prepared(preparation(images)))
    transformer = vit.VisionTransformer()
    inception.load_weights(transformer, state_dict)
    transformer = transformer.to(chosen).eval().requires_grad_(False)
    return Detector(
        name,
        transformer.cls_token.shape[2],
        identity,
        chosen,
        lambda images: transformer(vit.preprocess(images, resize)),
        maps=lambda images: _of_depths(transformer, vit.preprocess(images, resize)),
        widths=(transformer.cls_token.shape[2],) * _DEPTHS,
    )


_DEPTHS = 4
"""of a transformer, equally far apart, the last one the last block's: as StyleGAN-T takes them"""


def _of_depths(transformer: vit.VisionTransformer, images: Tensor) -> list[Tensor]:
    every = len(transformer.blocks) // _DEPTHS
    return [each.transpose(1, 2) for number, each in enumerate(transformer.maps(images), 1) if number % every == 0]


def _digits_detector(net: DigitsClassifier, identity: str, device: torch.device) -> Detector:
    def extract(images: Tensor) -> Tensor:
        return net.raw_features(_signed(images)) * net.feature_scale

    def classify(features: Tensor) -> Tensor:
        return F.linear(features / net.feature_scale, net.classifier.weight)

    def maps(images: Tensor) -> list[Tensor]:
        return [each.flatten(2) for each in net.maps(_signed(images))]

    return Detector(BUILT_IN, 64, identity, device, extract, classify, shape=(1, 8, 8), maps=maps, widths=(32, 64, 64))


def _signed(images: Tensor) -> Tensor:
    """Uint8 images as float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def _random_detector(state_dict: Mapping[str, Tensor], identity: str, device: torch.device) -> Detector:
    net = RandomFeatures()
    net.load_state_dict(dict(state_dict))
    net = net.to(device).eval()

    def maps(images: Tensor) -> list[Tensor]:
        return [each.flatten(2) for each in net.maps(images)]

    return Detector(RANDOM_FEATURES, net.NUM_FEATURES, identity, device, net, maps=maps, widths=(net.CHANNELS,) * 3)


def load_torchscript(path: Path | str, *, device: torch.device | str = "cpu", trust_code: bool = False) -> Detector:
    """An Inception in TorchScript, as `inception-2015-12-05.pt` of the published evaluations; it resizes by itself.

    TorchScript is a program: any but the published file, known by its digest, is run with `trust_code` alone. Called as
    net(images, return_features=True). Raises SidaError for a file that is damaged or not such a network.
    """
    digest = digest_of_code(path, trust_code)
    refuse_damaged(path)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            # torch would rather have another format; this one is what was published.
            warnings.simplefilter("ignore", DeprecationWarning)
            net = torch.jit.load(path, map_location=torch.device(device)).eval()
            features = net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device), return_features=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise SidaError(
            f"{path} is not a detector in TorchScript ({str(error).strip().splitlines()[0]})",
            "Give inception-2015-12-05.pt, or use --detector inception.",
        ) from error
    width = features.shape[1] if isinstance(features, Tensor) and features.ndim == 2 else 0
    if not width or not _are_features(features, [2, width]):
        raise SidaError(f"{path} must give features [2, F] of 2 images, got {_described(features)}", "Give another.")

    def extract(images: Tensor) -> Tensor:
        try:
            found: Tensor = net(images.expand(-1, 3, -1, -1), return_features=True)
        except torch.jit.Error as error:
            reason = str(error).strip().splitlines()[-1]
            raise SidaError(f"detector {path} failed on {len(images)} images ({reason})", "Give another.") from error
        return found

    identity = f"inception-torchscript@{digest[:16]}-fp32"
    return Detector("inception", width, identity, torch.device(device), extract)


def refuse_damaged(path: Path | str) -> None:
    """Raises SidaError for a file in torch's zip format in which a member's checksum is wrong; torch looks at none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        bad = str(error) or type(error).__name__
    if bad:
        raise SidaError(f"{path} is damaged: the checksum of {bad} is wrong", "Download it again.")


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, whatever file they came from, without batch norm's counters."""
    total = hashlib.sha256()
    for name in sorted(state_dict):
        if not name.endswith(".num_batches_tracked"):
            values = state_dict[name].detach().cpu().contiguous().reshape(-1)
            total.update(name.encode() + values.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
