"""The makespan of one schedule under many costs: its order is worked out once, and gone through in floating point."""

from __future__ import annotations

from collections.abc import Sequence

from pipekern.errors import ScheduleError
from pipekern.schedule.ir import Action, Schedule
from pipekern.schedule.order import explain, sequential

_Step = tuple[int, int, int, int, int]  # rank, cost, what it waits for, the message that brings it, what it makes


class Replay:
    """The same times as :func:`pipekern.schedule.simulate.simulate`, but for rounding and without its timeline.

    Raises ``ScheduleError`` where the order deadlocks.
    """

    def __init__(self, schedule: Schedule):
        steps, stuck = sequential(schedule)
        if stuck:
            raise ScheduleError("schedule deadlocks", explain(schedule, stuck))
        self.schedule = schedule
        self._nothing = 2 * schedule.stages * schedule.units  # a result that is there from the start
        self._free = 4 * schedule.stages  # a cost of 0
        self._steps = [step for rank, index in steps for step in self._of(rank, index)]

    def makespan(
        self, forward: Sequence[float], backward: Sequence[float], weight: Sequence[float], comm: Sequence[float]
    ) -> float:
        """``comm`` has one value for each two neighbouring stages, the others one a stage, of one micro-batch."""
        slices = self.schedule.slices
        both = [b + w for b, w in zip(backward, weight, strict=True)]
        costs = [cost / slices for row in (forward, backward, weight, both) for cost in row] + [0.0]
        messages = [*comm, 0.0]
        clock = [0.0] * self.schedule.ranks
        made = [0.0] * (self._nothing + 2)
        for rank, cost, source, link, result in self._steps:
            start = made[source] + messages[link]
            if start < clock[rank]:
                start = clock[rank]
            clock[rank] = made[result] = start + costs[cost]
        return max(clock, default=0.0)

    def _of(self, rank: int, index: int) -> list[_Step]:
        """An action as a step; two that overlap wait for what both need, and both end when the second does."""
        row, pairs = self.schedule.actions[rank], self.schedule.pairs
        action = row[index]
        if pairs and index and row[index - 1] in pairs:
            return []
        if action not in pairs:
            return [(rank, self._cost(action), *self._source(rank, action), self._result(action))]
        backward, unread = row[index + 1], self._nothing + 1
        return [
            (rank, self._free, *self._source(rank, backward), unread),
            (rank, self._cost(action), *self._source(rank, action), unread),
            (rank, self._cost(backward), self._nothing, -1, self._result(backward)),
            (rank, self._free, self._nothing, -1, self._result(action)),
        ]

    def _cost(self, action: Action) -> int:
        return ("F", "B", "W", "BW").index(action.op) * self.schedule.stages + action.stage

    def _result(self, action: Action) -> int:
        if action.op == "W":
            return self._nothing + 1
        return ((action.op != "F") * self.schedule.stages + action.stage) * self.schedule.units + action.microbatch

    def _source(self, rank: int, action: Action) -> tuple[int, int]:
        """The result of another rank that ``action`` waits for, and the link it comes over."""
        op, stage, microbatch = action
        forward = op == "F"
        source = self.schedule.previous_stage(stage) if forward else self.schedule.next_stage(stage)
        if op == "W" or source is None or self.schedule.stage_rank[source] == rank:
            return self._nothing, -1
        return self._result(Action("F" if forward else "B", source, microbatch)), stage - forward
