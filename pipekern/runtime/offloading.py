"""Which activations are put away in host memory: a share of them, or as measured bytes fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipekern.errors import ConfigError
from pipekern.plan.memory import size
from pipekern.plan.offload import Offload, choose_offload, offload_share, stays
from pipekern.runtime.options import Options
from pipekern.runtime.recomputation import fixed_bytes, limits, unit_ways
from pipekern.runtime.skips import Hop
from pipekern.schedule.comms import Program
from pipekern.stage.unit import Unit


def offloading(
    options: Options,
    stages: Sequence[Sequence[Unit]],
    skips: Sequence[Hop],
    program: Program,
    recompute: Sequence[Sequence[str]],
) -> Offload:
    """What is put away where ``recompute`` is what units make again. It goes to the log. Raises ``ConfigError``."""
    if options.offload is None:
        return stays(program.schedule)
    if options.offload == "auto":
        chosen = _within_memory(options, stages, skips, program, recompute)
    else:
        chosen = offload_share(program.schedule, options.offload)
    logging.getLogger("pipekern").info("offload=%r: %s", options.offload, chosen)
    return chosen


def _within_memory(
    options: Options,
    stages: Sequence[Sequence[Unit]],
    skips: Sequence[Hop],
    program: Program,
    recompute: Sequence[Sequence[str]],
) -> Offload:
    """As little as keeps every rank within its memory."""
    rows, outputs = unit_ways(options, stages, "offload='auto'")
    schedule = program.schedule
    ways = [
        [next(way for way in unit.ways if way.how == how) for unit, how in zip(row, hows, strict=True)]
        for row, hows in zip(rows, recompute, strict=True)
    ]
    inputs = [0.0, *outputs[:-1]]  # in a slot until they leave, and in memory of their own when they are back
    whole = [sum(way.kept for way in row) + own for row, own in zip(ways, inputs, strict=True)]
    waiting = [sum(unit.waiting for unit in row) for row in rows]
    again = [
        max(unit.ways[0].kept - way.kept for unit, way in zip(row, chosen, strict=True))
        for row, chosen in zip(rows, ways, strict=True)
    ]
    caps = limits(options, schedule.ranks, "offload='auto'")
    fixed = [
        held + max(0.0, *(again[stage] for stage in schedule.stages_of(rank)))
        for rank, held in enumerate(fixed_bytes(options, stages, skips, program))
    ]
    room = [cap - held for cap, held in zip(caps, fixed, strict=True)]
    chosen = choose_offload(schedule, room, whole, waiting)
    faults = [
        f"rank {rank} needs {size(need + held)} at least, {size(need + held - cap)} more than its {size(cap)}"
        for rank, (need, held, cap) in enumerate(zip(chosen.peaks(whole, waiting), fixed, caps, strict=True))
        if need + held > cap
    ]
    if faults:
        raise ConfigError(
            f"offload='auto' finds no choice that fits: {'; '.join(faults)}; give that much memory, more ranks, "
            "smaller micro-batches, or recompute='full' beside it"
        )
    return chosen
