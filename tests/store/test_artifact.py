"""The text of a manifest, its digest, and the keys of questions."""

import hashlib
import json

import pytest

from sidactl.store import Store, canonical_json, digest, objects


def test_canonical_json_bytes_are_exact() -> None:
    value = {"b": [1, 2.5, 1e-07, -0.0, 1e22], "a": {"é": None, "Z": True}, "c": "x\n"}
    expected = '{"a":{"Z":true,"é":null},"b":[1,2.5,1e-07,-0.0,1e+22],"c":"x\\n"}'
    assert canonical_json(value) == expected.encode()


def test_canonical_json_does_not_depend_on_insertion_order() -> None:
    assert canonical_json({"x": 1, "y": {"p": 2, "q": 3}}) == canonical_json({"y": {"q": 3, "p": 2}, "x": 1})


def test_canonical_json_writes_tuples_as_lists_and_reads_back() -> None:
    assert canonical_json({"a": (1, (2, "b"))}) == b'{"a":[1,[2,"b"]]}'
    data = canonical_json({"lr": 0.1 + 0.2, "n": 10**20})
    assert canonical_json(json.loads(data)) == data
    assert data == b'{"lr":0.30000000000000004,"n":100000000000000000000}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "\ud800"])
def test_canonical_json_refuses_what_utf8_json_cannot_say(value: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        canonical_json({"a": [value]})


@pytest.mark.parametrize("value", [{1: "a"}, {None: 1}, {True: 1}, {"a": {2: 3}}, {"a": b"bytes"}, {"a": {1, 2}}])
def test_canonical_json_refuses_other_keys_and_types(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_digest_is_the_sha256_of_the_canonical_text() -> None:
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


def test_key_depends_on_command_parameters_inputs_and_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Store.key("fid", {"num": 50000}, {"samples": "ab" * 32})
    text = '{"command":"fid","inputs":{"samples":"%s"},"params":{"num":50000},"schema":1}' % ("ab" * 32)
    assert key == hashlib.sha256(text.encode()).hexdigest()
    others = [
        Store.key("is", {"num": 50000}, {"samples": "ab" * 32}),
        Store.key("fid", {"num": 50001}, {"samples": "ab" * 32}),
        Store.key("fid", {"num": 50000}, {"samples": "ac" * 32}),
        Store.key("fid", {"num": 50000}, {"reference": "ab" * 32}),
    ]
    monkeypatch.setattr(objects, "SCHEMA_VERSION", 2)
    others.append(Store.key("fid", {"num": 50000}, {"samples": "ab" * 32}))
    assert len({key, *others}) == 6
