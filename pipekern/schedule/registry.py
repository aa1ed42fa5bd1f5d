"""Schedules by name: :func:`register` adds one, :func:`build` makes one.

A generator gets the :class:`Grid` and gives the rows of all ranks in turn, each an iterable of actions::

    @register("mine")
    def mine(grid):
        for rank in range(grid.ranks):
            yield [Action("F", rank, 0), Action("BW", rank, 0)]

An item of a row may be a pair ``(forward, backward)`` of actions that overlap.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipekern.errors import ConfigError
from pipekern.schedule.ir import Action, Schedule

Row = Iterable[Action | tuple[Action, Action]]


class Grid(NamedTuple):
    """What a schedule is built for. ``memory`` caps a rank's peak, in activations of its whole share."""

    ranks: int
    microbatches: int
    chunks: int
    memory: float | None


Generator = Callable[[Grid], Iterable[Row]]
Placement = Callable[[Grid], Iterable[int]]

ONE_CHUNK = range(1, 2)
TWO_CHUNKS = range(2, 3)
MANY_CHUNKS = range(2, 1 << 16)


def loop(grid: Grid) -> list[int]:
    """Stages dealt round after round: rank ``r`` holds ``r``, ``r + p``, ``r + 2p``, …"""
    return list(range(grid.ranks)) * grid.chunks


def zigzag(grid: Grid) -> list[int]:
    """Stages dealt back and forth: with two chunks, rank ``r`` holds ``r`` and ``2p - 1 - r``."""
    there = list(range(grid.ranks))
    return [rank for chunk in range(grid.chunks) for rank in (there[::-1] if chunk % 2 else there)]


class Entry(NamedTuple):
    """What :func:`build` knows of a schedule."""

    generate: Generator
    chunks: range
    placement: Placement
    chains: int
    synchronous: bool
    memory: bool


# Filled by the decorator, when the modules of the generators are imported.
_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    chunks: range = ONE_CHUNK,
    placement: Placement = loop,
    chains: int = 1,
    synchronous: bool = True,
    memory: bool = False,
) -> Callable[[Generator], Generator]:
    """Make :func:`build` know the decorated generator as ``name``.

    ``chunks`` are the chunks a rank that it takes, the first being the default; ``placement`` gives the rank of
    every stage, of all ``chains``; ``memory`` says whether it takes a cap. Raises ``ConfigError`` for a name in use.
    """

    def add(generate: Generator) -> Generator:
        if name in _ENTRIES:
            raise ConfigError(f"schedule name {name!r} is in use; register it under another name")
        _ENTRIES[name] = Entry(generate, chunks, placement, chains, synchronous, memory)
        return generate

    return add


def names() -> list[str]:
    """The names that :func:`build` knows."""
    return sorted(_ENTRIES)


def build(
    name: str, *, ranks: int, microbatches: int, chunks: int | None = None, memory: float | None = None
) -> Schedule:
    """The schedule ``name`` for ``ranks`` and ``microbatches``; ``chunks`` defaults to the fewest it takes.

    ``memory`` caps the peak a rank, in activations of one micro-batch through the rank's whole share. Raises
    ``ConfigError`` for a combination that the schedule does not take, naming the nearest that it does.
    """
    entry = _entry(name)
    for what, value in (("ranks", ranks), ("microbatches", microbatches)):
        if value < 1:
            raise ConfigError(f"{what}={value}: {name} needs at least 1; nearest {what}=1")
    if chunks is None:
        chunks = entry.chunks[0]
    if chunks not in entry.chunks:
        least, most = entry.chunks[0], entry.chunks[-1]
        rule = f"exactly {least}" if least == most else f"at least {least}"
        raise ConfigError(
            f"chunks={chunks}: {name} needs {rule} a rank; nearest chunks={min(max(chunks, least), most)}"
        )
    if memory is not None and not entry.memory:
        raise ConfigError(f"memory={memory}: {name} takes no cap; leave memory out, or use a schedule that takes it")
    grid = Grid(ranks, microbatches, chunks, memory)
    rows = [list(row) for row in entry.generate(grid)]
    pairs = frozenset(item[0] for row in rows for item in row if not isinstance(item, Action))
    return Schedule(
        name,
        microbatches,
        tuple(entry.placement(grid)),
        tuple(tuple(_flat(row)) for row in rows),
        chains=entry.chains,
        pairs=pairs,
        synchronous=entry.synchronous,
    )


def _flat(row: Row) -> Iterable[Action]:
    for item in row:
        if isinstance(item, Action):
            yield item
        else:
            yield from item


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.3) or names()
        raise ConfigError(f"schedule={name!r} is not known; nearest: {', '.join(near)}")
    return _ENTRIES[name]
