"""Messages that found no free slot: queued, and retried between instructions, never waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from pipekern.errors import MessageMismatch, TransportError
from pipekern.transport.base import Message, Receiver, Sender, Transport
from pipekern.transport.value import map_tensors

# What a message is, in the high byte of its tag; below it the step (24 bits) and the micro-batch or a number.
FORWARD_TAG, BACKWARD_TAG, EVALUATE_TAG, LOSS_TAG, EXCHANGE_TAG, TIE_TAG = (kind << 56 for kind in range(1, 7))
GENERATE_TAG, TOKEN_TAG, MOVE_TAG = (kind << 56 for kind in range(7, 10))
_KINDS = (
    "", "activation", "gradient", "activation of an evaluation", "loss", "collective", "tied weight",
    "activation of a text", "new tokens", "moving layer",
)  # fmt: skip
_RETRY = 0.0005  # seconds that a receive waits before it retries queued sends


def describe(tag: int) -> str:
    """A tag in words."""
    return f"{_KINDS[tag >> 56]}, step {tag >> 32 & 0xFFFFFF}, micro-batch or number {tag & 0xFFFFFFFF}"


class Outgoing:
    """This process's sends and receives: first in, first out on each link, and no wait that starves a queued send."""

    def __init__(self, transport: Transport, receivers: Iterable[Receiver], alone: bool):
        self._transport = transport
        self._receivers = list(receivers)
        self._alone = alone  # nobody else could free a slot
        self.queued: dict[str, deque[tuple[Sender, int, Any, int, bool]]] = {}

    def send(self, sender: Sender, tag: int, value: Any, digest: int = 0, given: bool = False) -> None:
        """Send now if the link has a free slot and nothing waits before it, else queue."""
        queue = self.queued.get(sender.link.name)
        if queue is None and sender.send(tag, value, digest, given):
            return
        if queue is None:
            queue = self.queued[sender.link.name] = deque()
        queue.append((sender, tag, self.own(value), digest, given))

    def flush(self) -> None:
        """Retry every queue until it is empty or its link is full."""
        for name, queue in list(self.queued.items()):
            while queue:
                sender, tag, value, digest, given = queue[0]
                if not sender.send(tag, value, digest, given):
                    break
                queue.popleft()
            if not queue:
                del self.queued[name]

    def receive(self, receiver: Receiver, tag: int, into: torch.Tensor | None = None) -> Message:
        """The next message of a link, see ``Receiver.recv``; queued sends go on meanwhile."""
        try:
            while self.queued:
                self.flush()
                message = receiver.recv(tag, _RETRY, into)
                if message is not None:
                    return message
            message = receiver.recv(tag, into=into)
        except MessageMismatch as error:
            raise MessageMismatch(f"{error}; expected: {describe(tag)}", error.rank) from None
        assert message is not None, "recv without a limit returned nothing"
        return message

    def drain(self) -> None:
        """Wait until every queued message is sent. Raises what the job raises: a send in vain counts as waiting
        there.
        """
        while self.queued:
            self.flush()
            self._transport.check()
            if self.queued and self._alone:
                raise TransportError(
                    f"no free slot on {', '.join(self.queued)} at the end of a step; a receiving stage holds on to its "
                    "inputs: what it keeps must be a copy (.detach().clone())"
                )
            time.sleep(_RETRY / 10)

    def clear(self) -> None:
        """Forget what is queued: what an exception left behind."""
        self.queued.clear()

    def own(self, value: Any) -> Any:
        """``value`` with copies of the tensors that lie in a received slot: what outlives the slot's use must not hold
        one.
        """

        def own(tensor: torch.Tensor) -> torch.Tensor:
            pointer = tensor.untyped_storage().data_ptr()
            if any(receiver.owns(pointer) for receiver in self._receivers):
                return tensor.detach().clone().requires_grad_(tensor.requires_grad)
            return tensor

        return map_tensors(own, value)
