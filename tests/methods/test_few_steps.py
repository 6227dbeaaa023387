"""Generators of several steps, held against numbers of published code, and trained."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl import catalog
from sidactl.errors import SidaError
from sidactl.foreign import networks
from sidactl.methods import dmd
from sidactl.nets.steps import stepwise
from sidactl.recipes import FakeScoreRecipe, MatchingRecipe, OneStepSpec, override
from tests.golden import golden
from tests.methods.test_dmd import Arrays, close, gradient_of


@pytest.fixture(scope="module")
def published() -> Arrays:
    return Arrays("fewstep.npz")


def drawn(arrays: Arrays, tag: str) -> Iterator[Tensor]:
    names = sorted(n for n in arrays.arrays.files if n.startswith(f"{tag}_draw"))
    return iter([arrays[name] for name in names])


class Seeing:
    """A denoiser that keeps what it was shown."""

    def __init__(self, denoise: Any) -> None:
        self.denoise, self.inputs = denoise, list[Tensor]()

    def __call__(self, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        self.inputs.append(x.detach())
        found: Tensor = self.denoise(x, sigma, labels)
        return found


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_all_steps_with_gradients_are_those_of_sidas_code_for_edm2(num_steps: int, published: Arrays) -> None:
    net = networks.read_network(golden(published.text("G_base")))
    networks.load_weights(net, net.state_dict() | published.net("G") | published.net("G_buffer"))
    net.requires_grad_(True)
    tag, seeing = f"sida_N{num_steps}", Seeing(net)
    sampler = OneStepSpec(num_steps=num_steps, sigma_init=float(published["sigma_init"]))
    levels = [sampler.sigma(step) for step in range(num_steps)]
    draws, z = drawn(published, tag), published["z"] / levels[0]  # recorded with its scale
    images = stepwise(seeing, z, published["labels"], levels, "fresh", lambda: next(draws))  # type: ignore[arg-type]
    close(images.detach(), published[f"{tag}_images"])
    close(torch.stack(seeing.inputs), published[f"{tag}_inputs"])
    torch.testing.assert_close(torch.tensor(levels), published[f"{tag}_sigmas"][:, 0].flatten())
    gradients = gradient_of(net, (images * published["cotangent"]).sum())
    names = [str(name) for name in published.arrays["G_param_order"]]
    ours = torch.stack([gradients[name].double().norm() for name in names])
    theirs = published[f"{tag}_G_gradnorm"].double()
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5 * float(theirs.max()))


@pytest.mark.parametrize("kind", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("init", [999, 800])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_trained_step_is_that_of_few_step_sid(kind: Any, init: int, k: int, published: Arrays) -> None:
    """Its flow in EDM's notation: time t is sigma / (1 + sigma), what it sees is x (1 - t); t = 1 is a sigma of 1e6."""
    weight, bias, a = published["flow_W"].clone().requires_grad_(), published["flow_b"], published["flow_a"]
    tag = f"siddit_init{init}_{kind}_k{k}"
    times = published[f"{tag}_t"].double().clamp(max=1 - 1e-6)
    levels = (times / (1 - times)).tolist()

    def denoise(x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        t = sigma / (1 + sigma)
        seen = x * (1 - t)
        velocity = torch.tanh(
            torch.einsum("oc,bchw->bohw", weight, seen) + bias.reshape(1, -1, 1, 1) + a.reshape(-1, 1, 1, 1) * t
        )
        return seen - t * velocity

    seeing, draws = Seeing(denoise), drawn(published, tag)
    images = stepwise(seeing, published["siddit_z"], None, levels, kind, lambda: next(draws), graphs="last")  # type: ignore[arg-type]
    close(images.detach(), published[f"{tag}_images"])
    shown = torch.stack([x * (1 - t) for x, t in zip(seeing.inputs, times.tolist(), strict=True)])
    close(shown, published[f"{tag}_inputs"])
    (gradient,) = torch.autograd.grad((images * published["siddit_cotangent"]).sum(), weight)
    close(gradient, published[f"{tag}_dW"], 1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize(("theirs", "kind"), [("sde", "fresh"), ("ode", "ddim")])
def test_fastgens_student_loop(num_steps: int, theirs: str, kind: Any, published: Arrays) -> None:
    weight, tag = published["fastgen_W"], f"fastgen_N{num_steps}_{theirs}"

    def denoise(x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        of_all = sigma**2 + 0.25
        return 0.25 / of_all * x + 0.3 * torch.tanh(torch.einsum("oc,bchw->bohw", weight, x / of_all**0.5))

    levels = published[f"fastgen_t_list_N{num_steps}"][:-1].tolist()
    seeing, draws = Seeing(denoise), drawn(published, tag)
    images = stepwise(seeing, published["fastgen_noise"], None, levels, kind, lambda: next(draws))  # type: ignore[arg-type]
    close(images, published[f"{tag}_images"])
    close(torch.stack(seeing.inputs), published[f"{tag}_inputs"])


def recipe(mode: Any = "sida", **changes: Any) -> FakeScoreRecipe:
    made = override(catalog.recipe_for("tiny-digits", mode), changes)
    assert isinstance(made, FakeScoreRecipe)
    return made


def test_levels_fall_evenly_or_as_asked() -> None:
    assert recipe().levels == (2.5,)
    assert recipe(steps=4).levels == (2.5, 1.875, 1.25, 0.625)
    other = recipe(step_levels=(4.0, 1.0))
    assert (other.sigma_init, other.levels) == (4.0, (4.0, 1.0))
    assert other.sampler() == OneStepSpec(sigma_init=4.0, num_steps=2, levels=(4.0, 1.0))
    assert [other.sampler().sigma(step) for step in range(2)] == [4.0, 1.0]
    assert "steps" not in recipe().to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 10**8}, "steps must be at most 1,000"),
        ({"step_levels": (0.0,)}, "step_levels must be falling from sigma_init"),
        ({"step_levels": (float("nan"), 1.0)}, "step_levels must be falling from sigma_init"),
        ({"step_levels": (1.0, 2.0)}, "step_levels must be falling from sigma_init"),
        ({"step_levels": (2.0, 0.0)}, "step_levels must be falling from sigma_init"),
        ({"step_levels": (2.0, 1.0), "sigma_init": 2.5}, "step_levels must be falling from sigma_init, 2.5"),
        ({"step_levels": (2.0, 1.0), "steps": 3}, "steps must be left out, or 2 as there are levels"),
        ({"step_noise": "ddim"}, "--step-noise counts for nothing with --steps 1"),
        ({"steps": 2, "step_noise": "other"}, "step_noise must be one of"),
        ({"mode": "dmd", "steps": 2}, "--steps is no setting of mode dmd"),
        ({"mode": "add", "steps": 2}, "--steps is no setting of mode add"),
    ],
)
def test_steps_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SidaError) as error:
        override(catalog.recipe_for("tiny-digits", changes.pop("mode", "sida")), changes)
    assert str(error.value).startswith(message)


