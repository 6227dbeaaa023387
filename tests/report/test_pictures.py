"""Grids hold exactly the pixels they were given; curves put things where the logarithm says."""

import io
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sidactl import report
from sidactl.errors import SidaError
from tests.worlds import noise

BLUE, TEACHER, GRID, AXIS = (0, 114, 178), (77, 77, 77), (207, 207, 207), (34, 34, 34)

FALLING = [(10**k, 10.0 ** (4 - k / 2)) for k in range(3, 9)]


def decoded(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)))


def plot(points: list[tuple[int, float]], teacher: float | None = None, higher_is_better: bool = False) -> bytes:
    return report.curve(
        points, teacher_score=teacher, title="tiny-digits", ylabel="FD", higher_is_better=higher_is_better
    )


def rows_of(picture: NDArray[np.uint8], colour: tuple[int, int, int], least: int) -> list[int]:
    """Rows with at least `least` pixels of exactly this colour."""
    return [int(row) for row in np.flatnonzero((picture == colour).all(axis=2).sum(axis=1) >= least)]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_tiles_equal_the_source_pixels_in_reading_order_with_white_gaps(channels: int) -> None:
    images = noise(5, 40, 48, channels)
    canvas = decoded(report.grid(images, columns=3)).reshape(82, 148, channels)
    for index, image in enumerate(images):
        top, left = index // 3 * 42, index % 3 * 50
        np.testing.assert_array_equal(canvas[top : top + 40, left : left + 48], image)
    assert (canvas[40:42] == 255).all()
    assert (canvas[:, 48:50] == 255).all()
    assert (canvas[42:, 100:] == 255).all()


