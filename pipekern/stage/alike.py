"""Which values all tensor-parallel parts of a stage have alike, as far as autograd's graph tells."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_MARK = "_pipekern_alike"


def mark(leaf: Tensor) -> Tensor:
    """The same tensor, from now on known to be alike: it has come from another stage, where it was."""
    setattr(leaf, _MARK, True)
    return leaf


def is_alike(value: Tensor) -> bool:
    """Whether ``value`` was made of whole parameters, of marked leaves, and of what divided modules return whole."""
    if value.grad_fn is None:
        return _is_known(value)
    left: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    while left:
        node = left.pop()
        shards = getattr(node, "shards", None)  # see division.py: what leaves a divided module
        leaf = getattr(node, "variable", None)
        if shards or (leaf is not None and not _is_known(leaf)):
            return False
        if shards is None and node not in seen:
            seen.add(node)
            left.extend(following for following, _ in node.next_functions if following is not None)
    return True


def _is_known(leaf: Tensor) -> bool:
    return getattr(leaf, _MARK, False) or (isinstance(leaf, nn.Parameter) and not isinstance(leaf, DTensor))
