"""What a failure of the machine means to people."""

import re

import torch
import torch.distributed as dist

from sidactl.errors import EXIT_FAILED, SidaError

_NO_MEMORY = ("can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")
_NO_KERNEL = ("CUDNN_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_NOT_SUPPORTED", "unable to find an engine to execute")
"""what cuDNN and cuBLAS say where no kernel's workspace fits, and where none takes the shape at all"""


def is_out_of_memory(error: Exception, *, in_trial: bool = False) -> bool:
    """Whether memory was lacking, torch's own or that of cuDNN and cuBLAS.

    in_trial: also where no kernel was found, of a shape that runs with fewer images.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = _NO_MEMORY + (_NO_KERNEL if in_trial else ())
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def explain_failure(error: Exception) -> SidaError | None:
    """What a failure of the machine, and not of ours, means to people; None for other errors."""
    text = str(error)
    if is_out_of_memory(error):
        wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
        return SidaError(
            f"out of memory{f' while asking for {wanted[1]} more' if wanted else ''}",
            "Hold less at a time: --checkpoint-activations, --ema-on-cpu, --precision bf16, a smaller "
            "--batch-per-device, more --num-accumulation-rounds, or --shard; --dry-run tells what is needed.",
            exit_code=EXIT_FAILED,
        )
    is_lost = isinstance(error, dist.DistError) or "onnection closed by peer" in text or "onnection reset" in text
    if is_lost and dist.is_initialized():
        return SidaError(
            "another process of this run has ended, so this one ends, too",
            "Repeat the same command to go on from the last checkpoint.",
            exit_code=EXIT_FAILED,
        )
    return None
