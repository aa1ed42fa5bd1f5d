"""The cut of a row of layers into contiguous stages that makes the slowest stage as fast as it can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.schedule.exact import fractions, number, scaled


class Partition(NamedTuple):
    """Stage ``k`` has the layers ``bounds[k]`` to ``bounds[k + 1] - 1`` and takes ``times[k]``.

    ``bottleneck`` is the largest of ``times``, in the unit of the costs; ints where it is whole.
    """

    bounds: tuple[int, ...]
    bottleneck: float
    times: tuple[float, ...]


def partition(
    costs: Sequence[float],
    parts: int,
    speeds: Sequence[float] | None = None,
    cut_costs: Sequence[float] | None = None,
) -> Partition:
    """Cut ``costs``, one a layer, into ``parts`` stages of at least one layer: the smallest bottleneck there is.

    A stage of the layers ``i`` to ``j - 1`` takes their costs divided by its speed (``speeds``, one a stage in
    order; default 1), plus ``cut_costs[i] + cut_costs[j]`` (one more than there are layers; the first and last charge
    the two ends of the model; default 0). Exact: a dynamic programme over (stages, layers), in integers.
    Raises ``ConfigError`` for fewer layers than parts, and for values that are no costs or speeds.
    """
    if not 1 <= parts <= len(costs):
        nearest = max(1, len(costs))
        raise ConfigError(
            f"parts={parts}: {len(costs)} layers make at least 1 and at most {nearest} stages, one layer each"
        )
    work = [Fraction(0), *accumulate(fractions("costs", costs))]
    cuts = _cuts(cut_costs, len(costs))
    slowness = _slowness(speeds, parts)
    by, (factors,) = scaled(slowness)
    unit, (done, cut) = scaled(work, cuts)
    cut = [value * by for value in cut]
    table = _table(done, cut, factors)
    bounds = _trace(table, len(costs))
    times = [
        (done[end] - done[start]) * factor + cut[start] + cut[end]
        for (start, end), factor in zip(pairwise(bounds), factors, strict=True)
    ]
    scale = unit * by
    return Partition(bounds, number(max(times), scale), tuple(number(time, scale) for time in times))


def _cuts(cut_costs: Sequence[float] | None, layers: int) -> list[Fraction]:
    if cut_costs is None:
        return [Fraction(0)] * (layers + 1)
    if len(cut_costs) != layers + 1:
        raise ConfigError(
            f"cut_costs has {len(cut_costs)} values; {layers} layers need {layers + 1}, one before each and one after"
        )
    return fractions("cut_costs", cut_costs)


def _slowness(speeds: Sequence[float] | None, parts: int) -> list[Fraction]:
    if speeds is None:
        return [Fraction(1)] * parts
    if len(speeds) != parts or not all(speed > 0 and math.isfinite(speed) for speed in speeds):
        raise ConfigError(f"speeds={list(speeds)}: {parts} stages need {parts} finite speeds above 0, one each")
    return [1 / Fraction(speed) for speed in speeds]


def _table(done: Sequence[int], cut: Sequence[int], factors: Sequence[int]) -> list[list[int]]:
    """``table[k][j]``: where stage ``k`` starts in the best cut of the first ``j`` layers into ``k + 1`` stages."""
    layers, parts = len(done) - 1, len(factors)
    best: dict[int, int] = {0: 0}
    table = []
    for stage, factor in enumerate(factors):
        reached, starts = {}, [0] * (layers + 1)
        for end in range(stage + 1, layers - (parts - stage - 1) + 1):
            lowest = -1
            for start in range(end - 1, stage - 1, -1):
                own = (done[end] - done[start]) * factor
                if 0 <= lowest <= own:
                    break  # only grows from here on
                if start in best:
                    time = max(best[start], own + cut[start] + cut[end])
                    if lowest < 0 or time < lowest:
                        lowest, starts[end] = time, start
            if lowest >= 0:
                reached[end] = lowest
        best = reached
        table.append(starts)
    return table


def _trace(table: Sequence[Sequence[int]], layers: int) -> tuple[int, ...]:
    bounds = [layers]
    for starts in reversed(table):
        bounds.append(starts[bounds[-1]])
    return tuple(reversed(bounds))
