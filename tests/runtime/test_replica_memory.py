"""What a rank sends and holds among replicas, counted as in benchmarks/zero_cpu.py, beside what the planner says."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.zero.contender import Contender
from benchmarks.zero.job import measure, unsplit_loss, whole_case
from benchmarks.zero.ours import Ours
from tests.launch import launch, values

SAMPLE = [(0, None), (2, "bf16"), (3, None)]
GRID = [(zero, precision) for zero in range(4) for precision in (None, "bf16")]


def _measure(cases: list[tuple[int, str | None]]) -> list[dict[str, Any]]:
    """Fails where the loss is not the unsplit model's, or pipekern counts other bytes than torch was given."""
    dist.init_process_group("gloo")
    wanted = unsplit_loss()
    rows = [row for case in cases for row in measure(Contender("pipekern", "", *case), Ours, wanted)]
    dist.destroy_process_group()
    return rows


@pytest.mark.parametrize("cases", [SAMPLE, pytest.param(GRID, marks=pytest.mark.full)], ids=["sample", "grid"])
def test_as_planned(cases: list[tuple[int, str | None]]) -> None:
    """Plain data parallelism on two sends each parameter's 4 bytes once to sum; in float32 any zero sends as much in
    all, with bf16 the weights that are gathered are half of it.
    """
    count = sum(p.numel() for p in whole_case().model(1).parameters())
    for (zero, precision), row in zip(cases, values(launch(_measure, 2, cases))[0], strict=True):
        assert row["sent_reduce"] == pytest.approx((2 if zero else 4) * count, rel=1e-3)
        assert row["sent_gather"] == pytest.approx((0 if not zero else 1 if precision else 2) * count, rel=1e-3)
        assert row["resting"] == pytest.approx(row["planned_resting"], rel=2e-3)
        arriving = 4 * count if zero else 0  # on a CPU parts of a sum have memory of their own
        assert row["resting"] < row["peak"] < 1.05 * (row["planned_peak"] + arriving)
