"""Small values that every rank must know: the loss, new tokens of a text, one partial norm a parameter, a timeline.

They travel over a star of links around the rank of the last stage, its root, on the job's own transport, so that the
same abort, death and deadline hold for them. Where there are several pipelines, their roots have a star around the
first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipekern.runtime.outgoing import EXCHANGE_TAG, Outgoing
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.value import map_tensors


def star_links(ranks: int, root: int) -> list[Link]:
    """The links of a pipeline's star: from the root to every other rank, and back."""
    others = [rank for rank in range(ranks) if rank != root]
    return [Link(f"down {r}", root, r, 2) for r in others] + [Link(f"up {r}", r, root, 2) for r in others]


def root_links(roots: Sequence[int]) -> list[Link]:
    """The links between the ``roots`` of all pipelines, ranks of the job: from the first to the others, and back."""
    others = list(enumerate(roots))[1:]
    there = [Link(f"roots down {i}", roots[0], root, 2) for i, root in others]
    return there + [Link(f"roots up {i}", root, roots[0], 2) for i, root in others]


class Star:
    """The star as rank ``rank`` of its pipeline sees it; with one process for all ranks (``rank`` None) there is nobody
    to tell. ``pipeline`` counts the pipelines, of which there are ``pipelines``.
    """

    def __init__(
        self,
        rank: int | None,
        ranks: int,
        root: int,
        outgoing: Outgoing,
        senders: Mapping[str, Sender],
        receivers: Mapping[str, Receiver],
        pipeline: int = 0,
        pipelines: int = 1,
    ):
        self.pipeline, self.pipelines = pipeline, pipelines
        self.rank, self.ranks, self.root = rank, ranks, root
        self._outgoing = outgoing
        self._senders, self._receivers = senders, receivers
        self._exchanges = self._root_exchanges = 0

    @property
    def alone(self) -> bool:
        """Whether this process has every rank."""
        return (self.rank is None or self.ranks == 1) and self.pipelines == 1

    @property
    def number(self) -> int:
        """This process, counted over all pipelines."""
        return self.pipeline * self.ranks + (self.rank or 0)

    @property
    def _others(self) -> list[int]:
        """The ranks of this pipeline that are other processes than the root."""
        return [] if self.rank is None else [rank for rank in range(self.ranks) if rank != self.root]

    def publish(self, tag: int, value: Any) -> None:
        """On the root: send ``value`` to every other rank of this pipeline."""
        for rank in self._others:
            self._outgoing.send(self._senders[f"down {rank}"], tag, value)

    def receive(self, tag: int) -> torch.Tensor:
        """On the others: what the root published."""
        message = self._outgoing.receive(self._receivers[f"down {self.rank}"], tag)
        return message.value.clone()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank of this pipeline, by rank, on each of them; where one process has all ranks, its own.
        Collective. Values are what a message can carry.
        """
        if self.rank is None:
            return [value]
        return self._exchange(value, lambda rows: rows)

    def everywhere(self, value: Any) -> list[list[Any]]:
        """``value`` of every rank of every pipeline, by pipeline and rank, on all of them; collective."""
        if self.rank is None:
            return [[value]]
        return self._exchange(value, self.of_roots)

    def _exchange(self, value: Any, above: Callable[[list[Any]], Any]) -> Any:
        """What the root makes of all ranks' values by ``above``, on every rank."""
        assert self.rank is not None
        tag = self._next_tag()
        if self.rank != self.root:
            self._outgoing.send(self._senders[f"up {self.rank}"], tag, value)
            return self._take(f"down {self.rank}", tag)
        result = above([value if rank == self.root else self._take(f"up {rank}", tag) for rank in range(self.ranks)])
        self.publish(tag, result)
        self._outgoing.drain()
        return result

    def of_roots(self, value: Any) -> list[Any]:
        """On the roots alone: ``value`` of each of them, by pipeline; collective among them."""
        if self.pipelines == 1:
            return [value]
        tag = EXCHANGE_TAG | 1 << 55 | self._root_exchanges
        self._root_exchanges += 1
        if self.pipeline:
            self._outgoing.send(self._senders[f"roots up {self.pipeline}"], tag, value)
            return self._take(f"roots down {self.pipeline}", tag)
        rows = [value, *(self._take(f"roots up {i}", tag) for i in range(1, self.pipelines))]
        for i in range(1, self.pipelines):
            self._outgoing.send(self._senders[f"roots down {i}"], tag, rows)
        self._outgoing.drain()
        return rows

    def _next_tag(self) -> int:
        self._exchanges += 1
        return EXCHANGE_TAG | self._exchanges

    def _take(self, link: str, tag: int) -> Any:
        value = self._outgoing.receive(self._receivers[link], tag).value
        return map_tensors(torch.clone, value)
