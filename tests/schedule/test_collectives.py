"""What goes between the replicas of a stage, as instructions of a program and in simulations."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ConfigError
from pipekern.schedule import Costs, Program, Schedule, build, names
from pipekern.schedule.collectives import Collectives, first_forwards, last_weights
from pipekern.schedule.ir import Action
from pipekern.trace import gantt, text
from pipekern.trace.timeline import COLLECTIVES, COMPUTE, Span
from tests.schedule.sample import random_schedule


def test_golden_program() -> None:
    """A sum begins after the last weight work, behind the message that it makes: a neighbour waits for that one."""
    program = build("1f1b", ranks=2, microbatches=2).program(collectives=Collectives({0: 2, 1: 1}, {0: 2, 1: 1}))
    assert [" ".join(map(str, row)) for row in program.instructions] == [
        "0GATHER0 0GATHER1 0JOIN0 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0BW0 0RECV_B1 0BW1 0REDUCE0 0REDUCE1",
        "1GATHER0 1RECV_F0 1JOIN0 1F0 1BW0 1SEND_B0 1RECV_F1 1F1 1BW1 1SEND_B1 1REDUCE0",
    ]


def test_golden_program_of_two_chunks() -> None:
    """Each stage is summed as soon as its own weight work has ended; stage 3 may share what is gathered."""
    schedule = Schedule.parse(
        "pipekern-schedule name=v microbatches=1 stage_rank=0,1,1,0\n0F0 3F0 3B0 3W0 0B0 0W0\n1F0 2F0 2BW0 1B0 1W0\n"
    )
    program = schedule.program(collectives=Collectives({0: 1}, {0: 1, 3: 1}))
    assert " ".join(map(str, program.instructions[0])) == (
        "0GATHER0 0JOIN0 0F0 0SEND_F0 3RECV_F0 3JOIN0 3F0 3B0 3SEND_B0 3W0 3REDUCE0 0RECV_B0 0B0 0W0 0REDUCE0"
    )
    assert [one for one in program.instructions[1] if one.op in (*COLLECTIVES, "JOIN")] == []


def test_golden_timeline() -> None:
    """1f1b with a gather of 2 before the first forward; rank 1's sum of 3 fits into the drain, rank 0's does not."""
    costs = Costs(forward=2, backward=3, weight=1, gather=2, reduce=3)
    timeline = build("1f1b", ranks=2, microbatches=2).simulate(costs)
    assert timeline.of_rank(0) == [
        Span(0, "F", 0, 0, 2, 4),
        Span(0, "F", 0, 1, 4, 6),
        Span(0, "BW", 0, 0, 10, 14),
        Span(0, "BW", 0, 1, 16, 20),
        Span(0, "GATHER", 0, 0, 0, 2),
        Span(0, "REDUCE", 0, 0, 20, 23),
    ]
    assert timeline.of_rank(1)[-2:] == [Span(1, "GATHER", 1, 0, 0, 2), Span(1, "REDUCE", 1, 0, 16, 19)]
    assert (timeline.makespan, timeline.span, timeline.busy, timeline.messages) == (23, 21, [12, 12], 4)


def test_golden_text() -> None:
    timeline = build("1f1b", ranks=2, microbatches=2).simulate(Costs(2, 3, 1, gather=2, reduce=3))
    assert text.draw(timeline, 23).splitlines() == [
        "rank 0 ..F0F1....B0bb..B1bb...",
        "       gg..................rrr",
        "rank 1 ....F0B0bbF1B1bb.......",
        "       gg..............rrr....",
    ]


def test_golden_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    schedule = build("1f1b", ranks=2, microbatches=2)
    for costs, wanted in ((Costs(2, 3, 1, gather=2, reduce=3), True), (Costs(2, 3, 1), False)):
        gantt.draw(schedule.simulate(costs), tmp_path / "timeline.svg")
        root = ElementTree.fromstring((tmp_path / "timeline.svg").read_text())
        words = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert ({"gather values", "sum gradients"} <= words) is wanted


def _check(schedule: Schedule, collectives: Collectives, program: Program) -> None:
    """Each once, gathers first, every sum after its last weight work, the rest as without, and the order whole."""
    plain = schedule.program()
    places = {place: at for at, place in enumerate(program.order)}
    assert sorted(places) == [(rank, i) for rank, row in enumerate(program.instructions) for i in range(len(row))]
    assert program.slots == plain.slots
    for rank, row in enumerate(program.instructions):
        assert [places[rank, i] for i in range(len(row))] == sorted(places[rank, i] for i in range(len(row)))
        beside = [one for one in row if one.op in (*COLLECTIVES, "JOIN")]
        assert tuple(one for one in row if one not in beside) == plain.instructions[rank]
        first, last = first_forwards(schedule.actions[rank]), last_weights(schedule.actions[rank])
        gathers = [one for one in row if one.op == "GATHER"]
        assert list(row[: len(gathers)]) == gathers
        assert [one[1:3] for one in gathers] == [(s, i) for s in first for i in range(collectives.gathers.get(s, 0))]
        joins = [one.stage for one in beside if one.op == "JOIN"]
        assert joins == (list(first) if gathers else [])
        for stage in joins:
            assert row.index((*("JOIN", stage, 0), -1)) < row.index((*first[stage], -1))
        reduces = [one[1:3] for one in row if one.op == "REDUCE"]
        assert reduces == [(s, i) for s in last for i in range(collectives.reduces.get(s, 0))]
        for stage, i in reduces:
            assert row.index((*("REDUCE", stage, i), -1)) > row.index((*last[stage], -1))


@given(st.integers(0, 2**32))
def test_any_program(seed: int) -> None:
    """More buckets than micro-batches, stages without any, any order of a schedule."""
    random = Random(seed)
    schedule = random_schedule(random, chains=False)
    counts = [{s: random.randint(0, 7) for s in range(schedule.stages)} for _ in range(2)]
    collectives = Collectives(*counts)
    _check(schedule, collectives, schedule.program(collectives=collectives))


@pytest.mark.parametrize("name", names())
def test_every_schedule(name: str) -> None:
    try:
        schedule = build(name, ranks=4, microbatches=8)
    except ConfigError:
        schedule = build(name, ranks=4, microbatches=12)
    if schedule.runnable:
        each = dict.fromkeys(range(schedule.stages), 2)
        _check(schedule, Collectives(each, each), schedule.program(collectives=Collectives(each, each)))


@given(st.integers(0, 2**32))
def test_laws(seed: int) -> None:
    """What goes beside only ever adds, by no more than it is in a row, and nothing where it is free."""
    random = Random(seed)
    schedule = random_schedule(random)
    cost = {op: [random.randint(0, 50) for _ in range(schedule.stages)] for op in "FBW"}
    gather, reduce = ([random.randint(0, 40) for _ in range(schedule.stages)] for _ in range(2))
    plain = schedule.simulate(Costs(cost["F"], cost["B"], cost["W"]))
    timeline = schedule.simulate(Costs(cost["F"], cost["B"], cost["W"], gather=gather, reduce=reduce))
    extra = sum(gather) + max(sum(reduce[s] for s in schedule.stages_of(rank)) for rank in range(schedule.ranks))
    assert plain.makespan <= timeline.makespan <= plain.makespan + extra
    assert (timeline.busy, timeline.messages, timeline.peak_activations) == (
        plain.busy, plain.messages, plain.peak_activations,
    )  # fmt: skip
    for rank, row in enumerate(schedule.actions):
        spans = timeline.of_rank(rank)
        ends = {Action(*span[1:4]): span.end for span in spans if span.op in COMPUTE}
        for op, of, begins in (("GATHER", gather, {}), ("REDUCE", reduce, last_weights(row))):
            beside = [span for span in spans if span.op == op]
            stages = last_weights(row) if op == "REDUCE" else first_forwards(row)
            assert [span.stage for span in beside] == [stage for stage in stages if of[stage]]
            assert all(span.end - span.start == of[span.stage] for span in beside)
            assert all(span.start >= ends[begins[span.stage]] for span in beside if begins)
            assert all(one.end <= other.start for one, other in pairwise(beside))
        first = {span.stage: span.end for span in spans if span.op == "GATHER"}
        assert all(span.start >= first.get(span.stage, 0) for span in spans if span.op == "F")


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_sum_that_fits_into_the_drain_is_free(ranks: int) -> None:
    """gpipe with F = B = W = 1: rank r ends its last backward, of 2, before rank r - 1 begins its own."""
    schedule = build("gpipe", ranks=ranks, microbatches=4)
    plain = schedule.simulate(Costs(1, 1, 1)).makespan
    drain = [2 * rank for rank in range(ranks)]
    assert schedule.simulate(Costs(1, 1, 1, reduce=drain)).makespan == plain
    for rank in range(ranks):
        more = [free + (rank == at) * 0.5 for at, free in enumerate(drain)]
        assert schedule.simulate(Costs(1, 1, 1, reduce=more)).makespan == plain + 0.5


def test_costs_that_are_none() -> None:
    for name in ("gather", "reduce"):
        with pytest.raises(ConfigError, match=name):
            Costs(1, 1, 1, **{name: -1.0})
        with pytest.raises(ConfigError, match=rf"{name} has 3 values; this schedule needs one number or 2 values"):
            build("1f1b", ranks=2, microbatches=2).simulate(Costs(1, 1, 1, **{name: [1.0, 2, 3]}))  # type: ignore[arg-type]
