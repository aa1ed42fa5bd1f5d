"""Schedules too large to hold: built and simulated together in C++, straight from their rules.

``1f1b``, ``zb-h1`` and ``zb-h2`` are rules that say from three counters what a rank does next, so no action need be
stored. 4096 ranks × 16384 micro-batches (201 M actions) take 0.3 s and 2 MB on one core; time grows with actions,
memory with ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pipekern.errors import ConfigError
from pipekern.schedule.exact import fractions, number, scaled
from pipekern.schedule.simulate import Cost, Costs
from pipekern.trace.timeline import Timeline

NAMES = ("1f1b", "zb-h1", "zb-h2")
_LIMIT = 1 << 62


def simulate_large(name: str, ranks: int, microbatches: int, costs: Costs) -> Timeline:
    """What ``build(name, …).simulate(costs)`` gives, equal to the last digit, but for the spans, which stay empty.

    ``name`` is 1f1b, zb-h1 or zb-h2. Costs in microseconds, one value or one a stage. Raises ``ConfigError`` for
    another schedule, for costs whose times do not fit in 63 bits, and where pipekern has no compiled part.
    """
    if name not in NAMES:
        raise ConfigError(f"schedule={name!r} cannot be streamed; {', '.join(NAMES)} can: build and simulate this one")
    for what, value in (("ranks", ranks), ("microbatches", microbatches)):
        if value < 1:
            raise ConfigError(f"{what}={value}: {name} needs at least 1; nearest {what}=1")
    lists = [_listed(key, getattr(costs, key), ranks) for key in ("forward", "backward", "weight")]
    scale, ticks = scaled(*lists, _listed("comm", costs.comm, ranks - 1))
    _check_range(scale, ticks, ranks, microbatches)
    try:
        from pipekern import _C
    except ImportError as error:
        raise ConfigError(
            f"simulating {name} from its rule needs pipekern's compiled part, which is not there ({error}): install "
            "g++ or clang++ and install pipekern again, or build the schedule and simulate it in Python"
        ) from error
    rules = (_C.StreamRule.ONE_F_ONE_B, _C.StreamRule.ZB_H1, _C.StreamRule.ZB_H2)
    rows = _C.stream(rules[NAMES.index(name)], microbatches, *ticks)
    stays = Fraction(costs.kept)
    peaks = [row.held + row.shrunk * stays for row in rows]
    return Timeline(
        spans=(),
        makespan=number(max(row.last_end for row in rows), scale),
        span=number(max(row.last_end - row.first_start for row in rows), scale),
        busy=[number(row.busy, scale) for row in rows],
        peak_activations=[number(peak.numerator, peak.denominator) for peak in peaks],
        messages=2 * microbatches * (ranks - 1),
    )


def _listed(name: str, cost: Cost, count: int) -> list[Fraction]:
    if not isinstance(cost, Sequence):
        return [Fraction(cost)] * count
    if len(cost) != count:
        raise ConfigError(f"{name} has {len(cost)} values; this schedule needs one number or {count} values")
    return fractions(name, cost)


def _check_range(scale: int, ticks: Sequence[Sequence[int]], ranks: int, microbatches: int) -> None:
    """A chain of waits has at most 3m actions of one rank and 6p to cross the others, each with at most one message."""
    slowest = max(max(values, default=0) for values in ticks[:3]) * 2 + max(ticks[3], default=0)
    longest = (3 * microbatches + 6 * ranks) * slowest
    if longest >= _LIMIT:
        raise ConfigError(
            f"the costs have a common fraction of 1/{scale} µs, in which a step may take {longest}, more than 63 bits "
            "hold: round the costs to whole microseconds, or to multiples of 1/1024 µs"
        )
