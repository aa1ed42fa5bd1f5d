"""Clocks of steps, on a device whose queue is played by hand and, where there is one, on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.runtime.executor import Executor
from pipekern.runtime.ticks import Clock, Tick
from pipekern.schedule.comms import Program

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Device:
    """A queue: ``passed`` is where the device is in it, and what is recorded stands at ``queued``, ns."""

    def __init__(self) -> None:
        self.queued = self.passed = 0

    def tick(self, device: torch.device) -> Tick:
        assert device == CUDA
        return Played(self)


class Played:
    def __init__(self, device: Device):
        self._device, self.at = device, -1

    def record(self) -> None:
        self.at = self._device.queued

    def done(self) -> bool:
        return self._device.passed >= self.at

    def wait(self) -> None:
        self._device.passed = self.at

    def since(self, earlier: Tick) -> int:
        assert isinstance(earlier, Played) and self.done() and earlier.at >= 0
        return self.at - earlier.at


def program() -> Program:
    return pk.schedule.build("1f1b", ranks=2, microbatches=2).program()


def executor(rank: int | None, device: Device, takes: dict[str, int]) -> Executor:
    """One of a rank whose instructions do nothing but queue what takes so many ns."""

    def queue(op: str) -> Any:
        def method(microbatch: int) -> None:
            device.queued += takes[op]

        return method

    ops = sorted(takes)
    runner = SimpleNamespace(scores=False, begin=lambda batch: None, **{op: queue(op) for op in ops})
    runner.lane = lambda peer: runner
    outgoing = SimpleNamespace(queued={}, drain=lambda: None)
    runners = cast(Any, {0: runner, 1: runner})
    return Executor(runners, program(), rank, {op: op for op in ops}, cast(Any, outgoing), lambda batch: None)


TAKES = {"F": 20, "BW": 40, "SEND_F": 1, "SEND_B": 1, "RECV_F": 300, "RECV_B": 500, "JOIN": 0}


def test_golden() -> None:
    """Rank 1 on a GPU: what computes takes what the device does, a receive the gap before it; once it is past that."""
    device = Device()
    run = executor(1, device, TAKES)
    clock = Clock(run, {0: CPU, 1: CUDA}, device.tick)
    run.run(cast(Any, None))
    lap = clock.take()
    assert not lap.done()
    lap.wait()
    assert lap.done()
    spent, whole = clock.read(lap)
    ops = [one.instruction.op for one in run.placed]
    assert ops == ["RECV_F", "F", "BW", "SEND_B", "RECV_F", "F", "BW", "SEND_B"]
    assert [spent[i] for i, op in enumerate(ops) if op in ("F", "BW")] == [20, 40, 20, 40]
    assert [spent[i] for i, op in enumerate(ops) if op == "RECV_F"] == [300, 301]  # with the send in between
    assert whole == max(300 + 60 + 1 + 300 + 60, lap.times[-1] - lap.times[0])


def test_a_step_that_is_not_read_yet_keeps_its_ticks() -> None:
    """However many are under way; what has been read is used again."""
    device = Device()
    takes = dict(TAKES)
    run = executor(0, device, takes)
    clock = Clock(run, {0: CUDA, 1: CPU}, device.tick)
    laps = []
    for forward in (10, 20, 30):
        takes["F"] = forward
        run.run(cast(Any, None))
        laps.append(clock.take())
    device.passed = device.queued
    first = next(i for i, one in enumerate(run.placed) if one.instruction.op == "F")
    assert [clock.read(lap)[0][first] for lap in laps] == [10, 20, 30]
    run.run(cast(Any, None))
    clock.take()
    assert clock._ticks is not laps[0].ticks and any(clock._ticks is lap.ticks for lap in laps)


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_without_a_gpu_the_host_tells(rank: int | None) -> None:
    device = Device()
    run = executor(rank, device, TAKES)
    clock = Clock(run, {0: CPU, 1: CPU}, device.tick)
    run.run(cast(Any, None))
    lap = clock.take()
    spent, whole = clock.read(lap)
    assert lap.done() and sum(spent) == whole == lap.times[-1] - lap.times[0]


def test_one_process_with_a_gpu_and_a_cpu() -> None:
    """Each stage by its own clock."""
    device = Device()
    run = executor(None, device, TAKES)
    clock = Clock(run, {0: CPU, 1: CUDA}, device.tick)
    run.run(cast(Any, None))
    lap = clock.take()
    device.passed = device.queued
    spent, _ = clock.read(lap)
    there = {i for i, (rank, one) in enumerate(run.placed) if rank == 1 and one.op in ("F", "BW")}
    assert {spent[i] for i in there} == {20, 40}
    host = [b - a for a, b in zip(lap.times, lap.times[1:], strict=False)]
    assert all(spent[i] == host[i] for i, one in enumerate(run.placed) if one.rank == 0)


class Busy(nn.Module):
    """Keeps the GPU's stream, not the host, for ``cycles``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.cycles = 2_000_000

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(self.cycles)
        return x * self.weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_a_gpu_tells_how_long_its_stages_compute() -> None:
    """The host only queues; the stage with four times the work is the one that is busy."""
    layers = [Busy(), Busy()]
    layers[1].cycles *= 4
    net = nn.Sequential(*layers).cuda()
    x = torch.ones(4, 4, device="cuda")
    with pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=2, ranks=2, devices=["cuda:0"] * 2, split=[1, 1]) as pipe:
        for _ in range(6):
            pipe.train_step(x, x)
        stats = pipe.stats()
    slow, fast = stats.ranks[1].stages[1]["F"], stats.ranks[0].stages[0]["F"]
    assert stats.slowest == (1, 1) and slow > 2 * 8_000_000 / 3e9 and slow > 2 * fast, str(stats)
