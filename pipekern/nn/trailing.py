"""The trailing dimensions that a norm is over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipekern.errors import ConfigError


def as_rows(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` [..., *shape] as rows [..., H]. Raises ``ConfigError`` where it does not end in ``shape``."""
    if tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        raise ConfigError(f"the input is {tuple(x.shape)}; this norm is over inputs of [..., {str(list(shape))[1:]}")
    return x if len(shape) == 1 else x.flatten(x.dim() - len(shape))
