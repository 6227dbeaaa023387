"""Distribution matching held against numbers of published code: Diff-Instruct, DMD, DMD2, FastGen, Uni-Instruct."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidactl import catalog, nets
from sidactl.foreign import networks
from sidactl.methods import base, discriminator, dmd, f_distill, score_losses
from sidactl.methods.sid import Sid
from sidactl.nets import Preconditioned
from sidactl.nets.heads import ConvolutionHeads
from sidactl.noise import draw_levels, sigma_of_time
from sidactl.recipes import NetSpec, NoiseLevels, PairedRecipe, override
from tests.golden import golden, golden_objectives
from tests.playback import Playback

ADM = NetSpec(
    architecture="DhariwalUNet",
    img_resolution=32,
    img_channels=3,
    label_dim=5,
    model_channels=8,
    channel_mult=(1, 2, 4),
    num_blocks=1,
    channel_mult_emb=4,
    attn_resolutions=(),
    dropout=0.0,
)
"""the networks of dmd2.npz"""


class Arrays:
    """A file's arrays as tensors."""

    def __init__(self, file: str) -> None:
        self.arrays = np.load(golden_objectives(file))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def text(self, name: str) -> str:
        return str(self.arrays[name])

    def net(self, prefix: str) -> dict[str, Tensor]:
        names = [n for n in self.arrays.files if n.startswith(f"{prefix}/") and not n.endswith("__f64")]
        return {n.removeprefix(f"{prefix}/"): self[n] for n in names}


