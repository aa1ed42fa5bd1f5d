"""Replicas that are all in one process: what one begins is there once all have begun it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pipekern.parallel.replicas import Replicas


class _Round:
    """One collective: the tensors of each replica, and what is done with them when the first one waits."""

    def __init__(self, size: int, run: Callable[[Sequence[tuple[Tensor, ...]]], None]):
        self.given: list[tuple[Tensor, ...]] = []
        self._size, self._run, self._over = size, run, False

    def wait(self) -> None:
        assert len(self.given) == self._size, "waits for replicas that have not begun"
        if not self._over:
            self._run(self.given)
        self._over = True

    def done(self) -> bool:
        return self._over


class Together:
    """Stands for :class:`~pipekern.parallel.replicas.Replicas` as replica ``index`` sees it. What it writes does not
    change a tensor's version, as torch.distributed counts it where it begins.
    """

    def __init__(self, index: int, rounds: list[list[_Round]]):
        self.index, self.size = index, len(rounds)
        self.calls: list[str] = []
        self._rounds = rounds

    @classmethod
    def all(cls, size: int) -> list[Replicas]:
        rounds: list[list[_Round]] = [[] for _ in range(size)]
        return [cast(Replicas, cls(index, rounds)) for index in range(size)]

    def _begin(self, name: str, run: Callable[[Sequence[tuple[Tensor, ...]]], None], *own: Tensor) -> Any:
        self.calls.append(name)
        mine = self._rounds[self.index]
        others = [row for row in self._rounds if len(row) > len(mine)]
        mine.append(others[0][len(mine)] if others else _Round(self.size, run))
        mine[-1].given.append(own)
        return mine[-1]

    def sum(self, values: Tensor) -> Any:
        def run(given: Sequence[tuple[Tensor, ...]]) -> None:
            total = torch.stack([value for (value,) in given]).sum(0)
            for (value,) in given:
                value.data.copy_(total)

        return self._begin("sum", run, values)

    def scatter(self, values: Tensor, own: Tensor) -> Any:
        def run(given: Sequence[tuple[Tensor, ...]]) -> None:
            total = torch.stack([value for value, _ in given]).sum(0)
            for (_, part), wanted in zip(given, total.tensor_split(len(given)), strict=True):
                part.data.copy_(wanted)

        return self._begin("scatter", run, values, own)

    def gather(self, values: Tensor) -> Any:
        def run(given: Sequence[tuple[Tensor, ...]]) -> None:
            parts = [value.tensor_split(len(given))[index] for index, (value,) in enumerate(given)]
            whole = torch.cat(parts).clone()
            for (value,) in given:
                value.data.copy_(whole)

        return self._begin("gather", run, values)
