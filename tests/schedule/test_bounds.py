"""Lower bounds: the published one, and that no schedule at hand is below any."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest

from pipekern.schedule import Costs, Schedule, build
from pipekern.schedule.bounds import lower_bounds, v_law
from pipekern.schedule.problem import Problem


def uniform(
    ranks: int,
    microbatches: int,
    cap: float,
    chunks: int = 1,
    costs: tuple[int, int, int, int] = (1, 1, 1, 0),
    kept: float = 1,
) -> Problem:
    stages = ranks * chunks
    links = [costs[3]] * (stages - 1)
    if chunks == 2:
        links[ranks - 1] = 0
    forward, backward, weight = ((cost,) * stages for cost in costs[:3])
    exact = (Fraction(cap), Fraction(kept))
    return Problem(ranks, microbatches, chunks, *exact, forward, backward, weight, tuple(links))


def test_golden_chain() -> None:
    # (m + p - 1)(F + B) + 2(p - 1)c + W: W is short, so the gradients' way decides.
    problem = uniform(ranks=8, microbatches=24, cap=24, costs=(18522, 18086, 9337, 601))
    assert lower_bounds(problem)[0] == 31 * (18522 + 18086) + 14 * 601 + 9337
    # With room for 16, and whole activations held to their W, eight W come before the last B.
    tight = uniform(ranks=8, microbatches=24, cap=16, costs=(18522, 18086, 9337, 601))
    assert lower_bounds(tight)[0] == lower_bounds(problem)[0] + 8 * 9337
    half = uniform(ranks=8, microbatches=24, cap=16, costs=(18522, 18086, 9337, 601), kept=0.5)
    assert lower_bounds(half)[0] == lower_bounds(problem)[0]


@pytest.mark.parametrize(
    ("ranks", "microbatches", "memory"), [(2, 4, 2), (4, 8, 4), (4, 8, 6), (8, 9, 20), (8, 30, 15)]
)
def test_head_with_one_chunk_and_unit_costs(ranks: int, microbatches: int, memory: int) -> None:
    span, makespan = lower_bounds(uniform(ranks, microbatches, memory))
    assert span == 3 * microbatches + max(0, 2 * ranks - 1 - min(memory, microbatches))
    assert makespan >= max(span, 3 * microbatches + ranks - 1)


def test_one_activation_at_a_time() -> None:
    # m times the whole way there and back: 2p, and the W.
    assert lower_bounds(uniform(ranks=4, microbatches=5, cap=1))[0] == 5 * 9


def test_tail_below_the_ranks() -> None:
    # Proved optima by a solver: the bound is exact here, and below at (4, 8, 3), where 7 is best.
    assert [lower_bounds(uniform(*case))[0] - 3 * case[1] for case in ((5, 10, 4), (6, 12, 5), (4, 8, 3))] == [7, 8, 6]


def published(random: Random) -> tuple[Schedule, int]:
    name, chunks = random.choice([("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2), ("v-min", 2)])
    ranks = random.randint(1, 6)
    return build(name, ranks=ranks, microbatches=random.randint(1, 4) + (2 * ranks if chunks == 2 else 0)), chunks


@pytest.mark.parametrize("seed", range(60))
def test_no_published_schedule_is_below(seed: int) -> None:
    random = Random(seed)
    schedule, chunks = published(random)
    stages = schedule.stages
    forward, backward, weight = (tuple(random.choice([0, 1, 2, 5, 9]) for _ in range(stages)) for _ in range(3))
    links = [random.choice([0, 1, 3]) for _ in range(stages - 1)]
    if chunks == 2:
        links[schedule.ranks - 1] = 0
    kept = random.choice([Fraction(1), Fraction(1, 2), Fraction(0)])
    timeline = schedule.simulate(Costs(forward, backward, weight, links, float(kept)))
    cap = Fraction(max(timeline.peak_activations)) * chunks
    problem = Problem(
        schedule.ranks,
        schedule.microbatches,
        chunks,
        max(cap, Fraction(1)),
        kept,
        forward,
        backward,
        weight,
        tuple(links),
    )
    span, makespan = lower_bounds(problem)
    assert span <= timeline.span
    assert makespan <= timeline.makespan


def test_v_law() -> None:
    idle = [(v_law(uniform(8, 16, halves, 2)) or 0) - 96 for halves in range(8, 18)]
    assert idle == [23, 20, 17, 14, 11, 8, 5, 3, 0, 0]
    assert v_law(uniform(8, 15, 12, 2)) is None
    assert v_law(uniform(8, 16, 12, 2, costs=(1, 2, 1, 0))) is None
    assert v_law(uniform(8, 16, 12)) is None
