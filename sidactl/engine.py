"""Devices: where the arithmetic happens. Several processes and other precisions get their room here."""

import torch

from sidactl.errors import SidaError


def pick_device(name: str | None = None) -> torch.device:
    """The named device ("cpu", "cuda", "cuda:1"), or a GPU where there is one. Raises SidaError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SidaError(f"device must be cpu, cuda or cuda:N, got {name!r}", "Pass --device cpu.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SidaError(
            f"device {name} is not there: torch sees {torch.cuda.device_count()} GPUs", "Pass --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise SidaError(f"device must be cpu, cuda or cuda:N, got {name!r}", "Pass --device cpu.")
    return device
