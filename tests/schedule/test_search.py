"""What the search promises: the cap, the bound, the published values, the same result every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipekern
from pipekern.errors import ConfigError
from pipekern.schedule import Costs, Schedule, SearchResult, build, names, search
from tests.schedule.sample import replay, row
from tests.schedule.zero_bubble import heuristic

pytest.importorskip("pipekern._C", reason="the search is in the compiled part, which was not built here")

UNIT = Costs(forward=1, backward=1, weight=1)


def bubble(schedule: Schedule, costs: Costs = UNIT) -> float:
    """Idle time by span, in units of the costs."""
    timeline = schedule.simulate(costs)
    return timeline.span - max(timeline.busy)


def exact(costs: Costs, schedule: Schedule) -> tuple[dict[str, list[Fraction]], list[Fraction]]:
    """Costs of every stage and link, from one number each."""
    values = {"F": costs.forward, "B": costs.backward, "W": costs.weight, "comm": costs.comm}
    share = {key: Fraction(value) for key, value in values.items() if not isinstance(value, Sequence)}
    comm = [share.pop("comm")] * (schedule.stages - 1)
    return {op: [value / schedule.chunks] * schedule.stages for op, value in share.items()}, comm


def assert_sound(result: SearchResult, costs: Costs, memory: float) -> None:
    """It runs, keeps the cap, and a second simulator comes to the same times."""
    result.check()
    timeline = result.simulate(costs)
    assert max(timeline.peak_activations) <= memory + 1e-9
    times = replay(result, *exact(costs, result))
    assert max(end for _, end in times.values()) == pytest.approx(timeline.makespan)
    assert result.lower_bound <= timeline.span * (1 + 1e-9)
    assert result.gap == pytest.approx(timeline.span / result.lower_bound - 1 if result.lower_bound else 0, abs=1e-9)


def test_golden_order() -> None:
    # Two activations on rank 0: it idles one unit until the first gradient comes, and rank 1 never after its start.
    result = search(ranks=2, microbatches=3, costs=UNIT, memory=2, placement="single")
    assert row(result, 0) == "0F0 0F1 0B0 0W0 0F2 0B1 0W1 0B2 0W2"
    assert row(result, 1) == "1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1W2"
    assert (result.lower_bound, result.gap) == (10, 0)
    assert_sound(result, UNIT, memory=2)


@pytest.mark.parametrize(("ranks", "microbatches", "memory", "best"), [(4, 8, 3, 7), (6, 12, 4, 13)])
def test_far_below_the_heuristic_under_a_cap_below_the_ranks(
    ranks: int, microbatches: int, memory: int, best: int
) -> None:
    published = {(4, 8, 3): 13, (6, 12, 4): 43}
    result = search(ranks, microbatches, UNIT, memory, "single")
    assert bubble(result) == best
    known = heuristic(ranks, microbatches, UNIT, memory)
    assert min(map(bubble, known)) == published[ranks, microbatches, memory]
    assert_sound(result, UNIT, memory)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "forward", "backward", "weight", "comm", "published"),
    [
        (8, 24, 18522, 18086, 9337, 601, 0.0433),
        (8, 32, 18513, 18086, 9331, 626, 0.0039),
        (8, 64, 18546, 18097, 9321, 762, 0.0026),
        (16, 48, 11347, 11248, 8132, 377, 0.0066),
    ],
)
def test_published_automatic_search_with_twice_the_ranks_as_memory(
    ranks: int, microbatches: int, forward: int, backward: int, weight: int, comm: int, published: float
) -> None:
    # The byte model of those numbers: about half of an activation goes with its B.
    costs = Costs(forward, backward, weight, comm, kept=0.5)
    known = min(s.simulate(costs).span_bubble_ratio for s in heuristic(ranks, microbatches, costs, 2 * ranks))
    assert round(known, 4) == published
    result = search(ranks, microbatches, costs, 2 * ranks, "single")
    assert result.simulate(costs).span_bubble_ratio <= known
    assert_sound(result, costs, 2 * ranks)


@pytest.mark.parametrize("placement", ["single", "v"])
@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_speed_up_over_1f1b_at_two_ranks(placement: str, microbatches: int) -> None:
    most = {"single": {2: 1.29, 4: 1.15, 8: 1.08}, "v": {2: 1.38, 4: 1.20, 8: 1.10}}
    known = build("1f1b", ranks=2, microbatches=microbatches).simulate(UNIT).makespan
    result = search(2, microbatches, UNIT, placement=placement, objective="makespan")  # type: ignore[arg-type]
    assert round(known / result.simulate(UNIT).makespan, 2) == most[placement][microbatches]
    assert result.gap == 0


@pytest.mark.parametrize(("ranks", "microbatches", "idle"), [(2, 4, 9), (3, 6, 16), (5, 10, 17)])
def test_proved_optima_of_v_placement_with_as_many_half_activations_as_ranks(
    ranks: int, microbatches: int, idle: int
) -> None:
    halves = Costs(forward=2, backward=2, weight=2)
    result = search(ranks, microbatches, halves, ranks / 2, "v")
    assert bubble(result, halves) == idle
    assert_sound(result, halves, ranks / 2)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "halves", "chunk_costs", "published"),
    [
        (2, 4, 4, (10, 20, 10, 0), 340),
        (3, 6, 6, (12, 11, 7, 2), 402),
        (4, 8, 4, (12, 11, 7, 2), 753),
        (4, 8, 6, (9261, 9043, 4668, 601), 446768),
        (4, 20, 4, (10, 20, 10, 0), 2470),
        (4, 20, 8, (10, 10, 10, 1), 1218),
        (6, 12, 9, (10, 10, 10, 1), 832),
        (8, 16, 8, (10, 10, 10, 1), 1268),
        (8, 16, 12, (10, 10, 10, 1), 1112),
        (8, 40, 8, (10, 20, 10, 0), 4970),
        (8, 40, 16, (9261, 9043, 4668, 601), 1925778),
        (12, 24, 18, (10, 10, 10, 1), 1676),
        (16, 32, 16, (9261, 9043, 4668, 601), 2225490),
        (16, 32, 24, (12, 11, 7, 2), 2470),
        (16, 32, 32, (10, 20, 10, 0), 2860),
    ],
)
def test_never_worse_than_the_adaptive_v_search(
    ranks: int, microbatches: int, halves: int, chunk_costs: tuple[int, int, int, int], published: int
) -> None:
    # The span of the best of its 60 x 15 x (p - 1) blocks within the cap, after its squeezing and reordering.
    forward, backward, weight, comm = chunk_costs
    costs = Costs(2 * forward, 2 * backward, 2 * weight, comm)
    result = search(ranks, microbatches, costs, halves / 2, "v")
    assert result.simulate(costs).span <= published
    assert_sound(result, costs, halves / 2)


def random_costs(random: Random) -> Costs:
    forward, backward, weight = (random.choice([7, 10, 13, 20, 36]) for _ in range(3))
    return Costs(forward, backward, weight, random.choice([0, 1, 4]), random.choice([1, 0.5, 0.75, 0]))


def never_worse(random: Random, ranks: int, microbatches: int) -> None:
    costs = random_costs(random) if random.random() < 0.8 else UNIT
    comparable = []
    for name in names():
        try:
            known = build(name, ranks=ranks, microbatches=microbatches)
        except ConfigError:
            continue
        if known.chains == known.slices == 1 and known.synchronous and known.stage_rank in placements(ranks).values():
            comparable.append(known)
    known = random.choice(comparable)
    timeline = known.simulate(costs)
    memory = max(1, *timeline.peak_activations)
    placement = next(key for key, ranks_of in placements(ranks).items() if ranks_of == known.stage_rank)
    result = search(ranks, microbatches, costs, memory, placement)  # type: ignore[arg-type]
    assert result.simulate(costs).span <= timeline.span, (known.name, costs)
    fast = search(ranks, microbatches, costs, memory, placement, objective="makespan")  # type: ignore[arg-type]
    assert fast.simulate(costs).makespan <= timeline.makespan, (known.name, costs)
    assert_sound(result, costs, memory)
    cap = random.randint(1, 2 * ranks)
    single = search(ranks, microbatches, costs, cap, "single")
    for other in heuristic(ranks, microbatches, costs, cap):
        assert single.simulate(costs).span <= other.simulate(costs).span * (1 + 1e-12), (cap, costs)
    assert_sound(single, costs, cap)


def placements(ranks: int) -> dict[str, tuple[int, ...]]:
    there = tuple(range(ranks))
    return {"single": there, "v": there + there[::-1]}


@pytest.mark.parametrize("seed", range(12))
def test_never_worse_than_a_published_schedule_of_the_same_peak(seed: int) -> None:
    random = Random(seed)
    ranks = random.randint(2, 6)
    never_worse(random, ranks, random.randint(1, 3 * ranks))


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(2, 13))
def test_never_worse_on_the_whole_grid(ranks: int) -> None:
    random = Random(1000 + ranks)
    for microbatches in (1, ranks - 1, ranks, 2 * ranks - 1, 2 * ranks, 3 * ranks, 5 * ranks):
        for _ in range(3):
            never_worse(random, ranks, microbatches)


@given(
    ranks=st.integers(1, 5),
    microbatches=st.integers(1, 9),
    memory=st.sampled_from([1, 1.5, 2, 2.75, 4, 9, None, math.inf]),
    placement=st.sampled_from(["single", "v", "any"]),
    objective=st.sampled_from(["span", "makespan"]),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_any_costs_of_every_stage(
    ranks: int, microbatches: int, memory: float | None, placement: str, objective: str, data: st.DataObject
) -> None:
    stages = ranks * (1 if placement == "single" else 2)
    listed = st.lists(st.sampled_from([0, 1, 3, 0.1, 250, 1e6]), min_size=stages, max_size=stages)
    links = data.draw(st.lists(st.sampled_from([0, 1, 0.7]), min_size=stages - 1, max_size=stages - 1))
    kept = data.draw(st.sampled_from([0, 0.3, 1]))
    costs = Costs(data.draw(listed), data.draw(listed), data.draw(listed), links, kept)
    result = search(ranks, microbatches, costs, memory, placement, objective=objective)  # type: ignore[arg-type]
    result.check()
    timeline = result.simulate(costs)
    assert max(timeline.peak_activations) <= min(memory or math.inf, microbatches) + 1e-9
    value = timeline.span if objective == "span" else timeline.makespan
    assert 0 <= result.lower_bound <= value * (1 + 1e-12)
    assert result.gap == pytest.approx(value / result.lower_bound - 1 if result.lower_bound else 0, abs=1e-9)


def test_any_placement_is_the_better_one() -> None:
    costs = Costs(10, 12, 5, comm=1)
    spans = {key: search(4, 8, costs, 3, key).simulate(costs).span for key in ("single", "v", "any")}
    assert spans["any"] == min(spans["single"], spans["v"])
    assert search(4, 8, costs, 3).lower_bound <= spans["any"]


def test_more_memory_and_the_objective_that_counts() -> None:
    costs = Costs(10, 12, 5, comm=1)
    tight, ample = (search(4, 8, costs, memory, "single").simulate(costs) for memory in (2, 7))
    assert ample.span < tight.span
    fast = search(4, 8, costs, 7, "single", objective="makespan").simulate(costs)
    assert fast.makespan <= ample.makespan and ample.span <= fast.span


def test_result_reads_as_a_schedule_and_comes_again() -> None:
    first, second = (search(5, 11, Costs(3, 4, 2, comm=0.5), 3.5) for _ in range(2))
    assert first == second
    again = Schedule.parse(str(first))
    assert (again.actions, again.stage_rank) == (first.actions, first.stage_rank)


def test_large() -> None:
    result = search(ranks=64, microbatches=256, costs=UNIT, memory=64)
    timeline = result.simulate(UNIT)
    assert timeline.span == 768 and result.gap == 0  # V placement: no idle time with 2p half-activations
    assert max(timeline.peak_activations) <= 64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ranks": 0}, "ranks=0: there is no device"),
        ({"microbatches": 0}, "microbatches=0"),
        ({"memory": 0.5}, "memory=0.5 is below 1 activation"),
        ({"memory": math.nan}, "memory=nan"),
        ({"placement": "w"}, "placement='w' is not known; give one of single, v, any"),
        ({"objective": "time"}, "objective='time' is not known"),
        ({"effort": 0}, "effort=0"),
        ({"costs": Costs([1, 1, 1], 1, 1)}, r"forward has 3 values; .* one number or 4 values; .* or 8 values"),
        ({"costs": Costs(1, 1, 1, comm=[0] * 5)}, "comm has 5 values; 4 stages need one number or 3 values"),
    ],
)
def test_bad_input(change: dict[str, object], reason: str) -> None:
    given: dict[str, object] = {"ranks": 4, "microbatches": 8, "costs": UNIT, "memory": 4}
    with pytest.raises(ConfigError, match=reason):
        search(**{**given, **change})  # type: ignore[arg-type]


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(ConfigError, match="forward=-1"):
        search(4, 8, Costs(-1, 1, 1), 4)


def test_without_the_compiled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pipekern._C", None)
    monkeypatch.delattr(pipekern, "_C", raising=False)
    with pytest.raises(ConfigError, match="compiled part, which is not there"):
        search(2, 2, UNIT, 2)
