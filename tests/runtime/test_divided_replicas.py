"""Tensor-parallel parts of replicas whose state is in shards: gradients, norms and steps of the unsplit model."""

from __future__ import annotations

import pytest

from tests.runtime.divided import KINDS
from tests.runtime.dividing import Case, prove


def test_shards_of_parts(seed: int) -> None:
    """Every ``zero``; a vocabulary that two parts do not divide, norms whose weights all heads share."""
    kinds = ("sequence", "ends", "tied", "sequence")
    prove([Case(kind, {"dp": 2, "tp": 2}, zero=zero) for zero, kind in enumerate(kinds)], seed)


MESHES = [{"pp": pp, "dp": dp, "tp": tp} for pp in (1, 2) for dp in (1, 2) for tp in (1, 2) if pp * dp * tp > 1]
SCHEDULES = ["1f1b", "interleaved-1f1b", "zb-v"]


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", range(4))
def test_whole_grid(mesh: dict[str, int], schedule: str, zero: int, seed: int) -> None:
    prove([Case(kind, mesh, schedule, zero=zero) for kind in KINDS], seed)
