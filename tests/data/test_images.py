"""Single images: to PNG and back, and how they are shown."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidactl.data.dataset import Dataset, tiny_digits_arrays
from sidactl.data.images import encode_png
from sidactl.data.prepare import contact_sheet
from tests.worlds import make_zip, noise


def test_tiny_digits_are_ink_counts_over_eight_minus_one() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    digits = sklearn_datasets.load_digits()
    images, labels = tiny_digits_arrays()
    assert np.abs(images[:, 0] / 127.5 - 1 - (digits.images / 8 - 1)).max() <= 1 / 255
    np.testing.assert_array_equal(labels, digits.target)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (8, 8, 3), (256, 256), (512, 256, 3)])
def test_encode_png_is_read_back_by_pillow(shape: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(encode_png(noise(*shape))))), noise(*shape))


def test_contact_sheet_shows_images_spread_over_the_dataset(tmp_path: Path) -> None:
    members = [(f"00000/img{i:08d}.png", encode_png(np.full((32, 32), 10 * i, np.uint8))) for i in range(8)]
    dataset = Dataset(make_zip(tmp_path / "d.zip", members))
    sheet = np.array(Image.open(io.BytesIO(contact_sheet(dataset, columns=2, rows=2))))
    assert set(np.unique(sheet)) == {0, 20, 40, 60, 255}
