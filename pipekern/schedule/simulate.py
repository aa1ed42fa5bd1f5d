"""The exact timeline of a schedule under given costs, linear in the number of its actions.

An action starts when its rank is free and everything that it waits for is there; a message is there ``comm`` after the
end of what made it, and at once between stages of one rank. All times are computed as integers in a
common fraction of a microsecond, so that a result is as exact as the costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule.collectives import first_forwards, last_weights
from pipekern.schedule.exact import fractions, number, scaled
from pipekern.schedule.ir import Action, Schedule
from pipekern.schedule.order import explain, sequential
from pipekern.trace.timeline import Span, Timeline

Cost = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Times in microseconds of one micro-batch through a rank's whole share, or lists with one value a stage.

    Of v chunks a rank each takes 1/v of the one value; of q slices of a micro-batch each takes 1/q.

    ``backward`` is the input gradient (B), ``weight`` the weight gradient (W), ``pair`` an overlapped F and BW
    (default: their sum). ``comm`` is one message's latency, or a list with one value for each pair of
    neighbouring stages (value ``s`` between stages ``s`` and ``s + 1``). ``kept`` is the share of an activation that
    stays from its B to its W. ``gather`` and ``reduce`` are the times in which a rank fetches and sums what is between
    the replicas of its share, one stage after the other, beside its work: all fetching begins with the step, a sum
    once a stage's last weight work has ended. Raises ``ConfigError`` for a value that is negative or not finite.
    """

    forward: Cost
    backward: Cost
    weight: Cost
    comm: Cost = 0
    kept: float = 1.0
    pair: Cost | None = None
    gather: Cost = 0
    reduce: Cost = 0

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "weight", "comm", "kept", "pair", "gather", "reduce"):
            value = getattr(self, name)
            if value is not None:
                fractions(name, value if isinstance(value, Sequence) else [value])
        if self.kept > 1:
            raise ConfigError(f"kept={self.kept} is more than 1, a whole activation; give a share from 0 to 1")


@dataclass(frozen=True)
class _Ticks:
    """The costs of every stage as integers, ``scale`` of them a microsecond."""

    scale: int
    forward: list[int]
    backward: list[int]
    weight: list[int]
    both: list[int]
    comm: list[int]
    pair: list[int]
    gather: list[int]
    reduce: list[int]

    @classmethod
    def of(cls, schedule: Schedule, costs: Costs) -> _Ticks:
        shares = [schedule.share(stage) for stage in range(schedule.stages)]
        forward = _exact("forward", costs.forward, shares, schedule.slices)
        backward = _exact("backward", costs.backward, shares, schedule.slices)
        weight = _exact("weight", costs.weight, shares, schedule.slices)
        comm = _exact("comm", costs.comm, [1] * (schedule.stages - 1))
        both = [b + w for b, w in zip(backward, weight, strict=True)]
        pair = [] if costs.pair is None else _exact("pair", costs.pair, shares, schedule.slices)
        gather, reduce = (_exact(n, c, shares) for n, c in (("gather", costs.gather), ("reduce", costs.reduce)))
        scale, ticks = scaled(forward, backward, weight, both, comm, pair, gather, reduce)
        return cls(scale, *ticks)

    def of_op(self, op: str) -> list[int]:
        return {"F": self.forward, "B": self.backward, "W": self.weight, "BW": self.both}[op]


