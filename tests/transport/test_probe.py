"""Measured links, on the stand-in driver: two processes, and both ranks in one."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests.launch import launch, values
from tests.transport import fake_cuda
from tests.transport.programs import CPUS, Ends, run

pytest.importorskip("pipekern._C")
from pipekern.transport import probe
from pipekern.transport.open import Opened
from pipekern.transport.world import join

PAIRS = {(0, 1): 100.0, (1, 0): 1e6}


def on_links_of_a_job(ends: Ends) -> Generator[str | None, None, list[probe.Measured]]:
    opened = Opened(ends.transport, ends.senders, ends.receivers)
    links = [sender.link for sender in ends.senders.values()] + [end.link for end in ends.receivers.values()]
    rows = probe.measure(ends.rank, sorted(links), opened, CPUS[:2], [1 << 16] * 2, seconds=0.05)
    yield None
    return rows


def test_golden() -> None:
    """Each rank has the rows of what it sends on."""
    for rank, (row,) in enumerate(run("fake-cuda", on_links_of_a_job)):
        assert row.link == f"{rank}>{1 - rank}" and row.way == "ipc" and row.latency > 0 and row.bandwidth > 0


def between(processes: int) -> tuple[list[probe.Measured], str]:
    leaks = fake_cuda.load("fake-cuda-staged")
    world = join("cuda", 60.0) if processes > 1 else None
    rows = probe.between(PAIRS, CPUS[:2], world, 0.05)
    if world is not None:
        world.close()
    return rows, leaks()


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_measure_and_agree_and_nothing_is_left(processes: int) -> None:
    fake_cuda.library()
    found = values(launch(between, processes, processes))
    for rows, leaks in found:
        assert rows == found[0][0] and leaks == ""
        assert [row.link for row in rows] == ["0>1", "1>0"] and all(row.bandwidth > 0 for row in rows)


def one_fails(victim: str) -> str:
    fake_cuda.load("fake-cuda")
    world = join("cuda", 60.0)
    if os.environ["RANK"] == victim:
        probe._follow = lambda end: iter([1 // 0])  # type: ignore[assignment, return-value]
    try:
        probe.between(PAIRS, CPUS[:2], world, 0.05)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        assert world is not None
        world.close()
    return "nothing"


def test_a_rank_that_fails_meanwhile_ends_the_others() -> None:
    fake_cuda.library()
    other, failed = values(launch(one_fails, 2, "1"))
    assert failed.startswith("ZeroDivisionError") and other.startswith("Aborted") and "ZeroDivisionError" in other
