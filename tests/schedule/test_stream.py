"""Simulation straight from the rules: equal to building the schedule and simulating it, for any costs."""

from __future__ import annotations

import random
import sys

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule.registry import build
from pipekern.schedule.simulate import Costs
from pipekern.schedule.stream import NAMES, simulate_large

pytest.importorskip("pipekern._C", reason="pipekern is installed without its compiled part")


def test_golden() -> None:
    """The first block of table 5 of Zero Bubble Pipeline Parallelism; zb-h2 is given by span."""
    costs = Costs(18522, 18086, 9337, 601)
    ratios = {name: simulate_large(name, 8, 24, costs) for name in NAMES}
    assert f"{ratios['1f1b'].bubble_ratio:.4f}" == "0.2431"
    assert f"{ratios['zb-h1'].bubble_ratio:.4f}" == "0.1585"
    assert f"{ratios['zb-h2'].span_bubble_ratio:.4f}" == "0.1083"


def _uneven(ranks: int, rng: random.Random, highest: int = 1000) -> Costs:
    """Integer costs that differ from stage to stage, some of them zero."""

    def values(count: int) -> list[int]:
        return [rng.randint(0, highest) for _ in range(count)]

    return Costs(values(ranks), values(ranks), values(ranks), values(ranks - 1), kept=rng.choice([0, 0.1, 0.5, 1]))


def _agree(name: str, ranks: int, microbatches: int, costs: Costs) -> None:
    large = simulate_large(name, ranks, microbatches, costs)
    small = build(name, ranks=ranks, microbatches=microbatches).simulate(costs)
    assert large.spans == ()
    for key in ("makespan", "span", "busy", "peak_activations", "messages", "bubble_ratio", "span_bubble_ratio"):
        assert getattr(large, key) == getattr(small, key), (name, ranks, microbatches, key, costs)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_simulate(name: str) -> None:
    rng = random.Random()
    for ranks in (1, 2, 3, 4, 7):
        for microbatches in (1, 2, 3, 5, 8, 21):
            _agree(name, ranks, microbatches, _uneven(ranks, rng))


@pytest.mark.parametrize("name", NAMES)
def test_agrees_on_fractions_and_one_cost_for_all(name: str) -> None:
    _agree(name, 5, 12, Costs(1.5, 0.25, 3, 0.125, kept=0.3))


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_simulate_on_the_whole_grid(name: str) -> None:
    rng = random.Random()
    for ranks in range(1, 17):
        for microbatches in (*range(1, 2 * ranks + 4), 5 * ranks, 100):
            _agree(name, ranks, microbatches, _uneven(ranks, rng))
    for ranks, microbatches in ((64, 130), (130, 64), (200, 20)):
        _agree(name, ranks, microbatches, _uneven(ranks, rng))


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_largest_size_does_the_work_of_every_action(name: str) -> None:
    costs = _uneven(4096, random.Random(), highest=20000)
    large = simulate_large(name, 4096, 16384, costs)
    each = zip(costs.forward, costs.backward, costs.weight, strict=True)  # type: ignore[arg-type]
    assert large.busy == [16384 * sum(three) for three in each]
    assert large.makespan >= large.span >= max(large.busy)


def test_bad_input() -> None:
    unit = Costs(1, 1, 1)
    with pytest.raises(ConfigError, match=r"schedule='gpipe' cannot be streamed; 1f1b, zb-h1, zb-h2 can"):
        simulate_large("gpipe", 2, 2, unit)
    with pytest.raises(ConfigError, match=r"ranks=0"):
        simulate_large("1f1b", 0, 2, unit)
    with pytest.raises(ConfigError, match=r"microbatches=0"):
        simulate_large("1f1b", 2, 0, unit)
    with pytest.raises(ConfigError, match=r"forward has 3 values; this schedule needs one number or 2 values"):
        simulate_large("1f1b", 2, 2, Costs([1, 1, 1], 1, 1))
    with pytest.raises(ConfigError, match=r"63 bits"):
        simulate_large("1f1b", 2, 2, Costs(1e-300, 1, 1))
    with pytest.raises(ConfigError, match=r"63 bits"):
        simulate_large("1f1b", 2, 2, Costs(1 << 60, 1, 1))


def test_without_the_compiled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipekern._C", None)
    monkeypatch.delattr("pipekern._C", raising=False)
    with pytest.raises(ConfigError, match=r"install g\+\+ or clang\+\+ and install pipekern again"):
        simulate_large("1f1b", 2, 2, Costs(1, 1, 1))
