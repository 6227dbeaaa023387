"""Inception and DINOv2: the published numbers under known weights, what small mistakes would cost, state dicts."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl import detectors
from sidactl.data.dataset import Dataset, drawn_subset
from sidactl.errors import SidaError
from sidactl.metrics import FeatureStats, frechet_distance
from sidactl.nets import inception
from sidactl.nets.inception import FIDInception, load_weights, resize_tf1_bilinear
from sidactl.nets.vit import VisionTransformer, preprocess
from tests.conftest import instead_of
from tests.golden import golden_metrics
from tests.golden_weights import dinov2_weights, fingerprint, inception_weights

Arrays = dict[str, np.ndarray]

INCEPTION_IMAGES = ["a32", "b32", "c32", "a64", "b64", "a299", "rect48x80", "rect300x200", "a512", "tiny5x7"]
VIT_IMAGES = ["a32", "b64", "c64", "d224", "e512", "rect100x60"]
VITS_AND_TOLERANCES = [("micro", 5e-5), ("vits14", 2e-4), pytest.param("vitl14", 1e-3, marks=pytest.mark.slow)]
FEATURES, LOGITS, SOFTMAX, RESIZED = 2e-4, 1e-3, 1e-5, 1e-4


def load(name: str) -> Arrays:
    with np.load(golden_metrics(name), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def described(name: str) -> Any:
    return json.loads(golden_metrics(name).read_text())


def nchw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def hwc(x: Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).numpy()


def close(actual: Tensor | np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=0, atol=tolerance)


@contextmanager
def outputs_of(net: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """What the named submodules give in forward passes meanwhile."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.__setitem__(name, output)

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


# ---- Inception ----


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    return inception_weights(described("inception/keys.json")["shapes"])


@pytest.fixture(scope="module")
def inception_golden() -> Arrays:
    return load("inception/outputs.npz")


@pytest.fixture
def net(inception_state: dict[str, Tensor]) -> FIDInception:
    with torch.device("meta"):
        net = FIDInception().eval()
    # Values are shared between tests, which run the net but do not train it.
    net.load_state_dict(inception_state, assign=True)
    return net


def test_the_inception_detector_gives_the_golden_features_and_logits(
    inception_state: dict[str, Tensor], inception_golden: Arrays
) -> None:
    detector = detectors.load("inception", inception_state)
    for name in ("a32", "b64", "rect48x80"):
        features = detector(nchw(inception_golden[f"image_{name}"]))
        close(features, inception_golden[f"feat2048_{name}"].reshape(1, -1), FEATURES)
        logits = inception_golden[f"logits_unbiased_{name}"].reshape(1, -1)
        close(detector.logits(features), logits, LOGITS)


def test_inception_keys_and_shapes_are_the_published_ones() -> None:
    keys = described("inception/keys.json")
    with torch.device("meta"):
        own = {name: list(weight.shape) for name, weight in FIDInception().state_dict().items()}
    assert own == keys["shapes"]
    assert len(own) == keys["num_keys"]


def test_weights_of_the_golden_inception_are_those_of_the_recipe(inception_state: dict[str, Tensor]) -> None:
    fingerprints = described("inception/keys.json")["fingerprints"]
    assert {name: fingerprint(inception_state[name]) for name in fingerprints} == fingerprints


@pytest.mark.parametrize("name", INCEPTION_IMAGES)
def test_inception_gives_the_golden_features(net: FIDInception, inception_golden: Arrays, name: str) -> None:
    wanted = {key.removesuffix(f"_{name}"): value for key, value in inception_golden.items() if key.endswith(name)}
    taps = ("Conv2d_1a_3x3", "Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_6d.branch1x1", "Mixed_6e")
    with outputs_of(net, *taps) as seen:
        features = net(nchw(wanted["image"]))
    assert features.dtype == torch.float32
    conv1a, conv2b, conv4a, branch, mixed6e = (seen[tap] for tap in taps)
    close(F.max_pool2d(conv2b, 3, 2).mean((2, 3))[0], wanted["feat64"], FEATURES)
    close(F.max_pool2d(conv4a, 3, 2).mean((2, 3))[0], wanted["feat192"], FEATURES)
    close(mixed6e.mean((2, 3))[0], wanted["feat768"], FEATURES)
    close(branch[0, :7].permute(1, 2, 0).flatten(), wanted["spatial_sfid"], FEATURES)
    close(features[0], wanted["feat2048"], FEATURES)
    logits = net.logits(features)
    close(logits[0], wanted["logits_unbiased"], LOGITS)
    close(logits.softmax(1)[0], wanted["softmax_unbiased"], SOFTMAX)
    close(net.logits(features, bias=True)[0], wanted["logits"], LOGITS)
    if "conv1a_out_first4ch_sub" in wanted:
        close(conv1a[0, :4, ::9, ::9], wanted["conv1a_out_first4ch_sub"], FEATURES)


