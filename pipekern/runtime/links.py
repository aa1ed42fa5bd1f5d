"""The links of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipekern.parallel.mesh import Grid
from pipekern.runtime.blueprint import Blueprint
from pipekern.runtime.collective import root_links, star_links
from pipekern.runtime.deltas import tie_links
from pipekern.transport.base import Link


def links(blueprint: Blueprint, codecs: Mapping[str, str], moves: Sequence[tuple[int, int]]) -> list[Link]:
    """Every link of a pipeline, in the same order on every rank: between stages with its of ``codecs``, between holders
    of a weight, the star, and for ``moves`` from rank to rank.
    """
    home, slots = blueprint.schedule.stage_rank, sorted(blueprint.slots().items())
    names = {f"{a}>{b}": (home[a], home[b], count) for (a, b), count in slots}
    between = [Link(name, *ends, codecs[name]) for name, ends in names.items()]
    moved = [Link(f"move {a}>{b}", a, b, 2) for a, b in moves]
    return between + tie_links(blueprint.ties) + star_links(blueprint.schedule.ranks, blueprint.root_rank) + moved


def all_links(
    blueprint: Blueprint, codecs: Mapping[str, str], moves: Sequence[tuple[int, int]], grid: Grid
) -> list[Link]:
    """The links of every pipeline of the job, each pipeline's with a prefix of its own, between ranks of the job."""
    found = []
    for index, home in enumerate(grid.homes):
        for link in links(blueprint, codecs, moves):
            name = prefix(index, grid) + link.name
            found.append(link._replace(name=name, source=home[link.source], target=home[link.target]))
    return found + root_links([grid.rank(first._replace(pp=blueprint.root_rank)) for first in grid.pipelines])


def prefix(pipeline: int, grid: Grid) -> str:
    """What the names of a pipeline's links begin with."""
    return f"pipeline {pipeline} " if len(grid.pipelines) > 1 else ""