def test_grid_enlarges_small_images_by_a_whole_factor_without_blending() -> None:
    images = noise(1, 10, 20, 3)
    canvas = decoded(report.grid(images))
    np.testing.assert_array_equal(canvas, images[0].repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize(("num_images", "size"), [(1, (32, 32)), (4, (66, 66)), (5, (66, 100)), (7, (100, 100))])
def test_grid_defaults_to_a_square(num_images: int, size: tuple[int, int]) -> None:
    assert decoded(report.grid(noise(num_images, 32, 32, 1))).shape == size


def test_grid_with_more_columns_than_images_has_no_empty_columns() -> None:
    assert decoded(report.grid(noise(2, 32, 32, 3), columns=9)).shape == (32, 66, 3)


def test_grid_refuses_what_is_not_images() -> None:
    with pytest.raises(SidaError) as caught:
        report.grid(np.zeros((2, 3, 8, 8), dtype=np.uint8))
    assert str(caught.value) == (
        "a grid must have uint8 images [N, H, W, C] with 1 or 3 channels, got uint8 [2, 3, 8, 8]. "
        "Pass at least one grey or RGB image."
    )
    with pytest.raises(SidaError, match=r"got uint8 \[0, 8, 8, 3\]"):
        report.grid(np.zeros((0, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(SidaError, match="columns of a grid must be >= 1, got 0"):
        report.grid(noise(2, 8, 8, 1), columns=0)


def test_same_input_gives_the_same_bytes() -> None:
    assert report.grid(noise(3, 8, 8, 3)) == report.grid(noise(3, 8, 8, 3))
    assert plot(FALLING, 2.0) == plot(FALLING, 2.0)
    assert plot(FALLING[::-1], 2.0) == plot(FALLING, 2.0)


def test_curve_is_900_by_600_on_white() -> None:
    picture = decoded(plot(FALLING, 2.0))
    assert picture.shape == (600, 900, 3)
    assert all((picture[y, x] == 255).all() for y in (0, 599) for x in (0, 899))


def test_curve_teacher_line_lies_where_the_logarithm_puts_it_between_the_gridlines() -> None:
    teacher = 3.0
    picture = decoded(plot([(1000, 100.0), (1_000_000, 0.1)], teacher))
    # Gridlines of the decades 100, 10, 1, 0.1 from the top; hardly anything else is in this grey.
    hundred, ten, one, tenth = rows_of(picture, GRID, 600)
    assert tenth - one == pytest.approx(one - ten, abs=1)
    assert ten - hundred == pytest.approx(one - ten, abs=1)
    row, below = rows_of(picture, TEACHER, 300)
    assert below == row + 1
    assert row == pytest.approx(one - math.log10(teacher) * (one - ten), abs=1)


def test_curve_without_a_drawable_teacher_score_has_no_teacher_line() -> None:
    for teacher in (None, math.nan, math.inf, 0.0):
        assert plot(FALLING, teacher) == plot(FALLING)
    assert rows_of(decoded(plot(FALLING)), TEACHER, 100) == []


def test_curve_of_a_power_law_is_a_straight_line() -> None:
    blue = (decoded(plot(FALLING)) == BLUE).all(axis=2)
    columns = np.arange(150, 780)  # left of the label of the best point
    centres = np.array([np.flatnonzero(blue[:, column]).mean() for column in columns])
    slope, offset = np.polyfit(columns, centres, 1)
    assert slope > 0.4
    assert np.abs(centres - (slope * columns + offset)).max() < 1.5


@pytest.mark.parametrize(("higher_is_better", "best"), [(False, 1_000_000), (True, 1000)])
def test_curve_rings_the_best_point_only(higher_is_better: bool, best: int) -> None:
    points = [(1000, 9.0), (30_000, 5.0), (1_000_000, 1.0), (30_000_000, 3.0)]
    picture = decoded(plot(points, higher_is_better=higher_is_better))
    axis = np.flatnonzero((picture[rows_of(picture, AXIS, 600)[0]] == AXIS).all(axis=1))
    width = float(axis.max() - axis.min())
    for num_images, _ in points[:3]:
        # The points span the axis but for a margin of 4 % of their span on either side.
        share = (math.log10(num_images) - 3) / (math.log10(30_000_000) - 3)
        column = round(axis.min() + width * (0.04 + share) / 1.08)
        blue = (picture[:, column] == BLUE).all(axis=1)
        num_strokes = int((np.diff(blue.astype(int)) == 1).sum())
        # Down through a ring: blue, white, blue, white, blue.
        assert (num_strokes >= 3) == (num_images == best), num_images


def test_curve_leaves_out_what_logarithms_cannot_show_and_says_so() -> None:
    clean = decoded(plot(FALLING))
    dirty = decoded(plot([(0, 300.0), (5000, math.nan), (6000, math.inf), (7000, 0.0), *FALLING]))
    differing = np.argwhere((clean != dirty).any(axis=2))
    assert len(differing) > 0
    # Only the remark in the lower right corner is new.
    assert differing[:, 0].min() > 550
    assert differing[:, 1].min() > 500


@pytest.mark.parametrize("points", [[], [(0, 3.0)], [(512, 3.0)], [(512, 3.0)] * 4, [(k, 3.0) for k in (1, 2, 1000)]])
def test_curve_draws_few_and_equal_points(points: list[tuple[int, float]]) -> None:
    picture = decoded(plot(points, 3.0))
    row = rows_of(picture, TEACHER, 20)[0]
    top, bottom = (int(v) for v in np.flatnonzero((picture[:, 78] == AXIS).all(axis=1))[[0, -1]])
    assert row == pytest.approx((top + bottom) / 2, abs=2)  # equal values lie in the middle
    assert (picture == BLUE).all(axis=2).any() == any(x > 0 for x, _ in points)


def test_curve_of_other_runs_gets_a_legend_and_further_colours() -> None:
    def drawn(series: dict[str, list[tuple[int, float]]] | None) -> NDArray[np.uint8]:
        return decoded(report.curve(FALLING, teacher_score=None, title="", ylabel="", series=series))

    orange = (213, 94, 0)
    picture = drawn({"SiD": [(1000, 50.0), (100_000, 20.0)]})
    marked = (picture == orange).all(axis=2)
    assert marked[54:80].any()  # in the legend
    assert marked[150:500].sum() > 300  # and in the plot
    assert not (drawn(None) == orange).all(axis=2).any()
    # A legend that needs more rows pushes the plot down.
    tall = drawn({f"a run with a long name, number {k}": [(1000, 50.0)] for k in range(6)})
    first = [int(np.flatnonzero((p[:, 78] == AXIS).all(axis=1))[0]) for p in (picture, tall)]
    assert first[1] == first[0] + 44
