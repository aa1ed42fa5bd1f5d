"""What an action waits for, and one order in which all ranks' actions can run."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Set
from dataclasses import replace
from typing import NamedTuple

from pipekern.schedule.ir import Action, Schedule


class Stuck(NamedTuple):
    """A rank that cannot go on: its action ``at`` needs ``result``, which never comes."""

    at: int
    result: Action


class Order(NamedTuple):
    """``steps``: (rank, index) of every action that can run, in a valid order; ``stuck``: ranks that stop."""

    steps: list[tuple[int, int]]
    stuck: dict[int, Stuck]


def needs(schedule: Schedule, action: Action) -> tuple[Action, ...]:
    """The results that ``action`` waits for; the gradient that a BW makes is named by its B."""
    op, stage, microbatch = action
    if op == "F":
        before = schedule.previous_stage(stage)
        found: tuple[Action, ...] = () if before is None else (Action("F", before, microbatch),)
        return (*found, Action("F", stage, microbatch - 1)) if microbatch % schedule.slices else found
    if op == "W":
        return (Action("B", stage, microbatch),)
    after = schedule.next_stage(stage)
    own = Action("F", stage, microbatch)
    found = (own,) if after is None else (own, Action("B", after, microbatch))
    return (*found, Action("B", stage, microbatch + 1)) if (microbatch + 1) % schedule.slices else found


def result(action: Action) -> Action:
    """The name under which :func:`needs` asks for what ``action`` makes."""
    return Action("B", action.stage, action.microbatch) if action.op == "BW" else action


def sequential(schedule: Schedule, given: Set[Action] = frozenset()) -> Order:
    """Run every rank as far as it goes, with unbounded room for messages; ``given`` results are there at once."""
    done = set(given)
    waiting: defaultdict[Action, list[int]] = defaultdict(list)
    position = [0] * schedule.ranks
    order = Order([], {})
    todo = deque(range(schedule.ranks))
    while todo:
        rank = todo.popleft()
        row = schedule.actions[rank]
        order.stuck.pop(rank, None)
        for index in range(position[rank], len(row)):
            action = row[index]
            inputs = needs(schedule, action)
            if action in schedule.pairs and index + 1 < len(row):
                inputs += needs(schedule, row[index + 1])
            missing = next((need for need in inputs if need not in done), None)
            if missing is not None:
                waiting[missing].append(rank)
                order.stuck[rank] = Stuck(index, missing)
                position[rank] = index
                break
            order.steps.append((rank, index))
            made = result(action)
            done.add(made)
            todo.extend(waiting.pop(made, ()))
    return order


def explain(schedule: Schedule, stuck: dict[int, Stuck]) -> list[str]:
    """One fault a stuck rank, in the words of the schedule's text form."""
    names = {result(action): action for row in schedule.actions for action in row}
    faults = []
    for rank, (at, missing) in sorted(stuck.items()):
        wanted = f"{names[missing]}" if missing in names else f"{missing}, which no rank runs"
        faults.append(f"rank {rank} stuck at {schedule.actions[rank][at]} (instruction {at}): waits for {wanted}")
    return faults


def part_that_runs(schedule: Schedule) -> Schedule:
    """``schedule`` without what comes after the point where a rank is stuck: to draw one that deadlocks."""
    stuck = sequential(schedule).stuck
    rows = (row[: stuck[rank].at] if rank in stuck else row for rank, row in enumerate(schedule.actions))
    return replace(schedule, actions=tuple(rows))
