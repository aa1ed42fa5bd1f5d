"""Where the time of a step goes, and which stage has become slow."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.plan.drift import LEARNING, SETTLING
from pipekern.runtime.stats import RankStats, Stats
from pipekern.runtime.watch import TOGETHER
from tests.runtime.step import PLACES, run

READY = SETTLING + LEARNING


def test_golden() -> None:
    ranks = (
        RankStats({0: {"F": 0.002, "BW": 0.004}}, waiting=0.0025, sending=0.0005, step=0.009),
        RankStats({1: {"F": 0.003, "BW": 0.006}}, waiting=0.001, sending=0.0, step=0.01),
    )
    stats = Stats(ranks, 40, {(1, 1): 1.5})
    assert (stats.step, stats.slowest) == (0.01, (1, 1))
    assert stats.imbalance == pytest.approx(9 / 7.5)
    assert str(stats) == (
        "40 steps, 10 ms each, imbalance 1.20 (stage 1, rank 1)\n"
        "rank    busy ms  waiting ms  sending ms  stages\n"
        "   0          6         2.5         0.5  0: F 2 BW 4\n"
        "   1          9           1           0  1: F 3 BW 6\n"
        "stage 1 (rank 1) is 1.50 × slower than before"
    )


class Nap(nn.Module):
    """A layer that takes ``seconds`` by the clock, forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.seconds = 0.002

    def forward(self, x: Tensor) -> Tensor:
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            time.sleep(0.0001)
        return x * self.weight


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _slowed(ranks: int, stage: int, policy: str) -> tuple[list[str], Stats, Stats]:
    """Steps until the detector has learnt, a few, then with ``stage`` slowed; then as before."""
    told, log = Told(), logging.getLogger("pipekern")
    log.addHandler(told)
    log.setLevel(logging.INFO)
    naps = [Nap() for _ in range(ranks)]
    net = nn.Sequential(*naps)
    options: dict[str, Any] = {"microbatches": 2, "ranks": ranks, "on_nonfinite": policy, "split": [1] * ranks}
    x = torch.ones(4, 4)
    with pk.Pipeline(net, loss_fn=nn.MSELoss(), **options) as pipe:
        for _ in range(READY + 5):
            pipe.train_step(x, x)
        naps[stage].seconds = 0.008
        for _ in range(10):
            pipe.train_step(x, x)
        slow = pipe.stats()
        naps[stage].seconds = 0.002
        for _ in range(20):
            pipe.train_step(x, x)
        over = pipe.stats()
    log.removeHandler(told)
    return told.lines, slow, over


@PLACES
@pytest.mark.parametrize("policy", ["raise", "ignore"])
def test_a_slow_stage_is_named(processes: bool, policy: str) -> None:
    """In the log of the first process, and by ``stats()`` on all, within ten steps; and again when it is over."""
    results = run(processes, _slowed, 3, 1, policy)
    for _, slow, over in results:
        assert slow.slow[1, 1] > 1, str(slow)
        assert slow.slowest == (1, 1) and slow.imbalance > 1.2
        assert (1, 1) not in over.slow, str(over)
    lines = [line for line in results[0][0] if "stage 1 (rank 1)" in line]  # a busy machine may slow others, too
    assert len(lines) == 2 and "stage 1 (rank 1) has become" in lines[0] and "as fast as before" in lines[1], lines
    assert all(not lines for lines, *_ in results[1:])


def _busy(ranks: int) -> tuple[list[float] | None, list[float] | None, int]:
    """What is heard before there is enough; after steps in which stage 1 of 3 takes 4 times as long; of how many."""
    naps = [Nap() for _ in range(3)]
    naps[1].seconds = 0.008
    x = torch.ones(4, 4)
    with pk.Pipeline(nn.Sequential(*naps), loss_fn=nn.MSELoss(), microbatches=2, ranks=ranks, split=[1] * 3) as pipe:
        watch = pipe._training.watch
        pipe.train_step(x, x)
        early = watch.busy()
        for _ in range(11):
            pipe.train_step(x, x)
        return early, watch.busy(), watch.heard


@PLACES
def test_all_ranks_know_how_busy_each_stage_is(processes: bool) -> None:
    """By the clock, and the same bits."""
    results = run(processes, _busy, 3)
    early, busy, heard = results[0]
    assert all(result == results[0] for result in results)
    assert early is None and 5 <= heard <= 12
    assert busy is not None and len(busy) == 3
    assert busy[1] >= 2 * 0.008 and min(busy[0], busy[2]) >= 2 * 0.002
    assert busy[1] > max(busy[0], busy[2])


def _accounted(ranks: int, schedule: str) -> tuple[Stats, list[float]]:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    x = torch.randn(12, 8)
    with pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=6, ranks=ranks, schedule=schedule) as pipe:
        pipe.train_step(x, x)
        return pipe.stats(), pipe.timeline().busy


@PLACES
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zb-h2", "v-half"])
def test_every_nanosecond_is_told(processes: bool, schedule: str) -> None:
    """After one step, busy times are the timeline's, and busy, waiting and sending make up the step."""
    order = pk.schedule.build(schedule, ranks=3, microbatches=6)
    stats, busy = run(processes, _accounted, 3, schedule)[0]
    assert [row.busy * 1e6 for row in stats.ranks] == pytest.approx(busy)
    assert [list(row.stages) for row in stats.ranks] == [list(order.stages_of(rank)) for rank in range(3)]
    sums = [row.busy + row.waiting + row.sending for row in stats.ranks]
    if processes:
        assert sums == pytest.approx([row.step for row in stats.ranks])
    else:
        assert sum(sums) == pytest.approx(stats.step)
    assert stats.steps == 1


def test_before_the_first_step_and_with_one_rank() -> None:
    with pk.Pipeline(nn.Sequential(nn.Linear(2, 2)), loss_fn=nn.MSELoss(), microbatches=1, ranks=1) as pipe:
        assert (pipe.stats().step, pipe.stats().imbalance, pipe.stats().steps) == (0.0, 1.0, 0)
        for _ in range(READY + 2 * TOGETHER):
            pipe.train_step(torch.ones(1, 2), torch.ones(1, 2))
        assert pipe.stats().slow == {}
