"""What is put away: as few activations as keep every rank under its limit, and back before they are needed."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations

import pytest

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Link
from pipekern.plan.offload import Offload, Trip, choose_offload, offload_share, stays
from pipekern.schedule import Costs, build, names
from pipekern.schedule.comms import RECEIVES, Program
from pipekern.schedule.ir import OPS, Schedule
from pipekern.schedule.simulate import peak_activations
from pipekern.trace import memory
from tests.schedule.sample import random_schedule


def test_golden() -> None:
    """GPipe holds four while F3 and BW0 run. For three, 1 is away during F3 and 2 during BW0, a copy beside the action
    before and after.
    """
    schedule = build("gpipe", ranks=1, microbatches=4)
    offload = offload_share(schedule, 0.25)
    assert offload.trips == ((Trip(0, 1, leaves=3, returns=4), Trip(0, 2, leaves=4, returns=5)),)
    assert offload.peak_activations() == [3] and offload.host_activations() == [2]
    row = offload.program(schedule.program()).instructions[0]
    assert " ".join(f"{one.op}{one.microbatch}" for one in row) == (
        "F0 F1 F2 AWAY1 F3 AWAY2 BACK1 BW0 BACK2 BW1 BW2 BW3"
    )
    assert str(offload) == "rank 0: 2 away, 4 -> 3 at the peak"


def test_ranks_that_hold_less_have_room() -> None:
    """1F1B holds 4, 3, 2, 1; half of the most is 2."""
    offload = offload_share(build("1f1b", ranks=4, microbatches=8), 0.5)
    assert offload.peak_activations() == [2, 2, 2, 1] and list(map(bool, offload.trips)) == [True, True, False, False]


def _counted(schedule: Schedule, program: Program, kept: Fraction) -> list[Fraction]:
    """The peaks, by walking through the instructions as a run does."""
    one = Fraction(1)
    change = {"F": one, "AWAY": -one, "BACK": one, "B": kept - 1, "W": -kept, "BW": -one}
    peaks = []
    for row in program.instructions:
        held = peak = Fraction(0)
        for op, stage, *_ in row:
            held += change.get(op, Fraction(0)) / schedule.share(stage)
            peak = max(peak, held)
        assert held == 0
        peaks.append(peak)
    return peaks


@pytest.mark.parametrize("name", [name for name in names() if build(name, ranks=4, microbatches=8).runnable])
def test_peaks_are_those_of_the_program(name: str) -> None:
    draw = random.Random()
    schedule = build(name, ranks=4, microbatches=8)
    before = peak_activations(schedule)
    assert stays(schedule).peak_activations() == before
    last = before
    for share in sorted(draw.random() for _ in range(4)):
        kept = Fraction(draw.randint(0, 4), 4)
        offload = offload_share(schedule, share)
        program = offload.program(schedule.program())
        peaks = offload.peak_activations()
        assert _counted(schedule, program, Fraction(1)) == peaks
        assert _counted(schedule, program, kept) == offload.peak_activations(float(kept))
        assert all(a <= b for a, b in zip(peaks, before, strict=True))
        assert all(a <= b for a, b in zip(peaks, last, strict=True))  # more asked for, no more held
        last = peaks
        _check_order(schedule, program, offload)
        timeline = offload.simulate(Costs(3, 2, 1))
        shares = [Fraction(1, schedule.share(stage)) for stage in range(schedule.stages)]
        curves = memory.curves(timeline, shares)
        assert [max(value for _, value in curve) for curve in curves] == timeline.peak_activations == peaks


def _check_order(schedule: Schedule, program: Program, offload: Offload) -> None:
    """Every activation leaves after its F and is back before its B; all else is in its old order."""
    plain = schedule.program()
    for rank, row in enumerate(program.instructions):
        moves = ("AWAY", "BACK")
        assert tuple(one for one in row if one.op not in moves) == plain.instructions[rank]
        at = {one[:3]: index for index, one in enumerate(row)}
        for trip in offload.trips[rank]:
            places = [at[op, trip.stage, trip.microbatch] for op in ("F", "AWAY", "BACK")]
            keys = [(op, trip.stage, trip.microbatch) for op in ("B", "BW")]
            backward = next(at[key] for key in keys if key in at)
            assert [*places, backward] == sorted([*places, backward])
            assert row[places[1] - 1].op not in RECEIVES  # before what the next action receives takes memory
        assert [index for one, index in program.order if one == rank] == list(range(len(row)))
    without = [(rank, program.instructions[rank][index]) for rank, index in program.order]
    assert [pair for pair in without if pair[1].op not in moves] == [
        (rank, plain.instructions[rank][index]) for rank, index in plain.order
    ]


def test_as_few_as_do() -> None:
    """Random orders of one chunk: no smaller set of trips stays under the limit, and what is promised is reached."""
    draw, checked = random.Random(), 0
    while checked < 40:
        schedule = random_schedule(draw)
        if schedule.chunks > 1 or not schedule.runnable or schedule.microbatches > 6:
            continue
        checked += 1
        lead = draw.choice([0, 1])
        limit = draw.randint(1, 4)
        one = [Fraction(1)] * schedule.stages
        offload = choose_offload(schedule, [limit] * schedule.ranks, one, one, leads=[lead])
        for rank, trips in enumerate(offload.trips):
            able = [
                trip
                for row in choose_offload(schedule, [0] * schedule.ranks, one, one, leads=[lead]).trips
                for trip in row
                if schedule.stage_rank[trip.stage] == rank
            ]
            peak = offload.peaks(one, one)[rank]
            for few in combinations(able, max(0, len(trips) - 1)):
                other = Offload(schedule, tuple(few if r == rank else () for r in range(schedule.ranks)))
                assert not trips or other.peaks(one, one)[rank] > max(limit, peak)


def test_unequal_stages_stay_under_their_bytes() -> None:
    draw = random.Random()
    schedule = build("zb-v", ranks=3, microbatches=9)
    whole = [draw.randint(1, 9) for _ in range(schedule.stages)]
    waiting = [draw.randint(0, size) for size in whole]
    before = stays(schedule).peaks(whole, waiting)
    least = choose_offload(schedule, [0] * 3, whole, waiting).peaks(whole, waiting)
    for part in (0.2, 0.5, 0.8):
        limits = [low + part * (high - low) for low, high in zip(least, before, strict=True)]
        peaks = choose_offload(schedule, limits, whole, waiting).peaks(whole, waiting)
        assert all(a <= b for a, b in zip(peaks, limits, strict=True)), (whole, waiting, peaks, limits)


def test_a_slow_link_is_told() -> None:
    """One rank, GPipe, actions of 100 µs: 100 bytes take 100 µs at 1 byte a µs and hide; at half of it they do not."""
    schedule = build("gpipe", ranks=1, microbatches=4)
    offload = Offload(schedule, ((Trip(0, 1, 3, 4),),))
    costs = Costs(100, 60, 40)
    assert offload.stalls(costs, [100], Link(bandwidth=1e6)) == [0]
    assert offload.stalls(costs, [100], Link(bandwidth=0.5e6)) == [200]  # 100 on the way out, 100 on the way back
    assert offload.stalls(costs, [100], Link(latency=5, bandwidth=1e6)) == [10]
    assert stays(schedule).stalls(costs, [100], Link(bandwidth=1)) == [0]


def test_with_time_for_the_copies_where_that_is_enough() -> None:
    schedule = build("1f1b", ranks=8, microbatches=16)
    for share, lead in ((0.25, 1), (1.0, 0)):
        row = schedule.actions[0]
        for trip in offload_share(schedule, share).trips[0]:
            assert trip.leaves == row.index(("F", *trip[:2])) + 1 + lead
            assert trip.returns == row.index(("BW", *trip[:2])) - lead
    assert all(action.op in OPS for action in row)


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half", float("nan")])
def test_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        offload_share(build("1f1b", ranks=2, microbatches=4), share)
