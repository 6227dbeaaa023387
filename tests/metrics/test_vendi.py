"""The Vendi score: the published package's values, the definition, its limits."""

from typing import Any

import numpy as np
import pytest
import torch

from sidactl.errors import SidaError
from sidactl.metrics import vendi


def error(*args: Any, **options: Any) -> str:
    with pytest.raises(SidaError) as caught:
        vendi(*args, **options)
    return str(caught.value)


def by_definition(rows: np.ndarray) -> float:
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(units @ units.T / len(rows))
    eigenvalues = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


@pytest.fixture
def features() -> np.ndarray:
    draws = np.random.RandomState(0)
    draws.standard_normal((300, 16))
    return 0.8 * draws.standard_normal((200, 16)) + 0.1


def test_vendi_agrees_with_the_published_package(features: np.ndarray) -> None:
    # vendi_score.vendi.score_X(rows) of vendi-score 0.0.3
    assert vendi(features) == pytest.approx(15.347422383393168, rel=1e-12)
    assert vendi(features[:10]) == pytest.approx(8.159646206104394, rel=1e-12)
    assert vendi(np.abs(features)) == pytest.approx(4.913642927148014, rel=1e-12)


def test_both_matrices_have_the_eigenvalues_of_the_kernel(features: np.ndarray) -> None:
    for num in (2, 15, 16, 17, 200):
        assert vendi(features[:num]) == pytest.approx(by_definition(features[:num]), rel=1e-10)
    assert vendi(features, block=7) == pytest.approx(vendi(features), rel=1e-12)
    assert vendi(features[::-1] * np.arange(1, 201)[:, None]) == pytest.approx(vendi(features), rel=1e-12)
    single = torch.tensor(features, dtype=torch.float32, requires_grad=True)
    assert vendi(single) == pytest.approx(vendi(features), rel=1e-6)


def test_vendi_counts_what_differs() -> None:
    assert vendi(np.eye(7)) == pytest.approx(7, rel=1e-14)
    assert vendi(np.repeat(np.eye(4), 50, 0)) == pytest.approx(4, rel=1e-14)
    assert vendi(np.full((30, 5), 0.3)) == 1
    assert vendi(np.full((1, 5), 0.3)) == 1
    for num in (3, 9):
        assert 1 <= vendi(np.eye(3, 9)[[0] * num]) <= vendi(np.eye(9)[:num]) <= num


def test_vendi_errors() -> None:
    rows = np.ones((5, 2))
    assert error(rows[:0]) == "generated features must number >= 1, got 0. Score more images."
    for wrong, shape in ((rows[0], "[2]"), (rows[:, :0], "[5, 0]")):
        assert error(wrong) == f"generated features must be a matrix [N, F], got shape {shape}. Make each item one row."
    rows[3] = 0
    for block in (2, 4096):
        assert error(rows, block=block) == (
            "generated features must not be zero, row 3 is. Look at the image behind it."
        )
    rows[4, 1] = np.inf
    assert error(rows) == "generated features must be finite, row 4 is not. Look at the image behind it."
