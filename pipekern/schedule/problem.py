"""What a search is given: the pipeline, its costs as integers, and the cap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

from pipekern.errors import ConfigError
from pipekern.schedule.exact import fractions, scaled
from pipekern.schedule.simulate import Cost, Costs


@dataclass(frozen=True)
class Problem:
    """A pipeline to find an order for. Times are in ticks, ``scale`` of them a microsecond.

    ``chunks`` is 1, or 2 for V placement, where rank r holds stages r and 2p - 1 - r. ``cap`` is the memory of a
    rank in activations of one stage, of which ``kept`` stays from B to W; ``link[s]`` the latency between stages
    s and s + 1.
    """

    ranks: int
    microbatches: int
    chunks: int
    cap: Fraction
    kept: Fraction
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    weight: tuple[int, ...]
    link: tuple[int, ...]
    scale: int = 1

    @classmethod
    def of(cls, ranks: int, microbatches: int, chunks: int, costs: Costs, memory: float | None) -> Problem:
        """The problem with these costs; ``memory`` in activations of a rank's whole share, None: no cap.

        Raises ``ConfigError`` where a list of costs has not one value a stage, or of latencies not one a link.
        """
        stages = ranks * chunks
        what = f"{ranks} ranks with {chunks} stage{'s' * (chunks > 1)} each"
        times = [
            _listed(name, getattr(costs, name), stages, chunks, what) for name in ("forward", "backward", "weight")
        ]
        links = _listed("comm", costs.comm, stages - 1, 1, f"{stages} stages")
        if chunks == 2:
            links[ranks - 1] = Fraction(0)  # between the two stages of the last rank
        scale, ticks = scaled(*times, links)
        cap = Fraction(microbatches if memory is None or math.isinf(memory) else memory) * chunks
        forward, backward, weight, link = map(tuple, ticks)
        kept = Fraction(costs.kept)
        return cls(ranks, microbatches, chunks, cap, kept, forward, backward, weight, link, scale)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of ``rank``, ascending."""
        return (rank,) if self.chunks == 1 else (rank, 2 * self.ranks - 1 - rank)

    @property
    def stage_rank(self) -> tuple[int, ...]:
        """The rank of every stage."""
        there = range(self.ranks)
        return (*there, *(reversed(there) if self.chunks == 2 else ()))

    def busy(self, rank: int) -> int:
        """Time that ``rank`` computes."""
        return self.microbatches * sum(
            self.forward[s] + self.backward[s] + self.weight[s] for s in self.stages_of(rank)
        )

    @cached_property
    def _down(self) -> list[int]:
        """From 0 to the earliest start of each stage's F; one more for the end of the last."""
        return list(accumulate((f + c for f, c in zip(self.forward, (*self.link, 0), strict=True)), initial=0))

    @cached_property
    def _up(self) -> list[int]:
        """By stage, from the end of its B to the end of stage 0's; one more from the start of the last B."""
        return list(accumulate((b + c for b, c in zip(self.backward, (*self.link, 0), strict=True)), initial=0))

    def first_forward(self, rank: int) -> int:
        """The earliest start of the first F of ``rank``, which is its first action."""
        return self._down[rank]

    def chain(self, start: int, stop: int) -> int:
        """From the start of F on stage ``start`` to the start of B on stage ``stop``, for one micro-batch."""
        return self._down[-1] - self._down[start] + self._up[-1] - self._up[stop + 1] + self._back(stop)

    def _back(self, stage: int) -> int:
        return self.link[stage] if stage < len(self.link) else 0

    def drain(self, stage: int) -> int:
        """From the end of a B on ``stage`` to the end of stage 0's W of the same micro-batch."""
        return self._up[stage] + self.weight[0]


def _listed(name: str, cost: Cost, count: int, parts: int, what: str) -> list[Fraction]:
    if not isinstance(cost, Sequence):
        return [value / parts for value in fractions(name, [cost])] * count
    if len(cost) != count:
        raise ConfigError(f"{name} has {len(cost)} values; {what} need one number or {count} values")
    return fractions(name, cost)