@pytest.mark.parametrize("name", INCEPTION_IMAGES)
def test_images_are_resized_as_tensorflow_1_does(inception_golden: Arrays, name: str) -> None:
    image = nchw(inception_golden[f"image_{name}"]).to(torch.float32)
    resized = hwc(resize_tf1_bilinear(image, 299, 299))
    close(resized[::13, ::11], inception_golden[f"resized_sub_{name}"], RESIZED)
    if name == "a32":
        close(resized, inception_golden["resized_full_a32"], RESIZED)
    if name == "rect48x80":
        close(resized[::2], load("inception/resized_more.npz")["resized_full_rect48x80"], RESIZED)
    if name == "a299":
        assert (resized == inception_golden["image_a299"]).all()


@pytest.mark.parametrize("name", ["a32", "a64"])
def test_inception_in_float64_agrees_with_the_golden_one_to_float32_rounding(
    net: FIDInception, inception_golden: Arrays, name: str
) -> None:
    features = net.double()(nchw(inception_golden[f"image_{name}"]))
    assert features.dtype == torch.float64
    close(features[0], inception_golden[f"feat2048_float64path_{name}"], 2e-7)


def test_inception_features_do_not_depend_on_the_batch_nor_on_the_dtype_of_images(
    net: FIDInception, inception_golden: Arrays
) -> None:
    images = torch.cat([nchw(inception_golden[f"image_{name}"]) for name in ("a32", "b32", "c32")])
    together = net(images)
    close(net(images[1:2])[0], together[1].numpy(), 2e-6)
    assert torch.equal(net(images.to(torch.float32)), together)


def test_inception_repeats_grey_to_three_channels(net: FIDInception, inception_golden: Arrays) -> None:
    grey = nchw(inception_golden["image_a32"])[:, :1]
    assert torch.equal(net(grey), net(grey.repeat(1, 3, 1, 1)))


def test_weights_load_without_counters_of_batches_but_strictly_otherwise(
    net: FIDInception, inception_state: dict[str, Tensor], inception_golden: Arrays
) -> None:
    state = {key: weight for key, weight in inception_state.items() if not key.endswith("num_batches_tracked")}
    loaded = FIDInception().eval()
    load_weights(loaded, state)
    image = nchw(inception_golden["image_a32"])
    assert torch.equal(loaded(image), net(image))

    odd = {key: weight for key, weight in state.items() if not key.startswith("Conv2d_1a_3x3.bn.")}
    odd |= {f"AuxLogits.{i}": torch.zeros(1) for i in range(6)} | {"fc.bias": torch.zeros(1000)}
    for wrong, message in (
        (
            odd,
            "the weights do not fit FIDInception: 4 missing (Conv2d_1a_3x3.bn.weight, Conv2d_1a_3x3.bn.bias, "
            "Conv2d_1a_3x3.bn.running_mean, Conv2d_1a_3x3.bn.running_var); 6 unexpected (AuxLogits.0, AuxLogits.1, "
            "AuxLogits.2, AuxLogits.3, AuxLogits.4, ...); 1 of another shape (fc.bias)",
        ),
        (
            state | {"fc.weight": state["fc.weight"].T},
            "the weights do not fit FIDInception: 1 of another shape (fc.weight)",
        ),
    ):
        with pytest.raises(SidaError) as caught:
            load_weights(loaded, wrong)
        assert caught.value.message == message
        assert caught.value.hint == "Check that the file holds this network under its published names."


