"""Small values that every rank must know: the loss, new tokens of a text, one partial norm a parameter, a timeline.

They travel over a star of links around the rank of the last stage, on the job's own transport, so that the same abort,
death and deadline hold for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipekern.runtime.outgoing import EXCHANGE_TAG, Outgoing
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.value import map_tensors


def star_links(ranks: int, root: int) -> list[Link]:
    """The links of the star: from the root to every other rank, and back."""
    others = [rank for rank in range(ranks) if rank != root]
    return [Link(f"down {r}", root, r, 2) for r in others] + [Link(f"up {r}", r, root, 2) for r in others]


class Star:
    """The star as rank ``rank`` sees it; with one process for all ranks (``rank`` None) there is nobody to tell."""

    def __init__(
        self,
        rank: int | None,
        ranks: int,
        root: int,
        outgoing: Outgoing,
        senders: Mapping[str, Sender],
        receivers: Mapping[str, Receiver],
    ):
        self.rank, self.ranks, self.root = rank, ranks, root
        self._outgoing = outgoing
        self._senders, self._receivers = senders, receivers
        self._exchanges = 0

    @property
    def alone(self) -> bool:
        """Whether this process has every rank."""
        return self.rank is None or self.ranks == 1

    def publish(self, tag: int, values: torch.Tensor) -> None:
        """On the root: send ``values``, a tensor of at most four dimensions, to every other rank."""
        if not self.alone:
            for rank in range(self.ranks):
                if rank != self.root:
                    self._outgoing.send(self._senders[f"down {rank}"], tag, values)

    def receive(self, tag: int) -> torch.Tensor:
        """On the others: what the root published."""
        message = self._outgoing.receive(self._receivers[f"down {self.rank}"], tag)
        return message.value.clone()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, by rank, on every rank; collective. Values are what a message can carry."""
        if self.alone:
            return [value]
        tag = EXCHANGE_TAG | self._exchanges
        self._exchanges += 1
        if self.rank == self.root:
            rows = [value if rank == self.root else self._take(f"up {rank}", tag) for rank in range(self.ranks)]
            for rank in range(self.ranks):
                if rank != self.root:
                    self._outgoing.send(self._senders[f"down {rank}"], tag, rows)
            self._outgoing.drain()
            return rows
        self._outgoing.send(self._senders[f"up {self.rank}"], tag, value)
        return self._take(f"down {self.rank}", tag)

    def _take(self, link: str, tag: int) -> Any:
        value = self._outgoing.receive(self._receivers[link], tag).value
        return map_tensors(torch.clone, value)
