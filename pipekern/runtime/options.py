"""What a user asks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.runtime.profile import LayerCosts
from pipekern.schedule.ir import Schedule
from pipekern.stage.spec import LayerSpec
from pipekern.transport.open import choose

POLICIES = ("raise", "skip", "ignore")

Split = Sequence[int] | LayerCosts | None


@dataclass(frozen=True)
class Options:
    """The arguments of ``Pipeline``, which says what they mean."""

    module: nn.Module | Sequence[LayerSpec]
    loss_fn: Callable[[Any, Any], Any]
    microbatches: int
    ranks: int | None
    devices: Sequence[str | torch.device] | None
    chunks: int | None
    schedule: str | Schedule
    split: Split
    on_nonfinite: str
    seed: int
    transport: str
    timeout: float
    inputs: Sequence[str] | None = None

    def check(self) -> None:
        """Raise ``ConfigError`` for what is wrong whatever the model and the ranks are."""
        choose(self.transport, None)
        if self.on_nonfinite not in POLICIES:
            raise ConfigError(f"on_nonfinite={self.on_nonfinite!r}; choose one of {', '.join(map(repr, POLICIES))}")
        if not self.timeout > 0:
            raise ConfigError(f"timeout={self.timeout!r}; give the seconds that a silent rank is waited for, above 0")