def _exact(name: str, cost: Cost, parts: Sequence[int], slices: int = 1) -> list[Fraction]:
    """A cost for each of ``parts``: the value listed for it, or the one cost divided by the part's number."""
    if not isinstance(cost, Sequence):
        return [Fraction(cost) / (part * slices) for part in parts]
    if len(cost) != len(parts):
        raise ConfigError(f"{name} has {len(cost)} values; this schedule needs one number or {len(parts)} values")
    return [value / slices for value in fractions(name, cost)]


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The timeline of one step, sends never blocking; raises ``ScheduleError`` where the order deadlocks.

    ``peak_activations`` counts an activation whole from its F to its B and ``kept`` of it from its B to its W, in
    activations of one micro-batch through the rank's whole share.
    """
    steps, stuck = sequential(schedule)
    if stuck:
        raise ScheduleError("schedule deadlocks", explain(schedule, stuck))
    run = _Run(schedule, _Ticks.of(schedule, costs))
    for rank, index in steps:
        run.step(rank, index)
    scale = run.ticks.scale
    starts = [row[0][1] if row else 0 for row in run.spans]
    run.reduce()
    makespan = max(run.clock, default=0)
    span = max((end - start for start, end in zip(starts, run.clock, strict=True)), default=0)
    return Timeline(
        spans=tuple(_span(rank, *one, scale) for rank in range(schedule.ranks) for one in run.row(rank)),
        makespan=number(makespan, scale),
        span=number(span, scale),
        busy=[number(busy, scale) for busy in run.busy],
        peak_activations=peak_activations(schedule, costs.kept),
        messages=run.messages,
    )


class _Run:
    """The state of a simulation: every rank's clock, and when each result is there."""

    def __init__(self, schedule: Schedule, ticks: _Ticks):
        self.schedule = schedule
        self.ticks = ticks
        self.clock = [0] * schedule.ranks
        self.busy = [0] * schedule.ranks
        self.spans: list[list[tuple[Action, int, int]]] = [[] for _ in range(schedule.ranks)]
        self.messages = 0
        self._output = [[0] * schedule.units for _ in range(schedule.stages)]
        self._gradient = [[0] * schedule.units for _ in range(schedule.stages)]
        self._collectives: list[list[tuple[Action, int, int]]] = [[] for _ in range(schedule.ranks)]
        self._gathered = [0] * schedule.stages
        for rank, row in enumerate(schedule.actions):
            self._collect(rank, "GATHER", [(stage, 0, ticks.gather[stage]) for stage in first_forwards(row)])

    def _collect(self, rank: int, op: str, works: Sequence[tuple[int, int, int]]) -> int:
        """Stages, when each could begin, and how long it takes: one after the other. Returns the end of the last."""
        clock = 0
        for stage, begin, cost in works:
            if cost:
                begin = max(begin, clock)
                clock = begin + cost
                self._collectives[rank].append((Action(op, stage, 0), begin, clock))
            if op == "GATHER":
                self._gathered[stage] = clock
        return clock

    def reduce(self) -> None:
        """Sum the gradients of every stage, after its last weight work; a rank has ended when its last sum has."""
        for rank, row in enumerate(self.schedule.actions):
            ends = {action: end for action, _, end in self.spans[rank]}
            works = [(stage, ends[action], self.ticks.reduce[stage]) for stage, action in last_weights(row).items()]
            self.clock[rank] = max(self.clock[rank], self._collect(rank, "REDUCE", works))

    def row(self, rank: int) -> list[tuple[Action, int, int]]:
        """What a rank does, in its order, and what goes between replicas meanwhile."""
        return self.spans[rank] + self._collectives[rank]

    def step(self, rank: int, index: int) -> None:
        row = self.schedule.actions[rank]
        action = row[index]
        pairs = self.schedule.pairs
        if pairs and index and row[index - 1] in pairs:
            return
        start = max(self.clock[rank], self._arrival(rank, action))
        if pairs and action in pairs:
            backward = row[index + 1]
            start = max(start, self._arrival(rank, backward))
            end = start + self._pair_cost(action, backward)
            self._done(rank, action, start, end)
            self._done(rank, backward, start, end)
        else:
            end = start + self.ticks.of_op(action.op)[action.stage]
            self._done(rank, action, start, end)
        self.clock[rank] = end
        self.busy[rank] += end - start

    def _pair_cost(self, forward: Action, backward: Action) -> int:
        if self.ticks.pair:
            return self.ticks.pair[forward.stage]
        return self.ticks.forward[forward.stage] + self.ticks.both[backward.stage]

    def _arrival(self, rank: int, action: Action) -> int:
        """When the last message that ``action`` needs is there; its own rank's results are there in any case."""
        op, stage, microbatch = action
        ready = self._gathered[stage] if op == "F" else 0
        if op == "F":
            source, link, made = self.schedule.previous_stage(stage), stage - 1, self._output
        elif op == "W":
            return 0
        else:
            source, link, made = self.schedule.next_stage(stage), stage, self._gradient
        if source is None or self.schedule.stage_rank[source] == rank:
            return ready
        self.messages += 1
        return max(ready, made[source][microbatch] + self.ticks.comm[link])

    def _done(self, rank: int, action: Action, start: int, end: int) -> None:
        op, stage, microbatch = action
        if op == "F":
            self._output[stage][microbatch] = end
        elif op != "W":
            self._gradient[stage][microbatch] = end
        self.spans[rank].append((action, start, end))


def peak_activations(schedule: Schedule, kept: float = 1.0) -> list[float]:
    """The most that each rank holds, in activations of one micro-batch through its whole share; it has no cost in it.

    An activation counts whole from its F to its B, and ``kept`` of it from its B to its W.
    """
    return [_peak(schedule, row, Fraction(kept)) for row in schedule.actions]


def _peak(schedule: Schedule, row: Sequence[Action], kept: Fraction) -> float:
    shares = math.lcm(1, *(schedule.share(action.stage) for action in row))
    scale = shares * kept.denominator * schedule.slices
    stays = int(kept * kept.denominator)
    held = peak = 0
    for op, stage, _ in row:
        unit = shares // schedule.share(stage)
        if op == "F":
            held += unit * kept.denominator
            peak = max(peak, held)
        else:
            held -= unit * {"B": kept.denominator - stays, "W": stays, "BW": kept.denominator}[op]
    return number(peak, scale)


def _span(rank: int, action: Action, start: int, end: int, scale: int) -> Span:
    return Span(rank, *action, number(start, scale), number(end, scale))
