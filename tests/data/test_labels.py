"""Labels of a dataset.json, however they are spelled."""

from pathlib import Path
from typing import Any

import pytest

from sidactl.data.dataset import Dataset
from sidactl.data.images import encode_png
from tests.worlds import load, make_zip, noise


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ('{"labels": [["a.png", 3], ["b.png", 0]]}', ([3, 0], None, 4)),
        (' {"labels":[["a.png",3],["b.png",0]], "other": 1}', ([3, 0], None, 4)),
        ('{"labels": [["a.png", 1], ["b.png", 0]], "class_names": ["x", "y", "z"]}', ([1, 0], ["x", "y", "z"], 3)),
        ('{"labels": [["b.png", 0], ["a.png", 3]]}', ([3, 0], None, 4)),
        ('{"labels": [["\\u0061.png", 3], ["b.png", 0]]}', ([3, 0], None, 4)),
        ('{"labels": [["a.png", 1], ["b.png", 0]], "labels": null}', 'D must be JSON, got the key "labels" twice'),
        ('{"labels": [["a.png", 1], ["b.png", 0]], "class_names": ["x"]}',
         "class_names in D must be a list with a name for each class"),
        ('{"labels": [["a.png", 1], ["b.png", 0]], }',
         "D must be JSON, got Expecting property name enclosed in double quotes: line 1 column 42 (char 41)"),
        ('{"labels": [["a.png", 1], ["b.png", 0]',
         "D must be JSON, got Expecting ',' delimiter: line 1 column 39 (char 38)"),
        ('{"labels": [["a.png", 1]]}', "D must label every image, got none for b.png"),
        ('{"labels": [["a.png", 1], ["b.png", 01]]}',
         "D must be JSON, got Expecting ',' delimiter: line 1 column 38 (char 37)"),
        ('{"labels": [["a.png", 1], ["b.png", 0], ["c.png", 0]]}',
         "D names 1 images that are not there, the first c.png"),
        ('{"labels": [["a.png", 1], ["b.png", 0], ["a.png", 2]]}',
         "D must give each image one class, got 1 and 2 for a.png"),
        ('{"labels": [["a.png", 1], ["b.png", 1000000]]}',
         "label of b.png in D must be an integer from 0 to 999999, got 1000000"),
    ],
)  # fmt: skip
def test_labels_in_any_spelling(text: str, outcome: Any, tmp_path: Path) -> None:
    images = [(name, encode_png(noise(4, 4, 3))) for name in ("a.png", "b.png")]
    path = make_zip(tmp_path / "d.zip", [*images, ("dataset.json", text.encode())])
    if isinstance(outcome, str):
        assert load(path).startswith(outcome.replace("D", f"dataset.json in {path}", 1) + ". ")
        return
    dataset = Dataset(path)
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.class_names, dataset.label_dim) == outcome
