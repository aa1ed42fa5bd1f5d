"""Errors against float64, ours and others', on the same inputs: outputs, and gradients where there are any."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipekern.cli.bench.case import SMALL, Case
from pipekern.cli.bench.cases import cases
from pipekern.cli.bench.row import Row

FACTOR = 2.0  # times torch's own error, which is taken as a unit in the last place at least
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def judge(names: Sequence[str], device: str) -> list[Row]:
    """A row an op, dtype and contender; on the CPU ours and torch's alone, for the others need a GPU."""
    rows = []
    for name in names:
        for dtype, word in DTYPES.items():
            for case in cases(name, SMALL, dtype, device):
                rows += [_row(case, word, contender) for contender in case.contenders if _runs(contender, device)]
    return rows


def _runs(contender: str, device: str) -> bool:
    return device == "cuda" or contender in ("pipekern", "torch")


def _row(case: Case, dtype: str, contender: str) -> Row:
    row = Row(case.op, case.shape, dtype, contender)
    exact = results(case, case.contenders["torch"], torch.float64)
    own = [error(a, e) for a, e in zip(results(case, case.contenders["torch"]), exact, strict=True)]
    try:
        found = results(case, case.contenders[contender])
        errors = [error(a, e) for a, e in zip(found, exact, strict=True)]
    except Exception as problem:  # another library's
        if contender == "pipekern":
            raise
        return row._replace(note=f"{type(problem).__name__}: {problem}".splitlines()[0])
    bounds = [FACTOR * max(b, torch.finfo(a.dtype).eps) for a, b in zip(found, own, strict=True)]
    close = all(a <= b for a, b in zip(errors, bounds, strict=True))
    return row._replace(error=max(errors), torch_error=max(own), close=close)


def results(case: Case, prepare: Callable[..., Callable[[], Any]], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and gradients, of copies of the case's inputs, in ``dtype`` where one is given."""
    inputs = [_copy(value, dtype) for value in case.inputs]
    outputs = as_list(prepare(*inputs)())
    if not case.backward_bytes:
        return [output.detach() for output in outputs]
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    grads = [torch.linspace(-1, 2, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, grads)
    return [*(output.detach() for output in outputs), *found]


def as_list(value: Any) -> list[Tensor]:
    """One tensor, or several, as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def _copy(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    if dtype is not None and copy.is_floating_point():
        copy = copy.to(dtype)
    return copy.requires_grad_(value.requires_grad)


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value; infinite where shapes or what is finite differ."""
    if found.shape != exact.shape:
        return math.inf
    value = float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
    return value if math.isfinite(value) else math.inf
