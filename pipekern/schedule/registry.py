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
from pipekern.schedule.rules import at_least
from pipekern.schedule.simulate import peak_activations

Row = Iterable[Action | tuple[Action, Action]]


class Grid(NamedTuple):
    """What a schedule is built for.

    ``chunks`` are the stages that a rank holds, or of a schedule with slices the slices of a micro-batch. ``memory``
    caps a rank's peak, in activations of its whole share; a generator may use it, :func:`build` sees that it holds.
    """

    ranks: int
    microbatches: int
    chunks: int
    memory: float | None


Generator = Callable[[Grid], Iterable[Row]]
Placement = Callable[[Grid], Iterable[int]]

ONE_CHUNK = range(1, 2)
TWO_CHUNKS = range(2, 3)
MANY_CHUNKS = range(2, 1 << 16)
EVEN_CHUNKS = range(2, 1 << 16, 2)


def loop(grid: Grid) -> list[int]:
    """Stages dealt round after round: rank ``r`` holds ``r``, ``r + p``, ``r + 2p``, …"""
    return list(range(grid.ranks)) * grid.chunks


def zigzag(grid: Grid) -> list[int]:
    """Stages dealt back and forth: with two chunks, rank ``r`` holds ``r`` and ``2p - 1 - r``."""
    there = list(range(grid.ranks))
    return [rank for chunk in range(grid.chunks) for rank in (there[::-1] if chunk % 2 else there)]


def opposed(grid: Grid) -> list[int]:
    """Two chains, the second one backwards: rank ``r`` holds ``r`` of the first and ``2p - 1 - r`` of the second."""
    return [*range(grid.ranks), *reversed(range(grid.ranks))]


def in_order(grid: Grid) -> range:
    """A stage a rank, whatever ``chunks`` counts."""
    return range(grid.ranks)


class Entry(NamedTuple):
    """What :func:`build` knows of a schedule, and what :func:`describe` tells of it."""

    generate: Generator
    chunks: range
    placement: Placement
    chains: int
    sliced: bool
    synchronous: bool
    runnable: bool

    @property
    def duplicates_weights(self) -> bool:
        """Whether each weight is kept twice: for two directions, or in two versions."""
        return self.chains > 1 or not self.synchronous


# Filled by the decorator, when the modules of the generators are imported.
_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    chunks: range = ONE_CHUNK,
    placement: Placement = loop,
    chains: int = 1,
    sliced: bool = False,
    synchronous: bool = True,
    runnable: bool = True,
) -> Callable[[Generator], Generator]:
    """Make :func:`build` know the decorated generator as ``name``.

    ``chunks`` are the chunks a rank that it takes, the first being the default; where it is ``sliced`` they are the
    slices of a micro-batch. ``placement`` gives the rank of every stage, of all ``chains``. ``runnable`` says whether
    the executor can run it today; what was built is judged by :attr:`Schedule.runnable`. Raises ``ConfigError`` for a
    name in use.
    """

    def add(generate: Generator) -> Generator:
        if name in _ENTRIES:
            raise ConfigError(f"schedule name {name!r} is in use; register it under another name")
        _ENTRIES[name] = Entry(generate, chunks, placement, chains, sliced, synchronous, runnable)
        return generate

    return add


def names() -> list[str]:
    """The names that :func:`build` knows."""
    return sorted(_ENTRIES)


def describe(name: str) -> Entry:
    """What was registered as ``name``: whether it is synchronous, duplicates weights, can be run; its chunks.

    Raises ``ConfigError`` for a name that is not known, with the nearest that are.
    """
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.3) or names()
        raise ConfigError(f"schedule={name!r} is not known; nearest: {', '.join(near)}")
    return _ENTRIES[name]


def build(
    name: str, *, ranks: int, microbatches: int, chunks: int | None = None, memory: float | None = None
) -> Schedule:
    """The schedule ``name`` for ``ranks`` and ``microbatches``; ``chunks`` defaults to the fewest it takes.

    ``memory`` caps the peak a rank, in activations of one micro-batch through the rank's whole share. Raises
    ``ConfigError`` for a combination that the schedule does not take, naming the nearest that it does.
    """
    entry = describe(name)
    at_least(name, "ranks", ranks, 1)
    at_least(name, "microbatches", microbatches, 1)
    if chunks is None:
        chunks = entry.chunks[0]
    if chunks not in entry.chunks:
        raise ConfigError(_wrong_chunks(name, entry, chunks))
    grid = Grid(ranks, microbatches, chunks, memory)
    rows = [list(row) for row in entry.generate(grid)]
    schedule = Schedule(
        name,
        microbatches,
        tuple(entry.placement(grid)),
        tuple(tuple(_flat(row)) for row in rows),
        chains=entry.chains,
        slices=chunks if entry.sliced else 1,
        pairs=frozenset(item[0] for row in rows for item in row if not isinstance(item, Action)),
        synchronous=entry.synchronous,
    )
    if memory is not None:
        _check_memory(schedule, memory)
    return schedule


def _wrong_chunks(name: str, entry: Entry, chunks: int) -> str:
    least, most, step = entry.chunks[0], entry.chunks[-1], entry.chunks.step
    rule = f"exactly {least}" if least == most else f"at least {least}" if step == 1 else f"a multiple of {step}"
    unit = "slices a micro-batch" if entry.sliced else "a rank"
    nearest = least + (min(max(chunks, least), most) - least) // step * step
    return f"chunks={chunks}: {name} needs {rule} {unit}; nearest chunks={nearest}"


def _check_memory(schedule: Schedule, memory: float) -> None:
    peak = max(peak_activations(schedule))
    if not peak <= memory:
        raise ConfigError(
            f"memory={memory}: {schedule.name} holds {peak} activations on its fullest rank here; "
            f"nearest memory={peak}, or take a schedule that holds less"
        )


def _flat(row: Row) -> Iterable[Action]:
    for item in row:
        if isinstance(item, Action):
            yield item
        else:
            yield from item