def as_levels(sigma: Tensor) -> Tensor:
    return sigma.float().reshape(-1, 1, 1, 1)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """By relative L2 norm, as the golden files' README suggests for gradients."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def adm(state: dict[str, Tensor]) -> Preconditioned:
    net = nets.build(ADM).eval()
    networks.load_weights(net, net.state_dict() | state)
    return net


@pytest.fixture(scope="module")
def published() -> Arrays:
    return Arrays("dmd2.npz")


def heads_of(state: dict[str, Tensor]) -> ConvolutionHeads:
    heads = ConvolutionHeads([(32, 8)])
    heads.load_state_dict({f"heads.0.{name}": value for name, value in state.items()})
    return heads


def gradient_of(net: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def assert_same_norms(found: dict[str, Tensor], arrays: Arrays, norms: str, order: str) -> None:
    names = [str(name) for name in arrays.arrays[order]]
    ours = torch.stack([found[name].double().norm() for name in names])
    theirs = arrays[norms].double()
    kept = torch.tensor([not name.endswith("qkv.bias") for name in names])
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-3, atol=1e-5 * float(theirs.max()))


def test_a_grid_of_noise_levels_is_dmd2s_table(published: Arrays) -> None:
    levels = sigma_of_time(torch.arange(1000) / 999)
    torch.testing.assert_close(levels, published["karras_sigmas"].float(), rtol=1e-5, atol=0)
    least, most = int(published["min_step"]), int(published["max_step"])

    class Drawn:
        def integers(self, high: int, shape: Any) -> Tensor:
            assert high == most - least + 1
            return torch.tensor([0, high - 1]).reshape(shape)

    drawn: Any = Drawn()
    ends = draw_levels(NoiseLevels.parse(f"grid:{least},{most}", "generator_time"), drawn, 2)
    torch.testing.assert_close(ends.flatten(), levels[[least, most]])


def test_the_direction_is_dmd2s(published: Arrays) -> None:
    images, labels = published["fake_images"], published["labels"]
    sigma = as_levels(published["karras_sigmas"][published["dm_draw00_randint"].flatten()])
    noisy = images + sigma * published["dm_draw01_randn_like"]
    with torch.no_grad():
        f, g = (adm(published.net(name))(noisy, sigma, labels) for name in ("teacher", "psi"))
    close(f, published["dm_pred_real"])
    close(g, published["dm_pred_fake"])
    direction = dmd.matching_direction(images, f, g)
    close(direction, published["dm_grad"])
    close(direction / direction.numel(), published["dm_dx"])
    torch.testing.assert_close((direction**2 / 2).mean(), published["dm_loss"].float(), rtol=1e-4, atol=0)


def test_the_fake_scores_loss_is_dmd2s(published: Arrays) -> None:
    psi, images, labels = adm(published.net("psi")), published["fake_images"], published["labels"]
    sigma = as_levels(published["karras_sigmas"][published["psi_draw01_randint"].flatten()])
    denoised = psi(images + sigma * published["psi_draw00_randn_like"], sigma, labels)
    close(denoised.detach(), published["psi_pred"])
    loss = score_losses.denoising_loss(denoised, images, sigma, 0.5).mean()
    torch.testing.assert_close(loss.detach(), published["psi_loss"].float(), rtol=1e-4, atol=0)
    assert_same_norms(gradient_of(psi, loss), published, "psi_gradnorm", "psi_param_order")


@pytest.mark.parametrize("clean", ["", "clean_"])
def test_the_classifier_is_dmd2s(published: Arrays, clean: str) -> None:
    psi, head = adm(published.net("psi")), heads_of(published.net("head"))
    levels = published["karras_sigmas"].float()

    def seen(draws: str, first: int, images: Tensor) -> tuple[Tensor, Tensor]:
        if clean:
            return images, as_levels(levels[:1]).expand(len(images), -1, -1, -1)
        sigma = as_levels(levels[published[f"{draws}_draw{first:02d}_randint"]])
        return images + sigma * published[f"{draws}_draw{first + 1:02d}_randn_like"], sigma

    def logits(noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = head(psi.features(noisy, sigma, labels)[-1:])
        return found

    images = published["fake_images"].requires_grad_()
    of_generator = logits(*seen("gan_gen", 0, images), published["labels"])
    loss = discriminator.adversarial_loss("softplus", of_generator).mean()
    torch.testing.assert_close(loss.detach(), published[f"gan_gen_{clean}loss"].float(), rtol=1e-4, atol=0)
    close(torch.autograd.grad(loss, images)[0], published[f"gan_gen_{clean}dx"])

    of_reals = logits(*seen("gan_disc", 0, published["real_images"]), published["real_labels"])
    of_fakes = logits(*seen("gan_disc", 2, images.detach()), published["labels"])
    close(of_fakes.sigmoid().flatten().detach(), published[f"gan_disc_{clean}prob_fake"])
    close(of_reals.sigmoid().flatten().detach(), published[f"gan_disc_{clean}prob_real"])
    loss = discriminator.telling_loss("softplus", of_fakes, of_reals).mean()
    torch.testing.assert_close(loss.detach(), published[f"gan_disc_{clean}loss"].float(), rtol=1e-4, atol=0)
    nets_of = {"psi": psi, "head": head.heads[0]}
    for name, net in nets_of.items():
        of_net = {"psi": "psi", "head": "head"}[name]
        loss_again = discriminator.telling_loss(
            "softplus",
            logits(*seen("gan_disc", 2, images.detach()), published["labels"]),
            logits(*seen("gan_disc", 0, published["real_images"]), published["real_labels"]),
        ).mean()
        norms = f"gan_disc_{clean}grad_{of_net}_norm"
        assert_same_norms(gradient_of(net, loss_again), published, norms, f"{of_net}_param_order")


def test_f_distills_weights_are_fastgens() -> None:
    arrays = Arrays("fastgen.npz")
    names = {
        "kl": "forward-kl",
        "js": "jensen-shannon",
        "sf": "softened-rkl",
        "neyman": "neyman",
        "sh": "hellinger",
        "jf": "jeffreys",
    }
    logits, sigma = arrays["logits"], arrays["t"]
    for theirs, ours in names.items():
        for norm, rate in ((0, 0.0), (1, 0.0), (1, 0.5)):
            means = torch.ones(f_distill.NUM_BINS)
            for call in range(len(logits)):
                ratio, bins = f_distill.density_ratio(logits[call]), f_distill.bins_of(sigma[call])
                if norm:
                    means = f_distill.updated_bins(means, ratio, bins, rate)
                    close(means, arrays[f"bins_{theirs}_norm{norm}_rate{rate}"][call].float(), 1e-5)
                    ratio = f_distill.levelled(ratio, bins, means)
                weights = f_distill.f_weight(ours, ratio)  # type: ignore[arg-type]
                weights = f_distill.normalised(weights, weights.mean())
                close(weights, arrays[f"h_{theirs}_norm{norm}_rate{rate}"][call].float(), 1e-5)


def test_reverse_kl_has_no_weight_where_fastgens_code_raises() -> None:
    """Its branch ends in a TypeError; what the paper's table says is a constant, which the mean takes away."""
    assert "TypeError" in Arrays("fastgen.npz").text("rkl_norm0_rate0.0_raises")
    assert f_distill.f_weight("reverse-kl", torch.tensor([0.1, 20.0])).tolist() == [1, 1]


