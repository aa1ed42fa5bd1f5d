"""DeepSpeed's PipelineModule, which has one schedule: 1F1B, one stage a rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

from benchmarks.pipelines.case import Case
from benchmarks.pipelines.contender import Contender, Start


class DeepSpeed:
    """A pipeline engine in fp32 without ZeRO."""

    def __init__(self, case: Case):
        with redirect_stdout(StringIO()):  # it prints a page about its layers
            self._start(case)

    def _start(self, case: Case) -> None:
        deepspeed.init_distributed("gloo")
        samples = len(case.x) // case.microbatches
        self._case = case
        module = PipelineModule(case.stages(2), num_stages=2, loss_fn=case.loss_fn, partition_method="uniform")
        parameters = list(module.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=case.optimizer(parameters, **case.options),
            config={
                "train_micro_batch_size_per_gpu": samples,
                "gradient_accumulation_steps": case.microbatches,
                "steps_per_print": 10**9,
                "wall_clock_breakdown": False,
            },
        )
        self._batches = self._endless()

    def _endless(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        m = self._case.microbatches
        return itertools.cycle(list(zip(self._case.x.chunk(m), self._case.y.chunk(m), strict=True)))

    def step(self) -> None:
        self._engine.train_batch(self._batches)

    def weights(self) -> dict[str, torch.Tensor]:
        """The stage is the engine's one layer: its names follow the layer's number."""
        named = self._engine.module.named_parameters()
        return {name.split(".", 1)[1]: p.detach() for name, p in named}

    def close(self) -> None:
        self._engine.destroy()


def contenders() -> dict[Contender, Start]:
    """One."""
    return {Contender("DeepSpeed", "PipelineModule", 2): DeepSpeed}
