"""The command line: parses, calls commands inside each body, prints; the order of its modules is that of --help."""

from importlib import import_module

from sidactl.cli.entry import app, main

__all__ = ["app", "main"]

for _name in ("data", "train", "sample", "score", "compare", "look", "keep"):
    import_module(f"sidactl.cli.{_name}")
