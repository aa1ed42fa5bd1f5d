"""What the docstring of every generator draws is what it builds, and its rules hold over a grid."""

from __future__ import annotations

import re

import pytest

from pipekern.schedule import Action, Costs, build, gpipe, interleaved, looped_bfs, one_f_one_b
from pipekern.trace import text


@pytest.mark.parametrize(
    ("module", "name", "ranks", "microbatches"),
    [
        (gpipe, "gpipe", 3, 4),
        (one_f_one_b, "1f1b", 3, 4),
        (interleaved, "interleaved-1f1b", 2, 4),
        (looped_bfs, "looped-bfs", 2, 3),
    ],
)
def test_golden_grid_of_the_docstring(module: object, name: str, ranks: int, microbatches: int) -> None:
    timeline = build(name, ranks=ranks, microbatches=microbatches).simulate(Costs(1, 1, 1))
    rows = re.findall(r"^    (rank .*)$", module.__doc__ or "", re.MULTILINE)
    assert rows == text.draw(timeline, len(rows[0]) - len("rank 0 ")).splitlines()


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b", "looped-bfs"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_valid_over_a_grid(name: str, ranks: int, rounds: int) -> None:
    one_chunk = name in ("gpipe", "1f1b")
    for chunks in (1,) if one_chunk else (2, 3):
        schedule = build(name, ranks=ranks, microbatches=ranks * rounds, chunks=chunks)
        schedule.check()
        assert schedule.runnable and schedule.chunks == chunks
        assert schedule.stage_rank == tuple(range(ranks)) * chunks


def test_1f1b_takes_fewer_microbatches_than_ranks() -> None:
    rows = build("1f1b", ranks=4, microbatches=2).actions
    assert [" ".join(map(str, row)) for row in rows] == [
        "0F0 0F1 0BW0 0BW1",
        "1F0 1F1 1BW0 1BW1",
        "2F0 2F1 2BW0 2BW1",
        "3F0 3BW0 3F1 3BW1",
    ]


def test_interleaved_order_of_chunks() -> None:
    row = build("interleaved-1f1b", ranks=2, microbatches=4, chunks=3).actions[0]
    forwards = " ".join(str(action) for action in row if action.op == "F")
    assert forwards == "0F0 0F1 2F0 2F1 4F0 4F1 0F2 0F3 2F2 2F3 4F2 4F3"
    assert row.index(Action("BW", 4, 0)) == 2 * 1 + 2 * 2 + 1


def test_looped_bfs_takes_the_chunks_backwards_in_reverse() -> None:
    row = build("looped-bfs", ranks=2, microbatches=2).actions[1]
    assert " ".join(map(str, row)) == "1F0 1F1 3F0 3F1 3BW0 3BW1 1BW0 1BW1"