def test_a_later_step_at_a_high_noise_level_is_said_to_be_unusual() -> None:
    assert any("begins at noise level 40" in line for line in recipe("dmd2", steps=2).unusual())
    assert not recipe("dmd2", step_levels=(80.0, 2.0)).unusual()


def test_each_step_of_a_run_trains_one_of_the_steps_and_those_before_it_without_gradients() -> None:
    made = recipe("diff-instruct", steps=3, step_noise="fixed")
    assert isinstance(made, MatchingRecipe)
    spec = catalog.TEACHERS["tiny-digits"].net
    method, seen = dmd.Matching(made, spec), list[tuple[float, bool]]()

    class Net:
        def __init__(self) -> None:
            self.spec, self.gain = spec, torch.ones((), requires_grad=True)

        def __call__(self, x: Tensor, sigma: float, labels: Tensor) -> Tensor:
            found = self.gain * x / (1 + sigma)
            seen.append((sigma, found.requires_grad))
            return found

    for chosen in range(3):
        seen.clear()
        batch: Any = SimpleNamespace(
            labels=torch.zeros(2, 10),
            latent=SimpleNamespace(normal=lambda shape: torch.ones(*shape)),
            chosen=lambda below, chosen=chosen: chosen,
        )
        images = method.generate(Net(), batch)  # type: ignore[arg-type]
        assert images.shape == (2, 1, 8, 8)
        assert [has_graph for _, has_graph in seen] == [False] * chosen + [True]
        assert [sigma for sigma, _ in seen] == pytest.approx(made.levels[: chosen + 1])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_lsgs_sampler_of_several_steps_is_ours_at_its_levels(num_steps: int) -> None:
    arrays, tag = Arrays("lsg.npz"), f"sampler_N{num_steps}"
    net = networks.read_network(golden(arrays.text("zero_label_teacher"))).eval()
    networks.load_weights(net, net.state_dict() | arrays.net("sampler_G"))
    net.requires_grad_(True)
    seeing, draws, z = Seeing(net), drawn(arrays, tag), arrays["sampler_z"]
    levels = [float(arrays["sigma_of_timestep"][int(times[0])]) for times in arrays.arrays[f"{tag}_timesteps"]]
    images = stepwise(seeing, z, arrays["zero_label_labels"], levels, "fresh", lambda: next(draws))  # type: ignore[arg-type]
    close(torch.stack(seeing.inputs), arrays[f"{tag}_inputs"])
    close(images.detach(), arrays[f"{tag}_images"])
    gradients = gradient_of(net, (images * arrays["sampler_cotangent"]).sum())
    ours = torch.stack([gradients[str(name)].double().norm() for name in arrays.arrays["zero_label_psi_param_order"]])
    theirs = arrays[f"{tag}_G_gradnorm"].double()
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4 * float(theirs.max()))
