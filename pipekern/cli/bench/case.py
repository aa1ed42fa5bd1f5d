"""One op at one shape, with its contenders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Prepare = Callable[..., Callable[[], Any]]  # of the inputs; what it returns is what is timed


class Sizes(NamedTuple):
    """Tokens, hidden widths, vocabularies, and parameters of an optimizer."""

    tokens: tuple[int, ...]
    hidden: tuple[int, ...]
    vocabularies: tuple[int, ...]
    parameters: int


SMALL = Sizes((96,), (256,), (1000,), 100_000)
LARGE = Sizes((256, 8192), (1024, 4096, 8192), (32_000, 128_000), 1_000_000_000)


class Case(NamedTuple):
    """``inputs`` that want a gradient require one. Bytes are the fewest that a direction must move; no bytes backward:
    there is no backward. ``flops`` are those of both directions' products, where they bound the time.
    """

    op: str
    shape: str
    inputs: list[Any]
    contenders: dict[str, Prepare]
    forward_bytes: int
    backward_bytes: int = 0
    flops: int = 0


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers that want a gradient."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def timed(function: Callable[..., Any], **options: Any) -> Prepare:
    """``function`` of the inputs as a contender."""
    return lambda *inputs: lambda: function(*inputs, **options)