def test_the_direction_is_fastgens_down_to_a_teacher_that_returns_the_image() -> None:
    arrays = Arrays("fastgen.npz")
    x, f, g = (arrays[name] for name in ("vsd_x", "vsd_teacher_x0", "vsd_fake_x0"))
    direction = dmd.matching_direction(x, f, g, "inverse-eps")
    for name, scale in (("plain", torch.ones(len(x))), ("scaled", arrays["vsd_scale"])):
        scaled = scale.float().reshape(-1, 1, 1, 1) * direction
        close(scaled / x.numel(), arrays[f"vsd_{name}_dx"])
        torch.testing.assert_close((scaled**2 / 2).mean(), arrays[f"vsd_{name}_loss"].float(), rtol=1e-4, atol=0)


def test_losses_of_scores_and_logits_are_fastgens() -> None:
    arrays = Arrays("fastgen.npz")
    x, predicted = arrays["vsd_x"], arrays["dsm_pred"]
    sigma = torch.ones(len(x), 1, 1, 1)
    unweighted = score_losses.denoising_loss(predicted, x, sigma, 0.5, weight="x0").mean()
    torch.testing.assert_close(unweighted, arrays["dsm_loss_x0"].float(), rtol=1e-5, atol=0)
    # A net that predicts the noise makes the image x + sigma (noise - prediction) of it.
    noise = arrays["dsm_eps"]
    sigma = torch.linspace(0.1, 5, len(x)).reshape(-1, 1, 1, 1)
    weighted = score_losses.denoising_loss(x + sigma * (noise - predicted), x, sigma, 0.5, weight="eps").mean()
    torch.testing.assert_close(weighted, arrays["dsm_loss_eps"].float(), rtol=1e-4, atol=0)
    fakes, reals = (arrays[f"gan_{kind}_logits"].requires_grad_() for kind in ("fake", "real"))
    of_generator = discriminator.adversarial_loss("softplus", fakes).mean()
    torch.testing.assert_close(of_generator.detach(), arrays["gan_gen_loss"].float(), rtol=1e-5, atol=0)
    close(torch.autograd.grad(of_generator, fakes)[0], arrays["gan_gen_dlogits"])
    told = discriminator.telling_loss("softplus", fakes, reals).mean()
    torch.testing.assert_close(told.detach(), arrays["gan_disc_loss"].float(), rtol=1e-5, atol=0)
    for found, name in zip(torch.autograd.grad(told, [fakes, reals]), ("fake", "real"), strict=True):
        close(found, arrays[f"gan_disc_d{name}"])


def test_heads_of_several_resolutions_are_fastgens() -> None:
    arrays = Arrays("fastgen.npz")
    heads = ConvolutionHeads([(16, 32), (16, 16), (16, 8)])
    heads.load_state_dict({n.removeprefix("discriminator_"): v for n, v in arrays.net("head").items()})
    fakes, reals = ([arrays[f"head_feature_{kind}{i}"].requires_grad_() for i in range(3)] for kind in ("fake", "real"))
    close(heads(fakes).detach(), arrays["head_logits_fake"])
    close(heads(reals).detach(), arrays["head_logits_real"])
    loss = discriminator.adversarial_loss("softplus", heads(fakes)).mean()
    for index, found in enumerate(torch.autograd.grad(loss, fakes)):
        close(found, arrays[f"head_gen_dfeature{index}"])
    loss = discriminator.telling_loss("softplus", heads(fakes), heads(reals)).mean()
    torch.testing.assert_close(loss.detach(), arrays["head_disc_loss"].float(), rtol=1e-5, atol=0)
    found = {f"discriminator_{name}": value for name, value in gradient_of(heads, loss).items()}
    assert_same_norms(found, arrays, "head_disc_gradnorm", "head_param_order")


@pytest.mark.parametrize("which", ["edm", "rgb"])
def test_diff_instructs_direction_and_loss_are_the_published_ones(which: str) -> None:
    arrays = Arrays("diff_instruct.npz")
    teacher = networks.read_network(golden(arrays.text(f"{which}_teacher"))).eval()
    psi = networks.read_network(golden(arrays.text(f"{which}_teacher"))).eval()
    networks.load_weights(psi, psi.state_dict() | arrays.net(f"{which}_psi"))
    x, labels = arrays[f"{which}_x"], arrays[f"{which}_labels"]

    def levels(draw: str) -> Tensor:
        return (1.2 * arrays[draw] - 1.2).exp()

    sigma = levels(f"{which}_gen_draw00_randn")
    noisy = x + sigma * arrays[f"{which}_gen_draw01_randn_like"]
    with torch.no_grad():
        direction = dmd.matching_direction(x, teacher(noisy, sigma, labels), psi(noisy, sigma, labels), "one")
    close(direction / len(x), arrays[f"{which}_gen_dx"])
    close(direction * x, arrays[f"{which}_gen_loss"])
    sigma = levels(f"{which}_psi_step_draw00_randn")
    score = score_losses.fake_score_loss(psi, x, arrays[f"{which}_psi_step_draw01_randn_like"], sigma, labels)
    close(score.per_pixel.detach(), arrays[f"{which}_psi_loss"])
    psi.requires_grad_(True)
    score = score_losses.fake_score_loss(psi, x, arrays[f"{which}_psi_step_draw01_randn_like"], sigma, labels)
    found = gradient_of(psi, score.per_pixel.sum() / len(x))
    assert_same_norms(found, arrays, f"{which}_psi_gradnorm", f"{which}_psi_param_order")


