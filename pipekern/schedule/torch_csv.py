"""Schedules to and from the CSV files of torch.distributed.pipelining (``_dump_csv`` and ``_load_csv`` of torch 2.13).

A line a rank, a cell an action: stage, operation, micro-batch. torch writes I for the gradient of the input (here B),
B for the whole backward (here BW), and ``(0F3;7B1)OVERLAP_F_B`` for an overlapped pair (here ``0F3&7BW1``).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule.ir import Action, Schedule

_TO_TORCH = {"F": "F", "B": "I", "W": "W", "BW": "B"}
_FROM_TORCH = {theirs: ours for ours, theirs in _TO_TORCH.items()}
_COMPUTE = re.compile(r"(\d+)([FIWB])(\d+)")
_PAIR = re.compile(r"\(([^;]*);([^;]*)\)OVERLAP_F_B")
# Sends and receives are inserted anew; the rest moves the shards of data-parallel weights, which is no matter of order.
_LEFT_OUT = re.compile(r"\d+(?:(?:SEND|RECV)_[FB]\d+|UNSHARD|RESHARD|REDUCE_GRAD)|")


def dumps(schedule: Schedule) -> str:
    """The file of ``schedule``, for torch's format "compute_only".

    Raises ``ConfigError`` for what torch's format cannot say: two directions, slices of micro-batches.
    """
    for what, value in (("chains", schedule.chains), ("slices", schedule.slices)):
        if value > 1:
            raise ConfigError(f"{what}={value} of {schedule.name}: a CSV of torch has only {what}=1; use the text form")
    out = io.StringIO()
    csv.writer(out).writerows(_cells(schedule, row) for row in schedule.actions)
    return out.getvalue()


def _cells(schedule: Schedule, row: tuple[Action, ...]) -> Iterator[str]:
    pair = ""
    for op, stage, microbatch in row:
        cell = f"{stage}{_TO_TORCH[op]}{microbatch}"
        if Action(op, stage, microbatch) in schedule.pairs:
            pair = cell
        else:
            yield f"({pair};{cell})OVERLAP_F_B" if pair else cell
            pair = ""


def loads(text: str, name: str = "torch-csv") -> Schedule:
    """The schedule in a file of either of torch's formats; call its ``check()`` before use.

    Empty cells, sends and receives, and what is done to shards are left out. Raises ``ScheduleError`` that lists every
    cell that is no action, and every stage that no rank runs.
    """
    faults: list[str] = []
    rows: list[tuple[Action, ...]] = []
    pairs: set[Action] = set()
    for rank, line in enumerate(csv.reader(io.StringIO(text))):
        row: list[Action] = []
        for place, cell in enumerate(line):
            actions = _actions(cell.strip())
            if actions is None:
                faults.append(f"rank {rank}, cell {place}: {cell!r} is no action of torch's, like 0F1, 0I1, 0W1 or 0B1")
                continue
            row += actions
            pairs.update(actions[:-1])
        rows.append(tuple(row))
    owner = {action.stage: rank for rank, row in enumerate(rows) for action in row}
    stages = max(owner, default=-1) + 1
    faults += [f"stage {stage} is run by no rank" for stage in range(stages) if stage not in owner]
    if faults or not owner:
        raise ScheduleError("not a schedule of torch.distributed.pipelining", faults or ["there is no action"])
    microbatches = 1 + max(action.microbatch for row in rows for action in row)
    stage_rank = tuple(owner[stage] for stage in range(stages))
    return Schedule(name, microbatches, stage_rank, tuple(rows), pairs=frozenset(pairs))


def _actions(cell: str) -> list[Action] | None:
    """None, one, or a pair of actions; None where the cell is something else."""
    if _LEFT_OUT.fullmatch(cell):
        return []
    pair = _PAIR.fullmatch(cell)
    found = [_COMPUTE.fullmatch(part.strip()) for part in (pair.groups() if pair else (cell,))]
    actions = [Action(_FROM_TORCH[match[2]], int(match[1]), int(match[3])) for match in found if match]
    good = len(actions) == len(found) and (not pair or [action.op for action in actions] == ["F", "BW"])
    return actions if good else None
