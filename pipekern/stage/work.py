"""Weight work: what a layer's backward leaves for W."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pipekern.errors import ConfigError


class Work:
    """A weight gradient to be made: called once, it adds to ``.grad``. ``kept`` are the tensors it is made of."""

    __slots__ = ("_make", "_versions", "kept")

    def __init__(self, make: Callable[[Tensor, Tensor], None], value: Tensor, gradient: Tensor):
        self._make, self.kept = make, (value, gradient)
        self._versions = value._version, gradient._version

    def __call__(self) -> None:
        value, gradient = self.kept
        if (value._version, gradient._version) != self._versions:
            raise ConfigError(
                f"the input {list(value.shape)} of a layer, or the gradient of its output, was written in place "
                "between the layer's backward and its weight gradient, which a schedule puts off; write to a copy, or "
                "choose a schedule of whole backwards, such as '1f1b'"
            )
        self._make(value, gradient)


Put = Callable[[Work], None]
