"""The measured timeline of a step."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

import pipekern as pk
from pipekern.runtime.executor import place
from pipekern.runtime.measure import measured
from pipekern.trace.timeline import Timeline
from tests.runtime.step import PLACES, SCHEDULES, run


def test_golden() -> None:
    """Two ranks, one micro-batch: clocks in nanoseconds become spans in microseconds from the first start."""
    program = pk.schedule.build("gpipe", ranks=2, microbatches=1).program()
    placed = [place(program, rank) for rank in range(2)]
    times = [[5000, 8000, 9000, 15000, 19000], [6000, 9500, 10500, 14000, 14500]]
    timeline = measured(program, placed, times, [1, 1])
    assert [(span.op, span.start, span.end) for span in timeline.of_rank(0)] == [
        ("F", 0.0, 3.0), ("SEND", 3.0, 4.0), ("RECV", 4.0, 10.0), ("BW", 10.0, 14.0),
    ]  # fmt: skip
    assert [span.op for span in timeline.of_rank(1)] == ["RECV", "F", "BW", "SEND"]
    assert timeline.makespan == 14.0
    assert timeline.busy == [7.0, 4.5]
    assert timeline.messages == 2


def _timelines(ranks: int, schedule: str) -> tuple[Timeline, Timeline]:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    with pk.Pipeline(model, loss_fn=nn.MSELoss(), microbatches=6, ranks=ranks, schedule=schedule) as pipe:
        x = torch.randn(12, 8)
        for _ in range(2):
            pipe.train_step(x, x)
        train = pipe.timeline()
        pipe.eval_step(x, x)
        return train, pipe.timeline()


@PLACES
@SCHEDULES
def test_its_order_is_the_programs(processes: bool, schedule: str) -> None:
    """The same on every rank; an evaluation has only forwards."""
    order = pk.schedule.build(schedule, ranks=3, microbatches=6)
    results = run(processes, _timelines, 3, schedule)
    assert all(result == results[0] for result in results)
    train, evaluation = results[0]
    for rank in range(3):
        computed = [(s.op, s.stage, s.microbatch) for s in train.of_rank(rank) if s.op not in ("SEND", "RECV")]
        assert computed == [(a.op, a.stage, a.microbatch) for a in order.actions[rank]]
        forwards = [(s.op, s.stage, s.microbatch) for s in evaluation.of_rank(rank) if s.op not in ("SEND", "RECV")]
        assert forwards == [(a.op, a.stage, a.microbatch) for a in order.actions[rank] if a.op == "F"]


@PLACES
@SCHEDULES
def test_its_spans_could_have_happened(processes: bool, schedule: str) -> None:
    """A rank does one thing at a time, and nothing before what it needs; peaks and messages are the simulated ones."""
    train, _ = run(processes, _timelines, 3, schedule)[0]
    for rank in range(3):
        spans = train.of_rank(rank)
        assert all(a.end <= b.start for a, b in pairwise(spans))
    ends = {(s.op, s.stage, s.microbatch): s.end for s in train.spans if s.op in ("F", "B", "W", "BW")}
    for span in train.spans:
        if span.op == "F" and span.stage > 0:
            assert span.start >= ends["F", span.stage - 1, span.microbatch]
    order = pk.schedule.build(schedule, ranks=3, microbatches=6)
    simulated = order.simulate(pk.schedule.Costs(forward=1, backward=1, weight=1))
    assert train.peak_activations == simulated.peak_activations
    assert train.messages == simulated.messages
    assert 0 <= train.bubble_ratio < 1
    assert min(span.start for span in train.spans) == 0.0
    assert Timeline.from_dict(train.to_dict()) == train


def test_before_the_first_step_it_is_empty() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pk.Pipeline(model, loss_fn=nn.MSELoss(), microbatches=1, ranks=2) as pipe:
        timeline = pipe.timeline()
    assert (list(timeline.spans), timeline.makespan, timeline.bubble_ratio) == ([], 0.0, 0.0)
