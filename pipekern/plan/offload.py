"""Activations that are put away in host memory between forward and backward: which of them, and when they are back.

Time is counted in a rank's actions. An activation is copied out while the ``lead`` actions after its F run, and copied
back while the ``lead`` actions before its B run; between them the device does not hold it. With a lead of 0 the rank
waits for the copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Link
from pipekern.schedule.comms import RECEIVES, Instruction, Program
from pipekern.schedule.ir import OPS, Action, Schedule
from pipekern.schedule.simulate import Costs, simulate
from pipekern.trace.timeline import Span, Timeline

LEADS = (1, 0)

Amount = float | Fraction


class Trip(NamedTuple):
    """The activation of one micro-batch through one stage, away from the start of its rank's action ``leaves`` to the
    start of action ``returns``.
    """

    stage: int
    microbatch: int
    leaves: int
    returns: int


class _Life(NamedTuple):
    """Positions among a rank's actions: of F, of the backward that needs the activation, and of the last."""

    forward: int
    backward: int
    last: int


@dataclass(frozen=True)
class Offload:
    """The activations that each rank puts away: ``trips[r]`` are rank r's, in the order in which they leave."""

    schedule: Schedule
    trips: tuple[tuple[Trip, ...], ...]

    def peak_activations(self, kept: float = 1.0) -> list[float]:
        """As :func:`pipekern.schedule.simulate.peak_activations`; an activation that is away does not count, one on its
        way does.
        """
        whole, waiting = _shares(self.schedule, kept)
        return [_plain(value) for value in self.peaks(whole, waiting)]

    def peaks(self, whole: Sequence[Amount], waiting: Sequence[Amount]) -> list[Amount]:
        """The most that each rank holds, where stage s holds ``whole[s]`` of a micro-batch from F to B, and
        ``waiting[s]`` from B to W.
        """
        rows = zip(self.schedule.actions, self.trips, strict=True)
        return [_peak(row, trips, whole, waiting) for row, trips in rows]

    def host_activations(self) -> list[float]:
        """The most activations that each rank has in host memory, which an activation takes from its F to its B."""
        whole, _ = _shares(self.schedule, 0.0)
        found = []
        for row, trips in zip(self.schedule.actions, self.trips, strict=True):
            lives, held = _lives(row), [Fraction(0)] * (len(row) + 1)
            for trip in trips:
                life = lives[trip[:2]]
                for index in range(life.forward, life.backward + 1):
                    held[index] += whole[trip.stage]
            found.append(_plain(max(held)))
        return found

    def program(self, program: Program) -> Program:
        """``program`` with an AWAY where an activation has left, and a BACK where its return begins."""
        rows, added = [], []
        for row, trips in zip(program.instructions, self.trips, strict=True):
            before = _boundaries(row, trips)
            rows.append(tuple(one for index, own in enumerate(row) for one in (*before.get(index, ()), own)))
            added.append(before)
        done = [0] * len(rows)
        order = []
        for rank, index in program.order:
            for _ in range(len(added[rank].get(index, ())) + 1):
                order.append((rank, done[rank]))
                done[rank] += 1
        return program._replace(instructions=tuple(rows), order=tuple(order))

    def simulate(self, costs: Costs) -> Timeline:
        """The schedule's timeline with spans AWAY and BACK, which take no time, and the peaks that are left."""
        timeline = simulate(self.schedule, costs)
        spans = [span for rank in range(self.schedule.ranks) for span in self._spans(timeline, rank)]
        return replace(timeline, spans=tuple(spans), peak_activations=self.peak_activations(costs.kept))

    def _spans(self, timeline: Timeline, rank: int) -> Iterator[Span]:
        moves, row, pairs = _moves(self.trips[rank]), self.schedule.actions[rank], self.schedule.pairs
        for index, span in enumerate(timeline.of_rank(rank)):
            second = row[index - 1] in pairs if index else False  # of two that overlap, which stay next to each other
            both = [] if second else [index, index + 1] if row[index] in pairs else [index]
            for op, trip in (move for place in both for move in moves.get(place, ())):
                yield Span(rank, op, *trip[:2], span.start, span.start)
            yield span

    def stalls(self, costs: Costs, sizes: Sequence[float], link: Link) -> list[float]:
        """Microseconds by which copies that ``link`` to the host does not hide make each rank's step longer.

        ``sizes[s]`` are the bytes that stage s puts away of a micro-batch. Copies of one direction follow each other,
        the two directions do not disturb each other, and a rank that waits is not late for the others.
        """
        timeline = simulate(self.schedule, costs)
        times = [link.time(size) for size in sizes]
        return [self._stall(timeline.of_rank(rank), rank, times) for rank in range(self.schedule.ranks)]

    def _stall(self, spans: Sequence[Span], rank: int, times: Sequence[float]) -> float:
        moves, away = _moves(self.trips[rank]), {trip[:2] for trip in self.trips[rank]}
        late = leaving = returning = 0.0
        there: dict[tuple[int, int], float] = {}  # when a copy is done
        for index, span in enumerate(spans):
            for op, trip in moves.get(index, ()):
                if op == "AWAY":
                    late = max(late, there[trip[:2]] - span.start)
                else:
                    returning = max(returning, span.start + late) + times[trip.stage]
                    there[trip[:2]] = returning
            key = span.stage, span.microbatch
            if key in away and span.op == "F":
                leaving = max(leaving, span.end + late) + times[span.stage]
                there[key] = leaving
            elif key in away and span.op in ("B", "BW"):
                late = max(late, there[key] - span.start)
        return late

    def __str__(self) -> str:
        peaks, before = self.peak_activations(), stays(self.schedule).peak_activations()
        rows = enumerate(zip(self.trips, before, peaks, strict=True))
        return "; ".join(f"rank {r}: {len(trips)} away, {a:g} -> {b:g} at the peak" for r, (trips, a, b) in rows)


