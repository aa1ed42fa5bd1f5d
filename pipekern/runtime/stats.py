"""Where the time of a step goes, rank by rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankStats:
    """One rank's seconds a step, medians of three means over the last 15: ``stages[s][op]`` computing (F, B, W or BW);
    ``waiting`` for messages and gathered values; ``sending``, which never waits; ``step`` from its first instruction to
    its last.
    """

    stages: Mapping[int, Mapping[str, float]]
    waiting: float
    sending: float
    step: float

    @property
    def busy(self) -> float:
        """Seconds that it computes."""
        return sum(sum(ops.values()) for ops in self.stages.values())


@dataclass(frozen=True)
class Stats:
    """What ``Pipeline.stats`` returns: ``ranks`` of the job in order, ``steps`` seen, and ``slow``, the stages that
    have become slower than they were, by (rank, stage): how many times.
    """

    ranks: tuple[RankStats, ...]
    steps: int
    slow: Mapping[tuple[int, int], float]

    @property
    def step(self) -> float:
        """Seconds a step, without what is outside the program: batch, exchange of flags, optimizer."""
        return max(row.step for row in self.ranks)

    @property
    def imbalance(self) -> float:
        """The busiest rank's busy time over the ranks' mean; 1 where all are alike."""
        busy = [row.busy for row in self.ranks]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0

    @property
    def slowest(self) -> tuple[int, int]:
        """The busiest rank, and its stage that takes longest: what the imbalance is due to."""
        rank = max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].busy)
        stages = self.ranks[rank].stages
        return rank, max(stages, key=lambda stage: sum(stages[stage].values()))

    def __str__(self) -> str:
        rank, stage = self.slowest
        whole = f"{self.steps} steps, {self.step * 1e3:.3g} ms each"
        lines = [
            f"{whole}, imbalance {self.imbalance:.2f} (stage {stage}, rank {rank})",
            "rank    busy ms  waiting ms  sending ms  stages",
        ]
        for number, row in enumerate(self.ranks):
            stages = ", ".join(
                f"{stage}: " + " ".join(f"{op} {seconds * 1e3:.3g}" for op, seconds in ops.items())
                for stage, ops in row.stages.items()
            )
            times = f"{row.busy * 1e3:11.3g} {row.waiting * 1e3:11.3g} {row.sending * 1e3:11.3g}"
            lines.append(f"{number:4}{times}  {stages}")
        lines += [f"stage {s} (rank {r}) is {f:.2f} × slower than before" for (r, s), f in self.slow.items()]
        return "\n".join(lines)
