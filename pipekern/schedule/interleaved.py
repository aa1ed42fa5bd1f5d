"""Interleaved 1F1B: each rank holds several chunks of the model, so that the pipeline fills in smaller steps.

Grid of 2 ranks, 2 chunks each (``B0/3``: of stage 3) and 4 micro-batches at F = B = W = 1::

    rank 0 F0F1F0F1F2..B0/2F3B1/2F2B0/0F3B1/0..B2/2..B3/2B2/0B3/0
    rank 1 ..F0F1F0B0/3F1B1/3F2B0/1F3B1/1F2B2/3F3B3/3B2/1B3/1....

Bubble (p - 1)(F + B + W) / v a rank with v chunks, peak (vp + p - 1) / v activations on rank 0.
"""

from __future__ import annotations

from pipekern.schedule.ir import Action
from pipekern.schedule.one_f_one_b import warm_up_pairs_drain
from pipekern.schedule.registry import MANY_CHUNKS, Grid, register
from pipekern.schedule.rules import multiple


@register("interleaved-1f1b", chunks=MANY_CHUNKS)
def interleaved(grid: Grid) -> list[list[Action]]:
    """The rows of all ranks: the ``k``-th forward runs chunk ``k // p mod v``, in groups of ``p`` micro-batches."""
    multiple("interleaved-1f1b", "microbatches", grid.microbatches, grid.ranks, "ranks")
    return [interleaved_row(rank, grid) for rank in range(grid.ranks)]


def interleaved_row(rank: int, grid: Grid) -> list[Action]:
    """The row of one rank."""
    ranks, microbatches, chunks, _ = grid
    turns = [_turn(k, ranks, chunks) for k in range(microbatches * chunks)]
    forwards = [Action("F", chunk * ranks + rank, microbatch) for chunk, microbatch in turns]
    backwards = [Action("BW", (chunks - 1 - chunk) * ranks + rank, microbatch) for chunk, microbatch in turns]
    return [*warm_up_pairs_drain(forwards, backwards, 2 * (ranks - rank - 1) + (chunks - 1) * ranks)]


def _turn(k: int, ranks: int, chunks: int) -> tuple[int, int]:
    """Chunk and micro-batch of a rank's ``k``-th forward."""
    group, place = divmod(k, ranks * chunks)
    return place // ranks, group * ranks + place % ranks
