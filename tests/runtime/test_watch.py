"""Where the time of a step goes, and which stage has become slow."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.plan.drift import STEPS, SUMS
from pipekern.runtime.stats import RankStats, Stats
from pipekern.runtime.watch import BLOCK, Watch
from tests.runtime.step import PLACES, run

READY = STEPS.settling + STEPS.learning


def busy_of(watch: Watch) -> list[float] | None:
    """Seconds a step by stage, the medians of the groups; None without them."""
    return list(map(median, zip(*watch.groups(), strict=True))) or None


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
        early = busy_of(watch)
        for _ in range(11):
            pipe.train_step(x, x)
        return early, busy_of(watch), watch.heard


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


@contextmanager
def heard_by_hand() -> Iterator[tuple[Watch, Callable[[float, float, float, float], None]]]:
    """The watch of two stages, and what lets it hear of a step: ms of the fastest micro-batches, and of all."""
    with pk.Pipeline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), loss_fn=nn.MSELoss(), microbatches=1) as pipe:
        watch = pipe._training.watch

        def hear(*times: float) -> None:
            a, b, whole_a, whole_b = (round(time * 1e6) for time in times)
            watch._take([f"16 {a} {whole_a} {b} {whole_b}"])

        yield watch, hear


def test_a_stage_that_is_stopped_now_and_then_is_named_by_its_sums(caplog: pytest.LogCaptureFixture) -> None:
    """A quota: every third step of stage 1 takes 20 ms longer, of 5 ms, and no other does. It is over at once."""
    with heard_by_hand() as (watch, hear), caplog.at_level("INFO", "pipekern"):
        for _ in range(BLOCK * (SUMS.settling + SUMS.learning)):
            hear(4, 4, 5, 5)
        for step in range(20):
            hear(4, 4, 5, 25 if step % 3 == 0 else 5)
        assert watch.slow.keys() == {(1, 1)} and 2 < watch.slow[1, 1] < 3
        for step in range(10):
            hear(4, 4, 5, 25 if step % 3 == 0 else 5)
        busy = busy_of(watch)
        assert busy is not None and busy[0] == 0.005 and 0.008 < busy[1] < 0.02
        for _ in range(4 * BLOCK):
            hear(4, 4, 5, 5)
        assert watch.slow == {}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "stage 1 (rank 1) has become" in lines[0] and "as fast as before" in lines[1], lines


def test_what_is_busy_starts_anew_with_a_change() -> None:
    """Single strays do not show in it, a stage that has become slow does within ten steps, and when that is over."""
    with heard_by_hand() as (watch, hear):
        for step in range(READY + 20):
            hear(4, 4, 5, 100 if step == READY + 17 else 5)
        assert busy_of(watch) == [0.005, 0.005] and watch.heard == 15
        assert sorted(row[1] for row in watch.groups()) == pytest.approx([0.005, 0.005, 0.024])
        for times, steps, slow in (((4, 8, 5, 10), 4, {(1, 1)}), ((4, 4, 5, 5), 4, set())):
            for _ in range(steps):
                assert watch.slow.keys() != slow
                hear(*times)
            assert watch.slow.keys() == slow and busy_of(watch) is None and watch.groups() == []
            for _ in range(5):
                hear(*times)
            assert busy_of(watch) == [0.005, times[3] / 1000] and watch.heard == 5


def test_processes_whose_devices_lag() -> None:
    """Steps are put together however late one process tells of them, and judged once all have."""
    with heard_by_hand() as (watch, _):
        watch._widths, watch._told = [3, 3], [deque(), deque()]
        watch._take(["18 1 1 8 2 2", "1"])
        watch._take(["18 3 3", "10 1 1"])
        assert [len(steps) for steps in watch._told] == [2, 0]
        watch._take(["1", "10 2 2 0 3 3"])
        assert [len(steps) for steps in watch._told] == [0, 0] and len(watch._block) == 3
        assert watch._block == [[8, 1, 1], [8, 2, 2], [8, 3, 3]]


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
        for _ in range(READY + 2 * BLOCK):
            pipe.train_step(torch.ones(1, 2), torch.ones(1, 2))
        assert pipe.stats().slow == {}
