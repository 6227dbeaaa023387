"""The inception score: how sure a classifier is of each image, and how different the images are."""

import math

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp

from sidactl.errors import SidaError
from sidactl.metrics.features import Features, as_rows


def inception_score(logits: Features, num_splits: int = 10) -> tuple[float, float]:
    """Mean and population standard deviation of the Inception score over `num_splits` parts, in float64.

    `logits` [N, classes] are the classifier's without its bias; part i holds rows floor(i N / num_splits) up to
    floor((i + 1) N / num_splits) in the order given. exp(E_x KL(p(y|x) || p(y))), from log-probabilities, so that
    none underflows.

    Source: Improved techniques for training GANs (1606.03498), section 4.
    """
    rows = as_rows(logits, "logits").cpu()
    if not 1 <= num_splits <= len(rows):
        raise SidaError(
            f"number of splits must be from 1 to {len(rows)}, got {num_splits}",
            "Score more images, or pass a smaller --num-splits.",
        )
    scores = []
    for i in range(num_splits):
        part = rows[i * len(rows) // num_splits : (i + 1) * len(rows) // num_splits].to(torch.float64).numpy()
        log_p = log_softmax(part, axis=1)
        log_marginal = logsumexp(log_p, axis=0) - math.log(len(part))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
