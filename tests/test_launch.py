"""The helper that runs tests on several processes."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from tests.launch import launch, values


def adds(start: int) -> tuple[str, float, int]:
    dist.init_process_group("gloo")
    total = torch.full((1,), float(start + dist.get_rank()))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return os.environ["RANK"], total.item(), torch.get_num_threads()


@pytest.mark.parametrize("store", ["outside", "rank 0"])
def test_golden(store: str) -> None:
    assert values(launch(adds, 3, 10, store=store)) == [(str(rank), 33.0, 1) for rank in range(3)]


def ends_badly(how: list[str]) -> str:
    mine = how[int(os.environ["RANK"])]
    print(f"I am {mine}", file=sys.stderr)
    if mine == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mine == "raises":
        raise ValueError("no good")
    if mine == "sleeps":
        threading.Event().wait()
    return mine


def test_each_end_is_reported() -> None:
    how = ["fine", "killed", "raises", "sleeps"]
    outcomes = launch(ends_badly, 4, how, timeout=3.0)
    assert [outcome.value for outcome in outcomes] == ["fine", None, None, None]
    assert [f"I am {name}" in outcome.output for name, outcome in zip(how, outcomes, strict=True)] == [True] * 4
    fine, killed, raises, sleeps = (outcome.error for outcome in outcomes)
    assert fine is None and killed == "rank 1 was killed by signal 9"
    assert raises is not None and raises.endswith("ValueError: no good\n")
    assert sleeps == "rank 3 did not end within 3.0 s"
    assert "in ends_badly" in outcomes[3].output  # where it hung
    with pytest.raises(AssertionError, match="3 of 4 ranks failed"):
        values(outcomes)
