"""The manifest's text: read as it was written, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipekern as pk
from pipekern.checkpoint.manifest import NAME, Entry, File, Manifest, check_json, read

GOLDEN = Manifest(
    "save-00000001",
    {"unit-00000.safetensors": File(96, "ab" * 32)},
    {"model/0.weight": Entry("unit-00000.safetensors", "bfloat16", [2, 3])},
    [{"step": 3, "data": {"epoch": 1}}],
)


def test_golden_text() -> None:
    row = json.loads(GOLDEN.encode())
    assert row["format"] == "pipekern checkpoint"
    assert row["version"] == 1
    assert row["files"] == {"unit-00000.safetensors": {"size": 96, "sha256": "ab" * 32}}
    assert row["entries"]["model/0.weight"] == {
        "file": "unit-00000.safetensors",
        "dtype": "bfloat16",
        "shape": [2, 3],
    }
    assert Manifest.decode(GOLDEN.encode()) == GOLDEN


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(JSON, max_size=3))
def test_values_come_back_as_they_were(values: list[Any]) -> None:
    check_json(values, "values")
    manifest = Manifest("save-00000001", {}, {}, values)
    assert Manifest.decode(manifest.encode()) == manifest


def test_nan_comes_back() -> None:
    (value,) = Manifest.decode(Manifest("save-00000001", {}, {}, [math.nan]).encode()).values
    assert math.isnan(value)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.full), 37])
def test_every_flipped_bit_is_seen(step: int) -> None:
    data = GOLDEN.encode().encode()
    for bit in range(0, 8 * len(data), step):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            Manifest.decode(changed.decode("ascii"))


def test_every_truncation_is_seen() -> None:
    text = GOLDEN.encode()
    for length in range(len(text)):
        with pytest.raises(ValueError):
            Manifest.decode(text[:length])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": [1, {2}]}, "values['a'][1] is a set"),
        ({1: 2}, "values has the key 1, a int"),
        ((1, 2), "values is a tuple"),
        ({"a": {"b": object()}, "c": b"x"}, "values['a']['b'] is a object; values['c'] is a bytes"),
    ],
)
def test_what_is_no_json_is_named(value: object, named: str) -> None:
    with pytest.raises(pk.CheckpointError) as refusal:
        check_json(value, "values")
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "manifest.json"),
        ("[]", "does not say"),
        ('{"format": "pipekern checkpoint", "version": 9}', "version 9"),
        ('{"format": "pipekern checkpoint", "version": 1}', "not the one that was written"),
        ("[" * 100_000, "manifest.json"),
        (Manifest("../x", {}, {}, []).encode(), "'../x' is not the name of a file"),
        (Manifest("x", {"/etc/passwd": File(1, "")}, {}, []).encode(), "'/etc/passwd' is not the name of a file"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(pk.CheckpointError, match="manifest") as refusal:
        read(tmp_path)
    assert named in str(refusal.value)
