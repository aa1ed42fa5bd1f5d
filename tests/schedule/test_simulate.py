"""Every value of these four schedules that is published or follows from their rules, and a slow second simulator."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule import Action, Costs, Schedule, build, names
from pipekern.trace.timeline import Span
from tests.schedule.sample import random_schedule, replay

UNIT = Costs(forward=1, backward=1, weight=1)


def test_golden_timeline() -> None:
    timeline = build("1f1b", ranks=2, microbatches=2).simulate(Costs(forward=2, backward=3, weight=1, comm=1))
    assert timeline.of_rank(0) == [
        Span(0, "F", 0, 0, 0, 2),
        Span(0, "F", 0, 1, 2, 4),
        Span(0, "BW", 0, 0, 10, 14),
        Span(0, "BW", 0, 1, 16, 20),
    ]
    assert timeline.of_rank(1) == [
        Span(1, "F", 1, 0, 3, 5),
        Span(1, "BW", 1, 0, 5, 9),
        Span(1, "F", 1, 1, 9, 11),
        Span(1, "BW", 1, 1, 11, 15),
    ]
    assert (timeline.makespan, timeline.span, timeline.busy, timeline.messages) == (20, 20, [12, 12], 4)
    assert timeline.bubble_ratio == 8 / 20 and timeline.peak_activations == [2, 1]


@pytest.mark.parametrize(
    ("name", "makespan", "peaks", "messages"),
    [
        ("gpipe", 33, [8, 8, 8, 8], 48),
        ("1f1b", 33, [4, 3, 2, 1], 48),
        ("interleaved-1f1b", 28.5, [11 / 2, 9 / 2, 7 / 2, 5 / 2], 112),
        ("looped-bfs", 28.5, [16 / 2] * 4, 112),
    ],
)
def test_unit_costs_at_4_ranks_and_8_microbatches(
    name: str, makespan: float, peaks: list[float], messages: int
) -> None:
    timeline = build(name, ranks=4, microbatches=8).simulate(UNIT)
    assert (timeline.makespan, timeline.span, timeline.busy) == (makespan, makespan, [24] * 4)
    assert (timeline.peak_activations, timeline.messages) == (peaks, messages)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "costs", "bubble"),
    [
        (8, 24, (18522, 18086, 9337, 601), 0.2431),
        (8, 32, (18513, 18086, 9331, 626), 0.1985),
        (8, 64, (18546, 18097, 9321, 762), 0.1240),
        (16, 48, (11347, 11248, 8132, 377), 0.2552),
    ],
)
def test_published_bubbles_of_1f1b(
    ranks: int, microbatches: int, costs: tuple[int, int, int, int], bubble: float
) -> None:
    """Zero Bubble Pipeline Parallelism, table 5."""
    timeline = build("1f1b", ranks=ranks, microbatches=microbatches).simulate(Costs(*costs))
    assert round(timeline.bubble_ratio, 4) == bubble


def test_interleaved_waits_for_the_wrap_around_of_every_microbatch() -> None:
    timeline = build("interleaved-1f1b", ranks=8, microbatches=24, chunks=3).simulate(Costs(18522, 18086, 9337, 601))
    assert timeline.makespan == 1237531 and round(timeline.bubble_ratio, 4) == 0.1090


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_laws(ranks: int, rounds: int) -> None:
    random = Random()
    p, m = ranks, ranks * rounds
    forward, backward, weight = (random.randint(1, 10**6) for _ in range(3))
    costs = Costs(forward, backward, weight)
    one, busy = forward + backward + weight, m * (forward + backward + weight)
    assert build("gpipe", ranks=p, microbatches=m).simulate(costs).makespan == busy + (p - 1) * one
    timeline = build("1f1b", ranks=p, microbatches=m).simulate(costs)
    assert timeline.makespan == busy + (p - 1) * one
    assert timeline.peak_activations == [min(m, p - rank) for rank in range(p)]
    assert timeline.messages == 2 * m * (p - 1)
    for chunks in (2, 3, 4):
        looped = build("looped-bfs", ranks=p, microbatches=m, chunks=chunks).simulate(costs)
        interleaved = build("interleaved-1f1b", ranks=p, microbatches=m, chunks=chunks).simulate(costs)
        for timeline in (looped, interleaved):
            assert timeline.makespan == pytest.approx(busy + (p - 1) * one / chunks, rel=1e-15)
            assert timeline.messages == 2 * m * (p * chunks - 1) * (p > 1)
        assert looped.peak_activations == [m] * p
        whole = chunks * p + p - 1
        assert interleaved.peak_activations[0] == min(whole, m * chunks) / chunks


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 6), (3, 3), (4, 8), (5, 10), (8, 24)])
def test_law_of_1f1b_with_latency(p: int, m: int) -> None:
    """Exact while a message takes no longer than a forward and a backward."""
    forward, backward, weight, comm = 1000, 1100, 700, 13
    timeline = build("1f1b", ranks=p, microbatches=m).simulate(Costs(forward, backward, weight, comm))
    extra = Fraction(2 * (p - 1) * m, p) + 2 * (p - 2)
    assert timeline.makespan == (m + p - 1) * (forward + backward + weight) + comm * extra


@given(st.integers(0, 2**32))
def test_agrees_with_a_slow_simulator(seed: int) -> None:
    random = Random(seed)
    schedule = random_schedule(random)
    scale = random.choice([1, 7, 12])
    cost = {op: [Fraction(random.randint(0, 50), scale) for _ in range(schedule.stages)] for op in "FBW"}
    comm = [Fraction(random.randint(0, 20), scale) for _ in range(schedule.stages - 1)]
    times = replay(schedule, cost, comm)
    # Fractions are real numbers to Costs, whatever mypy's numeric tower says.
    timeline = schedule.simulate(Costs(cost["F"], cost["B"], cost["W"], comm=comm))  # type: ignore[arg-type]
    for span in timeline.spans:
        start, end = times[Action(span.op, span.stage, span.microbatch)]
        assert (span.start, span.end) == (float(start), float(end))
    assert timeline.makespan == float(max(end for _, end in times.values()))
    rows = [[times[action] for action in row] for row in schedule.actions]
    assert timeline.span == float(max(row[-1][1] - row[0][0] for row in rows))
    assert timeline.busy == [float(sum(end - start for start, end in row)) for row in rows]


@pytest.mark.parametrize("name", names())
def test_every_schedule_agrees_with_a_slow_replay(name: str) -> None:
    """Two directions, slices and overlapped pairs among them."""
    random = Random()
    for ranks, microbatches in ((2, 4), (4, 8), (4, 12), (6, 12)):
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        cost = {op: [Fraction(random.randint(0, 50)) for _ in range(schedule.stages)] for op in ("F", "B", "W", "pair")}
        comm = [Fraction(random.randint(0, 20)) for _ in range(schedule.stages - 1)]
        slices = {op: [value / schedule.slices for value in values] for op, values in cost.items()}
        times = replay(schedule, slices, comm)
        costs = Costs(cost["F"], cost["B"], cost["W"], comm, pair=cost["pair"])  # type: ignore[arg-type]
        for span in schedule.simulate(costs).spans:
            start, end = times[Action(span.op, span.stage, span.microbatch)]
            assert (span.start, span.end) == (float(start), float(end))


@given(st.integers(0, 2**32), st.fractions(0, 1, max_denominator=8))
def test_peak_activations(seed: int, kept: Fraction) -> None:
    schedule = random_schedule(Random(seed))
    timeline = schedule.simulate(Costs(1, 1, 1, kept=float(kept)))
    for rank, row in enumerate(schedule.actions):
        stays = Fraction(float(kept))
        change = {"F": Fraction(1), "B": stays - 1, "W": -stays, "BW": Fraction(-1)}
        held = [sum(change[a.op] / schedule.share(a.stage) for a in row[: i + 1]) for i in range(len(row))]
        assert timeline.peak_activations[rank] == float(max(held)) and held[-1] == 0


def test_kept_lowers_the_peak() -> None:
    text = "pipekern-schedule name=w microbatches=2 stage_rank=0\n0F0 0B0 0F1 0B1 0W0 0W1\n"
    schedule = Schedule.parse(text)
    assert schedule.simulate(Costs(1, 1, 1)).peak_activations == [2]
    assert schedule.simulate(Costs(1, 1, 1, kept=0.25)).peak_activations == [1.25]


def test_overlapped_pair_starts_when_both_can_and_ends_as_one() -> None:
    text = "pipekern-schedule name=two microbatches=2 stage_rank=0,0 chains=2\n0F0 1F1&0BW0 1BW1\n"
    schedule = Schedule.parse(text)
    assert schedule.simulate(Costs(10, 10, 5, pair=12)).makespan == 10 + 12 + 15
    assert schedule.simulate(Costs(10, 10, 5)).makespan == 10 + 25 + 15
    overlapped = schedule.simulate(Costs(10, 10, 5, pair=12))
    assert [(span.start, span.end) for span in overlapped.spans[1:3]] == [(10, 22), (10, 22)]
    assert overlapped.busy == [37] and overlapped.bubble_ratio == 0


def test_costs_by_stage_and_latency_by_link() -> None:
    schedule = build("gpipe", ranks=3, microbatches=1)
    timeline = schedule.simulate(Costs(forward=[1, 2, 3], backward=[4, 5, 6], weight=[0, 0, 1], comm=[10, 20]))
    assert timeline.makespan == 1 + 10 + 2 + 20 + 3 + 7 + 20 + 5 + 10 + 4


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"forward": -1}, "forward=-1 is not a finite number of at least 0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"comm": float("inf")}, "comm=inf"),
        ({"backward": [1, -2]}, "backward=-2"),
        ({"kept": 1.5}, "kept=1.5 is more than 1"),
        ({"forward": [1, 2, 3]}, "forward has 3 values; this schedule needs one number or 2 values"),
        ({"comm": [1, 2]}, "comm has 2 values; this schedule needs one number or 1 values"),
    ],
)
def test_wrong_costs(costs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given = {"forward": 1, "backward": 1, "weight": 1} | costs
        build("1f1b", ranks=2, microbatches=2).simulate(Costs(**given))  # type: ignore[arg-type]


def test_a_deadlock_is_refused() -> None:
    schedule = Schedule.parse("pipekern-schedule name=x microbatches=1 stage_rank=0\n0BW0 0F0\n")
    with pytest.raises(ScheduleError, match=r"rank 0 stuck at 0BW0 \(instruction 0\): waits for 0F0"):
        schedule.simulate(UNIT)
