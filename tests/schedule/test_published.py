"""Every published number and law of a schedule, hit by building and simulating it.

Where a published formula says more than holds, the test says what holds and shows a case against the rest; that of
DualPipe is in test_dualpipe. What a search must reach is in test_search.
"""

from __future__ import annotations

from random import Random

import pytest

from pipekern.schedule import Costs, Schedule, build
from pipekern.schedule.simulate import peak_activations
from pipekern.trace.timeline import Timeline

UNIT = Costs(forward=1, backward=1, weight=1)
# F = B = W = 1 for a chunk, of which a rank holds two.
CHUNK = Costs(forward=2, backward=2, weight=2)


def simulate(name: str, ranks: int, microbatches: int, costs: Costs, chunks: int | None = None) -> Timeline:
    return build(name, ranks=ranks, microbatches=microbatches, chunks=chunks).simulate(costs)


def spans(timeline: Timeline) -> list[float]:
    rows = [timeline.of_rank(rank) for rank in range(timeline.ranks)]
    return [row[-1].end - row[0].start for row in rows]


def idle(timeline: Timeline) -> float:
    """Time of the rank that is idle most, from 0 to the end."""
    return timeline.makespan - min(timeline.busy)


def idle_in_span(timeline: Timeline) -> float:
    return timeline.span - timeline.busy[0]


# ---- Unit costs, p = 4, m = 8


@pytest.mark.parametrize(
    ("name", "makespan", "parts", "peaks"),
    [
        ("gpipe", 33, 1, [8, 8, 8, 8]),
        ("1f1b", 33, 1, [4, 3, 2, 1]),
        ("interleaved-1f1b", 28.5, 2, [11, 9, 7, 5]),
        ("looped-bfs", 28.5, 2, [16, 16, 16, 16]),
        ("seq1f1b", 28.5, 2, [5, 4, 3, 2]),
    ],
)
def test_golden_makespans_and_peaks(name: str, makespan: float, parts: int, peaks: list[int]) -> None:
    """``parts``: chunks or slices, in which the peaks are published."""
    timeline = simulate(name, 4, 8, UNIT)
    assert timeline.makespan == makespan
    assert [peak * parts for peak in timeline.peak_activations] == peaks


def test_golden_zero_bubble_spans() -> None:
    assert spans(simulate("zb-h1", 4, 8, UNIT)) == [27, 26, 25, 24]
    timeline = simulate("zb-v", 4, 8, CHUNK)
    assert (timeline.makespan, timeline.span) == (51, 48)


# ---- Zero Bubble Pipeline Parallelism, table 5


@pytest.mark.parametrize(
    ("ranks", "microbatches", "costs", "published"),
    [
        (8, 24, (18522, 18086, 9337, 601), (".2431", ".1585", ".1083")),
        (8, 32, (18513, 18086, 9331, 626), (".1985", ".1242", ".0837")),
        (8, 64, (18546, 18097, 9321, 762), (".1240", ".0674", ".0444")),
        (16, 48, (11347, 11248, 8132, 377), (".2552", ".1397", ".0672")),
    ],
)
def test_golden_zero_bubble_table(
    ranks: int, microbatches: int, costs: tuple[int, int, int, int], published: tuple[str, str, str]
) -> None:
    one, h1, h2 = (simulate(name, ranks, microbatches, Costs(*costs)) for name in ("1f1b", "zb-h1", "zb-h2"))
    ratios = (one.bubble_ratio, h1.bubble_ratio, h2.span_bubble_ratio)
    assert tuple(f"{ratio:.4f}"[1:] for ratio in ratios) == published


def test_golden_interleaved_with_every_wrap_around() -> None:
    """The published .1055 checks the wrap-around for the first micro-batch of each group only."""
    timeline = simulate("interleaved-1f1b", 8, 24, Costs(18522, 18086, 9337, 601), chunks=3)
    assert timeline.makespan == 1237531
    assert f"{timeline.bubble_ratio:.4f}" == "0.1090"


# ---- Overlapped pairs


def test_golden_dualpipe() -> None:
    """F, B, W, F&B = 10, 20, 10, 30, where B is the whole backward."""
    timeline = simulate("dualpipe", 8, 20, Costs(forward=10, backward=10, weight=10, pair=30))
    assert timeline.makespan == 660
    assert timeline.busy == [600] * 8
    assert timeline.peak_activations == [9] * 8


# ---- Bubbles, peaks and messages by formula, over a grid

SIZES = [(p, m) for p in (1, 2, 3, 4, 5, 8) for m in (p, p + 1, 2 * p, 3 * p + 1, 5 * p)]


