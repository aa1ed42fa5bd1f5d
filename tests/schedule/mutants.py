"""Kinds of mutants: one fault put into a good schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import NamedTuple

from pipekern.schedule import Action, Schedule

Rows = list[list[Action]]


class Kind(NamedTuple):
    """A kind of mutant, and words of the fault that it must be found by."""

    mutate: Callable[[Random, Schedule], Schedule | None]
    found_by: str


KINDS: dict[str, Kind] = {}


def kind(found_by: str) -> Callable[[Callable[[Random, Schedule], Schedule | None]], None]:
    """A mutation of the schedule; None where it has no place for it."""

    def add(mutate: Callable[[Random, Schedule], Schedule | None]) -> None:
        KINDS[mutate.__name__] = Kind(mutate, found_by)

    return add


def row_kind(found_by: str) -> Callable[[Callable[[Random, Schedule, Rows], bool | None]], None]:
    """A mutation of the rows, in place; False where they have no place for it."""

    def add(mutate: Callable[[Random, Schedule, Rows], bool | None]) -> None:
        def whole(random: Random, schedule: Schedule) -> Schedule | None:
            rows = [list(row) for row in schedule.actions]
            if mutate(random, schedule, rows) is False:
                return None
            return replace(schedule, actions=tuple(map(tuple, rows)))

        KINDS[mutate.__name__] = Kind(whole, found_by)

    return add


def place(random: Random, rows: Rows) -> tuple[list[Action], int]:
    """The row and index of any action."""
    return random.choice([(row, index) for row in rows for index in range(len(row))])


def other_rank(random: Random, schedule: Schedule, rank: int) -> int:
    return random.choice([one for one in range(schedule.ranks) if one != rank])


def relabel(random: Random, rows: Rows, *ops: str, **changed: str | int) -> bool | None:
    found = [(row, index) for row in rows for index, action in enumerate(row) if not ops or action.op in ops]
    if not found:
        return False
    row, index = random.choice(found)
    row[index] = row[index]._replace(**changed)  # type: ignore[arg-type]
    return None


def drop(random: Random, rows: Rows, op: str) -> bool | None:
    found = [(row, index) for row in rows for index, action in enumerate(row) if action.op == op]
    if not found:
        return False
    row, index = random.choice(found)
    del row[index]
    return None


@row_kind("lacks")
def forward_dropped(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return drop(random, rows, "F")


@row_kind("lacks")
def whole_backward_dropped(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return drop(random, rows, "BW")


@row_kind("lacks")
def input_gradient_dropped(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return drop(random, rows, "B")


@row_kind("lacks")
def weight_gradient_dropped(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return drop(random, rows, "W")


@row_kind("lacks")
def row_emptied(random: Random, schedule: Schedule, rows: Rows) -> None:
    random.choice(rows).clear()


@row_kind("lacks")
def row_cut_short(random: Random, schedule: Schedule, rows: Rows) -> None:
    row = random.choice(rows)
    del row[random.randrange(len(row)) :]


@row_kind("runs 2 times")
def doubled_in_place(random: Random, schedule: Schedule, rows: Rows) -> None:
    row, index = place(random, rows)
    row.insert(index, row[index])


@row_kind("runs 2 times")
def doubled_at_the_end(random: Random, schedule: Schedule, rows: Rows) -> None:
    row = random.choice(rows)
    row.append(random.choice(row))


@row_kind("runs 2 times")
def doubled_on_another_rank(random: Random, schedule: Schedule, rows: Rows) -> None:
    source = random.randrange(len(rows))
    target = other_rank(random, schedule, source)
    rows[target].append(random.choice(rows[source]))


@row_kind("but stage")
def moved_to_another_rank(random: Random, schedule: Schedule, rows: Rows) -> None:
    source = random.randrange(len(rows))
    target = other_rank(random, schedule, source)
    row = rows[target]
    row.insert(random.randrange(len(row) + 1), rows[source].pop(random.randrange(len(rows[source]))))


@row_kind("but stage")
def rows_swapped(random: Random, schedule: Schedule, rows: Rows) -> None:
    one, other = random.sample(range(len(rows)), 2)
    rows[one], rows[other] = rows[other], rows[one]


@row_kind("lacks")
def wrong_stage(random: Random, schedule: Schedule, rows: Rows) -> None:
    row, index = place(random, rows)
    others = [stage for stage in range(schedule.stages) if stage != row[index].stage]
    row[index] = row[index]._replace(stage=random.choice(others))


@row_kind("lacks")
def wrong_microbatch(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    row, index = place(random, rows)
    others = [one for one in range(schedule.units) if one != row[index].microbatch]
    if not others:
        return False
    row[index] = row[index]._replace(microbatch=random.choice(others))
    return None


@row_kind("micro-batches")
def microbatch_too_high(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return relabel(random, rows, microbatch=schedule.units + random.randrange(3))


@row_kind("micro-batches")
def microbatch_negative(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return relabel(random, rows, microbatch=-1)


@row_kind("stages")
def stage_too_high(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return relabel(random, rows, stage=schedule.stages + random.randrange(3))


@row_kind("operations are")
def unknown_operation(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return relabel(random, rows, op=random.choice(["X", "", "f", "WB", "SEND_F"]))


@row_kind("lacks")
def forward_as_backward(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return relabel(random, rows, "F", op="BW")


@row_kind("is mixed with")
def split_and_whole_mixed(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return relabel(random, rows, "B", "W", op="BW")


@row_kind("lacks")
def whole_without_its_weights(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return relabel(random, rows, "BW", op="B")


def swapped(random: Random, rows: Rows, first: str, second: tuple[str, ...]) -> bool | None:
    """Exchange an action and a later one of the same stage and micro-batch."""
    pairs = [
        (row, i, j)
        for row in rows
        for i, one in enumerate(row)
        if one.op == first
        for j, other in enumerate(row)
        if other.op in second and other[1:] == one[1:]
    ]
    if not pairs:
        return False
    row, i, j = random.choice(pairs)
    row[i], row[j] = row[j], row[i]
    return None


@row_kind("stuck at")
def backward_before_its_forward(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return swapped(random, rows, "F", ("B", "BW"))


@row_kind("stuck at")
def weights_before_their_backward(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    return swapped(random, rows, "B", ("W",))


@row_kind("stuck at")
def row_reversed(random: Random, schedule: Schedule, rows: Rows) -> None:
    random.choice(rows).reverse()


@row_kind("stuck at")
def neighbours_wait_for_each_other(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    """The earlier rank does the backward of i before the forward of j, the later one the forward of j first."""
    stage = random.randrange(schedule.stages)
    after = schedule.next_stage(stage)
    path = [i for i in range(schedule.units) if stage in schedule.path(i)]
    if after is None or schedule.stage_rank[after] == schedule.stage_rank[stage] or len(path) < 2:
        return False
    i, j = random.sample(path, 2)
    for at, first, then in ((stage, ("B", "BW"), "F"), (after, ("F",), "B")):
        row = rows[schedule.stage_rank[at]]
        early, late = (i, j) if at == stage else (j, i)
        one = next(a for a in row if a.op in first and a[1:] == (at, early))
        other = next(a for a in row if a.op[0] == then and a[1:] == (at, late))
        row.remove(one)
        row.insert(row.index(other), one)
    return None


@row_kind("stuck at")
def second_chunk_before_the_first(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    """A rank does the forward of a micro-batch on a later stage of the chain before that on an earlier one."""
    found = [
        (row, i, j)
        for row in rows
        for i, one in enumerate(row)
        for j, other in enumerate(row)
        if one.op == other.op == "F" and one.microbatch == other.microbatch and one.stage < other.stage
    ]
    if not found:
        return False
    row, i, j = random.choice(found)
    row[i], row[j] = row[j], row[i]
    return None


@row_kind("stuck at")
def slices_in_the_wrong_order(random: Random, schedule: Schedule, rows: Rows) -> bool | None:
    """Two slices of a micro-batch change places, both forwards or both backwards."""
    found = [
        (row, i, j)
        for row in rows
        for i, one in enumerate(row)
        for j, other in enumerate(row)
        if i < j and (one.op, one.stage) == (other.op, other.stage) and one.op != "W"
        if one.microbatch // schedule.slices == other.microbatch // schedule.slices
    ]
    if schedule.slices == 1 or not found:
        return False
    row, i, j = random.choice(found)
    row[i], row[j] = row[j], row[i]
    return None


@kind("is on rank")
def stage_on_a_rank_that_is_not_there(random: Random, schedule: Schedule) -> Schedule:
    stage_rank = list(schedule.stage_rank)
    stage_rank[random.randrange(len(stage_rank))] = random.choice([-1, schedule.ranks])
    return replace(schedule, stage_rank=tuple(stage_rank))


@kind("but stage")
def stage_on_another_rank(random: Random, schedule: Schedule) -> Schedule | None:
    stages = [stage for stage, rank in enumerate(schedule.stage_rank) if schedule.stage_rank.count(rank) > 1]
    if not stages:
        return None
    stage = random.choice(stages)
    stage_rank = list(schedule.stage_rank)
    stage_rank[stage] = other_rank(random, schedule, stage_rank[stage])
    return replace(schedule, stage_rank=tuple(stage_rank))


@kind("has a row but no stage")
def rank_without_a_stage(random: Random, schedule: Schedule) -> Schedule:
    return replace(schedule, actions=(*schedule.actions, random.choice(schedule.actions)))


@kind("lacks")
def more_microbatches(random: Random, schedule: Schedule) -> Schedule:
    return replace(schedule, microbatches=schedule.microbatches + schedule.chains * random.randint(1, 3))


@kind("micro-batches")
def fewer_microbatches(random: Random, schedule: Schedule) -> Schedule | None:
    if schedule.microbatches < 2:
        return None
    return replace(schedule, microbatches=random.randrange(1, schedule.microbatches))


@kind("microbatches=0")
def no_microbatch(random: Random, schedule: Schedule) -> Schedule:
    return replace(schedule, microbatches=0)


@kind("of equal length")
def chains_of_unequal_length(random: Random, schedule: Schedule) -> Schedule:
    return replace(schedule, chains=schedule.stages + random.randint(1, 3))


@kind("lacks")
def more_slices(random: Random, schedule: Schedule) -> Schedule:
    return replace(schedule, slices=schedule.slices + random.randint(1, 3))


@kind("to overlap")
def pair_without_a_backward(random: Random, schedule: Schedule) -> Schedule | None:
    alone = [
        one
        for row in schedule.actions
        for one, after in zip(row, [*row[1:], None], strict=True)
        if one.op != "F" or after is None or after.op != "BW"
    ]
    return replace(schedule, pairs=schedule.pairs | {random.choice(alone)})
