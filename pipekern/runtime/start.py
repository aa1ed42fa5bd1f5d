"""From a user's options to a running assembly: blueprint, agreement between ranks, links, stages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from pipekern.errors import ConfigError, PipekernError
from pipekern.runtime.assembly import Assembly, build_stages, links
from pipekern.runtime.blueprint import Blueprint, draw, free_others, owned
from pipekern.runtime.codecs import link_codecs
from pipekern.runtime.head_loss import choose_head
from pipekern.runtime.limits import limits, memory_of
from pipekern.runtime.options import Options
from pipekern.runtime.profile import LayerCosts
from pipekern.transport.agree import disagreements
from pipekern.transport.open import open_transport
from pipekern.transport.world import World, join, same_host


def start(options: Options) -> Assembly:
    """Check everything on every rank, compare, and only then open links and take memory. Raises ``ConfigError``."""
    options.check()
    world = join(options.transport, options.timeout)
    try:
        return _assemble(options, world)
    except BaseException as error:
        if world is not None:
            world.abort(error, f"rank {world.rank}, while the pipeline was made")
            world.close()
        raise


def _assemble(options: Options, world: World | None) -> Assembly:
    options, blueprint, devices = _agreed(options, world)
    schedule, rank = blueprint.schedule, None if world is None else world.rank
    here = range(schedule.stages) if rank is None else schedule.stages_of(rank)
    if rank is not None:
        free_others(blueprint, owned(blueprint, here))
    if options.fuse_loss is None:  # on a CPU it saves memory and costs time
        options = replace(options, fuse_loss=devices[schedule.stage_rank[-1]].type == "cuda")
    loss_path = choose_head(blueprint.stages[-1], options.loss_fn, options.fuse_loss)[1]
    stages = build_stages(blueprint, here, devices, options)
    codecs = link_codecs(options, blueprint, devices, world)
    opened = open_transport(options.transport, links(blueprint, codecs), devices, world)
    return Assembly(blueprint, rank, stages, options.loss_fn, loss_path, codecs, *opened)


def _agreed(options: Options, world: World | None) -> tuple[Options, Blueprint, list[torch.device]]:
    """The options with what ranks agree on, the blueprint once all have drawn the same, and a device a rank.

    What is wrong on one is raised on all.
    """
    if world is None:
        size = _size(options.ranks, world)
        devices = _devices(options.devices, size, launched=False)
        if _wants_memory(options):
            rows = [memory_of(options.module, device, devices.count(device)) for device in devices]
            options = replace(options, memory=limits(rows, lambda a, b: True))
        return options, draw(options, size), devices
    options = _informed(options, world)
    failure: PipekernError | None = None
    try:
        devices = _devices(options.devices, _size(options.ranks, world), launched=True)
        blueprint = draw(options, world.size)
        row = blueprint.row() | {
            "seed": options.seed,
            "fuse_loss": options.fuse_loss,
            "codec": options.codec if isinstance(options.codec, str) else dict(options.codec),
        }
    except PipekernError as error:
        failure, row = error, {"error": str(error)}
    rows = world.gather(row)
    if failure is not None:
        raise failure
    faults = [f"rank {rank}: {row['error']}" for rank, row in enumerate(rows) if "error" in row] or disagreements(rows)
    if faults:
        raise ConfigError("the ranks were not given the same pipeline: " + "; ".join(faults))
    return options, blueprint, devices


def _informed(options: Options, world: World) -> Options:
    """With what ranks measure for themselves and must agree on: the costs of rank 0, by which all split, and the memory
    that each rank may take.
    """
    split = options.split
    row = {"costs": asdict(split) if isinstance(split, LayerCosts) else None, "memory": {}}
    if _wants_memory(options):
        try:
            device = _devices(options.devices, world.size, launched=True)[world.rank]
            row["memory"] = memory_of(options.module, device)
        except ConfigError:
            pass  # raised again where every rank hears of it
    rows = world.gather(row)
    if rows[0]["costs"] is not None and isinstance(split, LayerCosts):
        options = replace(options, split=LayerCosts.read(rows[0]["costs"]))
    if _wants_memory(options):
        ids = world.identities
        found = limits([row["memory"] for row in rows], lambda a, b: same_host(ids[a], ids[b]))
        options = replace(options, memory=found)
    return options


def _wants_memory(options: Options) -> bool:
    return options.recompute == "auto" and options.memory is None


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
