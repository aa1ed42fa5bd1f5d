"""The plan of a training run: its learning rates, and what it does when time is short."""

from __future__ import annotations

import pytest

from examples.gpt.train import Plan


def test_the_rate_rises_then_falls_to_five_percent() -> None:
    plan = Plan(100)
    assert [plan.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert plan.rate(10) == 1.0
    assert plan.rate(55) == pytest.approx(0.525)
    assert plan.rate(100) == pytest.approx(0.05)


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 401])
def test_rates_are_positive_and_at_most_one(steps: int) -> None:
    plan = Plan(steps)
    rates = [plan.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[steps // 10 + 1 :] == sorted(rates[steps // 10 + 1 :], reverse=True)


def test_a_slow_machine_takes_fewer_steps_and_a_fast_one_all() -> None:
    slow, fast, hopeless = Plan(400), Plan(400), Plan(400)
    slow.fit(taken=10.0, done=20, seconds=110.0)
    fast.fit(taken=1.0, done=20, seconds=110.0)
    hopeless.fit(taken=500.0, done=20, seconds=110.0)
    assert (slow.steps, fast.steps, hopeless.steps) == (220, 400, 20)
    slow.fit(taken=20.0, done=40, seconds=110.0)
    assert slow.steps == 220
    slow.fit(taken=60.0, done=60, seconds=110.0)
    assert slow.steps == 110
