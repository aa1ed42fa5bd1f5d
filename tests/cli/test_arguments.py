from __future__ import annotations

import argparse

import pytest

from pipekern.cli.arguments import add_costs, cost, costs_of
from pipekern.errors import ConfigError
from pipekern.schedule import Costs


def parsed(*words: str, more: tuple[str, ...] = ()) -> Costs:
    parser = argparse.ArgumentParser()
    add_costs(parser, *more)
    return costs_of(parser.parse_args(words))


def test_golden_costs() -> None:
    assert parsed() == Costs(1, 1, 1)
    assert parsed("--forward", "1,2.5", "--comm", "3", "--kept", "0.5") == Costs([1, 2.5], 1, 1, comm=3, kept=0.5)
    assert parsed("--pair", "4", more=("pair",)) == Costs(1, 1, 1, pair=4)


def test_whole_numbers_stay_exact() -> None:
    assert [type(value) for value in (cost("3"), cost("3.0"))] == [int, float]
    assert cost("9007199254740993") == 9007199254740993


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="comm=-1"):
        parsed("--comm=-1")
    with pytest.raises(SystemExit):
        parsed("--pair", "4")
    with pytest.raises(SystemExit):
        parsed("--forward", "fast")
