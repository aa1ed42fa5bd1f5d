"""What a user asks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.plan.codec import CODECS
from pipekern.runtime.profile import LayerCosts
from pipekern.schedule.ir import Schedule
from pipekern.stage.recompute import CHOICES
from pipekern.stage.spec import LayerSpec
from pipekern.transport.open import check_name

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
    recompute: str
    on_nonfinite: str
    seed: int
    transport: str
    timeout: float
    inputs: Sequence[str] | None = None
    memory: float | Sequence[float] | None = None
    fuse_loss: bool | None = None
    codec: str | Mapping[str, str] = "none"

    def check(self) -> None:
        """Raise ``ConfigError`` for what is wrong whatever the model and the ranks are."""
        check_name(self.transport)
        codecs = [self.codec] if isinstance(self.codec, str) else list(self.codec.values())
        for name, values, choices in (
            ("recompute", [self.recompute], (*CHOICES, "auto")),
            ("on_nonfinite", [self.on_nonfinite], POLICIES),
            ("codec", codecs, (*CODECS, "auto") if isinstance(self.codec, str) else CODECS),
        ):
            wrong = [value for value in values if value not in choices]
            if wrong:
                raise ConfigError(f"{name}={wrong[0]!r}; choose one of {', '.join(map(repr, choices))}")
        if not self.timeout > 0:
            raise ConfigError(f"timeout={self.timeout!r}; give the seconds that a silent rank is waited for, above 0")
        if self.memory is not None and self.recompute != "auto":
            raise ConfigError(
                f"memory={self.memory} is what recompute='auto' chooses under, and recompute={self.recompute!r}; set "
                "recompute='auto', or leave memory out"
            )
