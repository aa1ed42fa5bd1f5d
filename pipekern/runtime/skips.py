"""How skips get from stage to stage: relayed with the value over every cut between, or straight to their stage."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from pipekern.runtime.costs import LayerCosts
from pipekern.schedule.comms import Edge
from pipekern.schedule.ir import Schedule
from pipekern.schedule.simulate import Costs
from pipekern.stage.skip import Join, Save
from pipekern.stage.unit import Unit

MESSAGE = 9.0  # µs that sending or receiving a message takes a rank besides its copy: an instruction's in the README


class Hop(NamedTuple):
    """The way of what is saved as ``name`` from the stage ``source``, which saves or joins it, to ``target``, the next
    that joins it.

    ``direct``: in a message of its own, or from hand to hand where both are on one rank; else it rides with the value
    through the stages between.
    """

    name: str
    source: int
    target: int
    direct: bool


def hops(stages: Sequence[Sequence[Unit]], order: Schedule, costs: LayerCosts | None) -> tuple[Hop, ...]:
    """The way of every skip between stages, in the model's order of joins.

    Two stages on one rank hand it over there, which costs nothing. Otherwise both ways are simulated, those with the
    most to copy first, and a message of its own must make the step shorter. Each cut that a relayed value crosses
    costs the rank before it a copy in F, and the rank after it one in B; a message of its own costs that once, and
    ``MESSAGE`` more on both of its ends, in F and in B. ``pk.profile`` measures how long a copy takes; where ``costs``
    do not say so it takes no time, and all that goes between ranks is relayed.
    """
    found = list(_between(stages, costs))
    loads: dict[Edge, float] = {}
    for _, a, b, copy in found:
        if b > a + 1:
            loads[a, b] = loads.get((a, b), 0.0) + copy
    direct = {(a, b) for a, b in loads if order.stage_rank[a] == order.stage_rank[b]}
    if costs is not None and costs.copy:
        best = _makespan(stages, order, costs, loads, direct)
        for edge in sorted(loads.keys() - direct, key=lambda edge: (-loads[edge], edge)):
            time = _makespan(stages, order, costs, loads, direct | {edge})
            if time < best:
                best, direct = time, direct | {edge}
    return tuple(Hop(name, a, b, (a, b) in direct) for name, a, b, _ in found)


def sent_directly(skips: Sequence[Hop]) -> dict[Edge, list[str]]:
    """The names of what is sent directly, by source and target."""
    found: dict[Edge, list[str]] = {}
    for hop in skips:
        if hop.direct:
            found.setdefault((hop.source, hop.target), []).append(hop.name)
    return found


def _between(stages: Sequence[Sequence[Unit]], costs: LayerCosts | None) -> Iterator[tuple[str, int, int, float]]:
    """Name, source and target of each hop from one stage to another, and the µs of a copy."""
    last: dict[str, tuple[int, float]] = {}
    units = [(stage, unit.train) for stage, units in enumerate(stages) for unit in units]
    copies = costs.copy if costs is not None and costs.copy else [0.0] * len(units)
    for (stage, layer), copy in zip(units, copies, strict=True):
        if isinstance(layer, Save):
            last[layer.name] = stage, copy
        elif isinstance(layer, Join):
            source, size = last[layer.name]
            if source != stage:
                yield layer.name, source, stage, size
            last[layer.name] = stage, size


def _makespan(
    stages: Sequence[Sequence[Unit]],
    order: Schedule,
    costs: LayerCosts,
    loads: Mapping[Edge, float],
    direct: Collection[Edge],
) -> float:
    """Of a step, with the skips of ``direct`` sent so and the others of ``loads`` relayed."""
    ends = [0]
    for units in stages:
        ends.append(ends[-1] + len(units))
    forward, backward, weight = (
        [sum(row[a:b]) for a, b in pairwise(ends)] for row in (costs.forward, costs.backward, costs.weight)
    )
    rank = order.stage_rank
    for (a, b), copy in loads.items():
        cuts = [(a, b)] if (a, b) in direct else list(pairwise(range(a, b + 1)))
        for source, target in cuts:
            if rank[source] != rank[target]:
                forward[source] += copy
                backward[target] += copy
        if (a, b) in direct and rank[a] != rank[b]:
            for stage in (a, b):
                forward[stage] += MESSAGE
                backward[stage] += MESSAGE
    return order.simulate(Costs(forward, backward, weight)).makespan
