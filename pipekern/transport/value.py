"""Walks over values: nestings of tuples, lists, dicts, named tuples and dataclasses over tensors and anything else.

Everything that looks for the tensors of a value looks here, so that no part of pipekern sees fewer of them than
another: a tensor that is overlooked loses its gradient without an error. Containers that torch's pytree knows and
messages do not (an ``OrderedDict``, a ``deque``, what a user has registered) are walked too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipekern.transport import record

PLAIN = frozenset({type(None), bool, int, float, str, torch.Size})  # beside tensors, what a message can hold


# The walks are functions of the module: a function within another that calls itself is a cycle, which would keep
# tensors, and so their slots, until the garbage collector comes by.
def tensors(value: Any, other: Callable[[Any], object] | None = None) -> list[Tensor]:
    """The tensor at each place of ``value``, in order; one that stands in several places comes as often.

    ``other`` is called with everything that is neither a tensor, nor a container of known kind, nor ``PLAIN``.
    """
    found: list[Tensor] = []
    _collect(value, found, other)
    return found


def distinct(found: Iterable[Tensor]) -> list[Tensor]:
    """``found``, each tensor once."""
    return list({id(tensor): tensor for tensor in found}.values())


def map_places(change: Callable[[Any], Any], value: Any, of: type = Tensor) -> Any:
    """``value`` with ``change`` called at each place of a tensor (or an ``of``), in the order of :func:`tensors`."""
    kind = type(value)
    if isinstance(value, of):
        return change(value)
    if kind in PLAIN:
        return value
    if kind is tuple:
        return tuple([map_places(change, part, of) for part in value])
    if kind is list:
        return [map_places(change, part, of) for part in value]
    if kind is dict:
        return {key: map_places(change, part, of) for key, part in value.items()}
    opened = _open(value)
    if opened is None:
        return value
    parts, close = opened
    return close([map_places(change, part, of) for part in parts])


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``change`` called once for each tensor: one that stands in several places still does."""
    if isinstance(value, Tensor):
        return change(value)
    done: dict[int, tuple[Tensor, Tensor]] = {}  # the first is kept, so that no other gets its id

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = tensor, change(tensor)
        return done[id(tensor)][1]

    return map_places(once, value)


def by_device(found: Iterable[Tensor]) -> list[list[Tensor]]:
    """``found`` in lists of one device each, which torch's foreach functions are made for."""
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in found:
        groups.setdefault(tensor.device, []).append(tensor)
    return list(groups.values())


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. A copy to the CPU is waited for: nothing else would keep it from being read early."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _collect(item: Any, found: list[Tensor], other: Callable[[Any], object] | None) -> None:
    kind = type(item)
    if isinstance(item, Tensor):
        found.append(item)
    elif kind in PLAIN:
        return
    elif kind is tuple or kind is list:
        for part in item:
            _collect(part, found, other)
    elif kind is dict:
        for part in item.values():
            _collect(part, found, other)
    elif (opened := _open(item)) is not None:
        for part in opened[0]:
            _collect(part, found, other)
    elif other is not None:
        other(item)


def _open(item: Any) -> tuple[Sequence[Any], Callable[[list[Any]], Any]] | None:
    """The parts of a container of a rarer kind, and what makes it of others; None for what is no container."""
    kind = type(item)
    names = record.field_names(kind)
    if names is not None:
        known = names
        return record.fields(item, known), lambda parts: record.make(kind, known, parts)
    node = pytree.SUPPORTED_NODES.get(kind)
    if node is None:
        return None
    parts, context = node.flatten_fn(item)  # its own tree_flatten is such a cycle
    return parts, lambda parts: node.unflatten_fn(parts, context)
