"""What a failure of the machine means to people."""

import re

import torch
import torch.distributed as dist

from sidactl.errors import EXIT_FAILED, SidaError


def explain_failure(error: Exception) -> SidaError | None:
    """What a failure of the machine, and not of ours, means to people; None for other errors."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
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
