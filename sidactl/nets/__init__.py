"""Networks by their NetSpec: `build` makes the denoiser that a spec describes, under the published key names."""

from typing import assert_never

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
