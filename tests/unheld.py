"""The command with EDM2 normalised in every pass, as where it is sharded: `python -m tests.unheld WORDS OF SIDACTL`."""

from contextlib import nullcontext
from typing import Any

from sidactl.__main__ import main
from sidactl.training import distillation


def unheld(net: Any, *, trains: bool = False) -> Any:
    """In place of `edm2.holding`."""
    return nullcontext()


if __name__ == "__main__":
    vars(distillation)["holding"] = unheld
    main()
