"""What the executor itself costs: a step of stages that compute next to nothing, minus their work, an instruction."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pipekern as pk
from benchmarks.pipelines.case import Case
from benchmarks.pipelines.ours import RANKS, Ours


def microseconds_an_instruction(case: Case, repeats: int) -> tuple[float, float, int]:
    """The executor's own time and the stages' time an instruction of one ``1f1b`` step, and how many there are.

    All ranks are in this process, so that nobody waits: the time that a step takes beyond the same forwards and
    backwards in a plain loop is the executor's, transport and batch handling included.
    """
    pipeline = Ours("1f1b", 1, case, transport="local")
    parts = case.stages(RANKS)
    count = sum(map(len, pk.schedule.build("1f1b", ranks=RANKS, microbatches=case.microbatches).program().instructions))

    def loop() -> None:
        m = case.microbatches
        for x, y in zip(case.x.chunk(m), case.y.chunk(m), strict=True):
            middle = parts[0](x)
            cut = middle.detach().requires_grad_()
            (case.loss_fn(parts[1](cut), y) / m).backward()
            middle.backward(cut.grad)

    whole, work = [], []
    for _ in range(repeats):
        whole.append(_seconds(pipeline.train))
        work.append(_seconds(loop))
    pipeline.close()
    for part in parts:
        part.zero_grad()
    own = median(a - b for a, b in zip(whole, work, strict=True))
    return own / count * 1e6, median(work) / count * 1e6, count


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
