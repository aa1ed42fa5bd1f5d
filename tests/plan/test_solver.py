from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from pipekern.plan.pool import Pool
from pipekern.plan.solver import Solver
from tests.plan.test_pool import pool

HUGE = 1 << 130  # no 128 bits hold it: left to Python


def test_golden_answers() -> None:
    solver = Solver(Pool(2, [1, 1], [0, 6, 12, 18], [0] * 4, [1, 2], [], []))
    assert solver.reaches(12) == (True, 12) and solver.reaches(11) == (False, 12)
    assert 22 <= solver.least_total(12, 100) <= 24 and solver.least_total(5, 100) == 100
    cut, least = solver.cheapest(12, 100)
    assert cut is not None and (cut.total, cut.longest, least) == (24, 12, 24)


def test_compiled_and_python_give_the_same_answers() -> None:
    rng = random.Random()
    for _ in range(60):
        one, limit, budget = pool(rng), rng.randint(1, 80), rng.randint(20, 200)
        compiled, python = Solver(one), Solver(one, compiled=False)
        assert compiled.reaches(limit).may == python.reaches(limit).may
        found, known = compiled.cheapest(limit, budget), python.cheapest(limit, budget)
        assert (found.cut and found.cut.total) == (known.cut and known.cut.total) and found.least == known.least
        assert max(compiled.least_total(limit, budget), python.least_total(limit, budget)) <= known.least
        assert compiled.spent == python.spent > 0


def test_integers_beyond_128_bits() -> None:
    rng = random.Random()
    for _ in range(20):
        one, limit = pool(rng), rng.randint(5, 80)
        rows: dict[str, Any] = {
            name: [HUGE * value for value in getattr(one, name)] for name in ("done", "cuts", "caps")
        }
        huge = replace(one, held=[[HUGE * value for value in row] for row in one.held], **rows)
        found, known = Solver(huge).cheapest(HUGE * limit, huge.endless), Solver(one).cheapest(limit, one.endless)
        assert (found.cut and found.cut.total) == (known.cut and known.cut.total * HUGE)
