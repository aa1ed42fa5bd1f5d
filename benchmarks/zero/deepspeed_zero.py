"""DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from io import StringIO

import deepspeed
from torch import Tensor

from benchmarks.pipelines.case import Case
from benchmarks.zero.contender import Contender, Start, held


class Zero:
    """An engine with gradient accumulation."""

    def __init__(self, case: Case, contender: Contender):
        with redirect_stdout(StringIO()):
            self._start(case, contender)

    def _start(self, case: Case, contender: Contender) -> None:
        deepspeed.init_distributed("gloo")
        self._case = case
        model = case.model(1)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=case.optimizer(model.parameters(), **case.options),
            config={
                "train_micro_batch_size_per_gpu": len(case.x) // case.microbatches,
                "gradient_accumulation_steps": case.microbatches,
                "steps_per_print": 10**9,
                "zero_optimization": {"stage": contender.zero},
                "bf16": {"enabled": contender.precision == "bf16"},
                "zero_allow_untested_optimizer": True,
            },
        )

    def step(self) -> float:
        m, loss = self._case.microbatches, 0.0
        for x, y in zip(self._case.x.chunk(m), self._case.y.chunk(m), strict=True):
            part = self._case.loss_fn(self._engine(x).float(), y)
            self._engine.backward(part)
            self._engine.step()
            loss += float(part.detach()) / m
        return loss

    def memory(self) -> Mapping[str, Iterable[Tensor]]:
        optimizer = self._engine.optimizer
        return held(self._engine.module.parameters(), getattr(optimizer, "optimizer", optimizer))

    def close(self) -> None:
        self._engine.destroy()


def contenders() -> dict[Contender, Start]:
    """Every stage, in float32 and bfloat16, with its own defaults."""
    grid = [(precision, zero) for precision in (None, "bf16") for zero in range(4)]
    return {Contender("DeepSpeed", f"ZeRO {zero}", zero, precision): Zero for precision, zero in grid}
