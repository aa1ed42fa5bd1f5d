"""Gradients of one step kept apart from those that were there before, where a step must still change its own part.

Three cases: a loss whose divisor is known only at the end of the step, a weight that several ranks hold, whose
gradient is the sum of theirs, and a step that may be dropped. Everything else accumulates straight into ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from pipekern.parallel.tensor import as_part, local
from pipekern.runtime.outgoing import TIE_TAG, Outgoing
from pipekern.stage.sharing import Tie
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.value import by_device


def tie_links(ties: Sequence[Tie]) -> list[Link]:
    """A link between every two ranks that hold the same weight, in both directions."""
    pairs = sorted({(a, b) for tie in ties for a in tie.names for b in tie.names if a != b})
    counts = {pair: sum(pair[0] in tie.names and pair[1] in tie.names for tie in ties) for pair in pairs}
    return [Link(f"tie {a}>{b}", a, b, counts[a, b] + 1) for a, b in pairs]


class Ties:
    """The weights that rank ``rank`` holds together with others (None: one process has every rank, and holds them
    once).
    """

    def __init__(
        self,
        rank: int | None,
        ties: Sequence[Tie],
        parameters: Mapping[str, nn.Parameter],
        outgoing: Outgoing,
        senders: Mapping[str, Sender],
        receivers: Mapping[str, Receiver],
    ):
        self._rank, self._outgoing = rank, outgoing
        self._senders, self._receivers = senders, receivers
        self._ties = ties
        self.hold(parameters)

    def hold(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take ``parameters`` by name; one that is not there has no part here, nor on the other ranks of this place."""
        rank = -1 if self._rank is None else self._rank
        named = [(i, tie, tie.names.get(rank, "")) for i, tie in enumerate(self._ties)]
        self._held = [(i, tie, parameters[name]) for i, tie, name in named if name in parameters]
        self.parameters = [parameter for _, _, parameter in self._held]

    def equalise(self) -> None:
        """Take the owner's values, so that all copies are the same, bit for bit."""
        for i, tie, parameter in self._held:
            owner = min(tie.names)
            if self._rank == owner:
                for other in tie.names.keys() - {owner}:
                    self._outgoing.send(self._senders[f"tie {owner}>{other}"], TIE_TAG | i, local(parameter.detach()))
            else:
                message = self._outgoing.receive(self._receivers[f"tie {owner}>{self._rank}"], TIE_TAG | i)
                with torch.no_grad():
                    local(parameter).copy_(message.value)

    def reduce(self, tag: int) -> None:
        """Give each of them the sum of all ranks' ``.grad``, added in the order of ranks: the same bits everywhere."""
        own = [None if p.grad is None else local(p.grad) for p in self.parameters]
        for (i, tie, _), grad in zip(self._held, own, strict=True):
            for other in tie.names.keys() - {self._rank}:
                self._outgoing.send(self._senders[f"tie {self._rank}>{other}"], TIE_TAG | tag | i, grad)
        for (i, tie, parameter), grad in zip(self._held, own, strict=True):
            grads = {}
            for rank in tie.names:
                if rank == self._rank:
                    grads[rank] = grad
                else:
                    message = self._outgoing.receive(self._receivers[f"tie {rank}>{self._rank}"], TIE_TAG | tag | i)
                    grads[rank] = message.value
            total = _sum([grads[rank] for rank in sorted(grads)], local(parameter).device)
            parameter.grad = None if total is None else as_part(parameter, total)
        self._outgoing.drain()


def _sum(grads: Iterable[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    there = [grad for grad in grads if grad is not None]
    if not there:
        return None
    total = there[0].to(device, copy=True)
    for grad in there[1:]:
        total += grad.to(device)
    return total


class Deltas:
    """The gradients of ``parameters`` from before a step, set aside while it runs."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._before = [(p, p.grad) for p in parameters]
        for parameter, _ in self._before:
            parameter.grad = None

    def divide(self, divisor: float) -> None:
        """Divide the step's own gradients."""
        if divisor == 1.0:
            return
        for grads in by_device(local(p.grad) for p, _ in self._before if p.grad is not None):
            torch._foreach_div_(grads, divisor)

    def merge(self) -> None:
        """Add what was there before."""
        for parameter, before in self._before:
            if before is None:
                continue
            parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)

    def clear(self) -> None:
        """Leave no gradient at all."""
        for parameter, _ in self._before:
            parameter.grad = None

    def drop(self) -> None:
        """Give back what was there before, without the step's own."""
        for parameter, before in self._before:
            parameter.grad = before
