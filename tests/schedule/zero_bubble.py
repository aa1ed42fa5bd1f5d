"""The published zero-bubble heuristic, as a baseline: one chunk a rank, the best of its eight flag combinations.

Written from its description in "Zero Bubble Pipeline Parallelism", section 3.1: as many warm-up F as memory allows
and as end before the first B can start; then one F and one B a rank in turn; W in gaps that are long enough, in
shorter ones where the gap would raise the largest bubble, and wherever memory presses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipekern.schedule import Action, Costs, Schedule


class DoesNotFitError(Exception):
    """The heuristic needs more memory than the cap."""


@dataclass
class _Rank:
    end: float = 0
    held: float = 0
    bubble: float = 0
    row: list[Action] = field(default_factory=list)
    ends: dict[str, list[float]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})

    def count(self, op: str) -> int:
        return len(self.ends[op])

    @property
    def waiting(self) -> int:
        """W that could run."""
        return self.count("B") - self.count("W")


def _number(cost: float | Sequence[float]) -> float:
    assert not isinstance(cost, Sequence), "the heuristic is for stages of equal cost"
    return cost


class _Heuristic:
    def __init__(self, ranks: int, microbatches: int, costs: Costs, memory: float, flags: tuple[bool, ...]):
        self.m, self.cap, self.comm = microbatches, memory, _number(costs.comm)
        self.cost = {"F": _number(costs.forward), "B": _number(costs.backward), "W": _number(costs.weight)}
        self.gain = {"F": 1, "B": costs.kept - 1, "W": -costs.kept}
        self.wait_for_first_b, self.backward_first, self.weight_in_small_gaps = flags
        self.ranks = [_Rank() for _ in range(ranks)]

    def arrival(self, at: int, op: str) -> float:
        peer = at - 1 if op == "F" else at + 1
        if op == "W" or not 0 <= peer < len(self.ranks):
            return 0
        return self.ranks[peer].ends[op][self.ranks[at].count(op)] + self.comm

    def put(self, at: int, op: str) -> None:
        rank = self.ranks[at]
        start = max(rank.end, self.arrival(at, op))
        if rank.row:
            rank.bubble += start - rank.end
        rank.held += self.gain[op]
        if rank.held > self.cap + 1e-9:
            raise DoesNotFitError
        rank.row.append(Action(op, at, rank.count(op)))
        rank.end = start + self.cost[op]
        rank.ends[op].append(rank.end)

    def small_gap_hidden(self, at: int, gap: float) -> bool:
        return gap <= max(rank.bubble for rank in self.ranks) - self.ranks[at].bubble

    def fill(self, at: int, op: str) -> None:
        rank, until = self.ranks[at], self.arrival(at, op)
        while rank.waiting and rank.end + self.cost["W"] <= until:
            self.put(at, "W")
        short = rank.waiting and rank.end < until
        if short and (self.weight_in_small_gaps or not self.small_gap_hidden(at, until - rank.end)):
            self.put(at, "W")

    def warm_up(self) -> None:
        p = len(self.ranks)
        for at in range(p):
            self.put(at, "F")
        extra = [0] * p
        gradient = self.ranks[-1].end + self.cost["B"]
        for at in range(p - 2, -1, -1):
            now, arrives = self.ranks[at].end, gradient + self.comm
            while extra[at] + 1 < self.m and extra[at] + 2 <= self.cap + 1e-9:
                if now + self.cost["F"] > arrives if self.wait_for_first_b else now >= arrives:
                    break
                now += self.cost["F"]
                extra[at] += 1
            gradient = max(now, arrives) + self.cost["B"]
        for at in range(1, p):
            while extra[at] and extra[at] >= extra[at - 1] and extra[at] + 1 < self.m:
                extra[at] -= 1
        for at in range(p):
            for _ in range(extra[at]):
                self.put(at, "F")
        for at in reversed(range(p)):
            self.put(at, "B")

    def holds_back(self, at: int) -> bool:
        """Whether the next F of this rank would only delay the B of the next rank."""
        if not self.backward_first or at + 1 == len(self.ranks):
            return False
        rank, after = self.ranks[at], self.ranks[at + 1]
        if rank.count("F") < after.count("F") + 2:
            return False
        due = after.end + self.cost["F"] + self.cost["B"] + self.comm
        if rank.end >= due:
            return True
        held, weights = rank.held + 1, 0
        while held > self.cap + 1e-9 and weights < rank.waiting:
            held += self.gain["W"]
            weights += 1
        if rank.end + self.cost["F"] + weights * self.cost["W"] <= due:
            return False
        return self.small_gap_hidden(at, due - rank.end)

    def turn(self, microbatch: int) -> None:
        p = len(self.ranks)
        wanted = [self.ranks[at].count("F") < self.m and not self.holds_back(at) for at in range(p)]
        for at in range(p):
            if not all(wanted[at:]):
                continue
            while self.ranks[at].held + 1 > self.cap + 1e-9 and self.ranks[at].waiting:
                self.put(at, "W")
            if at:
                self.fill(at, "F")
            self.put(at, "F")
        for at in reversed(range(p)):
            if self.ranks[at].count("F") <= microbatch:
                raise DoesNotFitError
            if at + 1 < p:
                self.fill(at, "B")
            while at == 0 and self.ranks[0].count("F") == self.m and self.ranks[0].waiting:
                self.put(0, "W")
            self.put(at, "B")

    def run(self) -> Schedule:
        self.warm_up()
        for microbatch in range(1, self.m):
            self.turn(microbatch)
        for at, rank in enumerate(self.ranks):
            while rank.waiting:
                self.put(at, "W")
        rows = tuple(tuple(rank.row) for rank in self.ranks)
        return Schedule("zero-bubble heuristic", self.m, tuple(range(len(self.ranks))), rows)


def heuristic(ranks: int, microbatches: int, costs: Costs, memory: float) -> list[Schedule]:
    """The schedules of those flag combinations that fit the cap; costs are one number each."""
    found = []
    for flags in itertools.product((False, True), repeat=3):
        try:
            found.append(_Heuristic(ranks, microbatches, costs, memory, flags).run())
        except DoesNotFitError:
            continue
    return found
