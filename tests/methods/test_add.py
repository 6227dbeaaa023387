"""ADD's parts held against StyleGAN-T's published discriminator, and against the formula of its distillation term."""

import pytest
import torch
from torch import nn

from sidactl.methods import add, discriminator
from sidactl.nets.heads import TokenHeads
from tests.methods.test_dmd import Arrays, assert_same_norms, close, gradient_of

SPECTRAL = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0.u",
    "weight_v": "parametrizations.weight.0.v",
}
"""what torch calls today the parts that the published code names by their old names"""


def renamed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{SPECTRAL.get(last, last)}"


@pytest.mark.parametrize("kind", ["uncond", "cond"])
def test_heads_on_tokens_are_stylegan_ts(kind: str) -> None:
    """The published code iterates its spectral norms in every pass, and divides the loss by the batch once more."""
    arrays = Arrays("add_heads.npz")
    condition = arrays["condition"] if kind == "cond" else None
    heads = TokenHeads([12] * 3, 5 if kind == "cond" else 0, images_together=8, projected=6)
    heads.load_state_dict(
        {f"heads.{renamed(name)}": value for name, value in arrays.net(f"{kind}_heads_before").items()}
    )
    nn.Module.train(heads)
    fakes, reals = ([arrays[f"feature_{of}{index}"] for index in range(3)] for of in ("fake", "real"))
    of_fakes, of_reals = heads(fakes, condition), heads(reals, condition)
    close(of_fakes.detach(), arrays[f"{kind}_disc_logits_fake"])
    close(of_reals.detach(), arrays[f"{kind}_disc_logits_real"])
    loss = discriminator.telling_loss("hinge", of_fakes, of_reals).mean() / len(of_fakes)
    torch.testing.assert_close(loss.detach(), arrays[f"{kind}_disc_loss"].float(), rtol=1e-4, atol=0)
    new = {renamed(str(name)): str(name) for name in arrays.arrays[f"{kind}_head_param_order"]}
    found = {new[name.removeprefix("heads.")]: value for name, value in gradient_of(heads, loss).items()}
    assert_same_norms(found, arrays, f"{kind}_disc_gradnorm", f"{kind}_head_param_order")
    for name, value in arrays.net(f"{kind}_heads_after_disc").items():
        torch.testing.assert_close(heads.state_dict()[f"heads.{renamed(name)}"], value, rtol=1e-4, atol=1e-6)
    for feature in fakes:
        feature.requires_grad_()
    logits = heads(fakes, condition)
    close(logits.detach(), arrays[f"{kind}_gen_logits"])
    loss = discriminator.adversarial_loss("hinge", logits).mean() / len(logits)
    torch.testing.assert_close(loss.detach(), arrays[f"{kind}_gen_loss"].float(), rtol=1e-4, atol=0)
    for index, gradient in enumerate(torch.autograd.grad(loss, fakes)):
        close(gradient, arrays[f"{kind}_gen_dfeature{index}"])


def test_spectral_norms_move_once_a_step_alone() -> None:
    heads = TokenHeads([12], 0, images_together=4)
    assert not heads.train().training
    before = {name: value.clone() for name, value in heads.named_buffers()}
    tokens = [torch.randn(8, 12, 17)]
    torch.testing.assert_close(
        heads(tokens), torch.cat([heads([t[:4] for t in tokens]), heads([t[4:] for t in tokens])])
    )
    assert all(torch.equal(value, before[name]) for name, value in heads.named_buffers())
    for _ in range(60):
        heads.iterate_norms()
    for module in heads.modules():
        if isinstance(module, nn.Conv1d):
            norm = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            torch.testing.assert_close(norm, torch.ones(()), rtol=1e-3, atol=0)


def test_the_distillation_term_is_adds_formula() -> None:
    arrays = Arrays("add_heads.npz")
    x, sigma, f = arrays["formula_x"], arrays["formula_sigma"], arrays["formula_teacher_x0"]
    for kind, name in (("exponential", "exponential"), ("sds", "sds_w_sigma2"), ("sds-flat", "sds_w_1")):
        weight = add.distillation_weight(kind, sigma)  # type: ignore[arg-type]
        close(weight.flatten(), arrays[f"formula_distill_{name}_c"])
        per_image = weight.flatten() * ((x - f) ** 2).sum(dim=(1, 2, 3))
        close(per_image, arrays[f"formula_distill_{name}_per_image"])
        close(add.distillation_direction(x, f, weight) / len(x), arrays[f"formula_distill_{name}_dx"])


def test_the_hinge_has_its_kinks_at_plus_and_minus_one() -> None:
    arrays = Arrays("add_heads.npz")
    logits, nothing = arrays["hinge_logits"], torch.full_like(arrays["hinge_logits"], -5.0)
    of_fakes = discriminator.telling_loss("hinge", logits.T, -nothing.T)
    of_reals = discriminator.telling_loss("hinge", nothing.T, logits.T)
    torch.testing.assert_close(of_fakes, arrays["hinge_fake_relu"].flatten().to(of_fakes))
    torch.testing.assert_close(of_reals, arrays["hinge_real_relu"].flatten().to(of_reals))
