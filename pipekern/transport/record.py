"""Records: named tuples and dataclasses. Their fields, and how one is made again without running anybody's code."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pipekern.errors import ConfigError

_NO_RECORDS = (dict, list, Tensor, nn.Module)  # a dataclass of these holds more than its fields


def field_names(kind: type) -> tuple[str, ...] | None:
    """The fields of a named tuple or a dataclass, in order; None for any other class."""
    if issubclass(kind, tuple):
        names = getattr(kind, "_fields", None)
        return names if isinstance(names, tuple) else None
    if not dataclasses.is_dataclass(kind) or issubclass(kind, _NO_RECORDS):
        return None
    return tuple(field.name for field in dataclasses.fields(kind))


def fields(item: Any, names: tuple[str, ...]) -> list[Any]:
    """The values of the fields ``names`` of a record, in order.

    What it holds beside them would be lost on the way, and a gradient with it: that raises ``ConfigError``, and so does
    a field without a value. Cached properties are not held: they are computed again from the fields.
    """
    kind = type(item)
    for name in getattr(item, "__dict__", ()):
        if name not in names and not isinstance(getattr(kind, name, None), cached_property):
            raise ConfigError(
                f"a {kind.__module__}.{kind.__qualname__} holds {name!r}, which is none of its fields "
                f"({', '.join(names)}) and would be lost between stages: declare it as a field"
            )
    if isinstance(item, tuple):
        return list(item)
    try:
        return [getattr(item, name) for name in names]
    except AttributeError as error:
        raise ConfigError(f"a {kind.__module__}.{kind.__qualname__} lacks a field: {error}; give it a value") from error


def make(kind: type, names: tuple[str, ...], parts: Iterable[Any]) -> Any:
    """A record of class ``kind`` with these values, as they are: neither ``__init__`` nor ``__post_init__`` runs.

    They have run where the values come from; a second time could change them, and would be code run by a message.
    """
    if issubclass(kind, tuple):
        return tuple.__new__(kind, parts)
    made = object.__new__(kind)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(made, name, part)  # a frozen one has no other way
    return made


def class_name(kind: type) -> str:
    """What a class is called in a message: module and path in it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def find_class(name: str) -> type | None:
    """The class of records called ``name``, if this process has it already; imports nothing and runs nothing."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)  # getattr could run a module's __getattr__
    known = isinstance(found, type) and class_name(found) == name and field_names(found) is not None
    return found if known else None