def stays(schedule: Schedule) -> Offload:
    """Nothing is put away."""
    return Offload(schedule, ((),) * schedule.ranks)


def offload_share(schedule: Schedule, share: object, leads: Sequence[int] = LEADS) -> Offload:
    """Put away what a rank holds above ``1 - share`` of the largest peak of all ranks, or as much of it as the schedule
    leaves time for: devices are alike, and a rank that holds less has room.

    Raises ``ConfigError`` for a share that is not from 0 to 1.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigError(f"offload={share!r}: give the share of the largest peak to put away, from 0 to 1")
    whole, waiting = _shares(schedule, 1.0)
    limit = (1 - Fraction(share)) * Fraction(max(stays(schedule).peaks(whole, waiting)))
    return choose_offload(schedule, [limit] * schedule.ranks, whole, waiting, leads)


def choose_offload(
    schedule: Schedule,
    limits: Sequence[Amount],
    whole: Sequence[Amount],
    waiting: Sequence[Amount],
    leads: Sequence[int] = LEADS,
) -> Offload:
    """The activations to put away so that rank r holds at most ``limits[r]``, or the least that it can.

    ``whole`` and ``waiting`` are as in :meth:`Offload.peaks`. The first of ``leads`` with which a rank stays under its
    limit is taken, else the one that leaves the least. At each moment that holds too much those are put away that are
    needed last, which for activations of one size are the fewest copies.
    """
    rows = zip(schedule.actions, limits, strict=True)
    return Offload(schedule, tuple(_rank_trips(row, limit, whole, waiting, leads) for row, limit in rows))


def _rank_trips(
    row: Sequence[Action], limit: Amount, whole: Sequence[Amount], waiting: Sequence[Amount], leads: Sequence[int]
) -> tuple[Trip, ...]:
    if _peak(row, (), whole, waiting) <= limit:
        return ()
    ways = [_with_lead(row, limit, whole, waiting, lead) for lead in leads]
    peaks = [_peak(row, trips, whole, waiting) for trips in ways]
    enough = (trips for trips, peak in zip(ways, peaks, strict=True) if peak <= limit)
    return next(enough, ways[peaks.index(min(peaks))])


def _with_lead(
    row: Sequence[Action], limit: Amount, whole: Sequence[Amount], waiting: Sequence[Amount], lead: int
) -> tuple[Trip, ...]:
    lives = _lives(row).items()
    able = [Trip(*key, life.forward + 1 + lead, life.backward - lead) for key, life in lives]
    able = [trip for trip in able if trip.leaves < trip.returns]
    limit = max(limit, _peak(row, able, whole, waiting))
    held, chosen = _held(row, (), whole, waiting), set()
    for index in range(len(row)):
        ready = sorted((t for t in able if t.leaves <= index < t.returns and t not in chosen), key=lambda t: t.returns)
        while held[index] > limit:
            trip = ready.pop()
            chosen.add(trip)
            for place in range(trip.leaves, trip.returns):
                held[place] -= whole[trip.stage]
    return tuple(trip for trip in able if trip in chosen)


def _lives(row: Sequence[Action]) -> dict[tuple[int, int], _Life]:
    """By stage and micro-batch, in the order of the forwards."""
    lives: dict[tuple[int, int], _Life] = {}
    for index, (op, *key) in enumerate(row):
        stage, microbatch = key
        if op == "F":
            lives[stage, microbatch] = _Life(index, index, index)
        elif op == "W":
            lives[stage, microbatch] = lives[stage, microbatch]._replace(last=index)
        else:
            lives[stage, microbatch] = lives[stage, microbatch]._replace(backward=index, last=index)
    return lives


def _held(
    row: Sequence[Action], trips: Sequence[Trip], whole: Sequence[Amount], waiting: Sequence[Amount]
) -> list[Amount]:
    """What is held while each action runs."""
    change: list[Amount] = [Fraction(0)] * (len(row) + 1)
    for (stage, _), life in _lives(row).items():
        change[life.forward] += whole[stage]
        change[life.backward + 1] -= whole[stage]
        change[life.backward + 1] += waiting[stage]
        change[life.last + 1] -= waiting[stage]
    for trip in trips:
        change[trip.leaves] -= whole[trip.stage]
        change[trip.returns] += whole[trip.stage]
    held: Amount = Fraction(0)
    found: list[Amount] = []
    for step in change[:-1]:
        held += step
        found.append(held)
    return found


def _peak(row: Sequence[Action], trips: Sequence[Trip], whole: Sequence[Amount], waiting: Sequence[Amount]) -> Amount:
    return max(_held(row, trips, whole, waiting), default=Fraction(0))


def _shares(schedule: Schedule, kept: float) -> tuple[list[Fraction], list[Fraction]]:
    """What a stage holds of a micro-batch from F to B and from B to W, in activations through its rank's share."""
    whole = [Fraction(1, schedule.share(stage) * schedule.slices) for stage in range(schedule.stages)]
    return whole, [share * Fraction(kept) for share in whole]


def _moves(trips: Sequence[Trip]) -> dict[int, list[tuple[str, Trip]]]:
    """What begins before each action; what leaves makes room for what returns."""
    found: dict[int, list[tuple[str, Trip]]] = {}
    for trip in trips:
        found.setdefault(trip.leaves, []).append(("AWAY", trip))
    for trip in sorted(trips, key=lambda trip: trip.returns):
        found.setdefault(trip.returns, []).append(("BACK", trip))
    return found


def _boundaries(row: Sequence[Instruction], trips: Sequence[Trip]) -> dict[int, list[Instruction]]:
    """What goes before which place of ``row``: before an action with the messages that it receives."""
    moves, action, first = _moves(trips), 0, 0
    found: dict[int, list[Instruction]] = {}
    for index, one in enumerate(row):
        if one.op in OPS:
            if action in moves:
                found[first] = [Instruction(op, *trip[:2]) for op, trip in moves[action]]
            action += 1
        if one.op not in RECEIVES:
            first = index + 1
    return found


def _plain(value: Amount) -> float:
    return int(value) if value == int(value) else float(value)
