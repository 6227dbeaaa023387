"""One-step generators from pretrained diffusion models by Score identity Distillation; names load when first used."""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as type checkers know it; nothing is imported here, so that no Ctrl-C meets an import
if TYPE_CHECKING:
    from sidactl import detectors, metrics, nets, noise, recipes, sampling, store
    from sidactl import methods as losses
    from sidactl.commands.distill import distill, finetune_sid2a
    from sidactl.commands.export import export
    from sidactl.commands.fetch import fetch_teacher
    from sidactl.commands.inventory import env, files, gc, look, ls, show, verify
    from sidactl.commands.prepare import prepare_data
    from sidactl.commands.resolve import load
    from sidactl.commands.sample import sample
    from sidactl.commands.score import evaluate, fd_dinov2, fid, inception_score, prec_recall
    from sidactl.commands.train import train_teacher
    from sidactl.errors import SidaError
    from sidactl.foreign import pickles

_MODULES = {
    "detectors": "sidactl.detectors",
    "losses": "sidactl.methods",
    "metrics": "sidactl.metrics",
    "nets": "sidactl.nets",
    "noise": "sidactl.noise",
    "pickles": "sidactl.foreign.pickles",
    "recipes": "sidactl.recipes",
    "sampling": "sidactl.sampling",
    "store": "sidactl.store",
}
_PLACES = {
    "distill": ("distill", "finetune_sid2a"),
    "export": ("export",),
    "fetch": ("fetch_teacher",),
    "inventory": ("env", "files", "gc", "look", "ls", "show", "verify"),
    "prepare": ("prepare_data",),
    "resolve": ("load",),
    "sample": ("sample",),
    "score": ("evaluate", "fd_dinov2", "fid", "inception_score", "prec_recall"),
    "train": ("train_teacher",),
}
"""the public functions, by the module of `commands` that they are in"""

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
        if name == "SidaError":
            return importlib.import_module("sidactl.errors").SidaError
        for module, functions in _PLACES.items():
            if name in functions:
                return getattr(importlib.import_module(f"sidactl.commands.{module}"), name)
        raise AttributeError(f"module 'sidactl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))
