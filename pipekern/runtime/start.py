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
from pipekern.transport.agree import disagreements
from pipekern.transport.open import choose, open_transport
from pipekern.transport.world import World, join


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
    choose(transport, None)
    if not timeout > 0:
        raise ConfigError(f"timeout={timeout!r}; give the seconds that a silent rank is waited for, above 0")
    world = join(transport, timeout)
    try:
        return _assemble(module, loss_fn, ranks, devices, transport, timeout, options, world)
    except BaseException:
        if world is not None:
            world.close()
        raise


def _assemble(
    module: nn.Module | Sequence[LayerSpec],
    loss_fn: Callable[[Any, Any], Any],
    ranks: int | None,
    devices: Sequence[str | torch.device] | None,
    transport: str,
    timeout: float,
    options: dict[str, Any],
    world: World | None,
) -> Assembly:
    size = _size(ranks, world)
    places = _devices(devices, size, launched=world is not None)
    blueprint = _agreed(module, size, options, world)
    rank = None if world is None else world.rank
    here = range(blueprint.schedule.stages) if rank is None else blueprint.schedule.stages_of(rank)
    if rank is not None:
        free_others(blueprint, owned(blueprint, here))
    stages = build_stages(blueprint, here, places, options["seed"])
    opened, senders, receivers = open_transport(transport, links(blueprint), size, world)
    return Assembly(blueprint, rank, stages, loss_fn, opened, (senders, receivers), timeout)


def _size(ranks: int | None, world: World | None) -> int:
    """The number of ranks."""
    if world is not None:
        if ranks not in (None, world.size):
            raise ConfigError(
                f"ranks={ranks}, and the launcher started {world.size} processes; leave ranks out, or launch {ranks}"
            )
        return world.size
    size = (torch.cuda.device_count() or 2) if ranks is None else ranks
    if size < 1:
        raise ConfigError(f"ranks={ranks}; a pipeline has at least one")
    return size


def _agreed(
    module: nn.Module | Sequence[LayerSpec], ranks: int, options: dict[str, Any], world: World | None
) -> Blueprint:
    """The blueprint, once every rank has drawn the same one. What is wrong on one rank is raised on all."""
    if world is None:
        return draw(module, ranks=ranks, **options)
    blueprint: Blueprint | PipekernError
    try:
        blueprint = draw(module, ranks=ranks, **options)
        row = blueprint.row() | {"seed": options["seed"]}
    except PipekernError as error:
        blueprint, row = error, {"error": str(error)}
    rows = world.gather(row)
    if isinstance(blueprint, PipekernError):
        raise blueprint
    faults = [f"rank {rank}: {row['error']}" for rank, row in enumerate(rows) if "error" in row] or disagreements(rows)
    if faults:
        raise ConfigError("the ranks were not given the same pipeline: " + "; ".join(faults))
    return blueprint


def _devices(given: Sequence[str | torch.device] | None, ranks: int, launched: bool) -> list[torch.device]:
    """One device a rank. Under a launcher only this process's entry counts."""
    if given is not None:
        devices = [torch.device(device) for device in given]
        if len(devices) == 1:
            devices *= ranks
        if len(devices) != ranks:
            raise ConfigError(f"devices has {len(devices)} entries for {ranks} ranks; give one a rank, or one for all")
        return devices
    count = torch.cuda.device_count()
    if count == 0:
        return [torch.device("cpu")] * ranks
    if launched:
        return [torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)] * ranks
    return [torch.device("cuda", rank % count) for rank in range(ranks)]
