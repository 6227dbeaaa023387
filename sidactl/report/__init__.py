"""Pictures for people, as bytes; nothing here reads or writes a file."""

from sidactl.report.curve import curve
from sidactl.report.dots import DOTS, Mark, dots
from sidactl.report.grid import grid

__all__ = ["DOTS", "Mark", "curve", "dots", "grid"]
