"""Times of every op, contender, mode and direction at the sizes of language models, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipekern.cli.bench.accuracy import as_list
from pipekern.cli.bench.case import LARGE, Case
from pipekern.cli.bench.cases import cases
from pipekern.cli.bench.clock import Timing, captured, clocked
from pipekern.cli.bench.machine import Rates
from pipekern.cli.bench.row import Row

MODES = ("eager", "compiled", "graph")


def measure(names: Sequence[str], judged: Sequence[Row], rates: Rates) -> list[Row]:
    """In bfloat16. A contender's error is that at the small shape, where it was judged."""
    known = {(row.op, row.dtype, row.contender): row for row in judged}
    rows = []
    for name in names:
        for case in cases(name, LARGE, torch.bfloat16, "cuda"):
            for contender, prepare in case.contenders.items():
                was = known[name, "bfloat16", contender]
                row = Row(name, case.shape, "bfloat16", contender)
                row = row._replace(error=was.error, torch_error=was.torch_error, close=was.close)
                for mode in MODES:
                    rows += _mode(row._replace(mode=mode), case, prepare, rates)
    return rows


def _mode(row: Row, case: Case, prepare: Callable[..., Callable[[], Any]], rates: Rates) -> list[Row]:
    """The rows of one mode; one that does not run has a note in place of figures."""
    try:
        run = prepare(*case.inputs)
        if row.mode == "graph":
            return [_graph(row, case, run, rates)]
        if row.mode == "compiled":
            torch.compiler.reset()  # every case is the same lambda to it, which it compiles a few times only
            run = torch.compile(run, fullgraph=row.contender == "pipekern", dynamic=False)
        return list(_directions(row, case, run, rates))
    except Exception as problem:  # of a mode that a library does not know; one of ours is a fault of the report
        return [row._replace(note=f"{type(problem).__name__}: {problem}".splitlines()[0])]


def _directions(row: Row, case: Case, run: Callable[[], Any], rates: Rates) -> Iterator[Row]:
    if case.flops and case.backward_bytes:  # some make the gradients forward, some backward
        timing = clocked(lambda _: _backward(case, run()))
        yield _filled(
            row._replace(direction="both"), timing, case.forward_bytes + case.backward_bytes, case.flops, rates
        )
        return
    timing = clocked(lambda _: run())
    yield _filled(row._replace(direction="forward"), timing, case.forward_bytes, case.flops, rates)
    if case.backward_bytes:
        timing = clocked(lambda outputs: _backward(case, outputs), run)
        yield _filled(row._replace(direction="backward"), timing, case.backward_bytes, 0, rates)


def _graph(row: Row, case: Case, run: Callable[[], Any], rates: Rates) -> Row:
    def whole() -> Any:
        outputs = run()
        return _backward(case, outputs) if case.backward_bytes else outputs

    row = row._replace(direction="both" if case.backward_bytes else "forward")
    return _filled(row, clocked(captured(whole)), case.forward_bytes + case.backward_bytes, case.flops, rates)


def _backward(case: Case, outputs: Any) -> Any:
    outputs = as_list(outputs)
    leaves = [value for value in case.inputs if isinstance(value, Tensor) and value.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])


def _filled(row: Row, timing: Timing, floor: int, flops: int, rates: Rates) -> Row:
    seconds = timing.gpu_us / 1e6
    return row._replace(
        **timing._asdict(),
        bytes_floor=floor,
        pct_of_copy=None if flops else 100 * floor / seconds / rates.copy,
        pct_of_product=100 * flops / seconds / rates.product if flops else None,
    )
