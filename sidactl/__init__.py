"""One-step generators from pretrained diffusion models by Score identity Distillation; names load when first used."""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as type checkers know it; nothing is imported here, so that no Ctrl-C meets an import
if TYPE_CHECKING:
    from sidactl import detectors, losses, metrics, nets, noise, ops, recipes, sampling, store
    from sidactl.errors import SidaError
    from sidactl.foreign import pickles
    from sidactl.inventory import env, export, files, gc, look, ls, show, verify
    from sidactl.ops import (
        distill,
        evaluate,
        fd_dinov2,
        fetch_teacher,
        fid,
        finetune_sid2a,
        inception_score,
        load,
        prec_recall,
        prepare_data,
        sample,
        train_teacher,
    )

_INVENTORY = {"env", "export", "files", "gc", "look", "ls", "show", "verify"}
_MODULES = {
    name: f"sidactl.{name}" for name in ("detectors", "losses", "metrics", "nets", "noise", "ops", "recipes", "store")
} | {"pickles": "sidactl.foreign.pickles", "sampling": "sidactl.sampling"}

__all__ = [
    "SidaError",
    "__version__",
    "detectors",
    "distill",
    "env",
    "evaluate",
    "export",
    "fd_dinov2",
    "fetch_teacher",
    "fid",
    "files",
    "finetune_sid2a",
    "gc",
    "inception_score",
    "load",
    "look",
    "losses",
    "ls",
    "metrics",
    "nets",
    "noise",
    "ops",
    "pickles",
    "prec_recall",
    "prepare_data",
    "recipes",
    "sample",
    "sampling",
    "show",
    "store",
    "train_teacher",
    "verify",
]


if not TYPE_CHECKING:  # they know the names above, and would take any other for an object

    def __getattr__(name: str) -> object:
        import importlib

        if name in _MODULES:
            return importlib.import_module(_MODULES[name])
        if name not in __all__:
            raise AttributeError(f"module 'sidactl' has no attribute {name!r}")
        place = "inventory" if name in _INVENTORY else "errors" if name == "SidaError" else "ops"
        return getattr(importlib.import_module(f"sidactl.{place}"), name)


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))
