"""What a foreign file holds, as a NetSpec and weights under the published names, loaded strictly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidactl import nets
from sidactl.errors import SidaError
from sidactl.foreign import pickles, records
from sidactl.nets import Preconditioned
from sidactl.nets.edm2 import force_normalize_
from sidactl.recipes import NetSpec
from sidactl.text import visible

# Options that a checkpoint leaves out have these values. Source: EDM (2206.00364), table 7; EDM2 (2312.02696), table 6.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "dropout": 0.10,
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
        "dropout": 0.10,
    },
    "EDM2": {
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "channel_mult_emb": None,
        "channel_mult_noise": None,
        "num_blocks": 3,
        "attn_resolutions": (16, 8),
        "logvar_channels": 128,
    },
}

_EDM_CLASSES = ("EDMPrecond", "EDMPrecond_EncoderDecoder")

_EDM2_CLASSES = ("Precond", "EDM_2_Precond_EncoderDecoder", "EDM_2_Precond_Generator")

# Options of the published classes that say how a net runs, not what it is.
_IGNORED = {"use_fp16", "model_type", "force_normalization", "use_gan", "label_dropout"}

_OTHER_SCHEDULES = ("VPPrecond", "VEPrecond", "iDDPMPrecond")


def spec_of(record: records.Record) -> NetSpec:
    """The NetSpec of a network record read from a published pickle.

    Raises SidaError for a class that is not one of the published ones, and for an option that we do not know.
    """
    options = dict(record.init_kwargs)
    if record.class_name in _EDM2_CLASSES:
        architecture = "EDM2"
        if record.class_name.endswith("_Generator"):  # it has no uncertainty head
            options["logvar_channels"] = 0
    elif record.class_name in _EDM_CLASSES:
        architecture = str(options.get("model_type", "DhariwalUNet")).removesuffix("_EncoderDecoder")
        if architecture not in _DEFAULTS:
            raise SidaError(
                f"networks of type {visible(architecture)} are not supported", "SongUNet and DhariwalUNet are."
            )
    elif record.class_name in _OTHER_SCHEDULES:
        raise SidaError(
            f"networks of class {record.class_name} (EDM's --precond other than edm) are not supported: they take "
            "inputs and noise levels scaled as VP, VE or iDDPM does",
            "Give one that was trained with --precond=edm, as the published teachers were.",
        )
    else:
        raise SidaError(
            f"networks of class {record.class_name} are not supported",
            "Those of EDM, EDM2, SiD and SiDA are.",
        )
    fields = _DEFAULTS[architecture] | {k: v for k, v in options.items() if k not in _IGNORED}
    # Blocks tell their dropout probability from other options by its type.
    dropout = fields.get("dropout", 0)
    fields["dropout"] = float(dropout) if isinstance(dropout, int | float) else dropout
    return NetSpec.from_json({"architecture": architecture} | {k: _jsonable(v) for k, v in fields.items()})


def load_record(record: records.Record) -> Preconditioned:
    """The denoiser that a record describes, with its weights, in eval mode and float32.

    Raises SidaError for weights that do not fit it, or are not real and finite.
    """
    net = filled(laid_out(spec_of(record)), pickles.state_dict(record))
    if record.forced_normalization_hook:
        force_normalize_(net)
    return net.eval().requires_grad_(False)


def laid_out(spec: NetSpec) -> Preconditioned:
    """The denoiser without memory for weights: what a file merely claims to hold costs nothing yet."""
    with torch.device("meta"):
        return nets.build(spec)


def filled(layout: Preconditioned, state: Mapping[str, Tensor]) -> Preconditioned:
    """The denoiser of this layout with these weights, as float32.

    Raises SidaError for weights that do not fit it, or are not real and finite, before memory is taken for it.
    """
    _refuse_misfits(layout, state)
    nets.check_values(state)
    net = nets.build(layout.spec)
    load_weights(net, state)
    return net


def load_weights(net: Preconditioned, state: Mapping[str, Tensor]) -> None:
    """Copies a state dict into a net, as float32. Raises SidaError listing what is missing, unexpected or misshapen."""
    _refuse_misfits(net, state)
    net.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})


def _refuse_misfits(net: Preconditioned, state: Mapping[str, Tensor]) -> None:
    if misfits := nets.misfits_of(net, state):
        raise SidaError(
            f"the weights do not fit the network: {misfits}",
            "Check that the file holds the network that its settings describe.",
        )


def read_network(path: Path) -> Preconditioned:
    """The network in a published pickle (its "ema" entry). Executes nothing; raises SidaError if there is none."""
    record = pickles.read(path).get("ema")
    if not isinstance(record, records.Record):
        raise SidaError(f"{path} holds no network named 'ema'", "Give a snapshot that EDM, SiD or SiDA published.")
    return load_record(record)


def _jsonable(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
