"""Every schedule of torch.distributed.pipelining."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from benchmarks.pipelines.case import Case
from benchmarks.pipelines.contender import Contender, Start

SINGLE = ("ScheduleGPipe", "Schedule1F1B")
LOOPED = ("ScheduleInterleaved1F1B", "ScheduleLoopedBFS", "ScheduleInterleavedZeroBubble")
V_SHAPED = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")


class TorchPipelining:
    """The stages of this rank under one of torch's schedules; ``here`` are their indices."""

    def __init__(self, name: str, stages: int, case: Case):
        rank, device = dist.get_rank(), torch.device("cpu")
        here = _placed(name, stages)[rank]
        parts = case.stages(stages)
        self._case = case
        self._modules = [parts[stage] for stage in here]
        built = [PipelineStage(parts[stage], stage, stages, device) for stage in here]
        cls: Any = getattr(pipelining, name)
        given = built[0] if name in SINGLE else built
        self._schedule = cls(given, case.microbatches, loss_fn=case.loss_fn)
        self._inputs = (case.x,) if 0 in here else ()
        self._targets = {"target": case.y} if stages - 1 in here else {}
        parameters = [p for module in self._modules for p in module.parameters()]
        self._optimizer = case.optimizer(parameters, **case.options)

    def step(self) -> None:
        self._schedule.step(*self._inputs, return_outputs=False, **self._targets)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for module in self._modules for name, p in module.named_parameters()}

    def close(self) -> None:
        """Nothing outlives the object."""


def _placed(name: str, stages: int) -> list[list[int]]:
    """Stages of ranks 0 and 1."""
    if name in V_SHAPED:
        return [[0, 3], [1, 2]]
    return [list(range(rank, stages, 2)) for rank in range(2)]


def contenders() -> dict[Contender, Start]:
    """All schedules that torch exports; the looped ones with 2 and 4 stages a rank, as ours."""
    grid = [(name, 2) for name in SINGLE]
    grid += [(name, stages) for name in LOOPED for stages in (4, 8)]
    grid += [(name, 4) for name in V_SHAPED]
    return {
        Contender("torch", name.removeprefix("Schedule") + (f" ×{stages // 2}" if stages > 2 else ""), stages): partial(
            TorchPipelining, name, stages
        )
        for name, stages in grid
    }
