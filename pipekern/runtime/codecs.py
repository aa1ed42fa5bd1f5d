"""How each link between stages carries its messages: as the user says, or by its measured bandwidth."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import product

import torch

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Link
from pipekern.plan.codec import choose_codec, message_bytes
from pipekern.runtime.blueprint import Blueprint
from pipekern.runtime.costs import LayerCosts
from pipekern.runtime.messages import message_bytes as bytes_between
from pipekern.runtime.options import Options
from pipekern.schedule.comms import Edge
from pipekern.transport import probe
from pipekern.transport.open import choose, hosts
from pipekern.transport.world import World

_SECONDS = 0.25  # for measuring all links


def link_codecs(
    options: Options,
    blueprint: Blueprint,
    homes: Sequence[Sequence[int]],
    devices: Sequence[torch.device],
    world: World | None,
) -> dict[str, str]:
    """The codec of every link between stages, by its name, the same on every rank; collective.

    ``homes``: for each pipeline the job's ranks, by the pipeline's. "auto" is "none" without the CUDA transport and on
    links from or to the CPU; else ``plan.choose_codec`` decides by the bandwidth measured on the slowest pipeline's
    link, for which the others wait, the bytes of the message, and the time of the slower of its two stages. Raises
    ``ConfigError``.
    """
    edges = {f"{a}>{b}": (a, b) for a, b in sorted(blueprint.train.slots)}
    given = options.codec
    if isinstance(given, Mapping):
        unknown = sorted(given.keys() - edges.keys())
        if unknown:
            raise ConfigError(f"codec names {', '.join(unknown)}; the links between stages are {', '.join(edges)}")
        return {name: given.get(name, "none") for name in edges}
    if given != "auto":
        return dict.fromkeys(edges, given)
    none = dict.fromkeys(edges, "none")
    edges = _between_gpus(blueprint, edges, homes, hosts(devices))
    if not edges or choose(options.transport, world, devices) != "cuda":
        return none
    costs = options.split
    if not isinstance(costs, LayerCosts) or not costs.outputs:
        raise ConfigError(
            "codec='auto' chooses by measured bytes and times of each unit: give split=pk.profile(module, x) of one "
            "micro-batch, or choose 'none', 'bf16' or 'fp8' for all links, or for each: {'0>1': 'bf16'}"
        )
    return none | _chosen(costs, blueprint, edges, _measured(costs, blueprint, edges, homes, devices, world))


def _between_gpus(
    blueprint: Blueprint, edges: Mapping[str, Edge], homes: Sequence[Sequence[int]], on_cpu: Collection[int]
) -> dict[str, Edge]:
    """Those of ``edges`` that have no end on the CPU in any pipeline."""
    rank = blueprint.schedule.stage_rank
    return {
        name: edge
        for name, edge in edges.items()
        if not any(home[rank[stage]] in on_cpu for home in homes for stage in edge)
    }


def _measured(
    costs: LayerCosts,
    blueprint: Blueprint,
    edges: Mapping[str, Edge],
    homes: Sequence[Sequence[int]],
    devices: Sequence[torch.device],
    world: World | None,
) -> dict[str, Link]:
    """The slowest link between the ranks of each of ``edges``, with messages of the size of its largest."""
    rank, sizes = blueprint.schedule.stage_rank, bytes_between(blueprint.stages, blueprint.skips, costs)
    pairs: dict[Edge, float] = {}
    for home, (a, b) in product(homes, edges.values()):
        pair = home[rank[a]], home[rank[b]]
        pairs[pair] = max(pairs.get(pair, 0.0), sizes[min(a, b), max(a, b)])
    rows = {row.link: Link(row.latency, row.bandwidth) for row in probe.between(pairs, devices, world, _SECONDS)}
    return {
        name: min((rows[f"{home[rank[a]]}>{home[rank[b]]}"] for home in homes), key=lambda link: link.bandwidth)
        for name, (a, b) in edges.items()
    }


def _chosen(
    costs: LayerCosts, blueprint: Blueprint, edges: Mapping[str, Edge], links: Mapping[str, Link]
) -> dict[str, str]:
    sizes, total = bytes_between(blueprint.stages, blueprint.skips, costs), costs.total()
    times = [
        sum(total[first : first + len(units)])
        for first, units in zip(blueprint.first_unit, blueprint.stages, strict=True)
    ]
    chosen = {}
    for name, (a, b) in edges.items():
        size, width, time = sizes[min(a, b), max(a, b)], _width(blueprint, min(a, b)), max(times[a], times[b])
        if blueprint.precision is not None:  # costs are those of the module before its weights are cast, in float32
            width = blueprint.precision.itemsize
            size *= width / 4
        chosen[name] = choose_codec(links[name], size, width, time) if width in (2, 4) else "none"
        text = f"{name} {chosen[name]}: {message_bytes(chosen[name], size, width):.0f} of {size:.0f} bytes"
        logging.getLogger("pipekern").info(
            "codec='auto' chooses %s at %.1f GB/s, behind %.0f µs", text, links[name].bandwidth / 1e9, time
        )
    return chosen


def _width(blueprint: Blueprint, stage: int) -> int:
    """Bytes of a value that the stage makes: of its weights, else of those before it."""
    units = [unit for units in reversed(blueprint.stages[: stage + 1]) for unit in reversed(units)]
    return next((p.element_size() for unit in units for _, p in unit.named_parameters() if p.is_floating_point()), 4)
