from __future__ import annotations

from fractions import Fraction

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import Costs
from pipekern.schedule.problem import Problem


def test_golden_v_placement() -> None:
    problem = Problem.of(ranks=2, microbatches=3, chunks=2, costs=Costs(1, 2, 0.5, comm=0.25), memory=1.5)
    assert problem.stage_rank == (0, 1, 1, 0)
    assert problem.stages_of(0) == (0, 3)
    # Quarters of a microsecond; a chunk costs half; nothing is sent between stages 1 and 2.
    assert (problem.scale, problem.cap, problem.kept) == (4, Fraction(3), Fraction(1))
    assert (problem.forward, problem.backward, problem.weight) == ((2,) * 4, (4,) * 4, (1,) * 4)
    assert problem.link == (1, 0, 1)
    assert problem.busy(0) == 3 * 2 * (2 + 4 + 1)


def test_chains() -> None:
    problem = Problem.of(
        ranks=3, microbatches=1, chunks=1, costs=Costs([1, 2, 3], [10, 20, 30], 100, comm=5), memory=None
    )
    assert problem.cap == 1
    assert [problem.first_forward(rank) for rank in range(3)] == [0, 6, 13]
    assert problem.chain(2, 2) == 3
    assert problem.chain(1, 1) == 2 + 5 + 3 + 30 + 5
    assert problem.chain(0, 1) == 1 + 5 + problem.chain(1, 1)
    assert problem.drain(2) == 5 + 20 + 5 + 10 + 100
    assert problem.drain(0) == 100


def test_floats_are_exact() -> None:
    problem = Problem.of(ranks=1, microbatches=1, chunks=1, costs=Costs(0.1, 1, 1), memory=1)
    assert Fraction(problem.forward[0], problem.scale) == Fraction(0.1)


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        (Costs([1, 1], 1, 1), "forward has 2 values; 4 ranks with 2 stages each need one number or 8 values"),
        (Costs(1, 1, 1, comm=[1]), "comm has 1 values; 8 stages need one number or 7 values"),
    ],
)
def test_lists_of_the_wrong_length(costs: Costs, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Problem.of(ranks=4, microbatches=8, chunks=2, costs=costs, memory=4)
