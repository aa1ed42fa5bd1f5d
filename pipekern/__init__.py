"""pipekern: pipeline parallel training of PyTorch models.

Names are loaded at first use, so that schedules, plans and traces can be had without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipekern._version import __version__
from pipekern.errors import (
    Aborted,
    CheckpointError,
    ConfigError,
    MessageMismatch,
    NumericsError,
    PeerDied,
    PeerFrozen,
    PipekernError,
    ScheduleError,
    TransportError,
    TransportTimeout,
)

if TYPE_CHECKING:
    from pipekern import nn, optim, plan, schedule, trace
    from pipekern.runtime.costs import LayerCosts
    from pipekern.runtime.move import Move
    from pipekern.runtime.pipeline import Pipeline
    from pipekern.runtime.profile import profile
    from pipekern.runtime.verify import verify
    from pipekern.stage.cache import Cache
    from pipekern.stage.skip import Skip
    from pipekern.stage.spec import LayerSpec

__all__ = [
    "Aborted",
    "Cache",
    "CheckpointError",
    "ConfigError",
    "LayerCosts",
    "LayerSpec",
    "MessageMismatch",
    "Move",
    "NumericsError",
    "PeerDied",
    "PeerFrozen",
    "PipekernError",
    "Pipeline",
    "ScheduleError",
    "Skip",
    "TransportError",
    "TransportTimeout",
    "__version__",
    "nn",
    "optim",
    "plan",
    "profile",
    "schedule",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    homes = {
        "Cache": "pipekern.stage.cache",
        "LayerCosts": "pipekern.runtime.costs",
        "LayerSpec": "pipekern.stage.spec",
        "Move": "pipekern.runtime.move",
        "Pipeline": "pipekern.runtime.pipeline",
        "Skip": "pipekern.stage.skip",
        "profile": "pipekern.runtime.profile",
        "verify": "pipekern.runtime.verify",
    }
    if name in homes:
        value = getattr(import_module(homes[name]), name)
    elif name in ("nn", "optim", "plan", "schedule", "trace"):
        value = import_module(f"pipekern.{name}")
    else:
        raise AttributeError(f"module 'pipekern' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
