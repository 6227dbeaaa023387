"""The Vendi score: how many different images a set seems to hold, without any reference."""

import math

import numpy as np
import scipy.linalg
import scipy.special
import torch

from sidactl.errors import SidaError
from sidactl.metrics.features import Features, as_rows, check_number, in_blocks


def vendi(generated: Features, *, block: int = 4096) -> float:
    """exp(-sum_i w_i log w_i) of the eigenvalues w of K / N, with K [N, N] the cosines of `generated` [N, F].

    1 where all rows point the same way, N where they are orthogonal. In float64, on the device of `generated`, from
    X' X / N [F, F] where that is smaller than K / N = X X' / N, whose other eigenvalues are 0; X are the rows at unit
    length. Says nothing of whether the images look real. Errors: no rows, rows of zeros, values that are not finite.

    Source: The Vendi score (2210.02410), definition 3.1 and section 3.3.
    """
    rows = as_rows(generated, "generated features")
    check_number(1, generated=rows)
    num, num_features = rows.shape
    product = torch.zeros((min(num, num_features),) * 2, dtype=torch.float64, device=rows.device)
    for i in in_blocks(rows, block if num_features < num else num):
        units = rows[i].to(torch.float64)
        lengths = units.norm(dim=1)
        if len(zeros := (lengths == 0).nonzero()):
            raise SidaError(
                f"generated features must not be zero, row {i.start + int(zeros[0])} is", "Look at the image behind it."
            )
        units /= lengths[:, None]
        product += units.T @ units if num_features < num else units @ units.T
    eigenvalues = scipy.linalg.eigvalsh(product.cpu().numpy() / num).clip(min=0)
    entropy = float(np.sum(scipy.special.entr(eigenvalues)))
    return min(max(math.exp(entropy), 1.0), float(num))
