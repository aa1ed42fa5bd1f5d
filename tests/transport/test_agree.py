"""Rows of facts from every rank, and where they differ."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported at run time only

from pipekern.errors import PeerDied, TransportTimeout
from pipekern.transport.agree import disagreements, gather_json, spans


def test_golden() -> None:
    rows: list[dict[str, Any]] = [
        {"schedule": "1f1b", "microbatches": 8, "version": "0.1.0"},
        {"schedule": "1f1b", "microbatches": 4, "version": "0.1.0"},
        {"schedule": "gpipe", "microbatches": 8, "version": "0.1.0"},
    ]
    assert disagreements(rows) == [
        'schedule: "1f1b" on ranks 0, 1, but "gpipe" on rank 2',
        "microbatches: 8 on ranks 0, 2, but 4 on rank 1",
    ]


def test_three_values_are_three_pairs() -> None:
    assert disagreements([{"seed": 1}, {"seed": 2}, {}]) == [
        "seed: 1 on rank 0, but 2 on rank 1",
        "seed: 1 on rank 0, but not given on rank 2",
        "seed: 2 on rank 1, but not given on rank 2",
    ]


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=5))
def test_a_line_for_each_pair_of_values_and_none_where_ranks_agree(rows: list[dict[str, int]]) -> None:
    found = disagreements(rows)
    assert disagreements([rows[0]] * 4) == []
    kinds = [len({row.get(key) for row in rows}) for key in "abc"]
    assert len(found) == sum(kind * (kind - 1) // 2 for kind in kinds)


def test_spans() -> None:
    assert spans([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9, 10"


def gathered(ranks: int) -> list[list[dict[str, Any]]]:
    store = HashStore()
    rows: list[list[dict[str, Any]]] = [[]] * ranks

    def run(rank: int) -> None:
        row = {"rank": rank, "split": (1, 2)}
        rows[rank] = gather_json(store, "sizes", rank, ranks, row, 20.0, lambda rank: False)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in reversed(range(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows


def test_every_rank_gets_every_row() -> None:
    expected = [{"rank": rank, "split": [1, 2]} for rank in range(3)]
    assert gathered(3) == [expected] * 3


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(TransportTimeout, match=r"rank 1 waited 0.05 s at 'sizes' for ranks 0, 2") as caught:
        gather_json(HashStore(), "sizes", 1, 3, {}, 0.05, lambda rank: False)
    assert caught.value.rank == 0


def test_a_rank_that_has_left_is_not_waited_for() -> None:
    with pytest.raises(PeerDied, match="rank 2 has left the job before 'sizes'"):
        store = HashStore()
        store.set("sizes/0", "{}")
        gather_json(store, "sizes", 1, 3, {}, 60.0, lambda rank: rank == 2)


def test_a_rank_that_came_and_then_left_has_come() -> None:
    store = HashStore()

    def comes_and_leaves(rank: int) -> bool:
        store.set("sizes/1", '{"late": 1}')
        return True

    assert gather_json(store, "sizes", 0, 2, {}, 60.0, comes_and_leaves) == [{}, {"late": 1}]
