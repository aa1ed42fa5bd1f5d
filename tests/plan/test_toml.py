from __future__ import annotations

import math
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ConfigError
from pipekern.plan import toml


def test_golden() -> None:
    data = {"samples": 4, "layers": [{"name": "a", "full": [1, 2.5]}, {"name": "b"}], "memory": math.inf, "links": []}
    assert toml.dumps(data).splitlines() == [
        "samples = 4",
        "layers = [",
        '  { name = "a", full = [1, 2.5] },',
        '  { name = "b" },',
        "]",
        "memory = inf",
        "links = []",
    ]


text = st.text(st.characters(exclude_categories=["Cs"]))
plain = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))


@given(st.dictionaries(text, values, max_size=4))
def test_what_is_written_is_read(data: dict[str, Any]) -> None:
    with NamedTemporaryFile() as file:
        Path(file.name).write_text(toml.dumps(data), encoding="utf-8", newline="")
        assert toml.load(file.name) == data


def test_none_is_left_out_and_objects_are_refused() -> None:
    assert toml.dumps({"a": None, "b": {"c": None, "d": True}}) == "b = { d = true }\n"
    with pytest.raises(TypeError, match="object has no place"):
        toml.dumps({"a": object()})


@pytest.mark.parametrize("content", [b"a = = 1", b"\xff"])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x.toml cannot be read .*give a TOML file"):
        toml.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        toml.load(tmp_path / "none.toml")
