"""Small facts that every rank of a job must know of every other, exchanged through the job's key-value store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

from pipekern.errors import PeerDied, TransportTimeout

SLICE = 0.1  # seconds: the longest that a wait goes without looking at the job


class Store(Protocol):
    """What is used of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


def gather_json(
    store: Store, name: str, rank: int, ranks: int, row: Mapping[str, Any], timeout: float, left: Callable[[int], bool]
) -> list[dict[str, Any]]:
    """``row`` of every rank, by rank. Collective; ``name`` may be used once a store.

    Values are what JSON can say, and arrive as JSON gives them back: tuples as lists. ``left(rank)`` is asked while
    waiting for ``rank``; it may raise. Raises ``PeerDied`` for a rank that left instead of coming, and
    ``TransportTimeout`` naming the ranks that have not come after ``timeout`` seconds.
    """
    store.set(f"{name}/{rank}", json.dumps(row))
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + timeout
    pause = 0.0005
    for other in range(ranks):
        key = f"{name}/{other}"
        while not store.check([key]):
            if left(other) and not store.check([key]):  # looked at again: it may have come and then left
                raise PeerDied(f"rank {other} has left the job before '{name}'; read what it printed", other)
            if time.monotonic() > deadline:
                missing = [r for r in range(other, ranks) if not store.check([f"{name}/{r}"])] or [other]
                raise TransportTimeout(
                    f"rank {rank} waited {timeout:g} s at '{name}' for {named(missing)}: start all ranks together, "
                    "look at what the late ones printed, or give a longer timeout",
                    missing[0],
                )
            time.sleep(pause)
            pause = min(2 * pause, SLICE)
        rows.append(json.loads(store.get(key)))
    return rows


def disagreements(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every pair of values that differ, with the ranks that have them; empty where all ranks agree.

    >>> disagreements([{"microbatches": 8}, {"microbatches": 4}, {"microbatches": 8}])
    ['microbatches: 8 on ranks 0, 2, but 4 on rank 1']
    """
    found: list[str] = []
    for key in dict.fromkeys(key for row in rows for key in row):
        holders: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            text = json.dumps(row[key], sort_keys=True) if key in row else "not given"
            holders.setdefault(text, []).append(rank)
        found += [
            f"{key}: {one} on {named(holders[one])}, but {other} on {named(holders[other])}"
            for one, other in combinations(holders, 2)
        ]
    return found


def spans(ranks: Sequence[int]) -> str:
    """Ascending ``ranks`` in short: ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {spans(ranks)}"
