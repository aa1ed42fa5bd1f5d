"""Activations that are not kept: a unit's forward runs again in the backward.

``"full"`` keeps a unit's input and nothing within it; ``"selective"`` also keeps the results of products, which are
dear to make and few, and makes the rest again. By torch.utils.checkpoint. The second run draws the same random
numbers, and leaves the buffers (batch statistics) as they were: each micro-batch counts once. What is kept goes
through the saved-tensor hooks in force, as what autograd saves itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pipekern.transport.value import distinct, map_places, tensors

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
        given = distinct(tensors(value))  # by themselves, for what is within a container checkpoint does not save
        number = {id(tensor): place for place, tensor in enumerate(given)}
        frame = map_places(lambda tensor: _Place(number[id(tensor)]), value)

        def run(*given: torch.Tensor) -> Any:
            self._seed(seed)
            return self._unit(map_places(lambda place: given[place.number], frame, _Place))

        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        contexts = partial(self._contexts, hooks)
        return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _contexts(self, hooks: Any) -> Contexts:
        if self._how == "full":
            return nullcontext(), self._again()
        first, again = create_selective_checkpoint_contexts(_policy)
        again = _both(self._again(), again)  # in this order: what is done to buffers is not part of the run
        if hooks is None:
            return first, again
        packed: list[Any] = []
        return _packed(first, hooks[0], packed), _both(_unpacked(packed, hooks[1]), again)

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


class _Place(NamedTuple):
    """Stands for a tensor of a value."""

    number: int


@contextmanager
def _packed(first: Any, pack: Callable[[torch.Tensor], Any], packed: list[Any]) -> Iterator[None]:
    """The first run; tensors that it has kept are then packed, in torch's wrappers around them."""
    with first:
        yield
    for one in pytree.tree_leaves(first.storage):
        if isinstance(getattr(one, "val", None), torch.Tensor):
            one.val = pack(one.val)
            packed.append(one)


@contextmanager
def _unpacked(packed: list[Any], unpack: Callable[[Any], torch.Tensor]) -> Iterator[None]:
    for one in packed:
        one.val = unpack(one.val)
        one.version = one.val._version
    yield


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield


def _policy(ctx: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