def random_costs() -> tuple[int, int, int]:
    random = Random()
    return random.randint(1, 10**6), random.randint(1, 10**6), random.randint(1, 10**6)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_gpipe(p: int, m: int) -> None:
    timeline = simulate("gpipe", p, m, Costs(*(costs := random_costs())))
    assert idle(timeline) == (p - 1) * sum(costs)
    assert timeline.peak_activations == [m] * p
    assert timeline.messages == 2 * m * (p - 1)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_1f1b(p: int, m: int) -> None:
    costs = random_costs()
    timeline = simulate("1f1b", p, m, Costs(*costs))
    assert idle(timeline) == (p - 1) * sum(costs)
    assert timeline.peak_activations == [min(p - rank, m) for rank in range(p)]
    assert timeline.messages == 2 * m * (p - 1)
    if p > 1 and m % p == 0:
        latency = Random().randint(1, min(costs))
        more = latency * (2 * (p - 1) * m // p + 2 * (p - 2))
        assert idle(simulate("1f1b", p, m, Costs(*costs, latency))) == (p - 1) * sum(costs) + more


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize(("p", "rounds"), [(1, 2), (2, 1), (3, 2), (4, 3), (8, 2)])
def test_interleaved_and_looped(p: int, rounds: int, chunks: int) -> None:
    m, costs = p * rounds, random_costs()
    exact = Costs(*(chunks * cost for cost in costs))
    timeline = simulate("interleaved-1f1b", p, m, exact, chunks)
    assert idle(timeline) == (p - 1) * sum(costs)
    assert timeline.peak_activations[0] * chunks == min(chunks * p + p - 1, m * chunks)
    assert timeline.messages == 2 * m * (p * chunks - 1 if p > 1 else 0)
    timeline = simulate("looped-bfs", p, m, exact, chunks)
    assert idle(timeline) == (p - 1) * sum(costs)
    assert timeline.peak_activations == [m] * p
    assert timeline.messages == 2 * m * (p * chunks - 1 if p > 1 else 0)


def zero_bubble_costs() -> tuple[int, int, int]:
    """The formulas of the handcrafted schedules hold where no W is longer than the F that it shares its gap with."""
    forward, backward, weight = random_costs()
    return max(forward, weight), backward, min(forward, weight)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zb_h1(p: int, m: int) -> None:
    forward, backward, weight = zero_bubble_costs()
    timeline = simulate("zb-h1", p, m, Costs(forward, backward, weight))
    assert idle_in_span(timeline) == (p - 1) * (forward + backward - weight)
    assert timeline.messages == 2 * m * (p - 1)
    if m > p:  # with m = p the last round trip is shorter by 2c
        unit = 1000
        latency = Random().randint(1, unit // 2)
        assert idle_in_span(simulate("zb-h1", p, m, Costs(unit, unit, unit, latency))) == (p - 1) * (unit + 4 * latency)


@pytest.mark.parametrize("kept", [0, 0.5, 32 / 34, 1])
def test_zb_h1_holds_no_more_than_1f1b(kept: float) -> None:
    """In the paper's model, in which an activation shrinks between B and W; with kept = 1 on every rank alike."""
    for p, m in SIZES:
        peaks = peak_activations(build("zb-h1", ranks=p, microbatches=m), kept)
        assert max(peaks) == peaks[0] == min(p, m)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= 2 * p - 1])
