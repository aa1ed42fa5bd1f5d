"""Records: their fields, and classes found by name without running anything."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.transport import record
from tests.transport.samples import Deeper, Frozen, Hidden, Pair, Slots, State


def test_golden() -> None:
    """The values as they are: ``__post_init__``, which doubles ``hidden``, does not run again."""
    state = State(3, rest="x")
    names = record.field_names(State)
    assert names == ("hidden", "rest", "doubled")
    assert record.fields(state, names) == [6, "x", None]
    made = record.make(State, names, [6, "x", None])
    assert type(made) is State and made == state and made is not state
    assert record.class_name(Deeper.Part) == "tests.transport.samples:Deeper.Part"
    assert record.find_class("tests.transport.samples:Deeper.Part") is Deeper.Part


@pytest.mark.parametrize(
    "item", [Pair(1, 2), Hidden(torch.ones(2)), Frozen(1, 2), Slots(1, 2), Deeper(1, part=Deeper.Part(weight=2))]
)
def test_every_kind_is_made_again(item: Any) -> None:
    kind = type(item)
    names = record.field_names(kind)
    assert names is not None
    made = record.make(kind, names, record.fields(item, names))
    assert type(made) is kind and made == item and repr(made) == repr(item)
    assert record.find_class(record.class_name(kind)) is kind


@dataclass
class Layer(nn.Module):
    size: int = 0


@dataclass
class Out(dict[str, int]):
    size: int = 0


@pytest.mark.parametrize("kind", [tuple, list, dict, int, torch.Size, torch.Tensor, Layer, Out, object], ids=str)
def test_what_is_no_record(kind: type) -> None:
    assert record.field_names(kind) is None


class Running(types.ModuleType):
    """A module that would run code when asked for a name."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


class Meta(type):
    """A class that would run code when asked for a name."""

    def __getattr__(cls, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


class Asked(metaclass=Meta):
    pass


def test_a_name_runs_nothing_and_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "running", Running("running"))
    assert "antigravity" not in sys.modules
    here = __name__
    for name in (
        "running:State",
        f"{here}:Asked.State",
        "antigravity:geohash",
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "collections:namedtuple",
        "tests.transport.samples:Alias",
        "tests.transport.samples:State.",
        "tests.transport.samples:",
        "tests.transport.samples",
        "",
        ":",
        f"{here}:State",  # a name that it has here only because it is imported
        f"{here}:Layer",
    ):
        assert record.find_class(name) is None, name
    assert "antigravity" not in sys.modules


def test_what_is_held_beside_the_fields_is_not_lost_in_silence() -> None:
    state = State(torch.ones(2))
    names = record.field_names(State)
    assert names is not None
    assert float(state.total) == 4.0  # a cached property: computed again from the fields
    record.fields(state, names)
    state.extra = torch.ones(1)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"State holds 'extra'.*\(hidden, rest, doubled\).*declare it as a field"):
        record.fields(state, names)
    empty = Slots.__new__(Slots)
    with pytest.raises(ConfigError, match=r"Slots lacks a field.*first"):
        record.fields(empty, ("first", "second"))


class Grown(NamedTuple):
    size: int


class Subclass(Grown):
    """A named tuple that may hold more than its fields."""


def test_a_named_tuple_with_more_than_its_fields() -> None:
    item = Subclass(3)
    assert record.fields(item, ("size",)) == [3]
    item.extra = 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="Subclass holds 'extra'"):
        record.fields(item, ("size",))
