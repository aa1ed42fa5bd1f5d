"""From a user's options to a running assembly: blueprint, agreement between ranks, links, stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any, TypeVar

import torch

from pipekern.errors import ConfigError, PipekernError
from pipekern.parallel.mesh import FIRST, Grid, Place, groups
from pipekern.parallel.replicas import Replicas, speed
from pipekern.parallel.tensor import Parts
from pipekern.runtime.assembly import Assembly, build_stages, build_units
from pipekern.runtime.blueprint import Blueprint, draw, free_others, owned
from pipekern.runtime.codecs import link_codecs
from pipekern.runtime.costs import LayerCosts
from pipekern.runtime.devices import Devices, device_here, devices_here, refuse_ties_apart
from pipekern.runtime.head_loss import choose_head
from pipekern.runtime.heap import keep_freed_memory
from pipekern.runtime.limits import limits, memory_of
from pipekern.runtime.links import all_links, links, prefix
from pipekern.runtime.options import Options
from pipekern.runtime.site import Site
from pipekern.stage.division import Division
from pipekern.stage.unit import Unit
from pipekern.transport.agree import disagreements
from pipekern.transport.open import open_transport
from pipekern.transport.world import World, join, same_host

NO_LIMIT = 1 << 62  # bytes

_T = TypeVar("_T")


def start(options: Options) -> Assembly:
    """Check everything on every rank, compare, and only then open links and take memory. Raises ``ConfigError``."""
    options.check()
    world = join(options.transport, options.timeout)
    try:
        site = _site(options, world)
        options, blueprint = agreed(options, world, site)
        if site.rank is not None:
            free_others(blueprint, owned(blueprint, blueprint.schedule.stages_of(site.rank)))
        return assembled(options, world, site, blueprint)
    except BaseException as error:
        if world is not None:
            world.abort(error, f"rank {world.rank}, while the pipeline was made")
            world.close()
        raise


def _site(options: Options, world: World | None) -> Site:
    if world is None:
        ranks = _size(options.ranks, None, options.devices)
        devices = devices_here(options.devices, ranks)
        return Site(Grid.of(options.mesh, 1), FIRST, None, devices, [range(ranks)], None, NO_LIMIT)
    grid, device = compared(world, lambda: _grid(options, world))
    devices = [torch.device(row["device"]) for row in world.gather({"device": str(device)})]
    place, replicas = grid.place(world.rank), _replicas(options, world, grid, devices)
    bucket, apart = _bucket(world, replicas, device), _apart(grid, place, world.identities)
    return Site(grid, place, place.pp, devices, grid.homes, replicas, bucket, apart)


def _apart(grid: Grid, place: Place, identities: Sequence[Mapping[str, Any]]) -> frozenset[tuple[int, int]]:
    """See ``Site``."""
    pp, _, tp = grid.sizes
    hosts = [[identities[grid.rank(Place(rank, place.dp, part))] for part in range(tp)] for rank in range(pp)]
    whole = [rank for rank, rows in enumerate(hosts) if all(same_host(rows[0], row) for row in rows)]
    return frozenset((a, b) for a, b in combinations(whole, 2) if not same_host(hosts[a][0], hosts[b][0]))


def assembled(
    options: Options,
    world: World | None,
    site: Site,
    blueprint: Blueprint,
    kept: Mapping[int, Unit] | None = None,
    moves: Sequence[tuple[int, int]] = (),
) -> Assembly:
    """Stages and links of what all ranks have agreed on. ``kept``: units that this process has already, by index.
    ``moves``: (from, to), ranks of a pipeline between which parameters will go.
    """
    schedule, rank, own, grid = blueprint.schedule, site.rank, site.own, site.grid
    here = range(schedule.stages) if rank is None else schedule.stages_of(rank)
    if any(own[schedule.stage_rank[stage]].type == "cpu" for stage in here):
        keep_freed_memory()
    if options.tensor_parallel is not None:
        options = replace(options, fuse_loss=False)
    if options.fuse_loss is None:  # on a CPU it saves memory and costs time
        options = replace(options, fuse_loss=own[schedule.stage_rank[-1]].type == "cuda")
    loss_path = choose_head(blueprint.stages[-1], options.loss_fn, options.fuse_loss)[1]
    units = build_units(blueprint, here, own, kept or {})
    division = None if world is None else _division(options, world, site, blueprint, units)
    stages = build_stages(blueprint, units, own, options, site.place.dp)
    codecs = link_codecs(options, blueprint, site.homes, site.devices, world)
    every = links(blueprint, codecs, moves) if world is None else all_links(blueprint, codecs, moves, grid)
    opened = open_transport(options.transport, every, site.devices, world)
    start = prefix(site.pipeline, grid)
    senders = {name.removeprefix(start): end for name, end in opened.senders.items()}
    receivers = {name.removeprefix(start): end for name, end in opened.receivers.items()}
    if site.replicas is not None:
        site.replicas.watch(opened.transport.check)
    if division is not None:
        division.parts.watch(opened.transport.check)
    zero = options.zero if site.replicas is not None else 0
    ends = opened.transport, senders, receivers
    return Assembly(blueprint, site, stages, options.loss_fn, loss_path, codecs, *ends, zero, division)


def compared(world: World | None, make: Callable[[], tuple[_T, dict[str, Any]]]) -> _T:
    """What ``make`` gives, once all ranks have the same row with it. What is wrong on one is raised on all."""
    if world is None:
        return make()[0]
    failure: PipekernError | None = None
    try:
        made, row = make()
    except PipekernError as error:
        failure, row = error, {"error": str(error)}
    rows = world.gather(row)
    if failure is not None:
        raise failure
    faults = [f"rank {rank}: {row['error']}" for rank, row in enumerate(rows) if "error" in row] or disagreements(rows)
    if faults:
        raise ConfigError("the ranks were not given the same pipeline: " + "; ".join(faults))
    return made


def _grid(options: Options, world: World) -> tuple[tuple[Grid, torch.device], dict[str, Any]]:
    """Where every process stands, the device of this one, and what ranks must agree on before they form groups."""
    grid, device = Grid.of(options.mesh, world.size), device_here(options.devices, world.rank, world.size)
    return (grid, device), {"mesh": {**grid.sizes._asdict(), "ranks": grid.ranks}}


def _replicas(options: Options, world: World, grid: Grid, devices: Sequence[torch.device]) -> Replicas | None:
    """This process among the replicas of its stages, None where there are no others. Collective."""
    if grid.sizes.dp == 1:
        return None
    group = groups(grid, world.rank, devices, "dp", options.timeout)
    return Replicas(group, grid.place(world.rank).dp, grid.sizes.dp, world.control.check)


def _division(
    options: Options, world: World, site: Site, blueprint: Blueprint, units: Mapping[int, list[Unit]]
) -> Division | None:
    """The units of this process divided among the parts of its stages, None where there is one. Collective."""
    grid, devices = site.grid, site.devices
    if grid.sizes.tp == 1:
        return None
    group, device = groups(grid, world.rank, devices, "tp", options.timeout), devices[world.rank]
    assert group is not None
    parts = Parts(group, device, grid.place(world.rank).tp, grid.sizes.tp, world.control.check)
    own = [unit for built in units.values() for unit in built]
    division = Division(own, blueprint.styles, parts, device, blueprint.modules())
    layouts = world.gather(division.layouts())
    for tie in blueprint.ties:
        found = {name: str(row[name]) for row in layouts for name in tie.names.values() if name in row}
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"tensor_parallel: {' and '.join(found)} are one weight, which the plan divides in several ways "
                f"({', '.join(found.values())}); divide an embedding by rows and a head by columns, or neither"
            )
    return division


def _bucket(world: World, replicas: Replicas | None, device: torch.device) -> int:
    """Bytes that go between replicas at once: those of 20 latencies, so that beginning costs a twentieth."""
    if replicas is None:
        return NO_LIMIT
    latency, bandwidth = speed(replicas, device)
    rows = world.gather({"bucket": 20 * latency * bandwidth})
    return min(max(int(max(row["bucket"] for row in rows)), 1 << 20), 1 << 28)


def agreed(
    options: Options, world: World | None, site: Site, before: Assembly | None = None
) -> tuple[Options, Blueprint]:
    """The options with what ranks agree on, and the blueprint once all have drawn the same; of the units that are
    there ``before``. What is wrong on one is raised on all.
    """
    model = None if before is None else (before.blueprint.root, before.blueprint.units)
    given = nullcontext() if before is None else before.given()
    if world is None:
        if _wants_memory(options):
            rows = [memory_of(options.module, device, site.devices.count(device)) for device in site.devices]
            options = replace(options, memory=limits(rows, lambda a, b: True))
        with given:
            blueprint = draw(options, len(site.devices), model=model)
        refuse_ties_apart(blueprint.ties, site.own)
        return options, blueprint
    options = _informed(options, world, site.devices[world.rank])

    def drawn() -> tuple[Blueprint, dict[str, Any]]:
        with given:
            ranks = _size(options.ranks, site.grid)
            blueprint = draw(options, ranks, site.grid.sizes, site.bucket, together=False, model=model)
            return blueprint, blueprint.row() | {
                "seed": options.seed,
                "fuse_loss": options.fuse_loss,
                "codec": options.codec if isinstance(options.codec, str) else dict(options.codec),
                "precision": options.precision,
                "zero": options.zero,
            }

    return options, compared(world, drawn)


def _informed(options: Options, world: World, device: torch.device) -> Options:
    """With what ranks measure for themselves and must agree on: the costs of rank 0, by which all split, and the memory
    that each rank may take.
    """
    split = options.split
    row = {"costs": asdict(split) if isinstance(split, LayerCosts) else None, "memory": {}}
    if _wants_memory(options):
        row["memory"] = memory_of(options.module, device)
    rows = world.gather(row)
    if rows[0]["costs"] is not None and isinstance(split, LayerCosts):
        options = replace(options, split=LayerCosts.read(rows[0]["costs"]))
    if _wants_memory(options):
        ids = world.identities
        found = limits([row["memory"] for row in rows], lambda a, b: same_host(ids[a], ids[b]))
        options = replace(options, memory=found)
    return options


def _wants_memory(options: Options) -> bool:
    return "auto" in (options.recompute, options.offload) and options.memory is None


def _size(ranks: int | None, grid: Grid | None, devices: Devices = None) -> int:
    """The number of pipeline ranks; where this process has all, one for each of several ``devices``."""
    if grid is not None:
        _, dp, tp = sizes = grid.sizes
        if ranks not in (None, sizes.pp):
            each = "" if dp * tp == 1 else f" for {sizes.pp} ranks of {dp * tp} pipelines"
            raise ConfigError(
                f"ranks={ranks}, and the launcher started {sizes.pp * dp * tp} processes{each}; leave ranks out, or "
                f"launch {ranks * dp * tp if ranks else 1}"
            )
        return sizes.pp
    if ranks is None and devices is not None and len(devices) > 1:
        return len(devices)
    size = (torch.cuda.device_count() or 2) if ranks is None else ranks
    if size < 1:
        raise ConfigError(f"ranks={ranks}; a pipeline has at least one")
    return size
