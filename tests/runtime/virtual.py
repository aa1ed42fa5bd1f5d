"""Layers that spend given times by a clock of their own, on ranks of given speeds: what a load of the machine cannot
change.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.plan.balance import UnitCosts, balance, predicted
from pipekern.runtime import executor
from pipekern.schedule.ir import Schedule

Noise = Callable[[random.Random], float]


def quiet(generator: random.Random) -> float:
    return 1.0


def slight(generator: random.Random) -> float:
    return generator.lognormvariate(0, 0.03)


def heavy_tailed(generator: random.Random) -> float:
    """One in a hundred takes longer, with no finite variance."""
    return 1 + 0.05 * generator.random() + (generator.random() < 0.01) * generator.paretovariate(1.5)


def collected(generator: random.Random) -> float:
    """A garbage collector stops one in sixty for five times its work."""
    return generator.lognormvariate(0, 0.03) * (5 if generator.random() < 1 / 60 else 1)


class Machine:
    """Ranks on which layer ``i`` takes ``seconds[i]`` forward and twice that backward, times the ``slower`` of its
    rank, each time times ``noise``.

    The executor's clock is this one within :meth:`running`, which also tells where the layers are.
    """

    def __init__(self, seconds: Sequence[float], ranks: int, noise: Noise, generator: random.Random):
        self.slower = [1.0] * ranks
        self._seconds, self._noise, self._generator = list(seconds), noise, generator
        self._now = 0
        self._optima: dict[tuple[float, ...], float] = {}
        self._pipe: pk.Pipeline | None = None

    def net(self) -> nn.Sequential:
        """The layers, all of one size."""
        return nn.Sequential(*(Timed(self, index) for index in range(len(self._seconds))))

    @contextmanager
    def running(self, pipe: pk.Pipeline) -> Iterator[None]:
        """Layers spend their times."""
        self._pipe = pipe
        with patch.object(executor, "time", self):
            yield

    def perf_counter_ns(self) -> int:
        """Of this process: what its layers have spent."""
        return self._now

    def spend(self, layer: int, times: float) -> None:
        """``times`` what the layer takes forward."""
        assert self._pipe is not None
        stage = bisect_right(list(accumulate(self._pipe.split)), layer)
        slower = self.slower[self._schedule.stage_rank[stage]]
        self._now += round(self._seconds[layer] * times * slower * self._noise(self._generator) * 1e9)

    @property
    def _schedule(self) -> Schedule:
        assert self._pipe is not None
        return self._pipe._parts.blueprint.schedule

    def step(self) -> float:
        """Seconds that a step of the pipeline's split takes without noise; simulated."""
        assert self._pipe is not None
        return predicted(self._pipe.split, self._costs(), self._schedule, self.slower)

    def optimum(self) -> float:
        """Seconds of a step with the planner's split for the speeds as they are."""
        speeds = tuple(self.slower)
        if speeds not in self._optima:
            self._optima[speeds] = balance(self._costs(), self._schedule, speeds).step
        return self._optima[speeds]

    def _costs(self) -> UnitCosts:
        return UnitCosts(self._seconds, [2 * seconds for seconds in self._seconds], [0.0] * len(self._seconds))


class Timed(nn.Module):
    """A layer that spends its machine's time."""

    def __init__(self, machine: Machine, index: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self._machine, self._index = machine, index

    def forward(self, x: Tensor) -> Tensor:
        self._machine.spend(self._index, 1.0)
        return Spent.apply(x * self.weight, self._machine, self._index)


class Spent(torch.autograd.Function):
    """The same value, whose backward spends the layer's time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, machine: Machine, index: int) -> Tensor:
        ctx.spend = machine.spend, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        spend, index = ctx.spend
        spend(index, 2.0)
        return grad, None, None
