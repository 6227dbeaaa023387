"""Scores with their spread as a picture: one row each, on one logarithmic axis."""

from collections.abc import Sequence

from sidactl.report.curve import Axis, Sheet, drawable

DOTS = "sidactl compare"
"""what such a picture says that it was drawn by, so that it may be replaced"""

_ROW, _WIDTH, _TOP = 34, 900, 76


def dots(marks: Sequence[tuple[str, float, float | None]], *, title: str, xlabel: str) -> bytes:
    """PNG of (name, mean, standard deviation) in the order given; the same input gives the same bytes.

    A bar goes from mean - std to mean + std. What is not finite and above zero has its value in words instead.
    """
    shown = [mark for mark in marks if drawable(mark[1])]
    ends = [end for _, mean, std in shown for end in (mean, mean + (std or 0), mean - (std or 0)) if drawable(end)]
    sheet = Sheet(_WIDTH, _TOP + _ROW * len(marks) + 66)
    left, right, bottom = 300, _WIDTH - 28, _TOP + _ROW * len(marks)
    sheet.text((28, 18), title, 22, "la", max_width=_WIDTH - 56)
    axis = Axis.around(ends, left, right, margin=0.06)
    for fine in (True, False):
        for x in axis.ticks(fine):
            sheet.box(axis.pixel(x), _TOP - 8, axis.pixel(x), bottom, "#eeeeee" if fine else "#cfcfcf")
    for x in axis.ticks():
        sheet.text((axis.pixel(x), bottom + 8), f"{x:.10g}", 15, "ma")
    sheet.text(((left + right) / 2, bottom + 34), xlabel, 15, "ma", "#6b6b6b")
    for index, (name, mean, std) in enumerate(marks):
        y = _TOP + _ROW * index + _ROW // 2 - 8
        sheet.text((left - 14, y), name, 15, "rm", max_width=left - 42)
        if not drawable(mean):
            sheet.text((left + 10, y), f"{mean:.4g}", 15, "lm", "#6b6b6b")
            continue
        low = mean - (std or 0)
        start = axis.pixel(low) if drawable(low) else left
        sheet.box(start, y, axis.pixel(mean + (std or 0)), y + 1, "#0072b2")
        sheet.dot(axis.pixel(mean), y, 5, "#0072b2")
    return sheet.png(DOTS)
