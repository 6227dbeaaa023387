"""Diffusion-GAN's times, their adaptation and losses, held against the published code."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl.methods import diffusion_gan, discriminator
from tests.methods.test_dmd import Arrays, close


@pytest.fixture(scope="module")
def published() -> Arrays:
    return Arrays("diffusion_gan.npz")


@pytest.mark.parametrize("kind", ["priority", "uniform"])
def test_tables_of_times_are_the_published_ones(published: Arrays, kind: str) -> None:
    for index, p in enumerate(published["p"].tolist()):
        largest = diffusion_gan.largest_time(p)
        assert largest == int(published[f"{kind}_T"][index])
        random = np.random.RandomState(int(published["np_seed_per_p"][index]))
        table = diffusion_gan.time_table(largest, random, kind)  # type: ignore[arg-type]
        assert sorted(table) == sorted(published[f"{kind}_t_epl"][index].tolist())
    bars = diffusion_gan.alpha_bars(largest)
    np.testing.assert_allclose(np.sqrt(bars), published[f"{kind}_abs"].numpy(), rtol=1e-6)
    # Theirs is in float32, in which 1 - alpha_bar loses digits.
    np.testing.assert_allclose(np.sqrt(1 - bars), published[f"{kind}_omabs"].numpy(), rtol=1e-4, atol=1e-7)


def test_diffused_images_are_edms_up_to_a_factor(published: Arrays) -> None:
    bars = torch.from_numpy(diffusion_gan.alpha_bars(int(published["forward_T"])))
    times = published["forward_t"].flatten().long()
    alpha = bars[times].sqrt().float().reshape(-1, 1, 1, 1)
    sigma = diffusion_gan.NOISE * (1 - bars[times]).sqrt().float().reshape(-1, 1, 1, 1) / alpha
    close(alpha * (published["forward_x"] + sigma * published["forward_draw00_randn_like"]), published["forward_xt"])


@pytest.mark.parametrize("run", ["cifar", "big"])
def test_the_largest_time_adapts_as_published(published: Arrays, run: str) -> None:
    batch, interval, kimg, target = published[f"ada_{run}_settings"].tolist()
    p = 0.0
    for index, mean_sign in enumerate(published["ada_mean_sign"].tolist()):
        p = diffusion_gan.adapted(p, mean_sign, target=target, num_images=int(batch * interval), kimg=kimg)
        assert p == pytest.approx(float(published[f"ada_{run}_p"][index]), abs=1e-9)
        assert diffusion_gan.largest_time(p) == int(published[f"ada_{run}_T"][index])


class Small(nn.Module):
    """The discriminator of the golden losses."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        for name, value in arrays.net("D").items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        get = self.get_parameter
        x = F.leaky_relu(F.conv2d(x, get("conv0_weight"), get("conv0_bias"), padding=1), 0.2)
        embedded = F.linear(t.float().reshape(-1, 1) / 1000, get("temb_weight"), get("temb_bias"))
        x = F.conv2d(x, get("conv1_weight"), get("conv1_bias"), padding=1, stride=2) + embedded[:, :, None, None]
        return F.linear(F.leaky_relu(x, 0.2).mean(dim=(2, 3)), get("out_weight"), get("out_bias"))


def diffused(arrays: Arrays, images: Tensor, draw: str, times: Tensor) -> Tensor:
    t = times.flatten().long()
    names = "gan_alphas_bar_sqrt", "gan_one_minus_alphas_bar_sqrt"
    alpha, noise = (arrays[name][t].float().reshape(-1, 1, 1, 1) for name in names)
    return alpha * images + noise * diffusion_gan.NOISE * arrays[draw]


def test_losses_and_penalty_are_the_published_ones(published: Arrays) -> None:
    net, fakes, reals = Small(published), published["gan_fake"].requires_grad_(), published["gan_real"]
    times = published["Gmain_t"]
    logits = net(diffused(published, fakes, "Gmain_draw00_randn_like", times), times)
    loss = discriminator.adversarial_loss("softplus", logits)
    torch.testing.assert_close(loss.detach(), published["Gmain_Loss_G_loss"].flatten(), rtol=1e-4, atol=1e-6)
    close(torch.autograd.grad(loss.mean(), fakes)[0], published["Gmain_dfake"])
    of_fakes, of_reals = published["Dmain_t"].chunk(2)
    told = discriminator.telling_loss(
        "softplus",
        net(diffused(published, fakes, "Dmain_draw00_randn_like", of_fakes), of_fakes),
        net(diffused(published, reals, "Dmain_draw01_randn_like", of_reals), of_reals),
    )
    by_reals = F.softplus(-published["Dmain_Loss_scores_real"]).flatten()
    by_fakes = F.softplus(published["Dmain_Loss_scores_fake"]).flatten()
    torch.testing.assert_close(told.detach(), by_fakes + by_reals, rtol=1e-4, atol=1e-6)
    times = published["Dreg_t"]
    noisy = diffused(published, reals, "Dreg_draw00_randn_like", times)
    alpha = published["gan_alphas_bar_sqrt"][times.flatten().long()].float()
    noisy.requires_grad_()
    # The published penalty is on the images before they are diffused, whose gradient has that factor more.
    penalty = discriminator.r1_penalty(net(noisy, times), [noisy]) * alpha**2
    torch.testing.assert_close(penalty.detach(), published["Dreg_Loss_r1_penalty"].float(), rtol=1e-3, atol=1e-9)