def test_dmds_kl_term_and_loss_are_those_of_the_re_implementation() -> None:
    arrays = Arrays("dmd.npz")
    teacher = networks.read_network(golden(arrays.text("teacher"))).eval()
    psi = networks.read_network(golden(arrays.text("teacher"))).eval()
    networks.load_weights(psi, psi.state_dict() | arrays.net("psi"))
    psi.requires_grad_(True)
    table, x, labels = arrays["sigmas_descending_with_zero"].float(), arrays["x"], arrays["labels"]
    sigma = as_levels(table[len(table) - 1 - arrays["kl_draw00_randint"]])
    noisy = x + sigma * arrays["kl_draw01_randn_like"]
    with torch.no_grad():
        direction = dmd.matching_direction(x, teacher(noisy, sigma, labels), psi(noisy, sigma, labels))
    close(direction / x.numel(), arrays["kl_dx"])
    torch.testing.assert_close((direction**2 / 2).mean(), arrays["kl_loss"].float(), rtol=1e-4, atol=0)
    sigma = as_levels(table[len(table) - 1 - arrays["denoise_t"]])
    denoised = psi(x + sigma * arrays["denoise_draw00_randn_like"], sigma, labels)
    loss = score_losses.denoising_loss(denoised, x, sigma, 0.5).mean()
    torch.testing.assert_close(loss.detach(), arrays["denoise_loss"].float(), rtol=1e-4, atol=0)
    assert_same_norms(gradient_of(psi, loss), arrays, "denoise_gradnorm", "psi_param_order")


def test_dmd_regresses_on_pairs_beside_its_direction_as_in_dmd_npz() -> None:
    """With the file's own distance, as the weights of LPIPS could not be had for it."""
    arrays = Arrays("dmd.npz")

    def distance(images: Tensor, others: Tensor) -> Tensor:
        first, second = (
            torch.nn.functional.interpolate((x + 1) / 2, (224, 224), mode="bilinear", antialias=True)
            for x in (images, others)
        )
        return ((first - second).square() + 0.1 * (first - second).abs()).flatten(1).mean(dim=1)

    teacher = networks.read_network(golden(arrays.text("teacher"))).eval()
    psi = networks.read_network(golden(arrays.text("teacher"))).eval()
    networks.load_weights(psi, psi.state_dict() | arrays.net("psi"))
    levels = arrays["sigmas_descending_with_zero"].float()
    sigma = as_levels(levels[len(levels) - 1 - arrays["total_draw00_randint"]])
    recipe = catalog.recipe_for("tiny-digits", "dmd")
    assert isinstance(recipe, PairedRecipe)
    recipe = dataclasses.replace(
        recipe, batch_size=3, num_accumulation_rounds=1, lambda_reg=float(arrays["lambda_reg"])
    )
    method = dmd.Paired(recipe, teacher.spec, distance)
    batch: Any = SimpleNamespace(
        labels=arrays["labels"],
        diffusion=SimpleNamespace(normal=lambda shape: arrays["total_draw01_randn_like"]),
        pairs=lambda: base.Pairs(torch.zeros(0), torch.zeros(0), arrays["y_ref"]),
    )
    x = torch.cat([arrays["x"], arrays["x_ref"]]).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmd, "draw_levels", lambda *_: sigma)
        losses, gradient = method.image_gradient(base.Nets(teacher, psi, lambda *_: None, None), batch, x, 0)  # type: ignore[arg-type, return-value]
    close(gradient[:3], arrays["total_dx"])
    close(gradient[3:], arrays["total_dx_ref"])
    torch.testing.assert_close(sum(losses.values()).detach(), arrays["total_loss"].float(), rtol=1e-4, atol=0)  # type: ignore[union-attr]
    torch.testing.assert_close(losses["generator_regression_loss"].item(), 0.25 * float(arrays["regression_value"]))


