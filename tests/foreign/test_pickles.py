"""Published pickles are read to the bit; hostile and damaged ones are refused in one line, with nothing executed."""

import ast
import io
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import sidactl
from sidactl.cli import main
from sidactl.errors import SidaError
from sidactl.foreign import pickles
from sidactl.foreign.records import Hook, Record
from tests.golden import golden, golden_metrics

PUBLISHER = "Nothing was executed. Get the file from its publisher, or export it as safetensors there."
NOT_LISTED = "which is not on the list of what a network file may contain"
DAMAGED = "damaged or not a network pickle (protocol 2 to 5) at byte"
HOOK = "_apply_forced_weight_normalization"

lit = []  # what a pickle that gets executed would add to


def burn(*_: object) -> dict[str, int]:
    lit.append("burnt")
    return {}


@pytest.fixture(autouse=True)
def _nothing_burns() -> Iterator[None]:
    lit.clear()
    yield
    assert not lit, "a pickle was executed"


# ---- golden files ----

EDM = ["edm_ddpmpp_uncond", "edm_ddpmpp_cond_aug9", "edm_ddpmpp_gray_traj", "edm_ncsnpp_uncond", "edm_adm_cond"]
EDM2 = ["edm2_cond_logvar", "edm2_cond_logvar_traj", "edm2_uncond_rgb", "edm2_gray_defaulthead", "edm2_guide_uncond"]
SIDA = ["sida_gen_edm", "sid_v1_gen_edm", "sida_gen_edm2_gan_forcenorm", "sid_gen_edm2_nogan"]
CONFIGS = [("edm", name) for name in EDM] + [("edm2", name) for name in EDM2] + [("sida", name) for name in SIDA]


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))  # tuples as lists


def _parameters(record: Record) -> Iterator[torch.Tensor]:
    yield from (p for p in record.state["_parameters"].values() if p is not None)
    for child in record.state["_modules"].values():
        yield from _parameters(child)


@pytest.mark.parametrize(("family", "name"), CONFIGS)
def test_golden_network_has_published_class_and_init_kwargs(family: str, name: str) -> None:
    config = json.loads(golden(f"networks/configs_{family}.json").read_text())[name]
    net = pickles.read(golden(f"networks/{name}.pkl"))["ema"]
    assert net.class_name == config["class_name"]
    assert net.init_args == ()
    assert _plain(net.init_kwargs) == config["init_kwargs"]
    assert net.forced_normalization_hook == (name == "sida_gen_edm2_gan_forcenorm")
    if "num_params" in config:
        assert sum(p.numel() for p in _parameters(net)) == config["num_params"]
    if "stored_dtype" in config:
        assert {str(t.dtype) for t in pickles.state_dict(net).values()} == {config["stored_dtype"]}


def _itemsize(stream: bytes) -> int:
    return 2 if b"HalfStorage" in stream else 4


