"""This process's parameters, as users see them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from pipekern.errors import ConfigError


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
                "clip by a norm of its own; call pipe.clip_grad_norm_(max_norm) for one norm over all stages",
                stacklevel=4,
            )
        return iter(self._parameters)


def load(
    own: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    put: Callable[[str, torch.Tensor], None],
) -> None:
    """``put`` the entries of ``own`` out of ``state``. Raises ``ConfigError`` for what is missing or does not fit."""
    missing = sorted(own.keys() - state.keys())
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or wrong:
        raise ConfigError(
            f"load_state_dict: missing {missing}, of another shape {sorted(wrong)}; give the whole model's state"
        )
    for name in own:
        put(name, state[name])
