"""All schedules beside each other at the same ranks, micro-batches and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.schedule.ir import Schedule
from pipekern.schedule.registry import build, describe, names
from pipekern.schedule.simulate import Costs


@dataclass(frozen=True)
class Figures:
    """What a schedule costs. Times in microseconds, ``peak`` in activations of the fullest rank."""

    name: str
    chunks: int
    makespan: float
    span: float
    bubble_ratio: float
    span_bubble_ratio: float
    peak: float
    messages: int
    synchronous: bool
    duplicates_weights: bool
    runnable: bool


class Comparison(NamedTuple):
    """``figures`` of what could be built, the shortest makespan first; ``refused``: name and reason of the others."""

    figures: list[Figures]
    refused: dict[str, str]


def compare(
    ranks: int, microbatches: int, costs: Costs, *, chunks: int | None = None, memory: float | None = None
) -> Comparison:
    """The figures of every registered schedule that takes ``ranks`` and ``microbatches`` within ``memory``.

    A schedule that takes ``chunks`` stages a rank (or slices a micro-batch) gets them, another one the fewest it takes.
    """
    found, refused = [], {}
    for name in names():
        taken = chunks if chunks in describe(name).chunks else None
        try:
            schedule = build(name, ranks=ranks, microbatches=microbatches, chunks=taken, memory=memory)
            found.append(figures(schedule, costs))
        except ConfigError as error:
            refused[name] = str(error)
    found.sort(key=lambda row: (row.makespan, row.span, row.peak, row.name))
    return Comparison(found, refused)


def figures(schedule: Schedule, costs: Costs) -> Figures:
    """The figures of one schedule; raises ``ConfigError`` where the costs have not one value a stage."""
    timeline = schedule.simulate(costs)
    return Figures(
        name=schedule.name,
        chunks=schedule.slices if schedule.slices > 1 else schedule.chunks,
        makespan=timeline.makespan,
        span=timeline.span,
        bubble_ratio=timeline.bubble_ratio,
        span_bubble_ratio=timeline.span_bubble_ratio,
        peak=max(timeline.peak_activations),
        messages=timeline.messages,
        synchronous=schedule.synchronous,
        duplicates_weights=schedule.duplicates_weights,
        runnable=schedule.runnable,
    )
