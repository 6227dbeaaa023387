import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidactl import methods, nets
from sidactl.data.augment import AugmentPipe
from sidactl.errors import SidaError
from sidactl.foreign import networks, pickles
from sidactl.methods import score_losses
from sidactl.methods import sid as methods_sid
from sidactl.nets import Preconditioned
from sidactl.nets.edm2 import drop_logvar_
from sidactl.noise import sigma_of_time
from sidactl.recipes import NetSpec
from tests.golden import golden
from tests.playback import Playback

LOSS_FILES = {
    "edm": "losses/edm.npz",
    "edm_uncond_rgb": "losses/edm_uncond_rgb.npz",
    "edm2_logvar": "losses/edm2.npz",
    "edm2_nologvar": "losses/edm2.npz",
}


@pytest.fixture(scope="module", params=LOSS_FILES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A golden loss file with its teacher, its fake score, and how the file names its arrays."""
    file = LOSS_FILES[request.param]
    arrays = np.load(golden(file))
    summary = json.loads(golden("losses/summary.json").read_text())[Path(file).stem]
    record = pickles.read(golden(summary["teacher"]))["ema"]
    fake_score = nets.build(networks.spec_of(record))
    networks.load_weights(
        fake_score,
        pickles.state_dict(record) | {k[10:]: tensor(arrays, k) for k in arrays if k.startswith("psi_param/")},
    )
    fake_score.set_dropout(0.0)
    if request.param == "edm2_nologvar":
        drop_logvar_(fake_score)
    names: dict[str, Any] = {
        "gen": "gen_",
        "nan": "nan_",
        "draws": "psi_{variant}_{mode}_draw",
        "psi": {"noaug": "psi_noaug", "aug": "psi_aug"},
        "scaled": "",
    }
    is_edm2 = Path(file).stem == "edm2"
    if is_edm2:
        head = request.param.removeprefix("edm2_")
        names = {
            "gen": f"gen_{head}_",
            "nan": f"nan_{head}_",
            "draws": "psi_draw",
            "psi": {"noaug": f"psi_{head}"},
            "scaled": "_lsd100",
        }
    return SimpleNamespace(
        arrays=arrays,
        teacher=networks.load_record(record),
        fake_score=fake_score,
        parameter_order=summary["grad_param_order"],
        P_mean=summary.get("P_mean", -1.2),
        P_std=summary.get("P_std", 1.2),
        is_edm2=is_edm2,
        discriminator_scale=100 if is_edm2 else 1,
        **names,
    )


@pytest.mark.parametrize("words", ["import sidactl; losses = sidactl.losses", "from sidactl import losses"])
def test_losses_are_there_as_an_attribute_and_by_a_from_import(words: str) -> None:
    """Each in a process of its own, where nothing else has loaded them before."""
    names = ["fake_score_loss", "discriminator_loss", "sid_generator_loss", "adversarial_generator_loss"]
    code = f"{words}; print(*(getattr(losses, name).__name__ for name in {names}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == names


def tensor(arrays: Any, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(arrays[name]))


def assert_golden(ours: Tensor, arrays: Any, name: str) -> None:
    expected = tensor(arrays, name)
    error = (ours.detach() - expected).norm() / expected.norm()
    assert error < 1e-4, f"{name}: relative L2 error {error:.2e}"
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_sigma_of_time_matches_losses_sigma_of_t_json() -> None:
    table = json.loads(golden("losses/sigma_of_t.json").read_text())
    ours = sigma_of_time(torch.tensor(table["t"], dtype=torch.float64))
    torch.testing.assert_close(ours, torch.tensor(table["sigma"], dtype=torch.float64), rtol=1e-12, atol=0)


def generator_losses(case: SimpleNamespace, x_g: Tensor, alpha: float, kept: slice | list[int]) -> methods_sid.SidLoss:
    sigma = sigma_of_time(tensor(case.arrays, "gen_draw_rand") * 0.8)
    labels = tensor(case.arrays, "class_labels")
    case.fake_score.eval().requires_grad_(False)
    noise = tensor(case.arrays, "gen_draw_randn")
    return methods.sid_generator_loss(
        case.teacher, case.fake_score, x_g[kept], noise[kept], sigma[kept], labels[kept], alpha=alpha
    )


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_generator_losses_match_golden(case: SimpleNamespace, alpha: float) -> None:
    x_g = tensor(case.arrays, "x_g").requires_grad_()
    sid = generator_losses(case, x_g, alpha, slice(None))
    if "gen_logits" in case.arrays:
        assert_golden(sid.logits, case.arrays, "gen_logits")
    for mode in ("sid", "sida"):
        assert_golden(sid.per_pixel, case.arrays, f"{case.gen}{mode}_alpha{alpha}_loss")
    (gradient,) = torch.autograd.grad(sid.per_pixel.sum(), x_g, retain_graph=True)
    for mode in ("sid", "sida"):
        assert_golden(gradient, case.arrays, f"{case.gen}{mode}_alpha{alpha}_dsum_dx")

    adversarial = methods.adversarial_generator_loss(sid)
    assert_golden(adversarial, case.arrays, f"{case.gen}sida_alpha{alpha}_loss_gan")
    (gradient,) = torch.autograd.grad(adversarial.sum(), x_g, retain_graph=True)
    assert_golden(gradient, case.arrays, f"{case.gen}sida_alpha{alpha}_gan_rawsum_dx")

    batch_size, num_pixels = len(x_g), x_g[0].numel()
    scaled = 100 / batch_size * sid.per_pixel.sum() + 0.01 / batch_size * num_pixels * adversarial.sum()
    (gradient,) = torch.autograd.grad(0.5 * scaled, x_g)
    assert_golden(gradient, case.arrays, f"{case.gen}sida_alpha{alpha}_combined_dx")


def recorded_draws(case: SimpleNamespace, variant: str, mode: str) -> Playback:
    prefix = case.draws.format(variant=variant, mode=mode)
    return Playback([case.arrays[name] for name in sorted(case.arrays.files) if name.startswith(prefix)])


def psi_losses(
    case: SimpleNamespace, variant: str, y: Tensor, *, adversarial: bool, kept: slice | list[int] = slice(None)
) -> tuple[score_losses.ScoreLoss, Tensor | None]:
    """The losses of the samples `kept` with the recorded draws, in the reference's order of drawing."""
    draws = recorded_draws(case, variant, "sida" if adversarial else "sid")
    labels, reals = tensor(case.arrays, "class_labels")[kept], tensor(case.arrays, "real_images")
    pipe = AugmentPipe(p=0.6) if variant == "aug" else None
    case.fake_score.train().requires_grad_(True)
    sigma = (case.P_std * draws.normal((len(y), 1, 1, 1)) + case.P_mean).exp()[kept]
    y, y_augment = pipe(y, draws) if pipe else (y, None)
    noise = draws.normal(y.shape)[kept]
    if not adversarial:
        assert draws.exhausted()
        return methods.fake_score_loss(case.fake_score, y[kept], noise, sigma, labels, y_augment), None
    reals, r_augment = pipe(reals, draws) if pipe else (reals, None)
    assert draws.exhausted()
    real = {"real_images": reals[kept], "real_augment_labels": r_augment}
    score = methods.fake_score_loss(case.fake_score, y[kept], noise, sigma, labels, y_augment, **real)
    return score, methods.discriminator_loss(score, sigma)


@pytest.mark.parametrize("variant", ["noaug", "aug"])
def test_fake_score_and_discriminator_losses_match_golden(case: SimpleNamespace, variant: str) -> None:
    prefix = case.psi.get(variant)
    if f"{prefix}_sid_loss" not in case.arrays:
        assert variant == "aug", "only the augmented variant may be absent, for a net without augment_dim"
        return
    x_g = tensor(case.arrays, "x_g")
    batch_size = len(x_g)
    score, _ = psi_losses(case, variant, x_g, adversarial=False)
    assert_golden(score.per_pixel, case.arrays, f"{prefix}_sid_loss")
    assert_gradients(case, f"{prefix}_sid", score.per_pixel.sum() / batch_size)

    score, discriminator = psi_losses(case, variant, x_g, adversarial=True)
    assert discriminator is not None
    assert_golden(score.per_pixel, case.arrays, f"{prefix}_sida_loss")
    assert_golden(discriminator, case.arrays, f"{prefix}_sida_loss_D")
    score_term = score.per_pixel.sum() / batch_size
    discriminator_term = discriminator.sum() * (case.discriminator_scale / batch_size)
    assert_gradients(case, f"{prefix}_sida_score", score_term)
    assert_gradients(case, f"{prefix}_sida_D{case.scaled}", discriminator_term)
    assert_gradients(case, f"{prefix}_sida_total{case.scaled}", score_term + discriminator_term)


def assert_gradients(case: SimpleNamespace, prefix: str, loss: Tensor) -> None:
    parameters = dict(case.fake_score.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    found = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
    assert set(found) <= set(case.parameter_order)
    norms = torch.stack([found.get(name, torch.zeros(())).double().norm() for name in case.parameter_order])
    expected = tensor(case.arrays, f"{prefix}_gradnorm").double()
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    for key in case.arrays.files:
        if key.startswith(f"{prefix}_grad/"):
            assert_golden(found[key.split("/")[1]], case.arrays, key)


def test_nan_sample_spoils_its_own_rows_only_and_the_others_equal_golden(case: SimpleNamespace) -> None:
    """The published code drops the sample (golden nan_*: three rows are left); here it stays, visibly not finite.

    Its cross-entropies are means over the samples that are left, real ones too (but in the generator step of EDM).
    """
    kept = [0, 1, 3]
    x_g = tensor(case.arrays, "x_g").clone()
    x_g[2, 0, 1, 1] = math.nan
    alpha, mode = (1.2, "sid") if f"{case.nan}gen_sid_loss" in case.arrays else (1.0, "sida")
    sid = generator_losses(case, x_g, alpha, slice(None))
    assert bool(sid.per_pixel[2].isnan().all())
    assert bool(methods.adversarial_generator_loss(sid).isnan().all()), "the cross-entropy is a mean over the batch"
    assert_golden(sid.per_pixel[kept], case.arrays, f"{case.nan}gen_{mode}_loss")
    adversarial = tensor(case.arrays, f"{case.nan}gen_sida_loss_gan")
    assert len(adversarial) == len(kept)
    if case.is_edm2:
        alone = methods.adversarial_generator_loss(generator_losses(case, x_g, alpha, kept))
        assert_golden(alone, case.arrays, f"{case.nan}gen_sida_loss_gan")
    else:
        assert bool(adversarial.isnan().all())
    score, discriminator = psi_losses(case, "noaug", x_g, adversarial=True)
    assert discriminator is not None
    assert_golden(score.per_pixel[kept], case.arrays, f"{case.nan}psi_sida_loss")
    assert bool(discriminator.isnan().all())
    _, discriminator = psi_losses(case, "noaug", x_g, adversarial=True, kept=kept)
    assert discriminator is not None
    assert_golden(discriminator, case.arrays, f"{case.nan}psi_sida_loss_D")


class Shift(Preconditioned):
    """The denoiser of data distributed as N(mean, 1), in closed form: (x + sigma^2 mean) / (1 + sigma^2)."""

    def __init__(self, mean: float) -> None:
        torch.nn.Module.__init__(self)
        self.mean = mean
        self.spec = NetSpec(
            architecture="SongUNet",
            img_resolution=8,
            img_channels=1,
            model_channels=16,
            channel_mult=(1,),
            num_blocks=1,
            attn_resolutions=(),
        )

    def forward(self, x: Tensor, sigma: Any, labels: Any = None, augment_labels: Any = None) -> Tensor:
        return (x + sigma**2 * self.mean) / (1 + sigma**2)

    def denoise_and_logits(
        self, x: Tensor, sigma: Any, labels: Any = None, augment_labels: Any = None, *, num_denoised: int | None = None
    ) -> Any:
        return self(x, sigma)[:num_denoised], x.mean(dim=1, keepdim=True)

    def logits(self, x: Tensor, sigma: Any, labels: Any = None, augment_labels: Any = None) -> Tensor:
        return x.mean(dim=1, keepdim=True)


def gaussian_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(6, 1, 8, 8, generator=generator) for _ in range(2))
    return images, noise, torch.rand(6, 1, 1, 1, generator=generator) + 0.5


def test_sid_loss_is_zero_where_fake_score_equals_teacher() -> None:
    images, noise, sigma = gaussian_inputs()
    sid = methods.sid_generator_loss(Shift(0.3), Shift(0.3), images, noise, sigma, alpha=1.2)
    assert float(sid.per_pixel.abs().max()) == 0.0


def test_sid_loss_of_two_gaussians_matches_closed_form() -> None:
    images, noise, sigma = gaussian_inputs()
    alpha, teacher_mean, fake_mean = 1.2, 0.3, -0.2
    shrink = sigma**2 / (1 + sigma**2)
    difference = shrink * (teacher_mean - fake_mean)
    f = (images + sigma * noise + sigma**2 * teacher_mean) / (1 + sigma**2)
    expected = difference * ((f - images) - alpha * difference) / (images - f).abs().mean((1, 2, 3), keepdim=True)
    sid = methods.sid_generator_loss(Shift(teacher_mean), Shift(fake_mean), images, noise, sigma, alpha=alpha)
    torch.testing.assert_close(sid.per_pixel, expected)


def test_fake_score_loss_is_least_at_the_true_denoiser() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4096, 1, 1, 1, generator=generator) + 0.3
    noise, sigma = torch.randn(4096, 1, 1, 1, generator=generator), torch.full((4096, 1, 1, 1), 0.7)
    at = {m: float(methods.fake_score_loss(Shift(m), images, noise, sigma).per_pixel.mean()) for m in (0.0, 0.3, 0.6)}
    assert at[0.3] < at[0.0]
    assert at[0.3] < at[0.6]


def test_adversarial_loss_has_no_gradient_where_logits_are_beyond_the_bound() -> None:
    logits = torch.tensor([-11.0, 0.0, 11.0]).reshape(3, 1, 1, 1).requires_grad_()
    loss = methods.adversarial_generator_loss(methods_sid.SidLoss(logits, logits, torch.ones(3, 1, 1, 1)))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.flatten().tolist() == [0.0, pytest.approx(-0.5), 0.0]


def test_weight_divisor_has_a_floor_and_no_gradient() -> None:
    images = torch.zeros(2, 1, 8, 8, requires_grad=True)
    sid = methods.sid_generator_loss(
        Shift(0.0), Shift(0.5), images, torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 1, 1), alpha=1.0
    )
    assert sid.weight.flatten().tolist() == [pytest.approx(1e5)] * 2
    assert not sid.weight.requires_grad


def test_logvar_on_a_net_without_that_head_is_one_clear_error() -> None:
    with pytest.raises(SidaError) as error:
        Shift(0.0).logvar(1.0)
    assert str(error.value) == "logvar needs a net with an uncertainty head, got SongUNet. Use an EDM2 teacher."
