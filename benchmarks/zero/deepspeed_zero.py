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
    """An engine with gradient accumulation, whose buckets are of the model's size: by default they take 2 GB."""

    def __init__(self, case: Case, contender: Contender):
        with redirect_stdout(StringIO()):
            self._start(case, contender)

    def _start(self, case: Case, contender: Contender) -> None:
        deepspeed.init_distributed("gloo")
        self._case = case
        model = case.model(1)
        size = sum(p.numel() for p in model.parameters())
        zero = {"stage": contender.zero, "reduce_bucket_size": size, "allgather_bucket_size": size}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=case.optimizer(model.parameters(), **case.options),
            config={
                "train_micro_batch_size_per_gpu": len(case.x) // case.microbatches,
                "gradient_accumulation_steps": case.microbatches,
                "steps_per_print": 10**9,
                "gradient_clipping": 0.0,  # its default is 1
                "zero_optimization": zero,
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
        parameters = list(self._engine.module.parameters())
        found = held(parameters, self._engine.optimizer.optimizer)
        found["parameters"] += [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        return found

    def close(self) -> None:
        self._engine.destroy()


def contenders() -> dict[Contender, Start]:
    """Its three stages, in float32 and bfloat16, with its defaults for all else."""
    grid = [(precision, zero) for precision in (None, "bf16") for zero in (1, 2, 3)]
    return {Contender("DeepSpeed", f"ZeRO {zero}", zero, precision): Zero for precision, zero in grid}
