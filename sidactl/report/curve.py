"""A curve of scores as PNG bytes; nothing here reads or writes a file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from sidactl.report.grid import png_of

CURVE_SIZE = (900, 600)

MAIN_SERIES = "this run"

_SUPERSAMPLING = 2

_INK, _GREY, _GRID, _FINE_GRID, _PAPER = "#222222", "#6b6b6b", "#cfcfcf", "#eeeeee", "#ffffff"

_TEACHER = "#4d4d4d"

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers too

_TICK_SETS = (
    (1.0,),
    (1.0, 2.0, 5.0),
    (1.0, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
)

_MIN_DECADES = math.log10(2)  # an axis of equal values still spans a factor of 2

_MAX_MARKERS = 80  # more evaluations than this are drawn as a line without dots


def curve(
    points: Sequence[tuple[int, float]],
    *,
    teacher_score: float | None,
    title: str,
    ylabel: str,
    series: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    higher_is_better: bool = False,
) -> bytes:
    """PNG (900 x 600) of scores against images seen, both axes logarithmic; the same input gives the same bytes.

    `points`: (images seen, score) of this run in any order; its best one is ringed and labelled. `series`: other runs
    by name, which bring a legend. `teacher_score`: a dashed horizontal line. Logarithmic axes cannot show values that
    are not finite and above zero: those points are left out, and the picture says how many.
    """
    given = [(MAIN_SERIES, points), *(series or {}).items()]
    lines = [sorted(p for p in line if drawable(*p)) for _, line in given]
    num_omitted = sum(len(line) for _, line in given) - sum(map(len, lines))
    teacher = teacher_score if teacher_score is not None and drawable(teacher_score) else None
    xs = [x for line in lines for x, _ in line]
    scores = [y for line in lines for _, y in line] + ([] if teacher is None else [teacher])

    sheet = Sheet(*CURVE_SIZE)
    left, top, right, bottom = 78, 54, CURVE_SIZE[0] - 28, CURVE_SIZE[1] - 66
    sheet.text((left, 18), title, 22, "la", max_width=right - left)
    if series:
        top = sheet.legend([name for name, _ in given], left, right, top)
    sheet.text((left, top), ylabel, 15, "la", _GREY, max_width=right - left)
    x_axis, y_axis = Axis.around(xs, left, right, margin=0.04), Axis.around(scores, bottom, top + 30, margin=0.11)
    _draw_axes(sheet, x_axis, y_axis)
    if not xs:
        sheet.text(((left + right) / 2, (top + bottom) / 2), "no score to draw yet", 18, "mm", _GREY)
    if num_omitted:
        omitted = f"{num_omitted} point{'s' if num_omitted > 1 else ''} not finite or not above zero, left out"
        sheet.text((right, bottom + 36), omitted, 12, "ra", _GREY)

    teacher_row = None if teacher is None else y_axis.pixel(teacher)
    if teacher_row is not None:
        for dash in range(left + 2, right, 14):
            sheet.box(dash, teacher_row, min(dash + 8, right), teacher_row + 1, _TEACHER)
    for index, line in reversed(list(enumerate(lines))):  # this run last, over the others
        sheet.line([(x_axis.pixel(x), y_axis.pixel(y)) for x, y in line], _colour(index), len(line) <= _MAX_MARKERS)
    if teacher_row is not None:
        sheet.text((left + 10, teacher_row - 5), f"teacher {teacher:.4g}", 15, "ls", _TEACHER)
    if lines[0]:
        best_x, best = (max if higher_is_better else min)(lines[0], key=lambda p: p[1])
        column, row = x_axis.pixel(best_x), y_axis.pixel(best)
        for radius, colour in ((8.0, _colour(0)), (5.5, _PAPER), (3.5, _colour(0))):
            sheet.dot(column, row, radius, colour)
        # The label stands on the better side, where no point of this run is, and not on the teacher's line.
        side, anchor = (-1, "ms") if higher_is_better else (1, "mt")
        label_row = row + 15 * side
        if teacher_row is not None and 8 < side * (teacher_row - row) < 34:
            label_row = teacher_row + 9 * side
        label = f"{best:.4g} at {_short_count(best_x)}"
        half = sheet.text_width(label, 17) / 2 + 4
        sheet.text((min(max(column, left + half), right - half), label_row), label, 17, anchor, _colour(0))
    return sheet.png()


def _draw_axes(sheet: "Sheet", x_axis: "Axis", y_axis: "Axis") -> None:
    left, right, bottom, top = x_axis.start, x_axis.end, y_axis.start, y_axis.end
    for fine, colour in ((True, _FINE_GRID), (False, _GRID)):
        for x in x_axis.ticks(fine):
            sheet.box(x_axis.pixel(x), top, x_axis.pixel(x), bottom, colour)
        for y in y_axis.ticks(fine):
            sheet.box(left, y_axis.pixel(y), right, y_axis.pixel(y), colour)
    for x in x_axis.ticks():
        sheet.text((x_axis.pixel(x), bottom + 8), _short_count(x), 15, "ma")
    for y in y_axis.ticks():
        sheet.text((left - 9, y_axis.pixel(y)), f"{y:.10g}", 15, "rm")
    sheet.box(left, bottom, right, bottom, _INK)
    sheet.box(left, top, left, bottom, _INK)
    sheet.text(((left + right) / 2, bottom + 34), "images seen", 15, "ma", _GREY)


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from 10^low at pixel `start` to 10^high at pixel `end`."""

    low: float
    high: float
    start: int
    end: int

    @classmethod
    def around(cls, values: Sequence[float], start: int, end: int, margin: float) -> "Axis":
        logs = [math.log10(v) for v in values] or [0.0, 1.0]
        low, high = min(logs), max(logs)
        widening = max(_MIN_DECADES - (high - low), 0.0) / 2
        widening += margin * (high - low + 2 * widening)
        return cls(low - widening, high + widening, start, end)

    def pixel(self, value: float) -> int:
        return round(self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start))

    def ticks(self, fine: bool = False) -> list[float]:
        """The coarsest choice with at least three ticks; `fine`: 1 to 9 of every decade."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        inside: list[float] = []
        for mantissas in (range(1, 10),) if fine else _TICK_SETS:
            candidates = [float(f"{m}e{d}") for d in decades for m in mantissas]
            inside = [v for v in candidates if self.low <= math.log10(v) <= self.high]
            if len(inside) >= 3:
                break
        return inside


class Sheet:
    """A white page addressed in pixels of the finished picture, drawn larger and averaged down for smooth edges."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), _PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x0: int, y0: int, x1: int, y1: int, colour: str) -> None:
        """Fills the pixels x0..x1, y0..y1, ends included: lines that fill whole pixels stay crisp."""
        s = _SUPERSAMPLING
        self.draw.rectangle((x0 * s, y0 * s, x1 * s + s - 1, y1 * s + s - 1), fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        s = _SUPERSAMPLING
        x, y = x + 0.5, y + 0.5
        self.draw.ellipse(((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s), fill=colour)

    def line(self, pixels: Sequence[tuple[int, int]], colour: str, dots: bool) -> None:
        s = _SUPERSAMPLING
        if len(pixels) > 1:
            path = [((x + 0.5) * s, (y + 0.5) * s) for x, y in pixels]
            self.draw.line(path, fill=colour, width=round(2.5 * s), joint="curve")
        for x, y in pixels if dots or len(pixels) == 1 else ():
            self.dot(x, y, 3.5, colour)

    def text(
        self,
        at: tuple[float, float],
        text: str,
        size: int,
        anchor: str,
        colour: str = _INK,
        max_width: float = math.inf,
    ) -> None:
        """Text at `at` (Pillow's anchors), no wider than `max_width`, on a rim of paper to stay legible over lines."""
        s = _SUPERSAMPLING
        xy, size = (at[0] * s, at[1] * s), int(size * min(1.0, max_width / max(self.text_width(text, size), 1.0)))
        self.draw.text(xy, text, colour, _font(size * s), anchor, stroke_width=3 * s, stroke_fill=_PAPER)

    def text_width(self, text: str, size: int) -> float:
        return _font(size * _SUPERSAMPLING).getlength(text) / _SUPERSAMPLING

    def legend(self, names: Sequence[str], left: int, right: int, top: int) -> int:
        """Names after dots of their colours, in rows from `top` on; returns where the next thing may start."""
        at = float(left)
        for index, name in enumerate(names):
            width = 16 + self.text_width(name, 15)
            if at > left and at + width > right:
                at, top = left, top + 22
            self.dot(at + 5, top + 9, 4.5, _colour(index))
            self.text((at + 16, top), name, 15, "la")
            at += width + 22
        return top + 26

    def png(self, software: str | None = None) -> bytes:
        return png_of(self.image.reduce(_SUPERSAMPLING), software)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def drawable(*values: float) -> bool:
    """Whether a logarithmic axis can show these."""
    return all(math.isfinite(v) and v > 0 for v in values)


def _short_count(num_images: float) -> str:
    """1500 -> '1.5k', 200000000 -> '200M', to three digits."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if num_images >= size:
            return f"{float(f'{num_images / size:.3g}'):g}{suffix}"
    return f"{num_images:g}"
