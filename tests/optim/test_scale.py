"""The loss scale's sequences."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pipekern import ConfigError
from pipekern.optim import LossScale


def run(scale: LossScale, steps: str) -> list[float]:
    """The values after steps that are good (``.``) or overflow (``!``)."""
    values = []
    for step in steps:
        scale.update(step == "!")
        values.append(scale.value)
    return values


def test_golden() -> None:
    """Three good steps double it, an overflow halves it and starts the count again."""
    scale = LossScale(initial=8, growth_interval=3)
    assert run(scale, "...!..!...") == [8, 8, 16, 8, 8, 8, 4, 4, 4, 8]


def test_hysteresis() -> None:
    """The second overflow backs off, and each after it; growth makes the first one free again."""
    scale = LossScale(initial=16, growth_interval=2, hysteresis=2)
    assert run(scale, "!.!!..!!") == [16, 16, 8, 4, 4, 8, 8, 4]


def test_the_minimum_is_kept_and_told() -> None:
    scale = LossScale(initial=4, backoff_factor=0.3, minimum=1)
    assert [scale.update(True) for _ in range(4)] == [False, False, True, True]
    assert scale.value == 1.0
    assert not scale.update(False)


@pytest.mark.parametrize("cut", range(1, 12, 3))
def test_goes_on_from_a_state(cut: int) -> None:
    """Through JSON, at any step, the rest of the sequence is the same."""
    options: dict[str, Any] = {"initial": 2.0**10, "growth_interval": 3, "hysteresis": 2, "backoff_factor": 0.25}
    draw = random.Random(cut)
    steps = "".join(draw.choice("...!") for _ in range(40))
    whole = run(LossScale(**options), steps)
    first, second = LossScale(**options), LossScale(**options)
    run(first, steps[:cut])
    second.load(json.loads(json.dumps(first.state())))
    assert run(second, steps[cut:]) == whole[cut:]


def test_a_shorter_interval_than_the_saved_runs() -> None:
    first, second = LossScale(initial=4), LossScale(initial=4, growth_interval=5)
    run(first, "." * 30)
    second.load(first.state())
    assert run(second, "......") == [8, 8, 8, 8, 8, 16]


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("initial", 0, "above 0"),
        ("initial", float("nan"), "a number"),
        ("initial", 0.5, "at least minimum"),
        ("growth_factor", 1, "above 1"),
        ("backoff_factor", 1.0, "below 1"),
        ("growth_interval", 0, "at least 1"),
        ("growth_interval", 2.5, "a whole number"),
        ("hysteresis", 0, "at least 1"),
        ("minimum", float("inf"), "below inf"),
        ("minimum", "1", "a number"),
    ],
)
def test_refused(option: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option} is .*{rule}"):
        LossScale(**{option: value})


@pytest.mark.parametrize(
    "change", [{"value": 0.5}, {"value": None}, {"good": -1}, {"overflows": 1.5}, {"steps": 3}, {"good": True}]
)
def test_a_state_that_is_none_changes_nothing(change: dict[str, Any]) -> None:
    scale = LossScale(initial=4)
    before = scale.state()
    with pytest.raises(ConfigError):
        scale.load({**before, **change})
    assert scale.state() == before
