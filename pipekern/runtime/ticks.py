"""When instructions ran: by the host's clock, and by events on the stream where a CUDA device runs them.

Events are read once the device is past them, so that nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import sub
from typing import NamedTuple, Protocol

import torch

from pipekern.runtime.executor import Executor
from pipekern.schedule.comms import RECEIVES
from pipekern.trace.timeline import COMPUTE

Method = Callable[[int], None]


class Tick(Protocol):
    """A place in a device's queue, behind all that is queued when it is recorded."""

    def record(self) -> None:
        """Queue it."""

    def done(self) -> bool:
        """Whether the device is past it."""

    def wait(self) -> None:
        """Until the device is past it."""

    def since(self, earlier: Tick) -> int:
        """Nanoseconds from ``earlier``, where the device is past both."""


class CudaTick:
    """An event on the stream that is current on ``device`` when it is recorded."""

    def __init__(self, device: torch.device):
        self._device, self._event = device, torch.cuda.Event(enable_timing=True)

    def record(self) -> None:
        """See ``Tick``."""
        self._event.record(torch.cuda.current_stream(self._device))

    def done(self) -> bool:
        """See ``Tick``."""
        return self._event.query()

    def wait(self) -> None:
        """See ``Tick``."""
        self._event.synchronize()

    def since(self, earlier: Tick) -> int:
        """See ``Tick``."""
        assert isinstance(earlier, CudaTick)
        return round(earlier._event.elapsed_time(self._event) * 1e6)


class _Queue(NamedTuple):
    """What one rank has on its CUDA device: the places of its first instruction and of those that compute, and for each
    of these the last receive between it and the one before.
    """

    device: torch.device
    first: int
    computing: list[int]
    receives: list[int | None]


class Lap(NamedTuple):
    """One step: the host's ``times``, see ``Executor``; of each queue the ticks before everything, and then before and
    after each instruction that computes.
    """

    times: list[int]
    ticks: list[list[Tick]]

    def done(self) -> bool:
        """Whether all devices are past it."""
        return not self.ticks or all(row[-1].done() for row in self.ticks)

    def wait(self) -> None:
        """Until they are."""
        for row in self.ticks:
            row[-1].wait()


class Clock:
    """The clock of ``executor``, whose stages are on ``devices``."""

    def __init__(self, executor: Executor, devices: Mapping[int, torch.device], tick: Callable[..., Tick] = CudaTick):
        self._executor, self._tick = executor, tick
        self._queues = _queues(executor, devices)
        self._free: list[list[list[Tick]]] = []
        self._ticks = self._fresh()
        for number, queue in enumerate(self._queues):
            for k, place in enumerate(queue.computing):
                executor.wrap(place, partial(self._around, number, 2 * k + 1))
            executor.wrap(queue.first, partial(self._behind, number))

    def take(self) -> Lap:
        """The step that has just run."""
        lap = Lap(self._executor.times, self._ticks)
        if self._queues:
            self._ticks = self._fresh()
        return lap

    def read(self, lap: Lap) -> tuple[list[int], int]:
        """Nanoseconds that each instruction of ``lap``, which is done, took, and from its first begin to its last end.
        A CUDA device's time between two computations is that of the receive between them. ``lap`` is used up.
        """
        spent, whole = list(map(sub, lap.times[1:], lap.times)), lap.times[-1] - lap.times[0]
        for queue, row in zip(self._queues, lap.ticks, strict=True):
            for k, place in enumerate(queue.computing):
                before, start, end = row[2 * k : 2 * k + 3]
                spent[place] = end.since(start)
                if (receive := queue.receives[k]) is not None:
                    spent[receive] = start.since(before)
            whole = max(whole, row[-1].since(row[0]))
        self._free.append(lap.ticks)
        return spent, whole

    def _fresh(self) -> list[list[Tick]]:
        if self._free:
            return self._free.pop()
        return [[self._tick(queue.device) for _ in range(2 * len(queue.computing) + 1)] for queue in self._queues]

    def _around(self, number: int, before: int, method: Method) -> Method:
        def timed(microbatch: int) -> None:
            row = self._ticks[number]
            row[before].record()
            method(microbatch)
            row[before + 1].record()

        return timed

    def _behind(self, number: int, method: Method) -> Method:
        def timed(microbatch: int) -> None:
            self._ticks[number][0].record()
            method(microbatch)

        return timed


def _queues(executor: Executor, devices: Mapping[int, torch.device]) -> list[_Queue]:
    queues: dict[int, _Queue] = {}
    receives: dict[int, int] = {}
    for place, (rank, one) in enumerate(executor.placed):
        if devices[one.stage].type == "cuda":
            queue = queues.setdefault(rank, _Queue(devices[one.stage], place, [], []))
            if one.op in RECEIVES:
                receives[rank] = place
            elif one.op in COMPUTE:
                queue.computing.append(place)
                queue.receives.append(receives.pop(rank, None))
    return list(queues.values())
