import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sidactl import nets
from sidactl.errors import SidaError
from sidactl.foreign import networks, pickles, records
from sidactl.nets.edm2 import drop_logvar_
from sidactl.recipes import NetSpec
from tests.conftest import instead_of
from tests.golden import golden

CONFIGS = {
    "configs_edm.json": [
        "edm_ddpmpp_uncond",
        "edm_ddpmpp_cond_aug9",
        "edm_ddpmpp_gray_traj",
        "edm_ncsnpp_uncond",
        "edm_adm_cond",
    ],
    "configs_edm2.json": [
        "edm2_cond_logvar",
        "edm2_cond_logvar_traj",
        "edm2_uncond_rgb",
        "edm2_gray_defaulthead",
        "edm2_guide_uncond",
    ],
}
SNAPSHOTS = ["sida_gen_edm", "sid_v1_gen_edm", "sida_gen_edm2_gan_forcenorm", "sid_gen_edm2_nogan"]
EDM2_LAYOUTS = [f"edm2-img512-{size}" for size in ("xs", "s", "m", "l", "xl", "xxl")] + [
    f"edm2-img64-{size}" for size in ("xs", "s", "m", "l", "xl")
]
MINIMAL = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000}


def record(class_name: str, **options: Any) -> records.Record:
    return records.Record(class_name=class_name, init_kwargs=MINIMAL | options)


