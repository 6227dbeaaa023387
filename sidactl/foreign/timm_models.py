"""Networks of timm by name, as detectors: where their weights are, how they see images, and the network to fill.

timm's code is run, no file of weights is: they are read as safetensors alone, here and not by timm.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidactl.errors import SidaError
from sidactl.nets.inception import load_weights
from sidactl.nets.preparation import Preparation

FILE = "model.safetensors"
"""what the hub calls the weights that are no pickle"""


@dataclass(frozen=True)
class Pretrained:
    """What timm says of a name with pretrained weights: where the hub has them, and how the network sees images."""

    name: str
    """timm's, such as resnet18.a1_in1k"""
    hub_id: str
    preparation: Preparation
    licence: str | None
    classifiers: tuple[str, ...]
    """the layers that give classes, which no feature comes from"""

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.hub_id}/resolve/main/{FILE}"

    def cached(self) -> str | None:
        """The path of the weights that timm has in its cache, which is that of the hub; None where there are none."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.hub_id, FILE)
        return path if isinstance(path, str) else None


def pretrained(name: str) -> Pretrained:
    """Raises SidaError without timm, for a name that it does not know, and for one without weights as safetensors."""
    timm = _timm()
    see = "See timm.list_pretrained() in Python for the names."
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise SidaError(f"timm does not know {name} ({str(error).strip()})", see) from error
    if config is None:
        raise SidaError(f"timm does not know {name}", see)
    if not config.has_weights:
        raise SidaError(f"timm has no pretrained weights of {name}, and random ones score nothing", see)
    if not config.hf_hub_id or config.hf_hub_filename not in (None, FILE):
        what = f"timm has the weights of {name} as a pickle alone, which is never read"
        raise SidaError(what, "Take a name whose weights are safetensors in the hub.")
    described = timm.data.resolve_data_config({}, pretrained_cfg=config.to_dict())
    channels, height, width = described["input_size"]
    if channels != 3:
        raise SidaError(f"timm's {name} sees {channels} channels, a detector needs RGB", see)
    return Pretrained(
        name,
        config.hf_hub_id,
        Preparation(
            size=(height, width),
            interpolation=described["interpolation"],
            crop=described["crop_pct"],
            mean=described["mean"],
            std=described["std"],
        ),
        config.license,
        (config.classifier,) if isinstance(config.classifier, str) else tuple(config.classifier or ()),
    )


def network(name: str) -> nn.Module:
    """timm's network without its classes, in eval mode, of which nothing is trained: its weights are still to come."""
    net = _timm().create_model(name, pretrained=False, num_classes=0)
    assert isinstance(net, nn.Module)
    return net.eval()


def filled(of: Pretrained, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of `network(of.name)`, from those of the hub. Raises SidaError where one is missing or left over.

    timm would leave what is missing as it was drawn, and say so in a log alone.
    """
    net = network(of.name)
    entrypoint = _timm().models.model_entrypoint(of.name)
    if convert := getattr(sys.modules[entrypoint.__module__], "checkpoint_filter_fn", None):
        weights = convert(dict(weights), net)
    own = net.state_dict()
    of_classes = {f"{layer}.{part}" for layer in of.classifiers for part in ("weight", "bias")} - set(own)
    load_weights(net, {name: tensor for name, tensor in weights.items() if name not in of_classes})
    return {name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}


def num_features(net: nn.Module, preparation: Preparation) -> int:
    """How many features a network gives of an image. Raises SidaError for one that gives no row of them."""
    device = next(net.parameters()).device
    with torch.inference_mode():
        found: Any = net(torch.zeros(1, 3, *preparation.size, device=device))
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
        got = [*found.shape] if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise SidaError(f"timm's network must give features [1, F] of an image, got {got}", "Take another.")
    return int(found.shape[1])


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise SidaError(
            f"a detector timm:NAME needs the package timm ({error})", "Install it with: pip install 'sidactl[timm]'."
        ) from error
    return timm
