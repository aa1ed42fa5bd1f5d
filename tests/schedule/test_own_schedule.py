"""How to write a schedule of one's own. Read it from the top."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pipekern as pk
from pipekern.schedule import Action, Grid, registry


@pytest.fixture(autouse=True)
def own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_write_register_check_simulate() -> None:
    # A schedule is a function that yields the actions of each rank in turn: F, B and W (or BW for B and W at once) of a
    # stage and a micro-batch. Here, after one forward each, every rank does B, then the next F, and W when it is free.
    @pk.schedule.register("mine")
    def mine(grid: Grid) -> Iterator[list[Action]]:
        last = grid.microbatches - 1
        for rank in range(grid.ranks):
            row = [Action("F", rank, i) for i in range(min(grid.ranks - rank, grid.microbatches))]
            for i in range(grid.microbatches):
                row.append(Action("B", rank, i))
                ahead = i + grid.ranks - rank
                if ahead <= last:
                    row.append(Action("F", rank, ahead))
                row.append(Action("W", rank, i))
            yield row

    # It is built by its name, like any other.
    schedule = pk.schedule.build("mine", ranks=2, microbatches=3)
    assert str(schedule) == (
        "pipekern-schedule name=mine microbatches=3 stage_rank=0,1\n"
        "0F0 0F1 0B0 0F2 0W0 0B1 0W1 0B2 0W2\n"
        "1F0 1B0 1F1 1W0 1B1 1F2 1W1 1B2 1W2\n"
    )

    # `check()` says nothing: nothing is missing, and no two ranks wait for each other.
    schedule.check()

    # Sends and receives are inserted where a message goes to another rank.
    instructions = schedule.program().instructions
    assert " ".join(map(str, instructions[1])) == (
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1W0 1B1 1SEND_B1 1RECV_F2 1F2 1W1 1B2 1SEND_B2 1W2"
    )

    # And it can be simulated: here against 1F1B, which takes two units more.
    unit = pk.schedule.Costs(forward=1, backward=1, weight=1)
    assert schedule.simulate(unit).makespan == 11
    assert pk.schedule.build("1f1b", ranks=2, microbatches=3).simulate(unit).makespan == 12


def test_faults_are_listed_with_the_cycle_of_waits() -> None:
    # Rank 1 wants the gradient of micro-batch 1 first, but rank 0 sends that only after the backward of micro-batch 0.
    @pk.schedule.register("hasty")
    def hasty(grid: Grid) -> Iterator[list[Action]]:
        yield [Action("F", 0, 0), Action("BW", 0, 0), Action("F", 0, 1), Action("BW", 0, 1)]
        yield [Action("F", 1, 0), Action("F", 1, 1), Action("BW", 1, 0), Action("BW", 1, 1)]

    with pytest.raises(pk.ScheduleError) as caught:
        pk.schedule.build("hasty", ranks=2, microbatches=2).check()
    assert str(caught.value) == (
        "schedule deadlocks: 2 faults\n"
        "  * rank 0 stuck at 0BW0 (instruction 1): waits for 1BW0\n"
        "  * rank 1 stuck at 1F1 (instruction 1): waits for 0F1\n"
        "draw it with `pipekern schedule show FILE`"
    )


def test_stages_in_another_place_and_wrong_sizes() -> None:
    # Where the stages lie is said with the name, and so is how many of them a rank holds; here back and forth.
    @pk.schedule.register("zigzag", chunks=range(2, 3), placement=registry.zigzag)
    def zigzag(grid: Grid) -> Iterator[list[Action]]:
        if grid.microbatches > 1:
            raise pk.ConfigError(f"microbatches={grid.microbatches}: zigzag takes one; nearest microbatches=1")
        for rank in range(grid.ranks):
            there, back = rank, 2 * grid.ranks - 1 - rank
            yield [Action(op, stage, 0) for op, stage in (("F", there), ("F", back), ("BW", back), ("BW", there))]

    schedule = pk.schedule.build("zigzag", ranks=3, microbatches=1)
    schedule.check()
    assert schedule.stage_rank == (0, 1, 2, 2, 1, 0)
    assert schedule.simulate(pk.schedule.Costs(1, 1, 1)).messages == 8
    with pytest.raises(pk.ConfigError, match="microbatches=2: zigzag takes one; nearest microbatches=1"):
        pk.schedule.build("zigzag", ranks=3, microbatches=2)
    with pytest.raises(pk.ConfigError, match="chunks=3: zigzag needs exactly 2 a rank; nearest chunks=2"):
        pk.schedule.build("zigzag", ranks=3, microbatches=1, chunks=3)
