"""The best order that a search finds under a cap on memory, with the lower bound beside it.

Three ideas carry it. A start: published orders, V blocks that repeat every six actions, and list scheduling under
many priorities. An improvement: the order is run backwards in time, then forwards, each time letting an action that
is ready go before a planned one that is not, as far as the cap allows for the planned ones too. And detours: the
same passes from the best order, with actions passed over at random. The core is in csrc/schedule/search.cpp; its
work is counted in actions, not in seconds, so a result is the same on every machine and every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from pipekern.errors import ConfigError
from pipekern.schedule.bounds import lower_bounds, v_law
from pipekern.schedule.exact import number
from pipekern.schedule.ir import OPS, Action, Schedule
from pipekern.schedule.problem import Problem
from pipekern.schedule.simulate import Costs

Placement = Literal["single", "v", "any"]
Objective = Literal["span", "makespan"]

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

_WORK = 3_000_000  # actions scheduled a placement and effort: 0.1 to 0.3 s on one core
_PASSES = 6  # passes over all actions that even the largest problem gets


@dataclass(frozen=True)
class SearchResult(Schedule):
    """A schedule that :func:`search` found; times in microseconds.

    ``lower_bound`` is what no schedule of the allowed placements can beat, for the objective of the search; ``gap`` is
    how far above it this one is, as a share of it: 0 proves that there is none better.
    """

    lower_bound: float = 0.0
    gap: float = 0.0


def search(
    ranks: int,
    microbatches: int,
    costs: Costs,
    memory: float | None = None,
    placement: Placement = "any",
    *,
    objective: Objective = "span",
    effort: int = 1,
) -> SearchResult:
    """The best schedule found for ``ranks`` and ``microbatches`` whose peak stays within ``memory`` on every rank.

    ``memory`` is in activations of one micro-batch through a rank's whole share (None: no cap). ``placement`` is
    "single" for one chunk a rank, "v" for two (rank r holds stages r and 2p - 1 - r), "any" for the better one.

    ``objective`` is what is minimised first; the other breaks ties. "span", the default and the criterion of the
    published searches, is the largest over ranks of last end minus first start: the step time where one step
    follows the other without a barrier. "makespan" runs from 0 to the last end: the step time behind a barrier.
    They differ by at most the time the first micro-batch takes to the last rank, and only where memory is ample:
    with one chunk, unit costs and a cap k of p or more, the best bubble is max(0, 2p - 1 - min(k, m)) by span,
    and p - 1 by makespan.

    ``effort`` multiplies the work, 1 being some tenths of a second. Equal input gives an equal result. Raises
    ``ConfigError`` for bad input, and where pipekern has no compiled part.
    """
    _check(ranks, microbatches, memory, placement, objective, effort)
    problems = _problems(ranks, microbatches, costs, memory, placement)
    found = min((_run(problem, objective, effort) for problem in problems), key=lambda each: each.key(objective))
    at = OBJECTIVES.index(objective)
    bound = min(Fraction(lower_bounds(problem)[at], problem.scale) for problem in problems)
    gap = found.key(objective)[0] / float(bound) - 1 if bound else 0.0
    return _result(found, number(bound.numerator, bound.denominator), gap if gap > 1e-12 else 0.0)


@dataclass(frozen=True)
class _Found:
    """Rows of codes, and their times in microseconds."""

    problem: Problem
    rows: list[bytes]
    span: float
    makespan: float

    def key(self, objective: Objective) -> tuple[float, float]:
        """What is compared: the objective, then the other one."""
        return (self.span, self.makespan) if objective == "span" else (self.makespan, self.span)


def _check(ranks: int, microbatches: int, memory: float | None, placement: str, objective: str, effort: int) -> None:
    if ranks < 1:
        raise ConfigError(f"ranks={ranks}: there is no device to schedule; give at least 1")
    if microbatches < 1:
        raise ConfigError(f"microbatches={microbatches}: a step needs at least 1; give 1 or more")
    if memory is not None and not memory >= 1:
        raise ConfigError(
            f"memory={memory} is below 1 activation: not even one micro-batch fits; give at least 1, or cut the "
            "micro-batches smaller"
        )
    for name, value, known in (("placement", placement, get_args(Placement)), ("objective", objective, OBJECTIVES)):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is not known; give one of {', '.join(known)}")
    if effort < 1:
        raise ConfigError(f"effort={effort}: the search needs some work; give 1 or more")


def _problems(ranks: int, microbatches: int, costs: Costs, memory: float | None, placement: Placement) -> list[Problem]:
    """The problem of each allowed placement that the costs are for: lists have one value a stage."""
    problems, faults = [], []
    for chunks in {"single": (1,), "v": (2,), "any": (1, 2)}[placement]:
        try:
            problems.append(Problem.of(ranks, microbatches, chunks, costs, memory))
        except ConfigError as error:
            faults.append(str(error))
    if not problems:
        raise ConfigError("; ".join(faults))
    return problems


def _run(problem: Problem, objective: Objective, effort: int) -> _Found:
    try:
        from pipekern import _C
    except ImportError as error:
        raise ConfigError(
            f"the search needs pipekern's compiled part, which is not there ({error}): install g++ or clang++ and "
            "install pipekern again, or build a schedule by name"
        ) from error
    # A power of two that brings the costs near 2^16: integers stay exact, and rounding stays far below any of them.
    largest = max(1, *problem.forward, *problem.backward, *problem.weight, *problem.link)
    unit = math.ldexp(1.0, 16 - largest.bit_length())
    cost = [[tick * unit for tick in ticks] for ticks in (problem.forward, problem.backward, problem.weight)]
    span, makespan = lower_bounds(problem)
    span = max(span, v_law(problem) or 0)
    actions = 3 * problem.microbatches * len(problem.forward)
    rows, found_span, found_makespan = _C.search(
        problem.ranks,
        problem.microbatches,
        problem.chunks,
        float(problem.cap),
        float(problem.kept),
        cost,
        [*(tick * unit for tick in problem.link), 0.0],
        objective == "makespan",
        (span * unit, makespan * unit),
        effort * max(_WORK, _PASSES * actions),
    )
    tick = unit * problem.scale
    return _Found(problem, rows, found_span / tick, found_makespan / tick)


def _result(found: _Found, lower_bound: float, gap: float) -> SearchResult:
    problem = found.problem
    return SearchResult(
        name="search",
        microbatches=problem.microbatches,
        stage_rank=problem.stage_rank,
        actions=tuple(tuple(_actions(problem, rank, row)) for rank, row in enumerate(found.rows)),
        lower_bound=lower_bound,
        gap=gap,
    )


def _actions(problem: Problem, rank: int, row: bytes) -> Iterator[Action]:
    """The actions of a row of codes, 2 * operation + chunk; the n-th of a code is micro-batch n."""
    stages = problem.stages_of(rank)
    seen = [0] * (2 * len(OPS))
    for code in row:
        yield Action(OPS[code >> 1], stages[code & 1], seen[code])
        seen[code] += 1
