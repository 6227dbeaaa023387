"""From a NetSpec to the denoiser that it describes, and what must hold of its weights."""

from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor, nn

from sidactl.errors import SidaError
from sidactl.nets.denoiser import Preconditioned
from sidactl.nets.edm import DhariwalUNet, SongUNet
from sidactl.nets.edm2 import EDM2Denoiser
from sidactl.recipes import NetSpec
from sidactl.text import visible


def build(spec: NetSpec) -> Preconditioned:
    """A freshly initialised denoiser in training mode, float32, on torch's default device (`with torch.device`)."""
    if spec.architecture == "SongUNet":
        return Preconditioned(spec, SongUNet(spec), "model")
    if spec.architecture == "DhariwalUNet":
        return Preconditioned(spec, DhariwalUNet(spec), "model")
    if spec.architecture == "EDM2":
        return EDM2Denoiser(spec)
    assert_never(spec.architecture)


def misfits_of(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or of another shape in a state dict for `net`, in one line; empty where it fits."""
    own = net.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [name for name in own if name in state and own[name].shape != state[name].shape],
    }
    listed = [
        f"{len(v)} {k} ({', '.join(visible(name) for name in v[:5])}{', ...' if len(v) > 5 else ''})"
        for k, v in problems.items()
        if v
    ]
    return "; ".join(listed)


def check_values(state: Mapping[str, Tensor]) -> None:
    """Raises SidaError naming the first tensor whose values cannot be weights: not real, not floating, not finite."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            raise SidaError(
                f"weights must be real floating-point numbers, {visible(name)} is {kind}", "Give another file."
            )
        if num_bad := tensor.numel() - int(tensor.to(torch.float32).isfinite().sum()):
            raise SidaError(
                f"weights must be finite, {num_bad} of {tensor.numel()} values of {visible(name)} are not",
                "Give another file: what this network draws is no image.",
            )
