"""A step of training: what happens to gradients before, around and after the program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipekern.optim.scale import LossScale
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.batch import Batch
from pipekern.runtime.deltas import Deltas
from pipekern.runtime.executor import Executor
from pipekern.runtime.idle import unused
from pipekern.runtime.nonfinite import Guard, finite
from pipekern.runtime.watch import Watch
from pipekern.stage.random import preserved


def _mend(buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give those that a step has left not finite (running statistics, for ever) back what they were before."""
    with torch.no_grad():
        for buffer, before in buffers:
            if buffer.is_floating_point() and not finite([buffer]) and finite([before]):
                buffer.copy_(before)


class Training:
    """Steps of ``parts``; ``policy`` is ``on_nonfinite`` of ``Pipeline``, ``scale`` that of the loss under float16.

    ``loss_is_pair``: whether the loss function returns a sum and a count, None until it is known.
    """

    def __init__(self, parts: Assembly, policy: str, scale: LossScale | None, loss_is_pair: bool | None = None):
        self.watch = Watch(parts)
        self.guard = Guard(parts, self.watch, policy, scale)
        self._parts = parts
        self.loss_is_pair = loss_is_pair

    def step(self, batch: Batch, run: Callable[[Executor, Batch], None]) -> tuple[Tensor, str]:
        """The mean loss, whose gradients are added to ``.grad``, and what is not finite, in words."""
        parts, store = self._parts, self._parts.store
        apart = store is not None or parts.division is not None
        whole = self.loss_is_pair is not False or self.guard.drops or apart
        if store is not None:
            store.part()
        deltas = Deltas(parts.distinct() if whole else parts.ties.parameters)
        if store is not None:
            store.begin()
        buffers = parts.buffers() if self.guard.leaves_out else []
        with preserved(parts.devices):
            run(parts.train, batch)
        verdict = parts.verdict(batch)
        assert verdict.loss is not None
        if store is not None:
            store.finish()
        if parts.division is not None:
            parts.division.finish(parts.parameters)
        parts.ties.reduce(batch.tag)
        deltas.divide(parts.loss.scale * (1.0 if verdict.divisor is None else verdict.divisor))
        parts.refuse_held()
        overflow, trouble, idle = self.guard.judge(batch, verdict.loss)
        if overflow or (trouble and self.guard.drops):
            _mend(buffers)
        if overflow:
            deltas.clear()
        elif trouble and self.guard.drops:
            deltas.drop()
        else:
            names = unused(parts) if idle else []
            if store is not None:
                store.leave(names)
            deltas.merge()
        self.loss_is_pair = verdict.divisor is not None
        return verdict.loss, trouble
