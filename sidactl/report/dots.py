"""Scores with their spread as a picture: a panel for each number, one row each, on a logarithmic axis."""

from collections.abc import Sequence
from typing import NamedTuple

from sidactl.report.curve import Axis, Sheet, drawable

DOTS = "sidactl compare"
"""what such a picture says that it was drawn by, so that it may be replaced"""

BLIND, SEEING = "#0072b2", "#d55e00"
"""colours of numbers by a detector that had no part in what it scores, and of the others, which are rings, too"""

_ROW, _WIDTH, _HEAD, _FOOT, _KEY = 34, 900, 58, 50, 34
_GREY = "#6b6b6b"


class Mark(NamedTuple):
    """One row of a panel."""

    name: str
    mean: float
    std: float | None
    is_blind: bool


def dots(panels: Sequence[tuple[str, Sequence[Mark]]]) -> bytes:
    """PNG of titles and their marks in the order given; the same input gives the same bytes.

    A bar goes from mean - std to mean + std. What is not finite and above zero has its value in words instead.
    """
    heights = [_HEAD + _ROW * len(marks) + _FOOT for _, marks in panels]
    sheet = Sheet(_WIDTH, _KEY + sum(heights))
    for left, colour, text in (
        (28, BLIND, "blind: its detector had no part in it"),
        (360, SEEING, "not blind: its detector chose it, or trained it"),
    ):
        _dot(sheet, left + 5, 22, colour)
        sheet.text((left + 18, 22), text, 15, "lm")
    top = _KEY
    for (title, marks), height in zip(panels, heights, strict=True):
        _draw(sheet, top, title, marks)
        top += height
    return sheet.png(DOTS)


def _draw(sheet: Sheet, top: int, title: str, marks: Sequence[Mark]) -> None:
    shown = [mark for mark in marks if drawable(mark.mean)]
    ends = [end for m in shown for end in (m.mean, m.mean + (m.std or 0), m.mean - (m.std or 0)) if drawable(end)]
    left, right, first, bottom = 300, _WIDTH - 28, top + _HEAD, top + _HEAD + _ROW * len(marks)
    sheet.text((28, top + 14), title, 19, "la", max_width=_WIDTH - 56)
    axis = Axis.around(ends, left, right, margin=0.06)
    for fine in (True, False):
        for x in axis.ticks(fine):
            sheet.box(axis.pixel(x), first - 8, axis.pixel(x), bottom, "#eeeeee" if fine else "#cfcfcf")
    for x in axis.ticks():
        sheet.text((axis.pixel(x), bottom + 8), f"{x:.10g}", 15, "ma")
    for index, (name, mean, std, is_blind) in enumerate(marks):
        y, colour = first + _ROW * index + _ROW // 2 - 8, BLIND if is_blind else SEEING
        sheet.text((left - 14, y), name, 15, "rm", max_width=left - 42)
        if not drawable(mean):
            sheet.text((left + 10, y), f"{mean:.4g}", 15, "lm", _GREY)
            continue
        low = mean - (std or 0)
        start = axis.pixel(low) if drawable(low) else left
        sheet.box(start, y, axis.pixel(mean + (std or 0)), y + 1, colour)
        _dot(sheet, axis.pixel(mean), y, colour)


def _dot(sheet: Sheet, x: int, y: int, colour: str) -> None:
    sheet.dot(x, y, 5, colour)
    if colour == SEEING:
        sheet.dot(x, y, 2.5, "white")
