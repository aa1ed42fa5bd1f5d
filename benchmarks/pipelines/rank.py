"""One rank of a library's pair: check that its contenders do the same work as the unsplit model, then time them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.pipelines.case import Case, cases
from benchmarks.pipelines.contender import Contender, Running, Start, contenders
from pipekern.errors import ConfigError

TOLERANCE = 1e-4  # of the largest gradient entry; float32, sums in another order


class Rank:
    """A library's contenders on this rank; every method is collective."""

    def __init__(self, library: str):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        dist.init_process_group("gloo")
        self._contenders = contenders(library)
        self._case = cases()[0]
        self._running: dict[Contender, Running] = {}

    def open(self, number: int) -> dict[Contender, float | str]:
        """Make the contenders of case ``number`` ready. The gradient error of each, or why it is left out."""
        self._case = cases()[number]
        found = {contender: self._checked(contender) for contender in self._contenders}
        fit = [contender for contender, error in found.items() if isinstance(error, float)]
        self._running = {contender: self._contenders[contender](self._case) for contender in fit}
        return found

    def _checked(self, contender: Contender) -> float | str:
        units = len(self._case.costs(contender.stages))
        if units < contender.stages:
            return f"{units} units are too few for {contender.stages} stages"
        try:
            return gradient_error(self._case, contender, self._contenders[contender])
        except (ValueError, ConfigError) as refusal:  # of this number of micro-batches, the same on both ranks
            return str(refusal)

    def turn(self, contender: Contender) -> float:
        """Seconds a step, the median over a turn."""
        step = self._running[contender].step
        step()  # what the one before left in the caches is gone
        return median(step_seconds(step) for _ in range(self._case.steps))

    def close(self) -> None:
        """Free the case's contenders."""
        for pipeline in self._running.values():
            pipeline.close()
        self._running = {}


def step_seconds(step: Callable[[], object]) -> float:
    """From a barrier until every rank has ended its step; the ranks share a clock."""
    dist.barrier()
    start = time.perf_counter()
    step()
    ends = torch.tensor([-start, time.perf_counter()], dtype=torch.float64)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return float(ends.sum())


def gradient_error(case: Case, contender: Contender, start: Start) -> float:
    """How far a step of plain SGD at rate 1 is from the unsplit model's, by the largest gradient entry; collective.

    Raises ``AssertionError`` where the error is too large.
    """
    plain = replace(case, optimizer=torch.optim.SGD, options={"lr": 1.0})
    model = plain.model(contender.stages)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for x, y in zip(case.x.chunk(case.microbatches), case.y.chunk(case.microbatches), strict=True):
        (case.loss_fn(model(x), y) / case.microbatches).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    running = start(plain)
    running.step()
    error = _largest_error(before, running, gradients)
    running.close()
    if not error < TOLERANCE:
        raise AssertionError(f"{contender} is {error:.1e} from the unsplit model's gradients on {case.name}")
    return error


def _largest_error(
    before: dict[str, torch.Tensor], running: Running, gradients: dict[str, torch.Tensor | None]
) -> float:
    weights = running.weights()
    wanted = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    own = [float((before[name] - weights[name] - wanted[name]).abs().max()) for name in weights]
    found = torch.tensor([max(own), len(weights)], dtype=torch.float64)
    rows = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, found)
    covered = sum(int(row[1]) for row in rows)
    assert covered == len(before), f"{covered} of {len(before)} parameters were trained"
    return max(float(row[0]) for row in rows) / largest
