"""Schedules as data: an action, and the order of actions on every rank.

Text form, one line a rank, read back by :meth:`Schedule.parse`::

    pipekern-schedule name=1f1b microbatches=2 stage_rank=0,1
    0F0 0F1 0BW0 0BW1
    1F0 1BW0 1F1 1BW1

An action is written stage, operation, micro-batch. Operations: ``F`` forward, ``B`` gradient of the stage's
input, ``W`` gradient of its weights, ``BW`` both at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pipekern.errors import ScheduleError

OPS = ("F", "B", "W", "BW")
_ACTION = re.compile(r"(\d+)(BW|F|B|W)(\d+)")


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

    ``stage_rank[s]`` is the rank of stage ``s``; ``actions[r]`` the order of rank ``r``. A micro-batch goes
    through the stages in ascending order.
    """

    name: str
    microbatches: int
    stage_rank: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.stage_rank)

    @cached_property
    def chunks(self) -> int:
        """The most stages that one rank holds."""
        return max((self.stage_rank.count(rank) for rank in range(self.ranks)), default=0)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that ``rank`` holds, ascending."""
        return [stage for stage, owner in enumerate(self.stage_rank) if owner == rank]

    def forward_only(self) -> Schedule:
        """The same order with the forwards alone: what evaluation runs."""
        forwards = tuple(tuple(a for a in row if a.op == "F") for row in self.actions)
        return Schedule(f"{self.name} (forward)", self.microbatches, self.stage_rank, forwards)

    def __str__(self) -> str:
        ranks = ",".join(map(str, self.stage_rank))
        head = f"pipekern-schedule name={self.name} microbatches={self.microbatches} stage_rank={ranks}"
        return "\n".join([head, *(" ".join(map(str, row)) for row in self.actions)]) + "\n"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read the text form; raises ``ScheduleError`` with the line at fault."""
        head, *rows = text.rstrip("\n").split("\n")
        match = re.fullmatch(r"pipekern-schedule name=(.+) microbatches=(\d+) stage_rank=(\d+(?:,\d+)*)", head)
        if match is None:
            raise ScheduleError(f"first line {head!r} is not 'pipekern-schedule name=… microbatches=… stage_rank=…'")
        actions = tuple(_parse_row(row) for row in rows)
        return cls(match[1], int(match[2]), tuple(map(int, match[3].split(","))), actions)


def _parse_row(row: str) -> tuple[Action, ...]:
    return tuple(Action.parse(word) for word in row.split())

