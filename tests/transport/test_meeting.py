"""Ranks that agree on a name in a store that may hold anything of earlier ones."""

from __future__ import annotations

import random
import threading

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported at run time only

from pipekern.errors import TransportTimeout
from pipekern.transport.meeting import meet


def met(store: HashStore, ranks: int) -> set[str]:
    """The names that ``ranks`` get, who come in any order."""
    names: list[str] = [""] * ranks

    def run(rank: int) -> None:
        names[rank] = meet(store, rank, ranks, 20.0)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in random.sample(range(ranks), ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return set(names)


def test_golden() -> None:
    """Two jobs of three ranks and one of four after each other: each has one name, and no two have the same."""
    store = HashStore()
    jobs = [met(store, ranks) for ranks in (3, 3, 4, 1)]
    assert [len(names) for names in jobs] == [1, 1, 1, 1]
    assert len(set.union(*jobs)) == 4


def test_what_a_meeting_that_failed_has_left_is_nobodys_answer() -> None:
    """Any of the ranks may have come, at any number of tries, before all come."""
    store = HashStore()
    for _ in range(6):
        come = random.sample(range(4), random.randint(0, 3))
        threads = [threading.Thread(target=_in_vain, args=(store, rank)) for rank in come]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(met(store, 4)) == 1


def _in_vain(store: HashStore, rank: int) -> None:
    """A rank other than 0 gets its answer if rank 0 is there, and then waits elsewhere."""
    try:
        meet(store, rank, 4, 0.01)
    except TransportTimeout:
        return
    assert rank


@pytest.mark.parametrize(("rank", "away"), [(0, "ranks 1-3"), (2, "rank 0")])
def test_who_has_not_come_is_named(rank: int, away: str) -> None:
    with pytest.raises(TransportTimeout, match=f"4 ranks did not meet within 0.01 s: rank {rank} has not seen {away}"):
        meet(HashStore(), rank, 4, 0.01)
