"""TOML files of plain values: tables, lists, strings, numbers and truth values."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipekern.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(path: Path | str) -> dict[str, Any]:
    """What is in the file; raises ``ConfigError`` where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:  # also text that is not UTF-8
        raise ConfigError(f"{path} cannot be read ({error}); give a TOML file") from None


def dumps(data: Mapping[str, Any]) -> str:
    """The text of a file; each table of a list of tables is a line, and a value of None is left out."""
    return "".join(f"{_key(key)} = {_rows(value)}\n" for key, value in data.items() if value is not None)


def _rows(value: Any) -> str:
    if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) for row in value):
        return "[\n" + "".join(f"  {_value(row)},\n" for row in value) + "]"
    return _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)} = {_value(part)}" for key, part in value.items() if part is not None)
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"{type(value).__name__} has no place in a TOML file")


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else _value(key)
