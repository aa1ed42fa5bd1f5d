"""From a user's options to a running assembly: blueprint, agreement between ranks, links, stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError, PipekernError
from pipekern.runtime.assembly import Assembly, build_stages, links
from pipekern.runtime.blueprint import Blueprint, draw, free_others, owned
from pipekern.stage.spec import LayerSpec
from pipekern.transport import agree
from pipekern.transport.open import launched, open_transport


def start(
    module: nn.Module | Sequence[LayerSpec],
    loss_fn: Callable[[Any, Any], Any],
    ranks: int | None,
    devices: Sequence[str | torch.device] | None,
    transport: str,
    timeout: float,
    options: dict[str, Any],
) -> Assembly:
    """Check everything on every rank, compare, and only then open links and take memory. Raises ``ConfigError``."""
    world = None if transport in ("local", "null") else launched()
    blueprint, placed = _agreed(module, loss_fn, ranks, devices, timeout, options, world)
    rank = None if world is None else world.rank
    here = range(blueprint.schedule.stages) if rank is None else blueprint.schedule.stages_of(rank)
    if rank is not None:
        free_others(blueprint.root, owned(blueprint, here))
    stages = build_stages(blueprint, here, placed, options["seed"])
    opened = open_transport(transport, links=links(blueprint), ranks=blueprint.schedule.ranks, timeout=timeout)
    return Assembly(blueprint, rank, stages, loss_fn, opened.transport, (opened.senders, opened.receivers), timeout)
