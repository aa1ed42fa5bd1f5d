"""Schedules as data: an action, and the order of actions on every rank.

Text form, one line a rank, read back by :meth:`Schedule.parse`::

    pipekern-schedule name=1f1b microbatches=2 stage_rank=0,1
    0F0 0F1 0BW0 0BW1
    1F0 1BW0 1F1 1BW1

An action is written stage, operation, micro-batch. Operations: ``F`` forward, ``B`` gradient of the stage's
input, ``W`` gradient of its weights, ``BW`` both at once. A forward that overlaps the backward after it is
joined to it: ``0F3&7BW1``. Lines that start with ``#`` are comments.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pipekern.errors import ScheduleError

if TYPE_CHECKING:
    from pipekern.schedule.collectives import Collectives
    from pipekern.schedule.comms import Program
    from pipekern.schedule.simulate import Costs
    from pipekern.trace.timeline import Timeline

OPS = ("F", "B", "W", "BW")
_ACTION = re.compile(r"(\d+)(BW|F|B|W)(\d+)")
_HEAD = re.compile(
    r"pipekern-schedule name=(.+) microbatches=(\d+) stage_rank=(\d+(?:,\d+)*)(?: chains=(\d+))?(?: slices=(\d+))?"
    r"( asynchronous)?"
)


class Action(NamedTuple):
    """One operation of one stage on one micro-batch."""

    op: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action written as ``text``; raises ``ScheduleError``."""
        match = _ACTION.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action; write stage, F, B, W or BW, micro-batch: 1BW0")
        return cls(match[2], int(match[1]), int(match[3]))


@dataclass(frozen=True)
class Schedule:
    """Who computes what, in which order. Nothing here is checked: see :meth:`check`.

    ``stage_rank[s]`` is the rank of stage ``s``; ``actions[r]`` the order of rank ``r``. The stages form
    ``chains`` chains of equal length, in ascending order; each chain holds the whole model, and the
    micro-batches are dealt to them in equal runs. One chain is the rule; two make a schedule with two
    directions and each weight twice. Each micro-batch is cut along its sequence into ``slices`` equal slices; where
    there are several, an action's micro-batch counts slices, ``slices`` of them in a row being one micro-batch. A
    slice's forward needs that of the slice before it, its backward that of the slice after it, on the same stage.
    ``pairs`` holds the forwards that overlap the full backward after them. An asynchronous schedule is never flushed:
    weights are updated while older gradients are still on their way, so that each rank keeps two versions of them.
    """

    name: str
    microbatches: int
    stage_rank: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    chains: int = 1
    slices: int = 1
    pairs: frozenset[Action] = frozenset()
    synchronous: bool = True

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.stage_rank)

    @property
    def units(self) -> int:
        """How many values an action's micro-batch can have: micro-batches times slices."""
        return self.microbatches * self.slices

    @cached_property
    def depth(self) -> int:
        """Stages that one micro-batch goes through."""
        return self.stages // self.chains

    @cached_property
    def chunks(self) -> int:
        """The most stages that one rank holds of one chain."""
        return max((self.share(stage) for stage in range(self.stages)), default=0)

    @property
    def duplicates_weights(self) -> bool:
        """Whether each weight is kept twice: for two directions, or in two versions."""
        return self.chains > 1 or not self.synchronous

    @cached_property
    def trains(self) -> bool:
        """Whether there is any backward; without one it is an order for evaluation."""
        return any(action.op != "F" for row in self.actions for action in row)

    @cached_property
    def runnable(self) -> bool:
        """Whether the executor can run it; else it can only be simulated."""
        return self.chains == 1 and self.slices == 1 and self.synchronous

    @cached_property
    def defers(self) -> bool:
        """Whether any weight gradient is put off to a W of its own."""
        return any(action.op == "W" for row in self.actions for action in row)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that ``rank`` holds, ascending."""
        return [stage for stage, owner in enumerate(self.stage_rank) if owner == rank]

    @cached_property
    def _shares(self) -> tuple[int, ...]:
        count: dict[tuple[int, int], int] = {}
        keys = [(owner, stage // self.depth) for stage, owner in enumerate(self.stage_rank)]
        for key in keys:
            count[key] = count.get(key, 0) + 1
        return tuple(count[key] for key in keys)

    def share(self, stage: int) -> int:
        """Number of stages into which the share of ``stage``'s rank is cut: the stage is one of so many."""
        return self._shares[stage]

    def next_stage(self, stage: int) -> int | None:
        """The stage that gets the output of ``stage``; None after the last."""
        return stage + 1 if (stage + 1) % self.depth else None

    def previous_stage(self, stage: int) -> int | None:
        """The stage that feeds ``stage``; None before the first."""
        return stage - 1 if stage % self.depth else None

    def path(self, microbatch: int) -> range:
        """The stages that ``microbatch`` (of ``units``) goes through, in order."""
        first = microbatch * self.chains // self.units * self.depth
        return range(first, first + self.depth)

    def forward_only(self) -> Schedule:
        """The same order with the forwards alone: what evaluation runs."""
        forwards = tuple(tuple(a for a in row if a.op == "F") for row in self.actions)
        name = f"{self.name} (forward)"
        return Schedule(name, self.microbatches, self.stage_rank, forwards, self.chains, self.slices)

    def check(self) -> None:
        """Raise ``ScheduleError`` that lists every fault, if there is any."""
        self.program()

    def program(self, skips: Collection[tuple[int, int]] = (), collectives: Collectives | None = None) -> Program:
        """This schedule with sends and receives; arguments and errors as in
        :func:`pipekern.schedule.comms.program`.
        """
        from pipekern.schedule.comms import program

        return program(self, skips, collectives)

    def simulate(self, costs: Costs) -> Timeline:
        """The exact timeline under ``costs``; raises ``ScheduleError`` where the order deadlocks."""
        from pipekern.schedule.simulate import simulate

        return simulate(self, costs)

    def __str__(self) -> str:
        ranks = ",".join(map(str, self.stage_rank))
        head = f"pipekern-schedule name={self.name} microbatches={self.microbatches} stage_rank={ranks}"
        head += f" chains={self.chains}" * (self.chains > 1) + f" slices={self.slices}" * (self.slices > 1)
        head += " asynchronous" * (not self.synchronous)
        return "\n".join([head, *map(self._row, self.actions)]) + "\n"

    def _row(self, row: tuple[Action, ...]) -> str:
        return "".join(f"{action}{'&' if action in self.pairs else ' '}" for action in row).rstrip(" ")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read the text form; raises ``ScheduleError`` with the line at fault."""
        head, *rows = [line for line in text.splitlines() if not line.startswith("#")] or [""]
        match = _HEAD.fullmatch(head)
        if match is None:
            raise ScheduleError(f"first line {head!r} is not 'pipekern-schedule name=… microbatches=… stage_rank=…'")
        stage_rank = tuple(map(int, match[3].split(",")))
        while len(rows) > max(stage_rank) + 1 and not rows[-1].strip():
            rows.pop()
        words = [row.split() for row in rows]
        actions = tuple(tuple(Action.parse(part) for word in row for part in word.split("&")) for row in words)
        pairs = frozenset(_pairs(words))
        chains, slices = int(match[4] or 1), int(match[5] or 1)
        return cls(match[1], int(match[2]), stage_rank, actions, chains, slices, pairs, not match[6])


def _pairs(words: list[list[str]]) -> Iterator[Action]:
    for row in words:
        for word in row:
            for part in word.split("&")[:-1]:
                yield Action.parse(part)
