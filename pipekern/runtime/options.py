"""What a user asks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.optim.scale import LossScale
from pipekern.optim.store import PRECISIONS
from pipekern.parallel.mesh import Mesh
from pipekern.parallel.plan import Plan
from pipekern.plan.codec import CODECS
from pipekern.runtime.costs import LayerCosts
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
    mesh: Mesh = None
    precision: str | None = None
    zero: int = 0
    loss_scale: LossScale | None = None
    offload: float | str | None = None
    offload_folder: str | None = None
    tensor_parallel: Plan = None
    rebalance: str | None = None
    counts: Sequence[int] | None = None  # units a stage, where ``split`` says what units cost

    def check(self) -> None:
        """Raise ``ConfigError`` for what is wrong whatever the model and the ranks are."""
        check_name(self.transport)
        codecs = [self.codec] if isinstance(self.codec, str) else list(self.codec.values())
        for name, values, choices in (
            ("recompute", [self.recompute], (*CHOICES, "auto")),
            ("on_nonfinite", [self.on_nonfinite], POLICIES),
            ("codec", codecs, (*CODECS, "auto") if isinstance(self.codec, str) else CODECS),
            ("zero", [self.zero], range(4)),
            ("precision", [self.precision], (None, *PRECISIONS)),
            ("rebalance", [self.rebalance], (None, "auto")),
        ):
            wrong = [value for value in values if value not in choices]
            if wrong:
                raise ConfigError(f"{name}={wrong[0]!r}; choose one of {', '.join(map(repr, choices))}")
        if self.loss_scale is not None and self.precision != "fp16":
            raise ConfigError(f"loss_scale with precision={self.precision!r}: it is for precision='fp16'; leave it out")
        if self.tensor_parallel is not None and self.fuse_loss:
            raise ConfigError(
                "fuse_loss=True with tensor_parallel: the loss takes no head in parts; leave fuse_loss out"
            )
        if self.tensor_parallel is not None and self.rebalance:
            raise ConfigError("rebalance='auto' with tensor_parallel, whose parts stay where they are; leave it out")
        if not self.timeout > 0:
            raise ConfigError(f"timeout={self.timeout!r}; give the seconds that a silent rank is waited for, above 0")
        if self.memory is not None and "auto" not in (self.recompute, self.offload) and self.zero < 3:
            raise ConfigError(
                f"memory={self.memory} is what recompute='auto' or offload='auto' chooses under, or zero=3 is held to, "
                f"and recompute={self.recompute!r}, offload={self.offload!r}, zero={self.zero}; set one of them, or "
                "leave memory out"
            )
        if self.recompute == self.offload == "auto":
            raise ConfigError(
                "recompute='auto' and offload='auto' both choose under the same memory; decide one of them: a share "
                "for offload, or 'none', 'selective' or 'full' for recompute"
            )
        if self.offload_folder is not None and self.offload is None:
            raise ConfigError(
                f"offload_folder={self.offload_folder!r} and nothing to put there; give offload=, or leave it out"
            )