@pytest.mark.parametrize("name", EDM + EDM2 + SIDA)
def test_golden_tensors_hold_the_stored_bytes(name: str) -> None:
    path = golden(f"networks/{name}.pkl")
    tensors = pickles.state_dict(pickles.read(path)["ema"]).values()
    streams = [arg for _, arg, _ in pickletools.genops(path.read_bytes()) if isinstance(arg, bytes) and len(arg) > 250]
    kept = [t.numpy().tobytes() for t in tensors]
    assert len(kept) == len(streams)
    for raw in kept:
        stream = next(s for s in streams if s.endswith(struct.pack("<q", len(raw) // _itemsize(s)) + raw))
        streams.remove(stream)


@pytest.mark.parametrize(
    ("name", "trajectory"),
    [("edm_ddpmpp_gray_traj", "edm_sid_fresh_start"), ("edm2_cond_logvar_traj", "edm2_sida_logvar_forcenorm")],
)
def test_golden_state_dict_has_published_names_in_order(name: str, trajectory: str) -> None:
    names = json.loads(golden(f"trajectory/{trajectory}.json").read_text())["tolerance"]["psi"]["names"]
    state = pickles.state_dict(pickles.read(golden(f"networks/{name}.pkl"))["ema"])
    assert [key for key in state if not key.endswith("resample_filter")] == names


@pytest.mark.parametrize("name", ["edm_ddpmpp_gray_traj", "edm2_cond_logvar_traj"])
def test_golden_training_file_holds_plain_companions(name: str) -> None:
    data = pickles.read(golden(f"networks/{name}.pkl"))
    assert type(data["dataset_kwargs"]) is dict
    assert data["loss_fn"].class_name in ("EDMLoss", "EDM2Loss")
    assert pickles.state_dict(data["loss_fn"]) == {}
    if "encoder" in data:
        assert data["encoder"].class_name == "StabilityVAEEncoder"
        assert data["encoder"].state["scale"].dtype == np.float32
        np.testing.assert_allclose(data["encoder"].state["scale"], 0.5 / np.array([4.17, 4.62, 3.71, 3.28]), rtol=1e-6)


@pytest.mark.parametrize("name", ["ref_edm2.pkl", "ref_edm2_numpy1_paths.pkl"])
def test_golden_statistics_equal_the_npz(name: str) -> None:
    stats = pickles.read(golden_metrics(f"stats_formats/{name}"))
    with np.load(golden_metrics("stats_formats/ref_edm.npz"), allow_pickle=False) as reference:
        for key in ("mu", "sigma"):
            np.testing.assert_array_equal(stats["fid"][key], reference[key], strict=True)
    assert stats["num_images"] == 80
    assert stats["fd_dinov2"]["sigma"].shape == (6, 6)


@pytest.mark.parametrize("name", EDM + EDM2 + SIDA)
def test_an_outline_is_the_network_without_its_weights(name: str) -> None:
    path = golden(f"networks/{name}.pkl")
    net, outline = pickles.read(path)["ema"], pickles.outline(path)["ema"]
    assert (outline.class_name, outline.init_kwargs) == (net.class_name, net.init_kwargs)
    shapes = {key: (str(t.dtype), tuple(t.shape)) for key, t in pickles.state_dict(net).items()}
    assert {key: (f"torch.{t.dtype}", t.shape) for key, t in pickles.state_dict(outline).items()} == shapes
    assert [part.class_name for _, part in pickles.parts(outline)] == [
        part.class_name for _, part in pickles.parts(net)
    ]


def test_a_look_needs_no_torch_and_says_what_a_file_holds() -> None:
    path = golden("networks/edm_adm_cond.pkl")
    script = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    script = f"{script}; from sidactl.cli import main; main(['look', {str(path)!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    net = pickles.read(path)["ema"]
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, lines.pop()) == (0, "", "False")
    state = pickles.state_dict(net)
    assert lines[0] == f"ema: EDMPrecond, {len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers"
    assert "  option   model_type: DhariwalUNet" in lines
    for name, tensor in state.items():
        assert f"  tensor   {name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" in lines


def test_a_look_at_safetensors_and_at_statistics(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file({"a.b": torch.zeros(2, 3)}, path, {"made by": "us"})
    tensors = [{"name": "a.b", "dtype": "F32", "shape": [2, 3]}]
    assert sidactl.look(path) == {"format": "safetensors", "metadata": {"made by": "us"}, "tensors": tensors}
    held = sidactl.look(golden_metrics("stats_formats/ref_edm2.pkl"))["contents"]
    assert held["fd_dinov2"]["sigma"] == {"dtype": "float64", "shape": [6, 6]}
    assert held["num_images"] == 80
    (tmp_path / "twins.pkl").write_bytes(pickle.dumps({"of": {1: 2, "1": 3}}, protocol=4))
    assert sidactl.look(tmp_path / "twins.pkl")["contents"] == {"of": [[1, 2], ["1", 3]]}


@pytest.mark.parametrize("told", [{"tensors": 5}, {"class": "Net", "tensors": [7]}, {1: 2, "1": 3}])
def test_a_look_takes_no_dict_for_a_network(tmp_path: Path, told: dict[Any, Any], capsys: Any) -> None:
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps({"of": told}, protocol=4))
    with pytest.raises(SystemExit) as ended:
        main(["look", str(tmp_path / "odd.pkl")])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"of: {json.dumps([list(item) for item in told.items()])}\n"


def test_a_look_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SidaError, match="neither a pickle"):
        sidactl.look(tmp_path / "text")
    with pytest.raises(SidaError, match="must be a file, got a folder"):
        sidactl.look(tmp_path)
    with pytest.raises(SidaError, match="no such file"):
        sidactl.look(tmp_path / "gone")
    (tmp_path / "calls.pkl").write_bytes(pickle.dumps({"ema": burn}, protocol=4))
    with pytest.raises(SidaError, match=NOT_LISTED):
        sidactl.look(tmp_path / "calls.pkl")


# ---- a small published file, made here ----


class Persistent:
    """Pickles as a persistent object of the published format does."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.class_name, self.state, self.version, self.type = class_name, state, 6, "class"

    def _apply_forced_weight_normalization(self) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        source = "raise SystemExit('module source was executed')"
        meta = {"type": self.type, "version": self.version, "module_src": source}
        meta |= {"class_name": self.class_name, "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@pytest.fixture(scope="module", autouse=True)
def _published_modules() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install_published_modules(patch.setitem)
        yield


def install_published_modules(setitem: Any) -> None:
    def _reconstruct_persistent_obj(meta: object) -> dict[str, int]:
        return burn(meta)

    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = (
        persistence.__name__,
        "_reconstruct_persistent_obj",
    )
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = type("EasyDict", (dict,), {"__module__": util.__name__})
    for module in (persistence, util, types.ModuleType("torch_utils"), types.ModuleType("dnnlib")):
        setitem(sys.modules, module.__name__, module)


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
]
DTYPES += [torch.int64, torch.bool]


def values(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-3, 3).reshape(2, 3).to(dtype)


def published(protocol: int = 4, hooked: bool = False) -> bytes:
    """A file with every kind of value that published files hold."""
    buffers = {str(dtype): values(dtype) for dtype in DTYPES}
    grid = values(torch.float32).expand(2, 3)
    layer = Persistent(
        "Layer",
        _init_args=(3,),
        _init_kwargs={"kernel": [3, 3]},
        _parameters=OrderedDict(weight=torch.nn.Parameter(grid.half()), bias=None),
        _buffers={"view": torch.arange(12.0).reshape(3, 4).t()[1:, 1:], "empty": torch.empty(0, 4), "none": None},
        _modules={},
        _forward_pre_hooks=OrderedDict(),
        _non_persistent_buffers_set={"view"},
    )
    if hooked:
        shadow = Persistent("Layer", _parameters={}, training=True)
        layer.state["_forward_pre_hooks"][489] = shadow._apply_forced_weight_normalization
    blocks = torch.nn.ModuleDict()
    blocks._modules["8x8_conv"] = layer
    net = Persistent(
        "Net",
        _init_args=(),
        _init_kwargs=sys.modules["dnnlib.util"].EasyDict(label_dim=10, dropout=0.1, deep=(1, 2, 3, 4), use_fp16=False),
        _parameters={},
        _buffers=buffers,
        _modules={"enc": blocks, "head": None},
        skip_scale=np.float64(0.5) ** 0.5,
        seed=1 << 40,
        minus=-70_000,
        table=np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        flags=np.array([True, False]),
    )
    net.state["table_again"] = net.state["table"]
    return pickle.dumps({"ema": net, "num_images": 80, "loss_fn": None}, protocol)


@pytest.fixture
def reading(tmp_path: Path) -> Any:
    def read(data: bytes) -> dict[str, Any]:
        path = tmp_path / "file.pkl"
        path.write_bytes(data)
        return pickles.read(path)

    return read


def refusal(reading: Any, data: bytes) -> str:
    """The one line that a file is refused with, without its path."""
    with pytest.raises(SidaError) as caught:
        reading(data)
    text = str(caught.value)
    assert text.isprintable()
    assert text.isascii()
    assert len(text) < 600
    return text.split("file.pkl: ", 1)[1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_value_is_read_exactly(reading: Any, protocol: int) -> None:
    if protocol == 2:  # has no bytes: they are written as a call of _codecs.encode
        assert refusal(reading, published(2)).startswith(f"refused, the pickle names _codecs.encode, {NOT_LISTED}. ")
        return
    data = reading(published(protocol))
    net = data["ema"]
    assert (data["num_images"], data["loss_fn"]) == (80, None)
    assert (net.class_name, net.init_args) == ("Net", ())
    assert net.init_kwargs == {"label_dim": 10, "dropout": 0.1, "deep": (1, 2, 3, 4), "use_fp16": False}
    assert (net.state["skip_scale"], type(net.state["skip_scale"])) == (0.5**0.5, float)
    assert (net.state["seed"], net.state["minus"]) == (1 << 40, -70_000)
    np.testing.assert_array_equal(net.state["table"], np.arange(6, dtype=np.float32).reshape(2, 3), strict=True)
    assert net.state["table"].flags.writeable
    assert net.state["table_again"] is net.state["table"]
    np.testing.assert_array_equal(net.state["flags"], np.array([True, False]), strict=True)
    state = pickles.state_dict(net)
    prefix = "enc.8x8_conv"
    assert list(state) == [str(dtype) for dtype in DTYPES] + [f"{prefix}.weight", f"{prefix}.view", f"{prefix}.empty"]
    for dtype in DTYPES:
        assert state[str(dtype)].dtype == dtype
        assert torch.equal(state[str(dtype)], values(dtype))
    assert torch.equal(state[f"{prefix}.weight"], values(torch.float16))
    assert not state[f"{prefix}.weight"].requires_grad
    assert torch.equal(state[f"{prefix}.view"], torch.arange(12.0).reshape(3, 4).t()[1:, 1:])
    assert state[f"{prefix}.empty"].shape == (0, 4)
    layer = net.state["_modules"]["enc"].state["_modules"]["8x8_conv"]
    assert (layer.init_args, layer.state["_non_persistent_buffers_set"]) == ((3,), {"view"})


def test_normalisation_hook_leaves_a_mark_that_cannot_be_called(reading: Any) -> None:
    assert not reading(published())["ema"].forced_normalization_hook
    net = reading(published(hooked=True))["ema"]
    assert net.forced_normalization_hook
    hooks = net.state["_modules"]["enc"].state["_modules"]["8x8_conv"].state["_forward_pre_hooks"]
    assert hooks == {489: Hook(HOOK)}
    assert not callable(hooks[489])


def test_result_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(published())
    net = pickles.read(path)["ema"]
    path.write_bytes(b"")
    state = pickles.state_dict(net)
    state["torch.float32"].add_(1)
    assert state["torch.float32"].tolist() == [[-2, -1, 0], [1, 2, 3]]


def test_representation_of_a_record_leaves_out_its_weights(reading: Any) -> None:
    assert len(repr(reading(published())["ema"])) < 200


# ---- files that are no network pickles ----


@pytest.mark.parametrize(
    ("data", "byte"),
    [
        (b"", 0),
        (b"PK\x03\x04", 1),
        (b"<html>", 1),
        (b"\x80", 1),
        (b"\x80\x06}.", 2),
        (b"\x80\x01}.", 2),
        (b"\x80\x04}", 3),
    ],
)
def test_other_files_are_refused_with_the_byte(reading: Any, data: bytes, byte: int) -> None:
    assert refusal(reading, data) == f"{DAMAGED} {byte}. Nothing was executed. Download the file again."


@pytest.mark.parametrize("name", ["absent.pkl", "."])
def test_absent_file_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(SidaError) as caught:
        pickles.read(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: no such file"


@pytest.mark.parametrize(
    ("part", "entries", "kind"),
    [("_parameters", {"w": "text"}, "Tensor"), ("_buffers", [1], "Tensor"), ("_modules", {"m": {}}, "Record")],
)
def test_state_dict_of_a_malformed_module_is_refused(part: str, entries: object, kind: str) -> None:
    with pytest.raises(SidaError) as caught:
        pickles.state_dict(Record("Net", state={part: entries}))
    assert str(caught.value) == f"{part} of Net must hold {kind}s by name"


def test_names_from_the_file_are_fit_to_print(reading: Any) -> None:
    net = Persistent("Net\n\x1b[2J", _parameters={"w\n\x1b" * 99: torch.zeros(1), 7: torch.zeros(1)})
    record = reading(pickle.dumps({"ema": net}, 4))["ema"]
    assert record.class_name == r"Net\n\x1b[2J"
    assert all(name.isprintable() and len(name) < 500 for name in pickles.state_dict(record))


# ---- hostile files ----

P = b"\x80\x04"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(full: str) -> bytes:
    """A global, given as module:name."""
    module, _, attribute = full.partition(":")
    return text(module) + text(attribute) + b"\x93"


def raw(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def mapping(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def stream(
    *,
    kind: bytes = b"ctorch\nFloatStorage\n",
    numel: int = 4,
    data: bytes = bytes(16),
    count: int | None = None,
    metadata: bytes = b"N",
    little: bytes = b"\x88",
    keys: bytes = b"]" + text("0") + b"a",
    magic: bytes = bytes.fromhex("8a0a6cfc9c46f9206aa85019"),
) -> bytes:
    """A nested torch.save stream."""
    declared = (
        b"(" + text("storage") + kind + text("0") + text("cpu") + b"J" + struct.pack("<i", numel) + metadata + b"tQ"
    )
    system = b"}" + text("little_endian") + little + b"s"
    parts = b"".join(b"\x80\x02" + part + b"." for part in (magic, b"M\xe9\x03", system, declared, keys))
    return parts + struct.pack("<q", numel if count is None else count) + data


def load(data: bytes) -> bytes:
    return name("torch.storage:_load_from_bytes") + raw(data) + b"\x85R"


def ints(numbers: tuple[int, ...]) -> bytes:
    encoded = [n.to_bytes(9, "little", signed=True) for n in numbers]
    return b"(" + b"".join(b"\x8a\x09" + e for e in encoded) + b"t"


def tensor(storage: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    arguments = b"(" + storage + ints((offset,))[1:-1] + ints(size) + ints(stride) + b"\x89}t"
    return name("torch._utils:_rebuild_tensor_v2") + arguments + b"R"


def dtype(code: str, order: str = "<", extra: bytes = b"NNN") -> bytes:
    state = b"(K\x03" + text(order) + extra + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    return name("numpy:dtype") + text(code) + b"\x89\x88\x87R" + state + b"b"


def array(shape: tuple[int, ...], kind: bytes, data: bytes) -> bytes:
    start = name("numpy.core.multiarray:_reconstruct") + name("numpy:ndarray") + b"K\x00\x85" + raw(b"b") + b"\x87R"
    return start + b"(K\x01" + ints(shape) + kind + b"\x89" + raw(data) + b"tb"


def record(state: bytes = b"}", version: bytes = b"K\x06", kind: str = "class") -> bytes:
    meta = (
        text("type") + text(kind) + text("version") + version + text("class_name") + text("Net") + text("state") + state
    )
    return name("torch_utils.persistence:_reconstruct_persistent_obj") + mapping(meta) + b"\x85R"


def evil(function: str = f"{__name__}:burn") -> bytes:
    return name(function) + b")R"


def holding(value: bytes) -> bytes:
    """A pickle of {'ema': value}."""
    return P + mapping(text("ema") + value) + b"."


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return burn, ()


class Loaded:
    """Pickles with a state that a careless BUILD would apply."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"__class__": Evil, "__setstate__": burn}


HERE = __name__.encode()
BURN = f"the pickle names {__name__}.burn, {NOT_LISTED}"
ARGUMENTS = "has arguments here that it has in no network file"
STATE = "it sets a state that no network file sets"
DICT, LIST = name("collections:OrderedDict") + b")R", b"]"
GLOBALS = [
    "os:system",
    "posix:system",
    "nt:system",
    "builtins:eval",
    "builtins:exec",
    "builtins:__import__",
    "builtins:setattr",
    "builtins:getattr.__self__",
    "subprocess:Popen",
    "importlib:import_module",
    "copyreg:_reconstructor",
    "operator:attrgetter",
    "functools:partial",
    "types:FunctionType",
    "torch:load",
    "torch:FloatStorage",
    "torch.storage:_load_from_bytes.__globals__",
    "torch_utils.persistence:_module_to_src",
    "collections:OrderedDict.__init__",
    "numpy:load",
    "numpy:fromfile",
    "numpy._core.multiarray:fromfile",
    "numpy:f2py.diagnose.run",
    "dnnlib.util:open_url",
]


def corpus() -> dict[str, tuple[bytes, str]]:
    """Hostile pickles by name, each with what its refusal must say."""
    files = {
        f"global {full}": (holding(evil(full)), f"the pickle names {full.replace(':', '.')}, ") for full in GLOBALS
    }
    files |= {f"protocol {n}": (pickle.dumps({"ema": Evil()}, n), BURN if n > 1 else DAMAGED) for n in range(6)}
    files |= {f"state, protocol {n}": (pickle.dumps({"ema": Loaded()}, n), f"{__name__}.Evil") for n in range(2, 6)}
    opcode = "the pickle uses the opcode {}, which no network file uses".format
    doubling = b")" + b"".join(b"\x94h%c\x86" % i for i in range(100))
    nested = b"c%b\nburn\n)R" % HERE
    many = 1_000_000
    # calls, each way that the pickle machine has
    files |= {
        "global opcode": (holding(b"c%b\nburn\n)R" % HERE), BURN),
        "inst": (holding(b"(i%b\nburn\n" % HERE), opcode("INST")),
        "obj": (holding(b"(" + name("collections:OrderedDict") + b"o"), opcode("OBJ")),
        "obj of an evil global": (holding(b"(c%b\nburn\no" % HERE), BURN),
        "newobj": (
            holding(name(f"{__name__}:Evil") + b")\x81"),
            f"{__name__}.Evil, {NOT_LISTED}",
        ),
        "newobj with arguments": (holding(name("collections:OrderedDict") + b"K\x01\x85\x81"), ARGUMENTS),
        "newobj_ex": (holding(name("collections:OrderedDict") + b")}\x92"), opcode("NEWOBJ_EX")),
        "ext1": (holding(b"\x82\x01)R"), opcode("EXT1")),
        "ext2": (holding(b"\x83\x01\x00)R"), opcode("EXT2")),
        "ext4": (holding(b"\x84\x01\x00\x00\x00)R"), opcode("EXT4")),
        "persid": (holding(b"Pburn\n"), opcode("PERSID")),
        "binpersid": (holding(text("burn") + b"Q"), opcode("BINPERSID")),
        "next_buffer": (holding(b"\x97"), opcode("NEXT_BUFFER")),
        "readonly_buffer": (holding(b"C\x00\x98"), opcode("READONLY_BUFFER")),
        "reduce of a text": (holding(text("os.system") + b")R"), DAMAGED),
        "reduce of a record": (holding(record() + b")R"), DAMAGED),
        "reduce of a hook": (holding(name("builtins:getattr") + record() + text(HOOK) + b"\x86R)R"), DAMAGED),
        "reduce with a list": (holding(name("collections:OrderedDict") + b"]R"), DAMAGED),
        "reduce of a class": (holding(name("numpy:ndarray") + b")R"), ARGUMENTS),
        "getattr of a text": (holding(name("builtins:getattr") + text("") + text("__class__") + b"\x86R"), ARGUMENTS),
        "getattr of a global": (
            holding(name("builtins:getattr") + name("numpy:dtype") + text(HOOK) + b"\x86R"),
            ARGUMENTS,
        ),
        "getattr of another name": (
            holding(name("builtins:getattr") + record() + text("__init__") + b"\x86R"),
            ARGUMENTS,
        ),
        "global with a list as name": (holding(b"]]\x93"), DAMAGED),
        "global with a record as module": (holding(record() + text("state") + b"\x93"), DAMAGED),
        "global without end": (holding(b"cos" + b"s" * 400), DAMAGED),
        "global with escapes": (holding(evil("os\n\x1b[2J:system")), r"the pickle names os\n\x1b[2J.system, "),
        "global with a long name": (holding(evil("os:" + "x" * 100_000)), "the pickle names os.xxxxx"),
    }
    # states
    files |= {
        "setstate": (holding(record() + mapping(text("__setstate__") + DICT) + b"b"), STATE),
        "class in a state": (holding(DICT + mapping(text("__class__") + name("numpy:ndarray")) + b"b"), STATE),
        "slots": (holding(DICT + b"N" + mapping(text("__class__") + b"N") + b"\x86b"), STATE),
        "state of a list": (holding(LIST + b"}b"), STATE),
        "state of a global": (holding(name("builtins:getattr") + mapping(text("__call__") + b"N") + b"b"), STATE),
        "state of a tensor": (holding(tensor(load(stream()), (4,), (1,)) + b"}b"), STATE),
        "second state": (
            holding(name("torch.nn.modules.container:ModuleDict") + b")R" + mapping(text("a") + b"N") + b"b}b"),
            STATE,
        ),
        "persistent function": (holding(record(kind="func")), DAMAGED),
        "persistence format 7": (holding(record(version=b"K\x07")), "its persistence format is not version 6"),
        "tensor as a version": (holding(record(version=tensor(load(stream()), (4,), (1,)))), DAMAGED),
        "list as init_args": (holding(record(mapping(text("_init_args") + b"]"))), DAMAGED),
    }
    # nested streams
    files |= {
        "nested kind": (holding(load(stream(kind=nested))), BURN),
        "nested magic": (holding(load(stream(magic=nested))), BURN),
        "nested system": (holding(load(stream(little=nested))), BURN),
        "nested keys": (holding(load(stream(keys=nested))), BURN),
        "nested metadata": (holding(load(stream(metadata=nested))), BURN),
        "nested call": (holding(load(stream(kind=b"ctorch\nFloatStorage\n)R"))), f"torch.FloatStorage {ARGUMENTS}"),
        "nested nesting": (
            holding(load(stream(metadata=load(stream())))),
            "torch.storage._load_from_bytes, which is not",
        ),
        "nested getattr": (holding(load(stream(kind=name("builtins:getattr")))), "the pickle names builtins.getattr, "),
        "nested other class": (holding(load(stream(kind=b"ctorch\nTensor\n"))), "the pickle names torch.Tensor, "),
        "nested ext": (holding(load(stream(magic=b"\x82\x01"))), opcode("EXT1")),
        "nested persid": (holding(load(stream(magic=b"P1\n"))), opcode("PERSID")),
        "big endian": (holding(load(stream(little=b"\x89"))), "it was not written on a little-endian machine"),
        "view of a storage": (holding(load(stream(metadata=b")"))), DAMAGED),
        "storage beyond its stream": (holding(load(stream(numel=1 << 30, count=1 << 30))), DAMAGED),
        "negative storage": (holding(load(stream(numel=-4, count=-4, data=b""))), DAMAGED),
        "storage of two sizes": (holding(load(stream(numel=3, count=4))), DAMAGED),
        "bytes after a storage": (holding(load(stream(data=bytes(20)))), DAMAGED),
        "other key": (holding(load(stream(keys=b"]" + text("1") + b"a"))), DAMAGED),
        "zip checkpoint": (holding(load(b"PK\x03\x04" + bytes(100))), DAMAGED),
        "load of a text": (holding(name("torch.storage:_load_from_bytes") + text("x") + b"\x85R"), ARGUMENTS),
        "bare storage": (holding(load(stream())), "it leaves raw bytes or a bare name"),
    }
    # tensors and arrays
    files |= {
        "tensor too large": (holding(tensor(load(stream()), (1 << 40,), (0,))), DAMAGED),
        "tensor expanded": (holding(tensor(load(stream()), (8,), (0,))), DAMAGED),
        "tensor past the end": (holding(tensor(load(stream()), (2, 2), (3, 1))), DAMAGED),
        "tensor offset": (holding(tensor(load(stream()), (4,), (1,), 1)), DAMAGED),
        "tensor negative stride": (holding(tensor(load(stream()), (4,), (-1,), 3)), DAMAGED),
        "tensor negative offset": (holding(tensor(load(stream()), (4,), (1,), -1)), DAMAGED),
        "tensor negative size": (holding(tensor(load(stream()), (-4, -1), (1, 1))), DAMAGED),
        "tensor of many dimensions": (holding(tensor(load(stream()), (1,) * 9, (1,) * 9)), DAMAGED),
        "tensor strides missing": (holding(tensor(load(stream()), (2, 2), (1,))), DAMAGED),
        "tensor without a storage": (holding(tensor(b"]", (4,), (1,))), ARGUMENTS),
        "object array": (holding(array((1,), dtype("O8", "|"), bytes(8))), f"numpy.dtype {ARGUMENTS}"),
        "record dtype": (holding(array((1,), dtype("V8", "|"), bytes(8))), f"numpy.dtype {ARGUMENTS}"),
        "dtype with fields": (holding(array((1,), dtype("f8", "|", b"N)}"), bytes(8))), STATE),
        "big-endian array": (holding(array((1,), dtype("f8", ">"), bytes(8))), STATE),
        "array of another size": (holding(array((3,), dtype("f8"), bytes(8))), DAMAGED),
        "huge array": (holding(array((1 << 62, 0), dtype("f8"), b"")), DAMAGED),
        "negative array": (holding(array((-1, -1), dtype("f8"), bytes(8))), DAMAGED),
        "scalar of two": (
            holding(name("numpy.core.multiarray:scalar") + dtype("f8") + raw(bytes(16)) + b"\x86R"),
            DAMAGED,
        ),
        "bare dtype": (holding(dtype("f8")), "it leaves raw bytes or a bare name"),
    }
    # lengths that lie, and bombs
    files |= {
        "bytes8 length": (holding(b"\x8e" + struct.pack("<Q", 1 << 62)), DAMAGED),
        "bytearray length": (holding(b"\x96" + struct.pack("<Q", 1 << 40)), DAMAGED),
        "bytes length": (holding(b"B\xff\xff\xff\x7f"), DAMAGED),
        "text length": (holding(b"\x8d" + struct.pack("<Q", 1 << 62)), f"it has a text of {1 << 62} bytes"),
        "text no utf-8": (holding(b"\x8c\x02\xff\xfe"), DAMAGED),
        "long text": (holding(text("x" * (1 << 21))), f"it has a text of {1 << 21} bytes"),
        "long4": (holding(b"\x8b\xff\xff\xff\x7f"), opcode("LONG4")),
        "frame length": (P + b"\x95" + struct.pack("<Q", 1 << 62) + b"}.", DAMAGED),
        "protocol in the middle": (holding(P + b"}"), opcode("PROTO")),
        "digits": (holding(b"L" + b"9" * 100_000 + b"L\n"), opcode("LONG")),
        "dup": (holding(b"]" + b"2" * 1000 + b"e"), opcode("DUP")),
        "get of nothing": (holding(b"h\x05"), DAMAGED),
        "no such opcode": (holding(b"\xff"), DAMAGED),
        "pop below a mark": (P + b"}}(\x86.", DAMAGED),
        "open mark": (P + b"(}.", DAMAGED),
        "two values": (P + b"}}.", DAMAGED),
        "no value": (P + b".", DAMAGED),
        "bytes after the end": (P + b"}.}.", DAMAGED),
        "half an item": (P + b"}(" + text("a") + b"u.", DAMAGED),
        "list at the top": (P + b"].", "it does not hold named networks or statistics"),
        "number as a name": (P + mapping(b"K\x01N") + b".", "it does not hold named networks or statistics"),
        "bare bytes": (holding(raw(b"x")), "it leaves raw bytes or a bare name"),
        "bare name": (holding(name("builtins:getattr")), "it leaves raw bytes or a bare name"),
        "sets": (P + b"\x8f" * many + b".", "it has more than 500000 opcodes"),
        "marks": (P + b"(" * many + b".", "it has more than 500000 opcodes"),
        "memo": (P + b"]" + b"\x94" * many + b".", "it has more than 500000 opcodes"),
        "deep tuple": (holding(b")" + b"\x85" * 400_000), "it is nested more than 100 levels deep"),
        "deep lists": (holding(b"]" * 200_000 + b"a" * 199_999), "it is nested more than 100 levels deep"),
        "deep records": (holding(record() + b"\x85" * 200), "it is nested more than 100 levels deep"),
        "list in itself": (holding(b"]\x94h\x00a"), "it is nested more than 100 levels deep or contains itself"),
        "dict in itself": (
            P + b"}\x94" + text("a") + b"h\x00s.",
            "it is nested more than 100 levels deep or contains itself",
        ),
        "record in itself": (holding(record(b"}\x94" + text("a") + b"h\x00s")), "levels deep or contains itself"),
        "doubling": (holding(doubling), "it amounts to more than 500000 values"),
        "doubling as a key": (P + b"}" + doubling + b"Ns.", DAMAGED),
        "doubling in a set": (holding(b"\x8f(" + doubling + b"\x90"), DAMAGED),
        "wide sharing": (
            holding(b"](" + b"N" * 10_000 + b"e\x94(" + b"h\x00" * 10_000 + b"t\x86"),
            "more than 500000 values",
        ),
        "keys of one hash": (holding(mapping(b"".join(_colliding_keys(100_000)))), DAMAGED),
        "one storage many times": (holding(_storage_many_times()), "its tensors are larger than the file"),
        "one tensor many times": (holding(_tensor_many_times()), "its tensors are larger than the file"),
        "one array many times": (holding(_array_many_times()), "its tensors are larger than the file"),
    }
    return files


def _colliding_keys(count: int) -> Iterator[bytes]:
    for i in range(1, count + 1):
        yield b"\x8a\x0a" + (i * ((1 << 61) - 1)).to_bytes(10, "little") + b"N"


def _storage_many_times() -> bytes:
    data = raw(stream(numel=250_000, data=bytes(1_000_000)))
    return name("torch.storage:_load_from_bytes") + b"\x94" + data + b"\x85\x94(" + b"h\x00h\x01R" * 5_000 + b"t\x87"


def _tensor_many_times() -> bytes:
    arguments = (
        b"(" + load(stream(numel=250_000, data=bytes(1_000_000))) + b"K\x00" + ints((250_000,)) + ints((1,)) + b"\x89}t"
    )
    return name("torch._utils:_rebuild_tensor_v2") + b"\x94" + arguments + b"\x94(" + b"h\x00h\x01R" * 5_000 + b"t\x87"


def _array_many_times() -> bytes:
    state = b"(K\x01" + ints((1_000_000,)) + dtype("u1") + b"\x89" + raw(bytes(1_000_000)) + b"t\x94"
    start = name("numpy.core.multiarray:_reconstruct") + name("numpy:ndarray") + b"K\x00\x85" + raw(b"b") + b"\x87R"
    return state + start + b"h\x00b" * 5_000 + b"\x86"


CORPUS = corpus()


def test_corpus_is_live() -> None:
    assert len(CORPUS) > 100
    for live in ("protocol 4", "global opcode", "newobj"):
        pickle.loads(CORPUS[live][0])  # ours: this is what the reader must not do
    pickle.loads(holding(evil()))
    assert lit == ["burnt"] * 3
    lit.clear()


@pytest.mark.parametrize("case", CORPUS)
def test_hostile_pickle_is_refused(reading: Any, case: str) -> None:
    data, expected = CORPUS[case]
    message = refusal(reading, data)
    assert expected in message
    assert message.startswith(DAMAGED if expected == DAMAGED else "refused, ")


def test_refusal_names_the_global_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"ema": Evil()}))
    with pytest.raises(SidaError) as caught:
        pickles.read(path)
    assert str(caught.value) == f"{path}: refused, {BURN}. {PUBLISHER}"


