"""Chimera: two pipelines in opposite directions, each with half the micro-batches, fill each other's bubbles.

Grid of 4 ranks and 8 micro-batches (``B4/7``: on stage 7) at F = B = W = 1::

    rank 0 F0F1..F4B4/7F5B5/7..B0/0F2..B1/0F3F6B6/7F7B7/7..B2/0....B3/0
    rank 1 ..F0F4F1F5..B4/6B0/1B5/6B1/1F2F6..F3F7..B6/6B2/1B7/6B3/1....
    rank 2 ..F4F0F5F1..B0/2B4/5B1/2B5/5F6F2..F7F3..B2/2B6/5B3/2B7/5....
    rank 3 F4F5..F0B0/3F1B1/3..B4/4F6..B5/4F7F2B2/3F3B3/3..B6/4....B7/4

Each rank holds a stage of either direction, so that every weight is there twice. The order is that of the times at
BW = F, where blocks of p micro-batches fit together without a gap: bubble ratio (p - 2) / (2m + p - 2). At BW = 2F
it is (p - 2) / (1.5m + p - 2) for one block, and every further block adds a gap of (p - 2)F, which the paper closes by
running two forwards at a time. Between p/2 + 1 and p activations. (Li and Hoefler, Chimera, 2021.)
"""

from __future__ import annotations

from collections.abc import Iterator

from pipekern.schedule.ir import Action
from pipekern.schedule.registry import Grid, opposed, register
from pipekern.schedule.rules import multiple


@register("chimera", placement=opposed, chains=2, runnable=False)
def chimera(grid: Grid) -> Iterator[list[Action]]:
    """The rows of all ranks: both pipelines' actions, sorted by their time at BW = F."""
    ranks, microbatches, _, _ = grid
    multiple("chimera", "ranks", ranks, 2)
    multiple("chimera", "microbatches", microbatches, 2)
    half = microbatches // 2
    for rank in range(ranks):
        timed = []
        for stage, first, depth in ((rank, 0, rank), (2 * ranks - 1 - rank, half, ranks - 1 - rank)):
            for index in range(half):
                block, place = divmod(index, ranks // 2)
                start = 2 * (place + block * ranks)
                timed.append((start + depth, Action("F", stage, first + index)))
                timed.append((start + 2 * ranks - 1 - depth, Action("BW", stage, first + index)))
        yield [action for _, action in sorted(timed)]