@pytest.mark.parametrize(("config", "name"), [(config, name) for config, names in CONFIGS.items() for name in names])
def test_spec_has_the_options_that_the_golden_config_states(config: str, name: str) -> None:
    settings = json.loads(golden(f"networks/{config}").read_text())[name]
    net = networks.read_network(golden(f"networks/{name}.pkl"))
    stated = {k: v for k, v in settings["init_kwargs"].items() if k not in ("use_fp16", "model_type")}
    told = net.spec.to_json()
    assert {k: told.get(k, getattr(net.spec, k)) for k in stated} == stated
    assert sum(p.numel() for p in net.parameters()) == settings["num_params"]
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert {t.dtype for t in net.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots_of_generators_load(name: str) -> None:
    net = networks.read_network(golden(f"networks/{name}.pkl"))
    assert net.spec.logvar_channels == 0
    assert net.spec.architecture == ("EDM2" if "edm2" in name else "SongUNet")
    assert sum(p.numel() for p in net.parameters()) == (45811 if "edm2" in name else 43825)


@pytest.mark.parametrize("name", EDM2_LAYOUTS)
def test_spec_of_a_published_edm2_network_has_its_names_and_shapes(name: str) -> None:
    layout = json.loads(golden(f"layouts/{name}.json").read_text())
    spec = networks.spec_of(records.Record(class_name="Precond", init_kwargs=layout["init_kwargs"]))
    with torch.device("meta"):
        net = nets.build(spec)
    assert {key: list(p.shape) for key, p in net.named_parameters()} == layout["parameters"]
    assert {key: list(b.shape) for key, b in net.named_buffers()} == layout["buffers"]


@pytest.mark.parametrize(
    ("class_name", "logvar_channels"),
    [("Precond", 128), ("EDM_2_Precond_EncoderDecoder", 128), ("EDM_2_Precond_Generator", 0)],
)
def test_what_an_edm2_checkpoint_leaves_out_has_the_published_defaults(class_name: str, logvar_channels: int) -> None:
    spec = networks.spec_of(record(class_name, dropout=0, use_fp16=True, force_normalization=True, use_gan=True))
    stated = {k: getattr(spec, k) for k in MINIMAL}
    assert stated == MINIMAL
    assert (spec.architecture, spec.model_channels, spec.channel_mult, spec.num_blocks) == (
        "EDM2",
        192,
        (1, 2, 3, 4),
        3,
    )
    assert (spec.channel_mult_emb, spec.channel_mult_noise, spec.attn_resolutions) == (None, None, (16, 8))
    assert (spec.channels_per_head, spec.logvar_channels) == (64, logvar_channels)
    assert type(spec.dropout) is float


def test_head_that_a_generator_states_but_does_not_have_is_not_built() -> None:
    assert networks.spec_of(record("EDM_2_Precond_Generator", logvar_channels=32)).logvar_channels == 0


def test_weights_of_a_hooked_snapshot_are_normalised_once_and_others_are_not() -> None:
    for name in ("sida_gen_edm2_gan_forcenorm", "sid_gen_edm2_nogan"):
        path = golden(f"networks/{name}.pkl")
        loaded = networks.read_network(path).state_dict()
        stored = pickles.state_dict(pickles.read(path)["ema"])
        is_hooked = name == "sida_gen_edm2_gan_forcenorm"
        for key, weight in stored.items():
            expected = weight
            if is_hooked and weight.ndim > 1:
                rms = weight.square().mean(dim=tuple(range(1, weight.ndim)), keepdim=True).sqrt()
                expected = weight / (1e-4 + rms)
            torch.testing.assert_close(loaded[key], expected, rtol=1e-6, atol=0)


def test_half_precision_weights_become_float32_without_change() -> None:
    path = golden("networks/edm2_cond_logvar.pkl")
    stored = pickles.state_dict(pickles.read(path)["ema"])
    loaded = networks.read_network(path).state_dict()
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert all(torch.equal(loaded[key], tensor.to(torch.float32)) for key, tensor in stored.items())


@pytest.mark.parametrize(
    ("class_name", "options", "text"),
    [
        ("Other", {}, "networks of class Other are not supported. Those of EDM, EDM2, SiD and SiDA are."),
        (
            "VPPrecond",
            {},
            "networks of class VPPrecond (EDM's --precond other than edm) are not supported: they take inputs and "
            "noise levels scaled as VP, VE or iDDPM does. Give one that was trained with --precond=edm, as the "
            "published teachers were.",
        ),
        (
            "EDMPrecond",
            {"model_type": "VGG"},
            "networks of type VGG are not supported. SongUNet and DhariwalUNet are.",
        ),
    ],
)
def test_network_of_another_kind_is_one_line(class_name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(SidaError) as error:
        networks.spec_of(record(class_name, **options))
    assert str(error.value) == text


def test_option_that_is_not_known_is_refused_by_its_name() -> None:
    with pytest.raises(SidaError, match=r"^unknown NetSpec field 'more_balance'\. "):
        networks.spec_of(record("Precond", more_balance=0.5))


def test_balances_limit_and_noise_levels_of_a_checkpoint_are_read_and_stored_where_they_are_not_the_usual() -> None:
    options = {"res_balance": 0.5, "attn_balance": 0.2, "clip_act": None}
    spec = networks.spec_of(record("Precond", **options))
    assert {name: getattr(spec, name) for name in options} == options
    assert NetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    usual = networks.spec_of(record("Precond", res_balance=0.3, attn_balance=0.3, clip_act=256))
    assert usual == networks.spec_of(record("Precond"))
    assert not {*options, "sigma_min", "sigma_max"} & set(usual.to_json())
    levels = {"model_type": "SongUNet", "sigma_min": 0.01, "sigma_max": 50}
    bounded = networks.spec_of(record("EDMPrecond", **levels))
    assert (bounded.sigma_min, bounded.sigma_max) == (0.01, 50)
    with pytest.raises(SidaError, match=r"^sigma_max must be above sigma_min, 2, got 1\.0\. "):
        networks.spec_of(record("EDMPrecond", **levels | {"sigma_min": 2, "sigma_max": 1}))


def test_weights_that_do_not_fit_are_listed_first_five_then_counted() -> None:
    net = networks.read_network(golden("networks/edm2_cond_logvar_traj.pkl"))
    state = net.state_dict()
    kept = {k: v for k, v in state.items() if "logvar" not in k} | {"a": torch.zeros(1), "b": torch.zeros(1)}
    kept["unet.out_conv.weight"] = torch.zeros(1)
    with pytest.raises(SidaError) as error:
        networks.load_weights(net, kept)
    assert str(error.value) == (
        "the weights do not fit the network: "
        "3 missing (logvar_fourier.freqs, logvar_fourier.phases, logvar_linear.weight); 2 unexpected (a, b); "
        "1 of another shape (unet.out_conv.weight). "
        "Check that the file holds the network that its settings describe."
    )
    with pytest.raises(SidaError) as error:
        networks.load_weights(net, {})
    names = ", ".join(list(state)[:5])
    assert str(error.value).startswith(f"the weights do not fit the network: {len(state)} missing ({names}, ...). ")


def test_file_without_a_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of(pickles.read, lambda path: {"loss_fn": 1}, monkeypatch)
    with pytest.raises(SidaError) as error:
        networks.read_network(tmp_path / "x.pkl")
    assert str(error.value) == (
        f"{tmp_path / 'x.pkl'} holds no network named 'ema'. Give a snapshot that EDM, SiD or SiDA published."
    )


def test_head_can_be_dropped_and_what_is_left_denoises_alike() -> None:
    net = networks.read_network(golden("networks/edm2_cond_logvar_traj.pkl"))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = net(x, 1.5)
    for _ in range(2):
        drop_logvar_(net)
    assert torch.equal(net(x, 1.5), before)
    assert not [key for key in net.state_dict() if "logvar" in key]
    with pytest.raises(SidaError):
        net.logvar(1.0)