@pytest.mark.parametrize("data", [P + b"}r\xff\xff\xff\xff.", P + b"}\x95" + bytes(8) + b"."])
def test_odd_but_harmless_pickle_is_read(reading: Any, data: bytes) -> None:
    assert reading(data) == {}


# ---- state dicts in torch's own formats ----

FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before the zip"])


def saved(value: object, is_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def some_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    weights: dict[str, torch.Tensor] = net.state_dict()  # with the versions of its modules as an attribute
    base = torch.arange(12.0)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool):
        weights[str(dtype)] = torch.arange(3).to(dtype)
    return weights | {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "transposed": base.reshape(3, 4).t(),
        "of one storage": base[4:8],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@FORMATS
def test_a_state_dict_is_read_as_torch_wrote_it(tmp_path: Path, is_zip: bool) -> None:
    weights, path = some_weights(), tmp_path / "w.pth"
    path.write_bytes(saved(weights, is_zip))
    found = pickles.read_weights(path)
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        assert (found[name].dtype, found[name].is_contiguous()) == (tensor.dtype, True)
        assert torch.equal(found[name], tensor)


@FORMATS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([torch.zeros(1)], "refused, it does not hold tensors by name"),
        ({"a": "text"}, "refused, it does not hold tensors by name"),
        ({"a": {"b": torch.zeros(1)}}, "refused, it does not hold tensors by name"),
        ({"a": torch.nn.Linear(1, 1)}, "refused, the pickle names torch.nn.modules.linear.Linear, " + NOT_LISTED),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "refused, the pickle names torch._utils._rebuild_tensor_v3, "),
        ({"a": torch.eye(2).to_sparse()}, "refused, the pickle names torch._utils._rebuild_sparse_tensor, "),
        ({"a": torch.zeros(2, device="meta")}, "refused, the pickle names torch._utils._rebuild_meta_tensor_no_s"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "refused, the pickle names torch.ComplexFloatStorage, "),
        (
            {"a": torch.zeros(2, dtype=torch.complex64).conj().imag},
            "refused, torch._utils._rebuild_tensor_v2 has arguments here that it has in no network file",
        ),
        ({"a": burn}, f"refused, the pickle names {__name__}.burn, {NOT_LISTED}"),
    ],
    ids=["list", "text", "nested", "module", "float8", "sparse", "meta", "complex", "negated", "function"],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, is_zip: bool, value: object, told: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved(value, is_zip))
    with pytest.raises(SidaError) as caught:
        pickles.read_weights(path)
    assert str(caught.value).startswith(f"{path}: {told}")
    assert str(caught.value).endswith(PUBLISHER)


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "w.pth", saved({"a": torch.zeros(1000)}, True)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def refused(compression: int, changed: dict[str, bytes | None]) -> str:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in (members | changed).items():
                if content is not None:
                    archive.writestr(name, content)
        with pytest.raises(SidaError) as caught:
            pickles.read_weights(path)
        return str(caught.value).removeprefix(f"{path}: ").partition(". ")[0]

    at = "archive/"
    assert refused(zipfile.ZIP_DEFLATED, {}) == "refused, its member byteorder is not stored as torch stores it"
    assert refused(zipfile.ZIP_STORED, {f"{at}byteorder": b"big"}) == (
        "refused, it was not written on a little-endian machine"
    )
    damaged = "damaged or not a state dict of torch at byte 0"
    assert refused(zipfile.ZIP_STORED, {f"{at}data/0": None}) == damaged
    assert refused(zipfile.ZIP_STORED, {f"{at}data/0": b"short"}) == damaged
    assert refused(zipfile.ZIP_STORED, {"other/data/0": b""}) == "refused, two of its members have one name"


