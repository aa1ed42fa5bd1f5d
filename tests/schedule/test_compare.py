from __future__ import annotations

import pytest

from pipekern.schedule import Costs, build, describe, names
from pipekern.schedule.compare import compare, figures

UNIT = Costs(1, 1, 1)


def test_golden_one_row() -> None:
    row = figures(build("seq1f1b", ranks=4, microbatches=8), UNIT)
    assert (row.name, row.chunks, row.makespan, row.span, row.peak, row.messages) == ("seq1f1b", 2, 28.5, 28.5, 2.5, 96)
    assert (row.bubble_ratio, row.synchronous, row.duplicates_weights, row.runnable) == (4.5 / 28.5, True, False, False)


def test_every_schedule_is_there_once_in_order() -> None:
    for ranks, microbatches in ((4, 8), (3, 5), (1, 1), (6, 6)):
        found, refused = compare(ranks, microbatches, UNIT)
        assert sorted([*refused, *(row.name for row in found)]) == names()
        assert [row.makespan for row in found] == sorted(row.makespan for row in found)
    assert not compare(4, 8, UNIT).refused
    assert set(compare(3, 6, UNIT).refused) == {"chimera", "dualpipe"}


@pytest.mark.parametrize("memory", [1, 2, 3, 4.5, 7])
def test_memory_is_a_cap(memory: float) -> None:
    found, refused = compare(4, 8, UNIT, memory=memory)
    assert all(row.peak <= memory for row in found)
    free = {row.name: row.peak for row in compare(4, 8, UNIT).figures}
    assert {name for name, peak in free.items() if peak <= memory} <= {row.name for row in found}
    assert all("memory" in reason for reason in refused.values())


def test_chunks_where_they_are_taken() -> None:
    for row in compare(4, 8, UNIT, chunks=4).figures:
        assert row.chunks == (4 if 4 in describe(row.name).chunks else describe(row.name).chunks[0])
