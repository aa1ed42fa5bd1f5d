"""Hanayo: each rank holds a stage on every pass of W waves that run back and forth, so that pipelines fill faster.

Grid of 2 ranks, 4 chunks each (``B0/3``: of stage 3) and 2 micro-batches at F = B = W = 1::

    rank 0 F0F1..F0F0F1F1F0B0/7F1B1/7..B0/4B0/3B1/4B1/3B0/0....B1/0
    rank 1 ..F0F0F1F1F0F0F1F1..B0/6B0/5B1/6B1/5B0/2B0/1B1/2B1/1....

``chunks`` is 2W: 2pW stages in zigzag. Bubble ratio about (2p - 2) / (3pW + p - 1) at BW = 2F and m = p, with at most p
activations. With more micro-batches it holds up to twice as many, unless ``memory`` caps those that are on their
way. (Liu et al., Hanayo, 2023.)
"""

from __future__ import annotations

import heapq
import math

from pipekern.schedule.ir import Action
from pipekern.schedule.registry import EVEN_CHUNKS, Grid, register, zigzag
from pipekern.schedule.rules import at_least

_TIME = {"F": 1, "BW": 2}


@register("hanayo", chunks=EVEN_CHUNKS, placement=zigzag)
def hanayo(grid: Grid) -> list[list[Action]]:
    """The rows of all ranks: at BW = 2F, whoever is free takes the oldest backward it has, else the oldest forward."""
    stage_rank = zigzag(grid)
    limit = _on_their_way(grid)
    rows: list[list[Action]] = [[] for _ in range(grid.ranks)]
    waiting: list[list[tuple[bool, int, int, Action]]] = [[] for _ in rows]
    free = [0] * grid.ranks
    # When each rank gets something to do; () where it only becomes free.
    agenda: list[tuple[int, int, Action | tuple[()]]] = [(0, 0, Action("F", 0, i)) for i in range(limit)]
    while agenda:
        now, touched = agenda[0][0], set()
        while agenda and agenda[0][0] == now:
            _, rank, action = heapq.heappop(agenda)
            touched.add(rank)
            if action:
                heapq.heappush(waiting[rank], (action.op == "F", action.microbatch, -action.stage, action))
        for rank in touched:
            if free[rank] > now or not waiting[rank]:
                continue
            chosen = heapq.heappop(waiting[rank])[-1]
            rows[rank].append(chosen)
            free[rank] = now + _TIME[chosen.op]
            heapq.heappush(agenda, (free[rank], rank, ()))
            after = _after(chosen, len(stage_rank) - 1, limit)
            if after.microbatch < grid.microbatches:
                heapq.heappush(agenda, (free[rank], stage_rank[after.stage], after))
    return rows


def _on_their_way(grid: Grid) -> int:
    """The most micro-batches between their first F and their last BW, which no rank's peak can exceed."""
    if grid.memory is None:
        return grid.microbatches
    at_least("hanayo", "memory", grid.memory, 1)
    return math.floor(min(grid.memory, grid.microbatches))


def _after(action: Action, last: int, limit: int) -> Action:
    """What the end of ``action`` makes possible; a micro-batch that leaves lets another one in."""
    op, stage, microbatch = action
    if op == "F":
        return Action("F", stage + 1, microbatch) if stage < last else Action("BW", stage, microbatch)
    return Action("BW", stage - 1, microbatch) if stage else Action("F", 0, microbatch + limit)