@FORMATS
def test_a_damaged_state_dict_is_read_or_refused_and_never_by_torch(
    tmp_path: Path, is_zip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, path = {"a": torch.arange(40.0), "b": torch.arange(3)}, tmp_path / "w.pth"
    whole = saved(weights, is_zip)
    monkeypatch.setattr(torch, "load", burn)
    rng, num_refused = random.Random(17), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        try:
            found = pickles.read_weights(path)
        except SidaError:
            num_refused += 1
        else:
            # The format before the zip has no checksum.
            assert not is_zip or all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert num_refused > len(whole) // 5
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(SidaError):
            pickles.read_weights(path)


RUNNERS = {"torch.load", "torch.jit.load", "torch.hub.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}
RUNNERS |= {"marshal.load", "marshal.loads", "runpy.run_path"}


def test_nothing_in_the_source_runs_what_a_file_says() -> None:
    """torch.jit.load is in one place, behind a digest; there is no other reader of programs."""
    found = []
    for path in sorted(Path(sidactl.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                if ast.unparse(node) in RUNNERS:
                    found.append((path.name, ast.unparse(node)))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("eval", "exec", "compile", "__import__"):
                    found.append((path.name, node.func.id))
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only", "trust_remote_code"):
                value = ast.unparse(node.value)
                if value != "False":
                    found.append((path.name, f"{node.arg}={value}"))
            elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "dill", "cloudpickle"):
                found.append((path.name, f"from {node.module}"))
    assert found == [("detectors.py", "torch.jit.load")]


# ---- damage, and what any of it may cost ----


def mutations(data: bytes, num_prefixes: int, num_flips: int) -> Iterator[bytes]:
    rng = random.Random(2410)
    for _ in range(num_prefixes):
        yield data[: rng.randrange(len(data))]
    for _ in range(num_flips):
        at = rng.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def sweep(files: Iterator[bytes]) -> None:
    """Read each file under a limit of 2 GB beyond what torch takes: it is read or refused, within 5 s, not executed."""
    torch.set_num_threads(1)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (2 << 30), resource.RLIM_INFINITY))
    lit.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pkl"
        for number, data in enumerate(files):
            path.write_bytes(data)
            started = time.process_time()
            refused = ""
            try:
                for value in pickles.read(path).values():
                    if isinstance(value, Record):
                        pickles.state_dict(value)
                        repr(value)
            except SidaError as error:
                refused = str(error)
            assert not refused or refused.isprintable(), f"file {number}: {refused!r}"
            assert time.process_time() - started < 5, f"file {number} took too long"
            assert not lit, f"file {number} was executed"
            assert os.listdir(folder) == ["file.pkl"]


def run_sweep(files: str) -> None:
    script = f"from {__name__} import *; import sys; install_published_modules(dict.__setitem__); sweep({files})"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are Linux's")
def test_hostile_and_damaged_files_cost_little() -> None:
    run_sweep("[*(data for data, _ in CORPUS.values()), *mutations(published(hooked=True), 150, 850)]")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are Linux's")
def test_damaged_golden_network_is_read_or_refused() -> None:
    path = golden("networks/edm2_guide_uncond.pkl")
    run_sweep(f"mutations(Path({str(path)!r}).read_bytes(), 500, 2000)")
