"""What tests of schedules share: random schedules that can run, a slow simulator to compare with, grids."""

from __future__ import annotations

import re
from fractions import Fraction
from random import Random
from types import ModuleType

from pipekern.schedule import Action, Costs, Schedule
from pipekern.trace import text


def random_schedule(random: Random, split: bool = True, chains: bool = True) -> Schedule:
    """Any placement and any order that some run of all ranks could have had."""
    ranks, microbatches = random.randint(1, 4), random.randint(1, 5)
    many = 2 if chains and random.random() < 0.3 else 1
    depth = random.randint(ranks, 2 * ranks)
    stage_rank = [rank for _ in range(many) for rank in _placement(random, ranks, depth)]
    empty = Schedule("random", microbatches, tuple(stage_rank), ((),) * ranks, many)
    todo = []
    for microbatch in range(microbatches):
        path = empty.path(microbatch)
        todo += [("F", stage, microbatch) for stage in path]
        for stage in path:
            ops = ["B", "W"] if split and random.random() < 0.5 else ["BW"]
            todo += [(op, stage, microbatch) for op in ops]
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[tuple[str, int, int]] = set()
    left = [Action(*item) for item in todo]
    while left:
        action = random.choice([a for a in left if all(any(d in done for d in either) for either in inputs(empty, a))])
        left.remove(action)
        done.add(action)
        rows[stage_rank[action.stage]].append(action)
    return Schedule("random", microbatches, tuple(stage_rank), tuple(map(tuple, rows)), many)


def _placement(random: Random, ranks: int, depth: int) -> list[int]:
    stages = list(range(ranks)) + [random.randrange(ranks) for _ in range(depth - ranks)]
    random.shuffle(stages)
    return stages


def inputs(schedule: Schedule, action: Action) -> list[list[tuple[str, int, int]]]:
    """What an action needs; of each list one. Written out from the definitions, apart from the package's own."""
    op, stage, i = action
    first, last = stage % schedule.depth == 0, stage % schedule.depth == schedule.depth - 1
    place = i % schedule.slices
    if op == "F":
        return [[("F", stage - 1, i)]] * (not first) + [[("F", stage, i - 1)]] * (place > 0)
    if op == "W":
        return [[("B", stage, i)]]
    after = [[("B", stage + 1, i), ("BW", stage + 1, i)]] * (not last)
    return [[("F", stage, i)]] + after + [[("B", stage, i + 1), ("BW", stage, i + 1)]] * (place < schedule.slices - 1)


Times = dict[Action, tuple[Fraction, Fraction]]


def replay(schedule: Schedule, cost: dict[str, list[Fraction]], comm: list[Fraction]) -> Times:
    """Start and end of every action: sweep over the ranks until nothing changes.

    ``cost`` has those of F, B, W and of an overlapped pair, by stage, the pair's being that of its forward.
    """
    times: Times = {}
    clock = [Fraction(0)] * schedule.ranks
    position = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            if position[rank] == len(row):
                continue
            action = row[position[rank]]
            joined = row[position[rank] : position[rank] + (2 if action in schedule.pairs else 1)]
            waits = [(one, either) for one in joined for either in inputs(schedule, one)]
            start = clock[rank]
            known = True
            for one, either in waits:
                made = next((Action(*d) for d in either if Action(*d) in times), None)
                if made is None:
                    known = False
                    break
                link = min(made.stage, one.stage)
                late = comm[link] if schedule.stage_rank[made.stage] != rank else 0
                start = max(start, times[made][1] + late)
            if known:
                parts = ["pair"] if len(joined) > 1 else list(action.op)
                clock[rank] = start + sum((cost[part][action.stage] for part in parts), Fraction(0))
                times.update(dict.fromkeys(joined, (start, clock[rank])))
                position[rank] += len(joined)
                moved = True
    assert sum(position) == sum(map(len, schedule.actions))
    return times


def assert_docstring_draws(module: ModuleType, schedule: Schedule) -> None:
    """The grid in the generator's docstring is the one that it builds."""
    rows = re.findall(r"^    (rank .*)$", module.__doc__ or "", re.MULTILINE)
    width = len(rows[0].split(" ", 2)[2])
    assert rows == text.draw(schedule.simulate(Costs(1, 1, 1)), width).splitlines()


def assert_docstring_lists(module: ModuleType, schedule: Schedule) -> None:
    """The rows in the generator's docstring are those of the text form of what it builds."""
    rows = re.findall(r"^    (rank .*)$", module.__doc__ or "", re.MULTILINE)
    assert rows == [f"rank {rank} {row}" for rank, row in enumerate(str(schedule).splitlines()[1:])]


def row(schedule: Schedule, rank: int) -> str:
    """A rank's order in the text form."""
    return " ".join(map(str, schedule.actions[rank]))
