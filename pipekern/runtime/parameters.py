"""This process's parameters, as users see them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence

from torch import nn


class StageParameters(Sequence[nn.Parameter]):
    """The parameters of this process's stages. ``torch.nn.utils.clip_grad_norm_`` over part of a model warns."""

    def __init__(self, parameters: Sequence[nn.Parameter], whole: bool):
        self._parameters = list(parameters)
        self._whole = whole

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._parameters[index]

    def __iter__(self) -> Iterator[nn.Parameter]:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not self._whole and caller == "torch.nn.utils.clip_grad":
            warnings.warn(
                "torch.nn.utils.clip_grad_norm_ sees the parameters of this rank's stages only, so every rank would "
                "clip by a norm "
                "of its own; call pipe.clip_grad_norm_(max_norm) for one norm over all stages",
                stacklevel=4,
            )
        return iter(self._parameters)
