"""What of each unit is made again in the backward: as the user says, or as measured costs fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipekern.errors import ConfigError
from pipekern.plan.memory import slot_bytes
from pipekern.plan.recompute import UnitWays, Way, choose_recompute
from pipekern.runtime.costs import LayerCosts
from pipekern.runtime.messages import message_bytes
from pipekern.runtime.options import Options
from pipekern.runtime.skips import Hop
from pipekern.schedule.comms import Program
from pipekern.stage.recompute import CHOICES
from pipekern.stage.unit import Unit

_STATES = 4  # a trained weight, its gradient, and two moments of Adam


def recomputation(
    options: Options, stages: Sequence[Sequence[Unit]], skips: Sequence[Hop], program: Program
) -> list[list[str]]:
    """How each unit runs, by stage; one of ``CHOICES``. What is chosen goes to the log. Raises ``ConfigError``."""
    if options.recompute != "auto":
        return [[options.recompute] * len(units) for units in stages]
    rows, _ = unit_ways(options, stages, "recompute='auto'")
    fixed = fixed_bytes(options, stages, skips, program)
    caps = limits(options, program.schedule.ranks, "recompute='auto'")
    chosen = choose_recompute(program.schedule, rows, fixed, caps)
    text = "; ".join(f"stage {stage}: {' '.join(hows)}" for stage, hows in enumerate(chosen))
    logging.getLogger("pipekern").info("recompute='auto' chooses %s", text)
    return chosen


def unit_ways(
    options: Options, stages: Sequence[Sequence[Unit]], asked: str
) -> tuple[list[list[UnitWays]], list[float]]:
    """The ways to run each unit, by stage, and the bytes that each stage hands on. Raises ``ConfigError``, for what the
    user has ``asked``.
    """
    costs = options.split
    if not isinstance(costs, LayerCosts) or not costs.kept:
        raise ConfigError(
            f"{asked} chooses by measured bytes and times of each unit: give split=pk.profile(module, x) of one "
            "micro-batch, or choose 'none', 'selective' or 'full' for all units, or a share to put away"
        )
    rows: list[list[UnitWays]] = []
    last: list[int] = []  # unit of each stage
    for units in stages:
        first = last[-1] + 1 if last else 0
        last.append(first + len(units) - 1)
        rows.append([_ways(costs, unit, unit == first, unit == last[-1]) for unit in range(first, last[-1] + 1)])
    return rows, [costs.outputs[unit] for unit in last]


def limits(options: Options, ranks: int, asked: str) -> list[float]:
    """The bytes that each rank may take. Raises ``ConfigError``, for what the user has ``asked``."""
    memory = options.memory
    if memory is None:
        raise ConfigError(
            f"{asked}: nothing here tells how much memory is free; give memory=, the bytes that a rank may take"
        )
    each = list(memory) if isinstance(memory, Sequence) else [memory] * ranks
    if len(each) != ranks or not min(each) > 0:
        raise ConfigError(f"memory={memory}: give the bytes that each rank may take, above 0, or {ranks} numbers")
    return each


def _ways(costs: LayerCosts, unit: int, starts: bool, ends: bool) -> UnitWays:
    """Those of a unit with which a stage starts, whose input lies in a slot, or ends, whose output is held."""
    more = costs.ends[unit] if ends else 0.0
    less = costs.ends[unit - 1] if starts and unit else 0.0  # what nothing but a unit that runs again would hold
    rows = zip(CHOICES, costs.kept[unit], costs.added[unit], strict=True)
    return UnitWays([Way(how, kept + more - less * (how != "none"), t) for how, kept, t in rows], costs.waiting[unit])


def fixed_bytes(
    options: Options, stages: Sequence[Sequence[Unit]], skips: Sequence[Hop], program: Program
) -> list[float]:
    """Bytes of a rank besides activations: parameters with all that belongs to them, buffers, and messages."""
    assert isinstance(options.split, LayerCosts)
    sizes = message_bytes(stages, skips, options.split)
    fixed = []
    for rank, ring in enumerate(slot_bytes(program, lambda a, b: sizes[min(a, b), max(a, b)])):
        units = [unit for stage in program.schedule.stages_of(rank) for unit in stages[stage]]
        own = {id(p): p for unit in units for _, p in unit.named_parameters()}
        buffers = {id(b): b for unit in units for b in unit.train.buffers()}
        states = sum(p.nbytes * (_STATES if p.requires_grad else 1) for p in own.values())
        fixed.append(ring + states + sum(b.nbytes for b in buffers.values()))
    return fixed
