"""A second kind of device on a machine without a GPU: torch's lazy device, whose tensors do not mix with the CPU's.

The stand-in driver takes tensors of the CPU for a device's, so it does not see one on the wrong side; this does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pipekern.runtime import outgoing
from pipekern.stage import stage

LAZY = "lazy:0"


def load() -> None:
    """Make it a device of this process. Its tensors have no memory to look at, so nobody asks whose they share."""
    backend = pytest.importorskip("torch._lazy.ts_backend")
    backend.init()
    own = outgoing.Outgoing.own

    def own_of_cpu(self: outgoing.Outgoing, value: Any) -> Any:
        return value if isinstance(value, torch.Tensor) and not value.is_cpu else own(self, value)

    def own_gradients(fresh: Sequence[nn.Parameter], used: Any) -> list[nn.Parameter]:
        return [parameter for parameter in fresh if parameter.grad is None]

    setattr(outgoing.Outgoing, "own", own_of_cpu)  # noqa: B010
    setattr(stage, "_own_gradients", own_gradients)  # noqa: B010
