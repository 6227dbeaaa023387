"""Guided denoisers: against the published code's numbers, closed forms, and what must not change."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl import catalog, nets
from sidactl.foreign import networks
from sidactl.methods.score_losses import denoising_loss
from sidactl.methods.sid import sid_generator_loss
from sidactl.nets import Preconditioned
from sidactl.nets.guided import Guided
from tests.golden import golden
from tests.methods.test_dmd import Arrays, as_levels, close, gradient_of


@pytest.fixture(scope="module")
def published() -> Arrays:
    return Arrays("lsg.npz")


def network(arrays: Arrays, base: str, own: str) -> Preconditioned:
    net = networks.read_network(golden(arrays.text(base))).eval()
    return networks.load_weights(net, net.state_dict() | arrays.net(own) | arrays.net(f"{own}_buffer")) or net


def pair(
    arrays: Arrays, case: str
) -> tuple[Preconditioned, Preconditioned | None, Preconditioned, Preconditioned | None]:
    """Teacher and its guide, fake score and its guide; without guides both guide themselves."""
    teacher, psi = networks.read_network(golden(arrays.text(f"{case}_teacher"))).eval(), f"{case}_psi"
    if case == "zero_label":
        return teacher, None, network(arrays, f"{case}_teacher", psi), None
    guide = networks.read_network(golden(arrays.text(f"{case}_teacher_guide"))).eval()
    return (
        teacher,
        guide,
        network(arrays, f"{case}_teacher", psi),
        network(arrays, f"{case}_teacher_guide", f"{case}_psi_guide"),
    )


@pytest.mark.parametrize("case", ["zero_label", "guide_net"])
@pytest.mark.parametrize("combination", range(7))
def test_the_guided_sid_loss_is_that_of_lsg(case: str, combination: int, published: Arrays) -> None:
    teacher, guide, psi, psi_guide = pair(published, case)
    of_psi, of_phi, alpha = published[f"{case}_combos_kappa23_kappa4_alpha"][combination].tolist()
    x, sigma = published[f"{case}_x"].clone().requires_grad_(), as_levels(published[f"{case}_sigma"])
    labels, tag = published[f"{case}_labels"], f"{case}_c{combination}"
    guided = Guided(teacher, guide, of_phi), Guided(psi, psi_guide, of_psi)
    noise = published[f"{case}_noise"]
    noisy = x.detach() + sigma * noise
    close(guided[0](noisy, sigma, labels).detach(), published[f"{tag}_y_real"])
    close(guided[1](noisy, sigma, labels).detach(), published[f"{tag}_y_fake"])
    fake_score: Any = without_logvar(guided[1])
    sid = sid_generator_loss(guided[0], fake_score, x, noise, sigma, labels, alpha=alpha)
    close(sid.per_pixel.detach(), published[f"{tag}_loss"], 1e-3)
    (gradient,) = torch.autograd.grad(sid.per_pixel.sum() / len(x), x)
    close(gradient, published[f"{tag}_dx"], 1e-3)


def without_logvar(net: Guided) -> Any:
    """The published loss is not divided by exp(u)."""
    spec = SimpleNamespace(logvar_channels=0, sigma_data=net.spec.sigma_data)
    return SimpleNamespace(denoise_and_logits=net.denoise_and_logits, spec=spec)


@pytest.mark.parametrize("case", ["zero_label", "guide_net"])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_guided_fake_scores_own_loss_is_that_of_lsg(case: str, scale: int, published: Arrays) -> None:
    """Of noise predictions, (noisy - D) / sigma; its gradient goes back through both branches of the network itself."""
    _, _, psi, guide = pair(published, case)
    psi.requires_grad_(True)
    x, sigma, noise = published[f"{case}_x"], as_levels(published[f"{case}_sigma"]), published[f"{case}_noise"]
    denoised = Guided(psi, guide, scale)(x + sigma * noise, sigma, published[f"{case}_labels"])
    close(((x + sigma * noise - denoised) / sigma).detach(), published[f"{case}_psi_kappa{scale}_noise_pred"], 1e-3)
    loss = denoising_loss(denoised, x, sigma, psi.spec.sigma_data, weight="eps").sum() / len(x)
    torch.testing.assert_close(loss.item(), float(published[f"{case}_psi_kappa{scale}_loss"]), rtol=1e-3, atol=0)
    gradients = gradient_of(psi, loss)
    names = [str(name) for name in published.arrays[f"{case}_psi_param_order"]]
    ours = torch.stack([gradients[name].double().norm() for name in names])
    theirs = published[f"{case}_psi_kappa{scale}_gradnorm"].double()
    kept = torch.tensor([not name.endswith("qkv.bias") for name in names])
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=2e-3, atol=1e-4 * float(theirs.max()))


@pytest.fixture(scope="module")
def net() -> Preconditioned:
    torch.manual_seed(0)
    made = nets.build(catalog.TEACHERS["tiny-digits"].net)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def seen(num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(num, 1, 8, 8), torch.tensor([0.5, 2.0, 8.0])[:num].reshape(-1, 1, 1, 1), torch.eye(10)[:num]


def test_guidance_of_one_is_none_to_the_bit(net: Preconditioned) -> None:
    x, sigma, labels = seen()
    assert torch.equal(Guided(net, None, 1.0)(x, sigma, labels), net(x, sigma, labels))
    assert torch.equal(Guided(net, net, 1.0).denoise_and_logits(x, sigma, labels)[1], net.logits(x, sigma, labels))


def test_the_network_itself_in_one_pass_is_itself_as_a_guide_without_labels(net: Preconditioned) -> None:
    x, sigma, labels = seen()

    class Unlabelled:
        def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return net(x, sigma, torch.zeros(len(x), 10))

    for num in (None, 2):
        ours, logits = Guided(net, None, 2.0).denoise_and_logits(x, sigma, labels, num_denoised=num)
        other, same_logits = Guided(net, Unlabelled(), 2.0).denoise_and_logits(x, sigma, labels, num_denoised=num)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, other)
        torch.testing.assert_close(logits, same_logits)
        assert len(ours) == (num or 3)
    found = Guided(net, None, 2.0).denoise_and_features(x, sigma, labels)[1]
    for ours, theirs in zip(found, net.features(x, sigma, labels), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_outside_of_the_interval_there_is_no_guidance(net: Preconditioned) -> None:
    x, sigma, labels = seen()
    plain, guided = net(x, sigma, labels), Guided(net, None, 3.0)(x, sigma, labels)
    found = Guided(net, None, 3.0, (1.0, 4.0))(x, sigma, labels)
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(found[1], guided[1])
    assert not torch.allclose(found[1], plain[1])
    assert torch.equal(Guided(net, None, 3.0, (1.0, 4.0))(x, 0.5, labels), net(x, 0.5, labels))


def test_images_that_do_not_keep_their_label_are_denoised_without_one(net: Preconditioned) -> None:
    x, sigma, labels = seen()
    keep = torch.tensor([[1.0], [0.0], [1.0]])
    found = Guided(net, None, 2.0, keep=keep)(x, sigma, labels)
    expected = Guided(net, None, 2.0)(x, sigma, labels * keep)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[1:2], net(x[1:2], sigma[1:2], torch.zeros(1, 10)))


def test_two_gaussians_are_guided_to_the_gaussian_of_the_closed_form() -> None:
    """Scores add: s / var_net + (1 - s) / var_guide is the precision at every noise level."""
    x = torch.linspace(-3, 3, 31).reshape(-1, 1, 1, 1)
    sigma, scale = torch.full_like(x, 0.8), 1.7
    (m, v), (n, w) = (0.4, 0.3**2), (-0.1, 0.6**2)

    def denoiser(mean: float, variance: float) -> Any:
        return lambda x, sigma, *_: (variance * x + sigma**2 * mean) / (variance + sigma**2)

    guided = Guided(denoiser(m, v), denoiser(n, w), scale)(x, sigma)
    score = (guided - x) / sigma**2
    of_net, of_guide = 1 / (v + 0.8**2), 1 / (w + 0.8**2)
    precision = scale * of_net + (1 - scale) * of_guide
    mean = (scale * of_net * m + (1 - scale) * of_guide * n) / precision
    torch.testing.assert_close(score, -precision * (x - mean), rtol=1e-4, atol=1e-5)
