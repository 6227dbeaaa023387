"""Files made to harm, to confuse or to cost: (door, name) -> bytes, or how to make something that is no file."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from tests.hostile.doors import (
    EDM2,
    EVENTS,
    NET,
    cifar,
    described,
    idx,
    layout,
    moments,
    npz,
    picture,
    pth,
    safetensors_net,
    stats_pickle,
    tarred,
    weights,
    zipped,
)

Content = bytes | Callable[[Path], object]
"""bytes, or what makes them, a FIFO, a link or a sparse file at a path"""
Case = tuple[str, str, Content]

ODD_NUMBERS = [-1, 0, 1e308, -0.5, 10**18, 1.5, "x", "", None, True, [], [1], {}, "9" * 5000, "\ud800"]
DEEP = "[" * 900 + "]" * 900
BOMB = bytes(1 << 20)


def net_files() -> Iterator[Case]:
    door = "net.safetensors"
    for field in (*NET, "label_dim", "dropout", "sigma_data", "channel_mult_emb", "resample_filter", "encoder_type"):
        for value in ODD_NUMBERS:
            yield door, f"{field} {str(value)[:12]!a}", safetensors_net(json.dumps(described(NET | {field: value})))
    for field in ("channels_per_head", "logvar_channels", "label_balance", "res_balance", "clip_act", "augment_dim"):
        for value in ODD_NUMBERS:
            yield (
                door,
                f"edm2 {field} {str(value)[:12]!a}",
                safetensors_net(json.dumps(described(EDM2 | {field: value})), weights(json.dumps(EDM2))),
            )
    for field in ("num_steps", "sigma_init"):
        for value in ODD_NUMBERS:
            sampler = {"num_steps": 1, "sigma_init": 2.5} | {field: value}
            yield door, f"sampler {field} {str(value)[:12]!a}", safetensors_net(json.dumps(described(sampler=sampler)))
    for field in ("name", "dataset", "licence", "recipe", "sampler", "net", "source_url"):
        for value in (*ODD_NUMBERS, "\x1b[2J", "a\nb", "../../x", "\u202e", "x" * 100_000):
            told = json.dumps(described(**{field: value}))
            yield door, f"params {field} {str(value)[:12]!a}", safetensors_net(told)
    for told in ("", "{", "NaN", "1e999", DEEP, '{"a":' * 900 + "1" + "}" * 900, "null", "[]", '"\\ud800"', "5" * 5000):
        yield door, f"metadata {told[:12]!a}", safetensors_net(told)
    for kind in (None, 5, "teacher", "detector", [], {}):
        yield door, f"kind {kind}", safetensors_net(json.dumps(described() | {"kind": kind}))
    for name, changed in (
        ("huge", NET | {"model_channels": 20_000, "num_blocks": 10**9}),
        ("many blocks", NET | {"num_blocks": 10**6}),
        ("many levels", NET | {"channel_mult": [1] * 60}),
        ("wide", NET | {"model_channels": 10**6}),
        ("large", NET | {"img_resolution": 1 << 30}),
        ("classes", NET | {"label_dim": 10**12}),
        ("taps", NET | {"resample_filter": [1] * 10**5}),
        ("edm2 huge", EDM2 | {"model_channels": 20_000, "num_blocks": 10**9}),
    ):
        yield door, f"net {name}", safetensors_net(json.dumps(described(changed)))
    state = weights()
    first = next(iter(state))
    for name, tensor in (
        ("nan", torch.full_like(state[first], torch.nan)),
        ("inf", torch.full_like(state[first], torch.inf)),
        ("int", torch.zeros(state[first].shape, dtype=torch.int32)),
        ("bool", torch.zeros(state[first].shape, dtype=torch.bool)),
        ("complex", torch.zeros(state[first].shape, dtype=torch.complex64)),
        ("float8", torch.zeros(state[first].shape).to(torch.float8_e4m3fn)),
        ("bf16", state[first].bfloat16()),
        ("empty", torch.zeros(0)),
        ("scalar", torch.tensor(1.0)),
    ):
        yield door, f"weights {name}", safetensors_net(state=state | {first: tensor})
    yield door, "weights missing", safetensors_net(state={k: v for k, v in state.items() if k != first})
    yield door, "weights more", safetensors_net(state=state | {"x\x1b[2J\n": torch.zeros(1)})
    yield door, "no metadata", safetensors.torch.save(state)
    yield from headers(door)


def headers(door: str) -> Iterator[Case]:
    """Malformed safetensors."""
    for name, header in (
        ("no json", b"{"),
        ("not a dict", b"[]"),
        ("bad offsets", b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999]}}'),
        ("overflow", b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}'),
        ("negative", b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}'),
        ("other dtype", b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}'),
        ("deep", b'{"a":' + DEEP.encode() + b"}"),
    ):
        yield door, f"header {name}", struct.pack("<Q", len(header)) + header + bytes(16)
    yield door, "header length", struct.pack("<Q", 1 << 62) + b"{}"
    yield door, "empty", b""
    yield door, "text", b"version https://git-lfs.github.com/spec/v1\n"


def pickled_nets() -> Iterator[Case]:
    from tests.foreign.test_pickles import CORPUS

    for name, (content, _) in CORPUS.items():
        yield "net.pkl", name, content
    for name, (content, _) in list(CORPUS.items())[::7]:
        yield "stats.pkl", name, content
    for options in OPTIONS:
        yield "net.pkl", f"options {str(options)[:60]!a}", _pickled_net(options)


OPTIONS: list[dict[str, Any]] = (
    [
        {name: value}
        for name in ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "label_dim", "dropout")
        for value in ("x", None, 2.5, -3, 90, 20_000, 10**9, [[1]], (), {"a": 1}, float("nan"))
    ]
    + [{"img_resolution": value} for value in ("8", None, 0, 7, 1 << 40)]
    + [{"model_type": value} for value in (None, 5, "DhariwalUNet", "SongUNet\x1b[2J", ["SongUNet"])]
    + [{"sigma_min": "x"}, {"sigma_max": -1}, {"sigma_data": "a"}, {"unknown\n": 1}, {"resample_filter": [0, 0]}]
)


def _pickled_net(options: dict[str, Any]) -> bytes:
    """A pickle of an EDM network that has these options and hardly any weights."""
    from tests.foreign.test_pickles import P, mapping, name, text

    def value(given: Any) -> bytes:
        match given:
            case None:
                return b"N"
            case bool():
                return b"\x88" if given else b"\x89"
            case int():
                return b"\x8a\x09" + given.to_bytes(9, "little", signed=True)
            case float():
                return b"G" + struct.pack(">d", given)
            case str():
                return text(given)
            case tuple():
                return b"(" + b"".join(map(value, given)) + b"t"
            case list():
                return b"](" + b"".join(map(value, given)) + b"e"
            case dict():
                return mapping(*(text(k) + value(v) for k, v in given.items()))
        raise TypeError(given)

    usual = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 8}
    state = {"_init_args": (), "_init_kwargs": usual | options, "_parameters": {}, "_buffers": {}, "_modules": {}}
    meta = text("type") + text("class") + text("version") + b"K\x06" + text("class_name") + text("EDMPrecond")
    meta += text("state") + value(state)
    made = name("torch_utils.persistence:_reconstruct_persistent_obj") + mapping(meta) + b"\x85R"
    return P + mapping(text("ema") + made) + b"."


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch OVERWRITTEN",)


def weight_files() -> Iterator[Case]:
    values: dict[str, object] = {
        "runs": {"a": _Runs()},
        "list": [torch.zeros(1)],
        "nested": {"a": {"b": torch.zeros(1)}},
        "text": {"a": "x"},
        "numbers": {1: torch.zeros(1)},
        "float8": {"a": torch.zeros(4).to(torch.float8_e4m3fn)},
        "bf16": {"a": torch.zeros(4).bfloat16()},
        "complex": {"a": torch.zeros(4, dtype=torch.complex64)},
        "sparse": {"a": torch.eye(3).to_sparse()},
        "meta": {"a": torch.zeros(3, device="meta")},
        "expanded": {"a": torch.zeros(1).expand(1 << 40)},
        "shared": {str(i): t for i, t in enumerate([torch.zeros(1000)] * 3000)},
        "names": {f"\x1b[2J{i}\n": torch.zeros(1) for i in range(50)},
    }
    for name, value in values.items():
        for is_zip in (True, False):
            yield ("weights.pth" if is_zip else "old.pth"), name, pth(value, is_zip=is_zip)
    sound = pth()
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(members)).partition("/")[0]
    yield "weights.pth", "deflated bomb", zipped(members | {f"{root}/data/0": BOMB * 64})
    yield "weights.pth", "no data.pkl", zipped({"a/b": b""}, zipfile.ZIP_STORED)
    yield "weights.pth", "long storage", zipped(members | {f"{root}/data/0": bytes(100)}, zipfile.ZIP_STORED)
    for method in (99, 12, 14):
        yield "weights.pth", f"method {method}", _with_method(zipped(members, zipfile.ZIP_STORED), method)
    for content in (b"", b"PK", b"PK\3\4" + bytes(100), b"\x80\x02.", b"\x80\x02}.", bytes(2000)):
        yield "weights.pth", f"bytes {content[:8]!a} {len(content)}", content
        yield "old.pth", f"bytes {content[:8]!a} {len(content)}", content
    yield from headers("weights.safetensors")


def _with_method(content: bytes, method: int) -> bytes:
    """A zip whose members claim another compression."""
    for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        parts = content.split(mark)
        content = mark.join([parts[0], *(p[: at - 4] + method.to_bytes(2, "little") + p[at - 2 :] for p in parts[1:])])
    return content


def _npy(header: bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


def statistics() -> Iterator[Case]:
    found = moments()
    mu, sigma = found["mu"], found["sigma"]
    skew = sigma.copy()
    skew[0, 1] += 0.5
    for name, arrays in {
        "negative": {"mu": mu, "sigma": -sigma},
        "asymmetric": {"mu": mu, "sigma": skew},
        "nan": {"mu": mu * np.nan, "sigma": sigma},
        "huge": {"mu": mu, "sigma": sigma * 1e308},
        "complex": {"mu": mu, "sigma": sigma * 1j},
        "text": {"mu": mu.astype(str), "sigma": sigma},
        "objects": {"mu": np.array([_Runs()] * 8), "sigma": sigma},
        "dates": {"mu": mu.astype("M8[s]"), "sigma": sigma},
        "records": {"mu": np.zeros(8, [("a", "f8")]), "sigma": sigma},
        "shapes": {"mu": mu[:5], "sigma": sigma},
        "scalars": {"mu": np.float64(1), "sigma": np.float64(1)},
        "empty": {"mu": mu[:0], "sigma": sigma[:0, :0]},
        "one": {"mu": mu},
        "none": {},
        "half": {"mu": mu.astype(np.float16), "sigma": sigma.astype(np.float16)},
        "integers": {"mu": np.zeros(8, int), "sigma": np.eye(8, dtype=int)},
        "zeros": {"mu": np.zeros(8), "sigma": np.zeros((8, 8))},
        "deep": {"mu": mu.reshape([1] * 30 + [8]), "sigma": sigma},
    }.items():
        yield "stats.npz", name, npz(**arrays)
    bad = {
        "bomb": zipped({"mu.npy": _npy(b"{'descr':'<f8','fortran_order':False,'shape':(400000000,)}\n", BOMB * 64)}),
        "claims": zipped({"mu.npy": _npy(b"{'descr':'<f8','fortran_order':False,'shape':(400000000,)}\n")}),
        "negative shape": zipped({"mu.npy": _npy(b"{'descr':'<f8','fortran_order':False,'shape':(-1,)}\n")}),
        "overflow": zipped({"mu.npy": _npy(b"{'descr':'<f8','fortran_order':False,'shape':(2**62,4)}\n")}),
        "huge shape": zipped({"mu.npy": _npy(b"{'descr':'<f8','fortran_order':False,'shape':(%d,4)}\n" % (1 << 62))}),
        "deep header": zipped({"mu.npy": _npy(b"(" * 900 + b")" * 900)}),
        "no header": zipped({"mu.npy": b""}),
        "magic": zipped({"mu.npy": b"\x93NUMPY\x09\0"}),
        "code": zipped({"mu.npy": _npy(b"__import__('os').system('touch OVERWRITTEN')\n")}),
        "method": _with_method(npz(**found), 99),
        "encrypted": _encrypted(npz(**found)),
        "damaged": npz(**found)[:-200] + bytes(200),
    }
    for name, content in bad.items():
        yield "stats.npz", name, content
    for name, value in (
        ("other keys", {"a": 1}),
        ("list", [1]),
        ("nan", {"fid": {"mu": mu * np.nan, "sigma": sigma}}),
        ("one", {"fid": {"mu": mu}}),
        ("text", {"fid": {"mu": "x", "sigma": "y"}}),
        ("runs", {"fid": _Runs()}),
        ("fd", {"fd_dinov2": {"mu": mu, "sigma": sigma}}),
    ):
        yield "stats.pkl", name, pickle.dumps(value, protocol=4)
    yield "stats.pkl", "cut", stats_pickle()[:-30]


def _encrypted(content: bytes) -> bytes:
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        parts = content.split(mark)
        content = mark.join([parts[0], *(p[: at - 4] + b"\1\0" + p[at - 2 :] for p in parts[1:])])
    return content


def archives() -> Iterator[Case]:
    door = "data.zip"
    for labels in (
        [], None, {}, 5, "x", [["00000/img00000000.png", 0]], [["00000/img00000000.png", -1]] * 4, [[1, 2]], [["a"]],
        [["00000/img00000000.png", 1e300]], [["00000/img00000000.png", "1"]], [["00000/img00000000.png", None]],
        [["../x", 0]], [["00000/img00000000.png", 10**30]],
    ):  # fmt: skip
        yield door, f"labels {str(labels)[:40]!a}", layout(labels)
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    usual = {name: picture(seed=i) for i, name in enumerate(names)}
    for told in (
        b"",
        b"{",
        b"NaN",
        DEEP.encode(),
        b"\xff\xfe",
        b'{"labels": NaN}',
        b'{"labels": [' + b"[]," * 10**6 + b"[]]}",
    ):
        yield door, f"json {told[:12]!a}", zipped(usual | {"dataset.json": told})
    made: dict[str, Content] = {
        "empty": zipped({}),
        "no images": zipped({"a.txt": b"x"}),
        "absolute": zipped({"/etc/x.png": picture(), "/b.png": picture()}),
        "upwards": zipped({"../../x.png": picture(), "../y.png": picture()}),
        "bad names": zipped({"\x1b[2J.png": picture(), "a\nb.png": picture(seed=1)}),
        "bomb": lambda path: path.write_bytes(zipped({"a.png": BOMB * 400})),
        "many": zipped({f"{i}.txt": b"" for i in range(50_000)}),
        "sizes": zipped({"a.png": picture(), "b.png": picture(size=(16, 16))}),
        "modes": zipped({"a.png": picture(), "b.png": picture(mode="L")}),
        "eps": zipped({"cat.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n"}),
        "method": _with_method(zipped(usual), 99),
        "encrypted": _encrypted(zipped(usual)),
        "cut": zipped(usual)[:-40],
        "nested": zipped({"a.zip": zipped(usual)}),
        "twice": _twice(),
    }
    for name, content in made.items():
        yield door, name, content
    for name, arrays in {
        "floats": {"arr_0": np.zeros((3, 8, 8, 3))},
        "shape": {"arr_0": np.zeros((3, 8, 8), np.uint8)},
        "channels": {"arr_0": np.zeros((3, 8, 8, 7), np.uint8)},
        "none": {"arr_0": np.zeros((0, 8, 8, 3), np.uint8)},
        "flat": {"arr_0": np.zeros((3, 0, 8, 3), np.uint8)},
        "objects": {"arr_0": np.array([_Runs()])},
        "labels": {"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "arr_1": np.array(["a", "b", "c"])},
        "few labels": {"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "arr_1": np.arange(2)},
        "negative": {"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "arr_1": np.array([0, -1, 2])},
        "large labels": {"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "arr_1": np.array([0, 1 << 60, 2])},
        "other": {"x": np.zeros(3)},
    }.items():
        yield "data.npz", name, npz(**arrays)
    for name, shape in (
        ("claims", "(400000000,8,8,3)"),
        ("negative", "(-3,8,8,3)"),
        ("text", "'x'"),
        ("deep", "(" * 500),
    ):
        header = b"{'descr':'|u1','fortran_order':False,'shape':%s}\n" % shape.encode()
        yield "data.npz", f"header {name}", zipped({"arr_0.npy": _npy(header, BOMB if name == "claims" else b"")})
    big = _npy(b"{'descr':'<i8','fortran_order':False,'shape':(400000000,)}\n", BOMB * 64)
    yield "data.npz", "labels bomb", zipped({"arr_0.npy": _array(np.zeros((3, 8, 8, 3), np.uint8)), "arr_1.npy": big})


def _array(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _twice() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for seed in range(2):
            archive.writestr("a.png", picture(seed=seed))
    return buffer.getvalue()


def _link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def tars() -> Iterator[Case]:
    door, first = "data.tar", "cifar-10-batches-py/data_batch_1"
    others = {k: v for k, v in cifar().items() if k != first}
    for name, infos in {
        "link to nothing": [_link(first, "nowhere")],
        "link to itself": [_link(first, first)],
        "hard link to itself": [_link(first, first, tarfile.LNKTYPE)],
        "link outside": [_link(first, "/etc/passwd")],
        "fifo": [_link(first, "", tarfile.FIFOTYPE)],
        "device": [_link(first, "", tarfile.CHRTYPE)],
    }.items():
        yield door, name, tarred(others, "w", infos)
    runs = b"U\x05labelcos\nsystem\nU\x11touch OVERWRITTEN\x85R"
    for name, batches in {
        "no labels": cifar([]),
        "large": cifar([255, 2]),
        "runs": cifar(before=runs),
        "short": cifar(planes=bytes(100)),
        "none": cifar(planes=b""),
        "today's pickle": {k: pickle.dumps({b"labels": [1], b"data": b"x"}) for k in cifar()},
    }.items():
        yield door, name, tarred(batches, "w")
    sound = tarred(cifar(), "w")
    for name, content in {
        "empty": b"",
        "zeros": bytes(10240),
        "cut": sound[: len(sound) // 2],
        "other": tarred({"a.txt": b"x"}, "w"),
        "long names": tarred({"a/" * 20_000 + "x": b""}, "w"),
        "sparse size": _sparse_member(),
    }.items():
        yield door, name, content
        yield "cifar-10-python.tar.gz", name, gzip.compress(content, mtime=0)
    yield (
        "cifar-10-python.tar.gz",
        "bomb",
        _unpacking_to_gigabytes(_member_head("cifar-10-batches-py/data_batch_1", 3 << 30)),
    )
    yield (
        "cifar-10-python.tar.gz",
        "long name bomb",
        _unpacking_to_gigabytes(_member_head("././@LongLink", 3 << 30, b"L")),
    )
    yield "cifar-10-python.tar.gz", "pax bomb", _unpacking_to_gigabytes(_member_head("pax", 3 << 30, b"x"))
    yield "cifar-10-python.tar.gz", "no gzip", sound
    yield "cifar-10-python.tar.gz", "trailing", gzip.compress(sound) + b"more"


def _unpacking_to_gigabytes(start: bytes) -> bytes:
    """A gzip of this and 3 GB of zeros, in as many parts as a gzip may have."""
    return gzip.compress(start, mtime=0) + _zeros() * 48


@cache
def _zeros() -> bytes:
    return gzip.compress(BOMB * 64, mtime=0)


def _member_head(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def _sparse_member() -> bytes:
    return _member_head("cifar-10-batches-py/data_batch_1", 1 << 50) + bytes(1024)


def mnist() -> Iterator[Case]:
    door = "train-images-idx3-ubyte"
    for name, content in {
        "empty": b"",
        "magic": b"\1" + idx()[1:],
        "kind": idx(kind=13),
        "dims": idx((3, 8)),
        "more dims": idx((1, 1, 3, 8, 8)),
        "cut": idx()[:-5],
        "longer": idx() + b"x",
        "none": idx((0, 8, 8)),
        "flat": idx((3, 0, 8)),
        "huge": idx((3, 16384, 16384), b"x"),
        "claims": idx((1 << 31, 1 << 15, 1 << 15), b""),
    }.items():
        yield door, name, content
        yield f"{door}.gz", name, gzip.compress(content, mtime=0)
    yield f"{door}.gz", "bomb", _unpacking_to_gigabytes(idx((1, 1 << 15, 1 << 15), b""))
    yield f"{door}.gz", "checksum", gzip.compress(idx(), mtime=0)[:-8] + bytes(8)
    yield f"{door}.gz", "no gzip", idx()


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def _head(width: int, height: int, depth: int = 8, kind: int = 2, lace: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, lace)


def images() -> Iterator[Case]:
    for name, content in {
        "empty": b"",
        "text": b"hello",
        "html": b"<html><body>404</body></html>",
        "bomb": _png(_head(20_000, 20_000), (b"IDAT", zlib.compress(bytes(60_001) * 2_000, 1)), (b"IEND", b"")),
        "large": _png(_head(8192, 8192), (b"IDAT", zlib.compress(bytes((8192 * 3 + 1) * 8192), 1)), (b"IEND", b"")),
        "claims": _png(_head(1 << 30, 1 << 30), (b"IEND", b"")),
        "zero": _png(_head(0, 8), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
        "negative": _png(_head(1 << 31, 8), (b"IEND", b"")),
        "short": _png(_head(8, 8), (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b"")),
        "no data": _png(_head(8, 8), (b"IEND", b"")),
        "depth 3": _png(_head(8, 8, 3), (b"IDAT", zlib.compress(bytes(200))), (b"IEND", b"")),
        "kind 9": _png(_head(8, 8, 8, 9), (b"IDAT", zlib.compress(bytes(200))), (b"IEND", b"")),
        "palette without one": _png(_head(8, 8, 8, 3), (b"IDAT", zlib.compress(bytes(72))), (b"IEND", b"")),
        "text bomb": _png(_head(8, 8), (b"zTXt", b"a\0\0" + zlib.compress(BOMB * 90, 1)), (b"IEND", b"")),
        "profile bomb": _png(_head(8, 8), (b"iCCP", b"a\0\0" + zlib.compress(BOMB * 90, 1)), (b"IEND", b"")),
        "checksum": picture()[:-20] + bytes(8) + picture()[-12:],
        "cut": picture()[:-30],
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "pdf": b"%PDF-1.4\n",
        "ico": b"\0\0\1\0\1\0" + bytes(16),
        "fits": b"SIMPLE  =                    T".ljust(2880),
        "other size": picture(size=(16, 8)),
        "alpha": picture(mode="RGBA"),
        "grey": picture(mode="L"),
        "cmyk": picture("TIFF", mode="CMYK"),
        "one pixel": picture(size=(1, 1)),
    }.items():
        yield "image.png", name, content
    for door, format in (("image.jpg", "JPEG"), ("image.bmp", "BMP"), ("image.tif", "TIFF"), ("image.webp", "WEBP")):
        whole = picture(format)
        for part in (2, 3):
            yield door, f"cut to 1/{part}", whole[: len(whole) // part]
        yield door, "zeros", whole[: len(whole) // 2] + bytes(len(whole) // 2)
        yield door, "really PNG", picture()
    yield "image.gif", "many frames", _frames(3000)
    for kind in ("fifo", "link to nothing", "link to itself", "link to /dev/zero", "folder", "sparse"):
        for door in ("image.png", "data.zip", "data.npz", "data.tar", "stats.npz", "weights.pth", "net.pkl",
                     "net.safetensors", "dataset.json", "train-images-idx3-ubyte.gz"):  # fmt: skip
            if (door, kind) != ("net.safetensors", "sparse"):  # which is large indeed: it is mapped, not read
                yield door, f"is a {kind}", _SPECIAL[kind]


def _frames(count: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    frames = [Image.new("L", (8, 8), i % 256) for i in range(count)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "sparse": lambda path: (path.touch(), os.truncate(path, 9 << 28)),  # more than a process may have
}


def texts() -> Iterator[Case]:
    for told in (
        b"", b"{", b"[]", b"5", b"null", b'{"labels": 5}', b'{"labels": null}', b'{"labels": {"0.png": 1}}',
        b'{"labels": [["0.png", 1], ["0.png", 0]]}', b'{"labels": [["0.png", 1]]}', b'{"labels": [["0.png", NaN]]}',
        b'{"labels": [["0.png", 1e999], ["1.png", 0]]}', b'{"labels": [["\\ud800.png", 1]]}', b'{"label": []}',
        DEEP.encode(), b'{"labels":' + DEEP.encode() + b"}", b"\xff\xfe\0",
        b'{"labels": [["0.png", 1], ["1.png", -1]]}',
        b'{"labels": [["0.png", 1], ["1.png", ' + b"9" * 5000 + b"]]}", b'{"labels": [' + b"[]," * 10**6 + b"[]]}",
    ):  # fmt: skip
        yield "dataset.json", f"{told[:40]!a} {len(told)}", told
    for told in (
        b"", b"{}\n", b"[]\n", b"5\n", b"null\n", b"{", b"\xff\n", b'{"event":null}\n',
        b'{"event":"progress","nimg":null}\n',
        b'{"event":"progress","nimg":"x"}\n', b'{"event":"progress","nimg":1e999}\n', DEEP.encode() + b"\n",
        b'{"event":"\\ud800"}\n', EVENTS[:-9], EVENTS + b'{"event":5,"nimg":[]}\n', b"\n" * 10**6, b"x" * 10**7,
        b'{"event":"evaluation","nimg":1,"score":"x"}\n', b'{"event":"checkpoint","nimg":-5}\n',
    ):  # fmt: skip
        yield "events.jsonl", f"{told[:40]!a} {len(told)}", told
    for kind in ("folder", "fifo", "link to nothing", "link to /dev/zero"):
        yield "events.jsonl", f"is a {kind}", _SPECIAL[kind]


def corpus() -> dict[tuple[str, str], Content]:
    """All of them."""
    made: dict[tuple[str, str], Content] = {}
    for group in (net_files, pickled_nets, weight_files, statistics, archives, tars, mnist, images, texts):
        for door, name, content in group():
            assert (door, name) not in made, (door, name)
            made[door, name] = content
    return made
