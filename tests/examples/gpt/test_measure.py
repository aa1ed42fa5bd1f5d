"""Costs read from timelines: those of a simulated step are the ones that it was simulated with."""

from __future__ import annotations

import random

import pytest

from examples.gpt.measure import stage_costs
from pipekern import schedule as schedules
from pipekern.schedule import Costs, Schedule
from pipekern.trace.timeline import Span, Timeline


def with_waits(timeline: Timeline, schedule: Schedule) -> Timeline:
    """The receives that a measured step shows: from the end of the work before until the work begins."""
    spans = []
    for rank in range(timeline.ranks):
        free = 0.0
        forwarded = set()
        for span in timeline.of_rank(rank):
            key = (span.stage, span.microbatch)
            if span.stage > 0 if key not in forwarded else span.stage + 1 < schedule.stages:
                spans.append(Span(rank, "RECV", *key, free, span.start))
            forwarded.add(key)
            spans.append(span)
            free = span.end
    return Timeline.measured(spans, timeline.ranks, timeline.peak_activations, timeline.messages)


def test_two_stages_by_hand() -> None:
    spans = [
        Span(0, "F", 0, 0, 0, 10),
        Span(0, "SEND", 0, 0, 10, 12),
        Span(0, "RECV", 0, 0, 12, 49),
        Span(0, "BW", 0, 0, 49, 59),
        Span(1, "RECV", 1, 0, 0, 15),
        Span(1, "F", 1, 0, 15, 25),
        Span(1, "BW", 1, 0, 25, 44),
        Span(1, "SEND", 1, 0, 44, 45),
    ]
    costs = stage_costs([Timeline.measured(spans, 2, [1, 1], 2)], schedules.build("1f1b", ranks=2, microbatches=1))
    assert costs.forward == [12, 10]
    assert costs.backward == [10, 20]
    assert costs.comm == 3.5  # 3 on the way forward, 4 on the way back


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_costs_of_a_simulated_step_come_back(name: str, ranks: int) -> None:
    draw = random.Random(f"{name} {ranks}")
    schedule = schedules.build(name, ranks=ranks, microbatches=6)
    forward = [draw.randint(50, 99) for _ in range(ranks)]
    backward = [draw.randint(100, 200) for _ in range(ranks)]
    timeline = schedule.simulate(Costs(forward=forward, backward=backward, weight=[0] * ranks, comm=7))
    costs = stage_costs([with_waits(timeline, schedule)], schedule)
    assert (costs.forward, costs.backward, costs.comm) == (forward, backward, 7)
    assert schedule.simulate(costs).makespan == timeline.makespan
