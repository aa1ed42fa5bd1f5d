"""One that fails makes all fail, with its words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import pipekern as pk
from pipekern.checkpoint.agree import alone, together
from tests.checkpoint.sample import Ring


def _run(faults: dict[int, Exception], ranks: int) -> list[list[int] | str]:
    ring = Ring(ranks)

    def action(rank: int) -> int:
        if rank in faults:
            raise faults[rank]
        return rank

    def run(rank: int) -> list[int] | str:
        try:
            return together(lambda: action(rank), lambda row: ring.gather(rank, row))
        except pk.CheckpointError as error:
            assert error.__cause__ is faults.get(rank)
            return str(error)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def test_golden_results() -> None:
    assert _run({}, 3) == [[0, 1, 2]] * 3
    assert together(lambda: "mine", alone) == ["mine"]


def test_who_failed_and_why() -> None:
    faults = {0: pk.CheckpointError("no disk"), 2: KeyError("x")}
    assert _run(faults, 3) == ["rank 0: no disk\nrank 2: KeyError: 'x'"] * 3


def test_what_all_say_is_said_once() -> None:
    assert _run({rank: pk.CheckpointError("no disk") for rank in range(3)}, 3) == ["no disk"] * 3
    with pytest.raises(pk.CheckpointError, match=r"^no disk$"):
        together(lambda: (_ for _ in ()).throw(pk.CheckpointError("no disk")), alone)