def test_directions_point_where_the_mathematics_of_gaussians_says() -> None:
    """Data N(m, s^2), fakes N(n, r^2): KL and its weighted kin descend from each x towards the data's score."""
    x = torch.linspace(-2, 2, 41).reshape(-1, 1, 1, 1)
    sigma = torch.full_like(x, 0.7)
    (m, s), (n, r) = (0.3, 0.5), (-0.2, 0.8)

    def denoised(mean: float, std: float) -> Tensor:
        return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)

    def score(mean: float, std: float) -> Tensor:
        return (mean - x) / (std**2 + sigma**2)

    f, g = denoised(m, s), denoised(n, r)
    direction = dmd.matching_direction(x, f, g, "one")
    expected = sigma**2 * (score(n, r) - score(m, s))
    torch.testing.assert_close(direction, expected, rtol=1e-5, atol=1e-5)
    log_ratio = torch.distributions.Normal(m, (s**2 + 0.49) ** 0.5).log_prob(x) - torch.distributions.Normal(
        n, (r**2 + 0.49) ** 0.5
    ).log_prob(x)
    ratio = f_distill.density_ratio(log_ratio.reshape(-1, 1))
    torch.testing.assert_close(ratio, log_ratio.exp().flatten().clamp(0.1, 20), rtol=1e-5, atol=1e-5)
    # d/dx of the f-divergence's integrand f''(1/r)/r times the difference of scores; forward KL: f'' (u) = 1/u, so r.
    weighted = f_distill.f_weight("forward-kl", ratio).reshape(-1, 1, 1, 1) * direction
    torch.testing.assert_close(weighted, log_ratio.exp().clamp(0.1, 20) * expected, rtol=1e-5, atol=1e-5)


def test_a_step_alternates_or_shares_as_its_method_says() -> None:
    both = base.Schedule(generator_first=True, generator_every=5)
    assert [both.turns(step, True) for step in (0, 1, 5)] == [
        ("generator", "fake_score"),
        ("fake_score",),
        ("generator", "fake_score"),
    ]
    alone = base.Schedule(generator_every=5, alternates=True)
    assert [alone.turns(step, True) for step in (0, 1, 5)] == [("generator",), ("fake_score",), ("generator",)]


@pytest.mark.parametrize(("divergence", "tolerance"), [("Forward-KL", 1.2e-2), ("Forward-Clean", None)])
def test_uni_instructs_published_step_is_sidas_with_both_weights_one(divergence: str, tolerance: float | None) -> None:
    """uni_instruct.npz: what its code takes for a density ratio is 1 but for rounding in this loss' unit.

    It divides the scaled adversarial loss by itself less one. That is no ratio of densities, so it is not ours: with
    theirs put in by hand our step is the recorded one, and without it, it differs by that factor's distance from one.
    """
    arrays = Arrays("uni_instruct.npz")
    teacher = networks.read_network(golden(arrays.text("teacher"))).eval()
    psi = networks.read_network(golden(arrays.text("teacher"))).eval()
    networks.load_weights(psi, psi.state_dict() | arrays.net("psi"))
    recipe = catalog.recipe_for("tiny-digits", "sida")
    numbers = {"alpha": 1.0, "joint_weight": 1.0, "lambda_adv": 0.01, "batch_size": 3, "num_accumulation_rounds": 1}
    method = Sid(override(recipe, numbers), teacher.spec)  # type: ignore[arg-type]
    x, ratio = arrays["x"].requires_grad_(), arrays[f"{divergence}_vr0_density_ratio"]
    torch.testing.assert_close(ratio, arrays["gen_loss_gan"] / (arrays["gen_loss_gan"] - 1))
    batch: Any = SimpleNamespace(
        labels=arrays["labels"],
        num_micro_batches=1,
        diffusion=Playback([arrays.arrays["gen_draw00_rand"], arrays.arrays["gen_draw01_randn_like"]]),
    )
    losses, _ = method._generator_losses(base.Nets(teacher, psi, augment_nothing, None), batch, x, 300_000)
    of_sid, of_adversarial = (
        torch.autograd.grad(losses[f"generator_{name}_loss"], x, retain_graph=True)[0]
        for name in ("sid", "adversarial")
    )
    further = of_adversarial if divergence == "Forward-KL" else torch.zeros_like(of_sid)
    close(ratio * of_sid + further, arrays[f"{divergence}_vr0_dx"], 1e-3)
    if tolerance:
        close(of_sid + further, arrays[f"{divergence}_vr0_dx"], tolerance)


def augment_nothing(images: Tensor, draws: Any) -> tuple[Tensor, None]:
    return images, None
