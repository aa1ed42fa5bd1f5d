"""Every fault of a schedule at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pipekern.errors import ScheduleError
from pipekern.schedule.ir import OPS, Action, Schedule
from pipekern.schedule.order import Stuck, explain, needs, result, sequential

DRAW = "draw it with `pipekern schedule show FILE`"


def check(schedule: Schedule) -> None:
    """Raise ``ScheduleError`` that lists every fault of ``schedule``, if there is any.

    First what is missing, doubled, misplaced or out of order, and who waits for whom where that deadlocks; where
    there is nothing of the kind, also whether it deadlocks with the numbers of slots that its links get.
    """
    schedule.program()


def check_order(schedule: Schedule) -> None:
    """As :func:`check`, with unbounded room for messages."""
    shape = list(_shape(schedule))
    if shape:
        raise ScheduleError(f"schedule has a wrong shape: {_count(shape)}", shape)
    rows = schedule.actions
    made = {result(action) for row in rows for action in row}
    never = {need for row in rows for action in row for need in needs(schedule, action)} - made
    stuck = sequential(schedule, never).stuck
    wrong = [*_present(schedule), *_pairs(schedule)]
    waits = [*_local_order(schedule, stuck), *explain(schedule, stuck)]
    if wrong:
        raise ScheduleError(f"schedule is wrong: {_count(wrong + waits)}", wrong + waits, DRAW)
    if waits:
        raise deadlock(waits)


def deadlock(faults: list[str]) -> ScheduleError:
    """The error of ranks that wait for each other."""
    return ScheduleError(f"schedule deadlocks: {_count(faults)}", faults, DRAW)


def _count(faults: list[str]) -> str:
    return f"{len(faults)} fault{'s' * (len(faults) != 1)}"


def _shape(schedule: Schedule) -> Iterator[str]:
    """Faults that make the rest of the checks meaningless."""
    if schedule.microbatches < 1:
        yield f"microbatches={schedule.microbatches}; a step needs at least 1"
    if schedule.slices < 1:
        yield f"slices={schedule.slices}; a micro-batch is at least 1"
    if schedule.chains < 1 or not schedule.stages or schedule.stages % max(schedule.chains, 1):
        yield f"{schedule.stages} stages do not form chains={schedule.chains} of equal length"
    for stage, rank in enumerate(schedule.stage_rank):
        if not 0 <= rank < schedule.ranks:
            yield f"stage {stage} is on rank {rank}; there are rows for {schedule.ranks} ranks"
    for rank in sorted(set(range(schedule.ranks)) - set(schedule.stage_rank)):
        yield f"rank {rank} has a row but no stage"


def _present(schedule: Schedule) -> Iterator[str]:
    """What is unknown, on the wrong rank, there twice, missing, or mixed."""
    count: Counter[Action] = Counter()
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if action.op not in OPS or action.stage not in _path(schedule, action.microbatch):
                yield f"rank {rank} runs {action}, but {_why_unknown(schedule, action)}"
            elif schedule.stage_rank[action.stage] != rank:
                owner = schedule.stage_rank[action.stage]
                yield f"rank {rank} runs {action}, but stage {action.stage} is on rank {owner}"
            count[action] += 1
    for action, times in count.items():
        if times > 1:
            yield f"{action} runs {times} times"
    for microbatch in range(schedule.units):
        for stage in schedule.path(microbatch):
            yield from _one_stage(schedule, stage, microbatch, count)


def _path(schedule: Schedule, microbatch: int) -> range:
    return schedule.path(microbatch) if 0 <= microbatch < schedule.units else range(0)


def _why_unknown(schedule: Schedule, action: Action) -> str:
    if action.op not in OPS:
        return f"operations are {', '.join(OPS)}"
    if not 0 <= action.microbatch < schedule.units:
        return f"there are {schedule.units} micro-batches" + " and slices" * (schedule.slices > 1)
    if not 0 <= action.stage < schedule.stages:
        return f"there are {schedule.stages} stages"
    path = schedule.path(action.microbatch)
    return f"micro-batch {action.microbatch} goes through stages {path[0]} to {path[-1]}"


def _one_stage(schedule: Schedule, stage: int, microbatch: int, count: Counter[Action]) -> Iterator[str]:
    forward, backward, weight, both = (Action(op, stage, microbatch) for op in ("F", "B", "W", "BW"))
    rank = schedule.stage_rank[stage]
    if forward not in count:
        yield f"rank {rank} lacks {forward}"
    if not schedule.trains:
        return
    if both in count:
        split = [str(action) for action in (backward, weight) if action in count]
        if split:
            yield f"{both} is mixed with {' and '.join(split)}: either the whole backward or its two parts"
    elif backward not in count and weight not in count:
        yield f"rank {rank} lacks {both}"
    else:
        for action in (backward, weight):
            if action not in count:
                yield f"rank {rank} lacks {action}"


def _local_order(schedule: Schedule, stuck: dict[int, Stuck]) -> Iterator[str]:
    """A rank's own B before its F, or W before its B, where it is not what the rank is stuck at."""
    for rank, row in enumerate(schedule.actions):
        first: dict[Action, int] = {}
        for index, action in enumerate(row):
            first.setdefault(result(action), index)
        for index, action in enumerate(row):
            own = Action("F" if action.op in ("B", "BW") else "B", action.stage, action.microbatch)
            if action.op != "F" and first.get(own, -1) > index and stuck.get(rank) != (index, own):
                yield f"rank {rank} runs {action} (instruction {index}) before {row[first[own]]} ({first[own]})"


def _pairs(schedule: Schedule) -> Iterator[str]:
    for rank, row in enumerate(schedule.actions):
        for index, action in enumerate(row):
            if action in schedule.pairs and (action.op != "F" or [a.op for a in row[index + 1 : index + 2]] != ["BW"]):
                yield f"rank {rank}: {action} (instruction {index}) is no forward with a BW after it to overlap"
