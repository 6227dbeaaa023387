"""Networks by their NetSpec: `build` makes the denoiser that a spec describes, under the published key names."""

from sidactl.nets.assembly import build, check_values, misfits_of
from sidactl.nets.denoiser import Denoiser, Preconditioned

__all__ = ["Denoiser", "Preconditioned", "build", "check_values", "misfits_of"]
