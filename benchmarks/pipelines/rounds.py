"""Contenders of all libraries take turns on a case."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.pipelines.contender import Contender
from benchmarks.pipelines.pair import Pair


@dataclass(frozen=True)
class Result:
    """One contender on one case: seconds a step by round, and the largest gradient error of its first step."""

    contender: Contender
    error: float
    rounds: list[float]

    @property
    def seconds(self) -> float:
        return median(self.rounds)

    def ratios(self, base: Result) -> list[float]:
        """This contender's time over that of ``base``: its quartiles over rounds."""
        return quantiles([own / other for own, other in zip(self.rounds, base.rounds, strict=True)], n=4)


def run(number: int, pairs: Sequence[Pair], rounds: int, say: Callable[[str], None]) -> list[Result]:
    """Check and time the contenders of all ``pairs`` on case ``number``. Says which do not fit."""
    errors: dict[Contender, float] = {}
    home: dict[Contender, Pair] = {}
    for pair in pairs:
        for contender, error in pair.ask("open", number).items():
            if isinstance(error, str):
                say(f"  {contender} is left out: {error}")
            else:
                errors[contender], home[contender] = error, pair
    times: dict[Contender, list[float]] = {contender: [] for contender in errors}
    for turn in range(rounds):
        order = list(errors)
        random.Random(turn).shuffle(order)
        for contender in order:
            times[contender].append(home[contender].ask("turn", contender))
        say(f"  round {turn + 1} of {rounds}")
    for pair in pairs:
        pair.ask("close")
    return [Result(contender, errors[contender], times[contender]) for contender in errors]
