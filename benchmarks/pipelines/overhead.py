"""What the executor itself costs: a step of stages that compute next to nothing, minus their work, an instruction."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import pipekern as pk
from benchmarks.pipelines.case import Case
from benchmarks.pipelines.ours import RANKS, Ours


class Overhead(NamedTuple):
    """Microseconds: the executor's own an ``instruction`` (sends and receives counted) and a ``computation`` (F or BW);
    the stages' ``work`` an instruction. ``instructions`` are those of a step.
    """

    instruction: float
    computation: float
    work: float
    instructions: int


def measure(case: Case, repeats: int) -> Overhead:
    """The executor's own cost in one ``1f1b`` step of ``case``, a median of ``repeats``.

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
    return Overhead(own / count * 1e6, own / (2 * RANKS * case.microbatches) * 1e6, median(work) / count * 1e6, count)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
