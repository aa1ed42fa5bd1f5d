"""V placement with little memory: a block of six unit steps a micro-batch, repeated, squeezed and put in better order.

The block gives each rank the starts of F and B of both its chunks; its W goes into the first free step after its B. A
repeated block is a schedule that holds few activations, and is idle only where the first and last micro-batches
leave steps free. Those are filled twice, never holding more than the repeated block does:

1. from the end backwards: every action as late as it can be, free steps taken by earlier actions that can run there,
   so that W moves into the drain;
2. from the start forwards in the same way: every action as early as it can be.

At F = B = W this leaves the smallest idle time known for V placement: 6p - 1 - 3M steps with M chunks of memory a rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from pipekern.schedule.ir import Action, Schedule
from pipekern.schedule.order import needs
from pipekern.schedule.registry import Grid, zigzag
from pipekern.schedule.simulate import peak_activations

Starts = Callable[[int, int], tuple[int, int, int, int]]
Rows = Sequence[Sequence[Action]]

PERIOD = 6
# How many actions a free step may be filled from; more change nothing for up to 64 ranks.
_LOOK_AHEAD = 2 * PERIOD


def repeated(grid: Grid, starts: Starts) -> Rows:
    """The rows of all ranks; ``starts(ranks, rank)`` are the steps of the first F0, F1, B1 and B0."""
    rows = tuple(tuple(_row(grid, rank, starts(grid.ranks, rank))) for rank in range(grid.ranks))
    schedule = Schedule("repeated block", grid.microbatches, tuple(zigzag(grid)), rows)
    cap = round(2 * max(peak_activations(schedule)))
    before = {action: list(needs(schedule, action)) for row in rows for action in row}
    after: dict[Action, list[Action]] = {action: [] for action in before}
    for action, inputs in before.items():
        for one in inputs:
            after[one].append(action)
    late = _Filling(after, cap, "W", "F").run([row[::-1] for row in rows])
    return _Filling(before, cap, "F", "W").run([row[::-1] for row in late])


def _row(grid: Grid, rank: int, starts: tuple[int, int, int, int]) -> list[Action]:
    """The block of ``rank`` repeated, with its W in the free steps."""
    there, back = rank, 2 * grid.ranks - 1 - rank
    ops = (("F", there), ("F", back), ("B", back), ("B", there))
    steps = {
        start + PERIOD * microbatch: Action(*op, microbatch)
        for start, op in zip(starts, ops, strict=True)
        for microbatch in range(grid.microbatches)
    }
    row: list[Action] = []
    weights: deque[Action] = deque()
    for step in range(max(steps) + 1):
        if step in steps:
            row.append(steps[step])
            if steps[step].op == "B":
                weights.append(steps[step]._replace(op="W"))
        elif weights:
            row.append(weights.popleft())
    return [*row, *weights]


@dataclass(frozen=True)
class _Filling:
    """Unit steps; in each, every rank runs the first of its next actions that can: not only the very next.

    ``inputs`` come before each action. ``grows`` is the operation that takes memory for one more activation and
    ``shrinks`` the one that gives it back; backwards in time these are W and F.
    """

    inputs: Mapping[Action, Sequence[Action]]
    cap: int
    grows: str
    shrinks: str

    def run(self, rows: Rows) -> list[list[Action]]:
        left = [deque(row) for row in rows]
        held = [0] * len(left)
        out: list[list[Action]] = [[] for _ in left]
        done: set[Action] = set()
        while any(left):
            made = []
            for rank, row in enumerate(left):
                index = self._runs_now(row, held[rank], done)
                if index >= 0:
                    made.append(row[index])
                    out[rank].append(row[index])
                    held[rank] += self._change(row[index])
                    del row[index]
            done.update(made)
        return out

    def _runs_now(self, row: deque[Action], held: int, done: set[Action]) -> int:
        """The place of the action that a rank runs now; -1 if it is idle."""
        peak = held
        for index, action in enumerate(islice(row, _LOOK_AHEAD)):
            fits = index == 0 or action.op != self.grows or peak < self.cap
            if fits and all(one in done for one in self.inputs[action]):
                return index
            held += self._change(action)
            peak = max(peak, held)
        return -1

    def _change(self, action: Action) -> int:
        return (action.op == self.grows) - (action.op == self.shrinks)
