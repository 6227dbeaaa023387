"""Networks by their NetSpec: `build` makes the denoiser that a spec describes, under the published key names."""

from collections.abc import Mapping
from typing import assert_never

from torch import Tensor, nn

from sidactl.diffusion import Preconditioned
from sidactl.nets.edm import DhariwalUNet, SongUNet
from sidactl.nets.edm2 import EDM2Denoiser
from sidactl.recipe import NetSpec


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
    listed = [f"{len(v)} {k} ({', '.join(v[:5])}{', ...' if len(v) > 5 else ''})" for k, v in problems.items() if v]
    return "; ".join(listed)
