"""Devices: which one, what memory it has, how tensors get there."""

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from sidactl import launch
from sidactl.errors import SidaError


def pick_device(name: str | None = None) -> torch.device:
    """The named device ("cpu", "cuda", "cuda:1"), or a GPU where there is one; raises SidaError if it is not there.

    Of the processes that torchrun starts on a machine each gets a GPU of its own. Its float32 is exact from now on,
    also in convolutions, where torch would round to TF32 unasked, and products of float16 are added up in float32, as
    in the published runs. A GPU that this build of torch has no kernels for is refused.
    """
    allow_tf32(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
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
    if device.type == "cuda":
        _check_kernels(device)
    return device


_WHEELS_BY_CAPABILITY = (((7, 5), "cu126"), ((9, 1), None), ((99, 0), "cu128"))
"""below which compute capability PyTorch's own builds for that CUDA have the kernels; None: those of PyPI do

Builds for CUDA 12.6 keep Maxwell, Pascal and Volta (V100), which later ones left out; Blackwell came with 12.8.
"""


def _check_kernels(device: torch.device) -> None:
    """Raises SidaError where no kernel of this build of torch runs on the GPU, which it would say at the first use."""
    built = [found.groups() for name in torch.cuda.get_arch_list() if (found := re.match(r"(sm|compute)_(\d+)", name))]
    if not built:  # another maker's GPU
        return
    major, minor = torch.cuda.get_device_capability(device)
    for kind, digits in built:
        of = int(digits[:-1]), int(digits[-1])
        # Binaries run on later GPUs of the same generation, PTX on all later ones.
        if of <= (major, minor) and (kind == "compute" or of[0] == major):
            return
    index = next(wheel for below, wheel in _WHEELS_BY_CAPABILITY if (major, minor) < below)
    raise SidaError(
        f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (sm_{major}{minor}), only "
        f"for {', '.join(torch.cuda.get_arch_list())}",
        f"Install {f'the build of torch for {index}' if index else 'another build of torch'}, or pass --device cpu.",
    )


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Within the block cuDNN tries its kernels at the first convolution of a shape and keeps the fastest.

    For training, whose shapes stay; its bits on a GPU may then differ from run to run, as in the published ones. Not
    for sampling and scores, where a seed gives the same image in batches of any size.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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


def bytes_of(device: torch.device) -> int | None:
    """A GPU's memory; None for a CPU, which shares its own with all others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def free(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_and_total(device: torch.device) -> tuple[int, int]:
    """A GPU's memory in bytes: what no program has taken, this one's reserve included, and all of it."""
    left, total = torch.cuda.mem_get_info(device)
    return left, total


def allow_tf32(allow: bool) -> None:
    """Whether a GPU may round the inputs of float32 products and convolutions to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
