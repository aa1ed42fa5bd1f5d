from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from pipekern.schedule import Action, Costs, build
from pipekern.schedule.weave import weave
from tests.schedule.sample import random_schedule


def test_golden() -> None:
    """1F1B of two ranks: rank 0 does W0 while it waits for B1, rank 1 has no wait and does both at the end."""
    woven = weave([list(row) for row in build("1f1b", ranks=2, microbatches=2).actions])
    assert [" ".join(f"{a.op}{a.microbatch}" for a in row) for row in woven] == [
        "F0 F1 B0 W0 B1 W1",
        "F0 B0 F1 B1 W0 W1",
    ]


@pytest.mark.parametrize("seed", range(30))
def test_any_order_stays_valid_complete_and_within_its_memory(seed: int) -> None:
    given = random_schedule(Random(seed), split=False, chains=False)
    woven = replace(given, actions=tuple(map(tuple, weave(given.actions))))
    woven.check()
    whole = Counter(a for row in given.actions for a in row)
    parts = Counter(a for row in woven.actions for a in row)
    assert parts == Counter(
        {part: 1 for a in whole for part in ([a] if a.op == "F" else [a._replace(op="B"), Action("W", *a[1:])])}
    )
    before, after = (s.simulate(Costs(1, 1, 1)) for s in (given, woven))
    assert max(after.peak_activations) <= max(before.peak_activations)
    assert after.makespan <= before.makespan