def test_zb_h2(p: int, m: int) -> None:
    forward, backward, weight = zero_bubble_costs()
    backward = max(backward, 2 * weight - forward)
    latency = Random().randint(0, weight // 2)
    timeline = simulate("zb-h2", p, m, Costs(forward, backward, weight, latency))
    assert idle_in_span(timeline) == (p - 1) * (forward + backward + 2 * latency - 2 * weight)
    assert max(timeline.peak_activations) == 2 * p - 1
    assert timeline.messages == 2 * m * (p - 1)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_smallest_bubble_of_one_chunk_under_a_cap(p: int, m: int) -> None:
    for cap in range(p, 2 * p + 2):
        timeline = build("zb-h2", ranks=p, microbatches=m, memory=cap).simulate(UNIT)
        assert idle_in_span(timeline) == max(0, 2 * p - 1 - min(cap, m))
        assert max(timeline.peak_activations) <= cap


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zb_v(p: int, m: int) -> None:
    timeline = simulate("zb-v", p, m, CHUNK)
    if m >= 2 * p - 1:
        assert idle_in_span(timeline) == 0
        assert timeline.peak_activations == [p] * p
    assert timeline.messages == 4 * m * (p - 1)


def v_law(p: int, memory: int) -> int:
    """The smallest idle time of V placement, in steps of a chunk, with ``memory`` chunks a rank."""
    return {2 * p - 1: 3}.get(memory, 6 * p - 1 - 3 * memory) if memory < 2 * p else 0


@pytest.mark.parametrize("p", range(3, 17))
@pytest.mark.parametrize(("name", "memory"), [("v-half", lambda p: (p + 2) // 2), ("v-min", lambda p: (p + 4) // 3)])
def test_v_half_and_v_min_are_on_the_law_of_v_placement(name: str, memory, p: int) -> None:  # type: ignore[no-untyped-def]
    for m in (2 * p, 2 * p + 3):
        timeline = simulate(name, p, m, CHUNK)
        assert max(timeline.peak_activations) == memory(p)
        assert idle_in_span(timeline) == v_law(p, 2 * memory(p))
        assert timeline.messages == 4 * m * (p - 1)


@pytest.mark.parametrize("name", ["v-half", "v-min"])
def test_v_half_and_v_min_of_two_ranks_miss_the_law_by_one(name: str) -> None:
    """Their blocks hold 2p = 4 chunks there, with which zb-v has no bubble; the repeated block leaves one step."""
    for m in (4, 8, 9):
        assert idle_in_span(simulate(name, 2, m, CHUNK)) == 1
        assert idle_in_span(simulate("zb-v", 2, m, CHUNK)) == v_law(2, 4) == 0


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_chimera(p: int, blocks: int) -> None:
    m = p * blocks
    timeline = simulate("chimera", p, m, Costs(2, 1, 1))
    assert timeline.bubble_ratio == pytest.approx((p - 2) / (2 * m + p - 2), rel=1e-12)
    half = [p // 2 + 1 + rank for rank in range(p // 2)]
    assert timeline.peak_activations == half + half[::-1]
    assert timeline.messages == 2 * m * (p - 1)


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_chimera_with_backwards_twice_as_long(p: int) -> None:
    """The published ratio is that of one block of p. Each further block in a row adds a gap of (p - 2)F, which the
    paper closes by running two forwards at a time."""
    assert simulate("chimera", p, p, UNIT).bubble_ratio == pytest.approx((p - 2) / (1.5 * p + p - 2), rel=1e-12)
    for blocks in (1, 2, 3, 5):
        assert idle(simulate("chimera", p, p * blocks, UNIT)) == (p - 2) * (blocks + 1)


@pytest.mark.parametrize("waves", [1, 2, 4])
@pytest.mark.parametrize("p", [2, 3, 4, 6, 8])
def test_hanayo(p: int, waves: int) -> None:
    """The published ratio is given as approximate, and is above what the order takes by up to a fifth."""
    timeline = simulate("hanayo", p, p, UNIT, chunks=2 * waves)
    about = (2 * p - 2) / (3 * p * waves + p - 1)
    assert 0.8 * about < timeline.bubble_ratio < 1.02 * about
    assert max(timeline.peak_activations) == p == max(simulate("1f1b", p, p, UNIT).peak_activations)
    assert timeline.messages == 2 * p * (2 * p * waves - 2 * waves)


@pytest.mark.parametrize("slices", [2, 3, 4])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_seq1f1b(p: int, m: int, slices: int) -> None:
    costs = random_costs()
    timeline = simulate("seq1f1b", p, m, Costs(*(slices * cost for cost in costs)), slices)
    assert idle(timeline) == (p - 1) * sum(costs)
    expected = [min(p - rank + slices - 1, m * slices) for rank in range(p)]
    assert [peak * slices for peak in timeline.peak_activations] == expected
    assert timeline.messages == 2 * m * slices * (p - 1)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_pipedream_2bw_takes_no_longer_for_a_batch_than_its_work(p: int, m: int) -> None:
    batches, costs = 4, random_costs()
    timeline = simulate("pipedream-2bw", p, m * batches, Costs(*costs))
    for rank in range(p):
        ends = [span.end for span in timeline.of_rank(rank) if span.op == "BW"]
        whole = [after - before for before, after in zip(ends[m - 1 :: m], ends[2 * m - 1 :: m], strict=False)]
        assert whole == [m * sum(costs)] * (batches - 1)
    assert max(timeline.peak_activations) == p
    assert timeline.messages == 2 * m * batches * (p - 1)


# ---- Laws


def one_chunk(p: int, m: int) -> list[Schedule]:
    return [build(name, ranks=p, microbatches=m) for name in ("gpipe", "1f1b", "zb-h1", "zb-h2")]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_no_schedule_of_one_chunk_is_shorter_than_its_chain(p: int, m: int) -> None:
    forward, backward, weight = random_costs()
    latency = Random().randint(0, 10**6)
    chain = (m + p - 1) * (forward + backward) + 2 * (p - 1) * latency + weight
    for schedule in one_chunk(p, m):
        assert schedule.simulate(Costs(forward, backward, weight, latency)).makespan >= chain


@pytest.mark.parametrize(("m", "one", "v"), [(2, "1.29", "1.38"), (4, "1.15", "1.20"), (8, "1.08", "1.10")])
def test_best_speed_up_over_1f1b_at_two_ranks(m: int, one: str, v: str) -> None:
    """By makespan, with F = B = W: the best possible, reached by zb-h1 with one chunk and by v-half in V placement."""
    base = simulate("1f1b", 2, m, UNIT).makespan
    assert f"{base / simulate('zb-h1', 2, m, UNIT).makespan:.2f}" == one
    assert f"{base / simulate('v-half', 2, m, UNIT).makespan:.2f}" == v
    for schedule in one_chunk(2, m):
        assert base / schedule.simulate(UNIT).makespan <= float(one) + 0.005
    for name in ("zb-v", "v-half", "v-min"):
        assert base / simulate(name, 2, m, UNIT).makespan <= float(v) + 0.005
