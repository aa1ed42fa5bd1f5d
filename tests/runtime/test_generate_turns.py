"""The order in which groups of prompts go round the stages."""

from __future__ import annotations

from collections import Counter

import pytest

from pipekern.runtime.generate import offsets, turns


def test_golden_turns() -> None:
    """Two ranks, V placement (0 1 1 0), two groups: the second enters two turns after the first; no rank ever waits."""
    assert offsets([0, 1, 1, 0], 2) == ([0, 2], 4)
    assert [(t.stage, t.group, t.late) for t in turns([0, 1, 1, 0], 2)] == [
        (0, 0, 0), (2, 1, 1), (1, 0, 0), (3, 1, 1), (2, 0, 0), (0, 1, 0), (3, 0, 0), (1, 1, 0)
    ]  # fmt: skip


RANKS = (1, 2, 3, 4)
PLACEMENTS = [
    *([rank for _ in range(v) for rank in range(r)] for r in RANKS for v in (1, 2, 3)),
    *([*range(r), *reversed(range(r))] for r in RANKS),
    *([*range(r), *reversed(range(r))] * 2 for r in RANKS),
    [0, 2, 1, 1, 0, 0, 2],
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 9])
def test_a_turn_comes_after_what_it_needs(placement: list[int], groups: int) -> None:
    """Each group meets the stages one after the other, round after round; no turn is left out."""
    period = turns(placement, groups)
    assert Counter((t.stage, t.group) for t in period) == Counter(
        (s, g) for s in range(len(placement)) for g in range(groups)
    )
    done: dict[int, list[tuple[int, int]]] = {group: [] for group in range(groups)}
    for start in range(5):
        for turn in period:
            if 0 <= start - turn.late < 4:
                done[turn.group].append((start - turn.late, turn.stage))
    assert all(made == [(n, s) for n in range(4) for s in range(len(placement))] for made in done.values())


def _makespan(placement: list[int], groups: int, rounds: int) -> int:
    """Turns until all is done, where each rank runs its own part of the order and waits for what a turn needs."""
    free: Counter[int] = Counter()
    ends: dict[tuple[int, int], int] = {}
    order = turns(placement, groups)
    for period in range(rounds + 1):
        for turn in order:
            number, rank = period - turn.late, placement[turn.stage]
            if 0 <= number < rounds:
                free[rank] = max(free[rank], ends.get((turn.group, number * len(placement) + turn.stage - 1), 0)) + 1
                ends[turn.group, number * len(placement) + turn.stage] = free[rank]
    return max(ends.values())


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_no_rank_waits(placement: list[int]) -> None:
    """A round takes as long as the busiest rank works in it, or as one group needs; with as many groups as ranks, or a
    multiple of that, no rank waits at all. Some other numbers do not fit the grid: then it is a sixth longer at most.
    """
    ranks = max(placement) + 1
    for groups in range(1, 3 * ranks + 1):
        shortest = max(len(placement), groups * max(Counter(placement).values()))
        measured = (_makespan(placement, groups, 40) - _makespan(placement, groups, 20)) / 20
        fits = groups % ranks == 0 and placement != PLACEMENTS[-1]
        assert shortest <= measured <= (shortest if fits else shortest * 7 / 6)
