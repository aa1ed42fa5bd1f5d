"""Replicas of a pipeline train as the unsplit model does over all their batches, within 1e-12 in float64."""

from __future__ import annotations

from itertools import product

import pytest

from tests.launch import launch, values
from tests.runtime.replicated import KINDS, Case, Trained, compare, train

SCHEDULES = ("1f1b", "interleaved-1f1b", "zb-v")
PLACES = ((1, 1), (1, 2), (2, 1), (2, 2))  # pipeline ranks, replicas
GRID = [Case(k, s, *p, z) for k, p, s, z in product(KINDS, PLACES, SCHEDULES, range(4)) if s == "1f1b" or p[0] > 1]


def _train_all(cases: list[Case], seed: int) -> list[Trained]:
    runs = []
    for case in cases:
        try:
            runs.append(train(case, seed))
        except Exception as error:
            raise AssertionError(f"{case} failed: {error}") from error
    return runs


def _prove(cases: list[Case], seed: int) -> None:
    """All of the same place."""
    runs = values(launch(_train_all, cases[0].pp * cases[0].dp, cases, seed, timeout=500))
    for case, *of_case in zip(cases, *runs, strict=True):
        compare(case, of_case, seed)


@pytest.mark.parametrize("place", PLACES)
def test_sample(place: tuple[int, int], seed: int) -> None:
    """Every kind of model with every zero, the schedules in turn."""
    cases = [case for case in GRID if (case.pp, case.dp) == place]
    step = 3 if place[0] > 1 else 1
    turn = [case for i, case in enumerate(cases) if i % step == (i // 12 + i // 4) % step]
    _prove(turn if place[1] > 1 else turn[::5], seed)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("place", "kind"), list(product(PLACES, KINDS)))
def test_whole_grid(place: tuple[int, int], kind: str, seed: int) -> None:
    _prove([case for case in GRID if (case.pp, case.dp) == place and case.kind == kind], seed)
