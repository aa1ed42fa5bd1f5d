"""Small checkpoints for the tests: state ``i`` has ``i`` everywhere, so that a mixture of two shows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipekern.checkpoint.load import Checkpoint
from pipekern.checkpoint.manifest import NAME
from pipekern.checkpoint.save import Shard, save


def shards(i: int, rank: int = 0, files: int = 3) -> Iterator[Shard]:
    """Files of some hundred bytes each."""
    for file in range(files):
        tensors = {f"{rank}/{file}/{n}": torch.full((50 * n,), i) for n in (1, 2)}
        yield f"file-{rank}-{file}", tensors.copy


def write(folder: Path, i: int, files: int = 3) -> None:
    save(folder, shards(i, files=files), lambda: {"state": i})


def state(folder: Path) -> int:
    """Which state is in ``folder``. Fails for a damaged one, and for a mixture."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    found = {row["state"] for row in checkpoint.values}
    for key in checkpoint.entries:
        found |= set(checkpoint.tensor(key).tolist())
    assert len(found) == 1, f"a mixture of {found}"
    return int(found.pop())


def tidy(folder: Path) -> bool:
    """Whether nothing is left in ``folder`` but one checkpoint."""
    names = sorted(path.name for path in folder.iterdir())
    return len(names) == 2 and names[0] == NAME and names[1].startswith("save-")


class Ring:
    """``gather`` among threads that stand for processes."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self._rows: list[Any] = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)

    def gather(self, rank: int, row: Any) -> list[Any]:
        self._rows[rank] = row
        self._barrier.wait()
        rows = list(self._rows)
        self._barrier.wait()
        return rows
