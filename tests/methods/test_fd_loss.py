"""The gradient of a Fréchet distance, found once a step and followed by every pass."""

import numpy as np
import torch
from torch import Tensor

from sidactl.methods.fd_loss import frechet_gradients
from sidactl.metrics import frechet_distance


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(dim=0), features.T @ features / len(features)


def test_distance_and_gradient_are_those_of_automatic_differentiation() -> None:
    generator = torch.Generator().manual_seed(0)
    reals = (
        torch.randn(200, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
    )
    fakes = (torch.randn(64, 6, generator=generator, dtype=torch.float64) + 0.3).requires_grad_()
    covariance = torch.cov(reals.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.sqrt()) @ vectors.T
    mean, second = moments(fakes)
    distance, of_mean, of_second = frechet_gradients(mean.detach(), second.detach(), reals.mean(dim=0), root)
    own = torch.cov(fakes.T, correction=0)
    expected = frechet_distance(
        fakes.detach().mean(0).numpy(), own.detach().numpy(), reals.mean(dim=0).numpy(), covariance.numpy()
    )
    np.testing.assert_allclose(float(distance), expected, rtol=1e-9)
    eigenvalues = torch.linalg.eigvals(own @ covariance).real.clamp(min=0)
    loss = (
        (fakes.mean(0) - reals.mean(0)).square().sum() + own.trace() + covariance.trace() - 2 * eigenvalues.sqrt().sum()
    )
    (slope,) = torch.autograd.grad(loss, fakes)
    followed = (of_mean + 2 * fakes.detach() @ of_second) / len(fakes)
    torch.testing.assert_close(followed, slope, rtol=1e-6, atol=1e-9)


def test_directions_without_variance_have_no_slope_instead_of_an_infinite_one() -> None:
    flat = torch.zeros(3, dtype=torch.float64)
    found = frechet_gradients(flat, torch.diag(torch.tensor([1.0, 0.0, 0.0]).double()), flat, torch.eye(3).double())
    assert all(torch.isfinite(value).all() for value in found)
