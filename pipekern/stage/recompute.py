"""Activations that are not kept: a unit's forward runs again in the backward.

``"full"`` keeps a unit's input and nothing within it; ``"selective"`` also keeps the results of products, which are
dear to make and few, and makes the rest again. By torch.utils.checkpoint. The second run draws the same random
numbers, and leaves the buffers (batch statistics) as they were: each micro-batch counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CHOICES = ("none", "selective", "full")

_aten = torch.ops.aten
_KEPT = {
    op.default
    for op in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten.baddbmm,
        _aten.convolution,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
    )
}

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class Recomputed:
    """``unit``, the call of ``module``, with ``how`` (``"selective"`` or ``"full"``); ``seed`` starts its numbers."""

    def __init__(self, unit: Callable[[Any], Any], module: nn.Module, how: str, seed: Callable[[int], object]):
        self._unit, self._module, self._how, self._seed = unit, module, how, seed

    def __call__(self, seed: int, value: Any) -> Any:
        """Run it for the first time; what backward needs of it is made again there."""

        def run(value: Any) -> Any:
            self._seed(seed)
            return self._unit(value)

        return checkpoint(run, value, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts)

    def _contexts(self) -> Contexts:
        if self._how == "full":
            return nullcontext(), self._again()
        first, again = create_selective_checkpoint_contexts(_policy)
        return first, _both(self._again(), again)  # in this order: what is done to buffers is not part of the run

    @contextmanager
    def _again(self) -> Iterator[None]:
        """The second run: buffers get back what they had."""
        before = [(buffer, buffer.clone()) for buffer in self._module.buffers()] if self._module.training else []
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield


def _policy(ctx: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