def half_pixel(x: Tensor, height: int, width: int, *, antialias: bool = False) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", antialias=antialias)


def slip_bn(net: FIDInception, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5


def slip_padding(net: FIDInception, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of(inception.average_pool, lambda x: F.avg_pool2d(x, 3, 1, 1), monkeypatch)


def slip_pool(net: FIDInception, monkeypatch: pytest.MonkeyPatch) -> None:
    net.Mixed_7c.max_pool = False


def slip_half_pixel(net: FIDInception, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of(inception.resize_tf1_bilinear, half_pixel, monkeypatch)


def slip_antialias(net: FIDInception, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of(inception.resize_tf1_bilinear, lambda x, h, w: half_pixel(x, h, w, antialias=True), monkeypatch)


def slip_scale(net: FIDInception, monkeypatch: pytest.MonkeyPatch) -> None:
    def resize(x: Tensor, height: int, width: int) -> Tensor:
        return (resize_tf1_bilinear(x, height, width) - 128) * (128 / 127.5) + 128

    instead_of(inception.resize_tf1_bilinear, resize, monkeypatch)


@pytest.mark.parametrize(
    ("mistake", "slip"),
    [
        ("unchanged", lambda net, monkeypatch: None),
        ("bn_eps_1e-5", slip_bn),
        ("avg_pool_counts_padding", slip_padding),
        ("mixed7c_avg_instead_of_max", slip_pool),
        ("torch_half_pixel_bilinear_resize", slip_half_pixel),
        ("antialiased_resize", slip_antialias),
        ("scaled_by_127.5_instead_of_128", slip_scale),
    ],
)
def test_each_typical_mistake_costs_what_it_is_known_to_cost(
    net: FIDInception,
    inception_golden: Arrays,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
    slip: Callable[[FIDInception, pytest.MonkeyPatch], None],
) -> None:
    slip(net, monkeypatch)
    changes = described("inception/sensitivity.json")[mistake]
    assert (max(changes.values()) > 4 * FEATURES) == (mistake != "unchanged")
    for name, change in changes.items():
        features = net(nchw(inception_golden[f"image_{name}"]))[0].numpy()
        cost = abs(features - inception_golden[f"feat2048_{name}"]).max()
        assert cost == pytest.approx(change, rel=1e-3, abs=2e-6)


# ---- DINOv2 ----


def vit(name: str, state: dict[str, Tensor]) -> VisionTransformer:
    described_as = described("dinov2/meta.json")[name]
    with torch.device("meta"):
        net = VisionTransformer(described_as["embed_dim"], described_as["depth"], described_as["heads"]).eval()
    net.load_state_dict(state, assign=True)
    return net


def vit_shapes(name: str) -> dict[str, list[int]]:
    if name == "vitl14":
        return described("dinov2/keys_dinov2_vitl14.json")["shapes"]
    return described("dinov2/meta.json")[name]["shapes"]


@pytest.fixture(scope="module")
def vit_golden() -> Arrays:
    return load("dinov2/outputs.npz")


@pytest.fixture
def micro() -> VisionTransformer:
    return vit("micro", dinov2_weights(vit_shapes("micro")))


def first_image(golden: Arrays) -> Tensor:
    return preprocess(nchw(golden["image_a32"]))


@pytest.mark.parametrize("name", ["micro", "vits14", "vitl14"])
def test_vit_keys_and_shapes_are_the_published_ones(name: str) -> None:
    described_as = described("dinov2/meta.json")[name]
    with torch.device("meta"):
        net = VisionTransformer(described_as["embed_dim"], described_as["depth"], described_as["heads"])
    own = {key: list(weight.shape) for key, weight in net.state_dict().items()}
    assert own == vit_shapes(name)
    assert len(own) == described_as["num_keys"]
    assert sum(weight.numel() for weight in net.parameters()) == described_as["params"]


def test_vit_is_the_large_one_unless_told_otherwise() -> None:
    with torch.device("meta"):
        own = {key: list(weight.shape) for key, weight in VisionTransformer().state_dict().items()}
    assert own == described("dinov2/keys_dinov2_vitl14.json")["shapes"]


@pytest.mark.parametrize(("name", "tolerance"), VITS_AND_TOLERANCES)
def test_vit_gives_the_golden_features(vit_golden: Arrays, name: str, tolerance: float) -> None:
    described_as = described("dinov2/meta.json")[name]
    state = dinov2_weights(vit_shapes(name))
    assert {key: fingerprint(state[key]) for key in described_as["fingerprints"]} == described_as["fingerprints"]
    net = vit(name, state)

    images = [nchw(vit_golden[f"image_{image}"]) for image in VIT_IMAGES[: described_as["num_images"]]]
    features = net(torch.cat([preprocess(image) for image in images]))
    assert features.dtype == torch.float32
    close(features, vit_golden[f"{name}_cls_torch"], tolerance)
    close(net(torch.cat([preprocess(image, "pil") for image in images])), vit_golden[f"{name}_cls_pil"], tolerance)

    close(net.position_embedding(16, 16)[0, :, :16], vit_golden[f"{name}_pos_embed_224_first16ch"], 2e-6)
    blocks = [f"blocks.{i}" for i in range(described_as["depth"])]
    embedded: list[Tensor] = []
    hook = net.blocks[0].register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    with outputs_of(net, *blocks) as seen:
        net(first_image(vit_golden))
    hook.remove()
    close(embedded[0][0, ::4, :16], vit_golden[f"{name}_tokens_after_embed_first16ch_img0"], 1e-5)
    if f"{name}_cls_after_each_block_img0" in vit_golden:
        rows = torch.stack([seen[block][0, 0] for block in blocks])
        close(rows, vit_golden[f"{name}_cls_after_each_block_img0"], tolerance)


@pytest.mark.parametrize("name", VIT_IMAGES)
def test_images_are_prepared_as_edm2_does(vit_golden: Arrays, name: str) -> None:
    image = nchw(vit_golden[f"image_{name}"])
    for resize in ("torch", "pil"):
        x = preprocess(image, resize)
        assert (x.dtype, x.shape) == (torch.float32, (1, 3, 224, 224))
        close(hwc(x)[::9, ::7], vit_golden[f"pre_{resize}_sub_{name}"], 2e-4)
        stats = [x.mean(), x.std(correction=0), x.min(), x.max()]
        close(torch.stack(stats), vit_golden[f"pre_stats_mean_std_min_max_{resize}_{name}"], 2e-4)
    if name == "a32":
        close(hwc(preprocess(image)), vit_golden["pre_torch_full_a32"], 2e-4)


def test_grey_images_are_repeated_to_three_channels(vit_golden: Arrays) -> None:
    grey = nchw(vit_golden["image_a32"])[:, :1]
    for resize in ("torch", "pil"):
        assert torch.equal(preprocess(grey, resize), preprocess(grey.repeat(1, 3, 1, 1), resize))


def test_vit_patch_tokens_of_the_final_norm(micro: VisionTransformer, vit_golden: Arrays) -> None:
    with outputs_of(micro, "norm") as seen:
        features = micro(first_image(vit_golden))
    close(seen["norm"][0, 1:], vit_golden["micro_x_norm_patchtokens_img0"], 5e-5)
    assert torch.equal(seen["norm"][:, 0], features)


def test_vit_at_other_sizes(micro: VisionTransformer, vit_golden: Arrays) -> None:
    x = first_image(vit_golden)
    assert micro.position_embedding(37, 37) is micro.pos_embed
    close(micro(F.interpolate(x, (518, 518)))[0], vit_golden["micro_cls_518_nearest_upsampled_img0"], 5e-5)
    close(micro(x[:, :, :140, :196])[0], vit_golden["micro_cls_crop140x196_img0"], 5e-5)


def test_vit_in_float64(micro: VisionTransformer, vit_golden: Arrays) -> None:
    x = torch.cat([preprocess(nchw(vit_golden[f"image_{name}"])) for name in VIT_IMAGES]).double()
    close(micro.double()(x), vit_golden["micro_cls_float64path"], 1e-6)


def test_each_typical_vit_mistake_costs_what_it_is_known_to_cost(
    micro: VisionTransformer, vit_golden: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = described("dinov2/meta.json")["micro_sensitivity_max_abs_cls"]
    x = torch.cat([preprocess(nchw(vit_golden[f"image_{name}"])) for name in VIT_IMAGES])

    def cost() -> float:
        return float(abs(micro(x).numpy() - vit_golden["micro_cls_torch"]).max())

    def positions(**options: Any) -> Tensor:
        grid = micro.pos_embed[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
        patches = F.interpolate(grid, mode="bicubic", **options)
        return torch.cat([micro.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)

    with monkeypatch.context() as patch:
        patch.setattr(micro, "position_embedding", lambda rows, columns: positions(size=(rows, columns)))
        assert cost() == pytest.approx(known["pos_embed_exact_size_no_offset"], rel=1e-3)
        scale = (16.1 / 37, 16.1 / 37)
        patch.setattr(micro, "position_embedding", lambda rows, columns: positions(scale_factor=scale, antialias=True))
        assert cost() == pytest.approx(known["pos_embed_antialias"], rel=1e-3)
    with monkeypatch.context() as patch:
        gelu = F.gelu
        patch.setattr(F, "gelu", lambda y: gelu(y, approximate="tanh"))
        assert cost() == pytest.approx(known["gelu_tanh"], rel=0.02)
    for module in micro.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    assert cost() == pytest.approx(known["layernorm_eps_1e-5"], rel=0.1)


# ---- images to scores ----

EXPECTED = "end_to_end/expected.json"
STATS = "end_to_end/stats.npz"
GENERATED = "end_to_end/generated_standin.zip"
REFERENCE = "datasets/edm_cifar.zip"


def subset_of_20() -> np.ndarray:
    """The images that EDM2 keeps of 50 under seed 3."""
    return drawn_subset(50, 20, seed=3)


def vits14() -> VisionTransformer:
    return vit("vits14", dinov2_weights(vit_shapes("vits14")))


@pytest.mark.parametrize(("which", "archive"), [("ref", REFERENCE), ("gen", GENERATED)])
def test_features_of_datasets_by_both_nets(net: FIDInception, which: str, archive: str) -> None:
    golden, first = load(STATS), Dataset(golden_metrics(archive)).images(range(4))
    close(net(first), golden[f"features_{which}_inception"][:4], FEATURES)
    close(vits14()(preprocess(first)), golden[f"features_{which}_dinov2_vits14"][:4], 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "suffix", "tolerance", "score_tolerance"),
    [("fid", "inception", FEATURES, 2e-4), ("fd_dinov2", "dinov2_vits14", 2e-4, 5e-3)],
)
def test_datasets_end_to_end_give_the_golden_scores(
    net: FIDInception, metric: str, suffix: str, tolerance: float, score_tolerance: float
) -> None:
    golden, expected = load(STATS), described(EXPECTED)
    dino = vits14()
    extract = net if metric == "fid" else lambda images: dino(preprocess(images))
    features = {}
    for which, archive in (("ref", REFERENCE), ("gen", GENERATED)):
        dataset = Dataset(golden_metrics(archive))
        parts = [extract(dataset.images(part)) for part in np.array_split(np.arange(dataset.num_images), 4)]
        features[which] = torch.cat(parts)
        stored = golden[f"features_{which}_{suffix}"]
        close(features[which][: len(stored)], stored, tolerance)
    features["gen_subset"] = features["gen"][subset_of_20()]

    stats = {which: FeatureStats() for which in features}
    for which, rows in features.items():
        stats[which].add(rows)
        covariance = stats[which].covariance()
        close(stats[which].mean, golden[f"mu_{which}_{metric}"], tolerance)
        thousandth = 1e-3 * covariance.diagonal().mean()
        close(covariance.diagonal(), golden[f"sigma_diag_{which}_{metric}"], thousandth)
        close(covariance[::61, ::53], golden[f"sigma_sub_{which}_{metric}"], thousandth)
    ref = stats["ref"]
    for which, run in (("gen", "edm2_metrics_all"), ("gen_subset", "edm2_metrics_subset")):
        gen = stats[which]
        distance = frechet_distance(gen.mean, gen.covariance(), ref.mean, ref.covariance())
        assert distance == pytest.approx(expected[run][metric], abs=score_tolerance)
