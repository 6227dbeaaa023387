"""Devices: which one, what memory it has, how tensors get there."""

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from sidactl import launch
from sidactl.errors import SidaError


def pick_device(name: str | None = None) -> torch.device:
    """The named device ("cpu", "cuda", "cuda:1"), or a GPU where there is one; raises SidaError if it is not there.

    Of the processes that torchrun starts on a machine each gets a GPU of its own. Its float32 is exact from now on,
    also in convolutions, where torch would round to TF32 unasked.
    """
    allow_tf32(False)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (local_rank := launch.local_rank()) is not None:
        name = f"cuda:{local_rank}"
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


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def keep_memory() -> None:
    """From now on this process keeps the memory that tensors on the CPU leave for those to come.

    By itself glibc gives back what is larger than 32 MB, and every new tensor of that size is fetched and cleared page
    by page, which takes several times as long as most operations on it. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on this device; what goes to a GPU goes from pinned memory, so that the host need not wait for it."""
    source = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return source.to(device, non_blocking=True)


def memory_of(device: torch.device) -> list[str | int]:
    """A GPU's name, and its memory in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return [properties.name, properties.total_memory]


def allow_tf32(allow: bool) -> None:
    """Whether a GPU may round the inputs of float32 products and convolutions to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
