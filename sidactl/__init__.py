"""One-step generators from pretrained diffusion models by Score identity Distillation; names load when first used."""

import importlib

__version__ = "0.1.0"

_OPS = (
    "load",
    "sample",
    "distill",
    "finetune_sid2a",
    "train_teacher",
    "fetch_teacher",
    "prepare_data",
    "fid",
    "fd_dinov2",
    "prec_recall",
    "inception_score",
    "evaluate",
)
_MODULES = ("detectors", "diffusion", "losses", "metrics", "nets", "ops", "pickles", "recipe", "sampling", "store")

__all__ = ["SidaError", "__version__", *_OPS, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _OPS:
        return getattr(importlib.import_module("sidactl.ops"), name)
    if name in _MODULES:
        return importlib.import_module(f"sidactl.{name}")
    if name == "SidaError":
        return importlib.import_module("sidactl.errors").SidaError
    raise AttributeError(f"module 'sidactl' has no attribute {name!r}")
