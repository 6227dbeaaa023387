"""Pictures for people, as bytes; nothing here reads or writes a file."""

from sidactl.report.curve import curve
from sidactl.report.dots import DOTS, dots
from sidactl.report.grid import grid

__all__ = ["DOTS", "curve", "dots", "grid"]
