"""Check that contenders do the same work, then time them in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch
import torch.distributed as dist

from benchmarks.pipelines.case import Case
from benchmarks.pipelines.contender import Contender, Running
from pipekern.errors import ConfigError

TOLERANCE = 1e-4  # of the largest gradient entry; float32, sums in another order


@dataclass(frozen=True)
class Result:
    """One contender on one case: seconds a step by round, and the largest gradient error of its first step."""

    contender: Contender
    error: float
    rounds: list[float]

    @property
    def seconds(self) -> float:
        return median(self.rounds)

    def ratios(self, base: Result) -> list[float]:
        """This contender's time over that of ``base``: its quartiles over rounds."""
        return quantiles([own / other for own, other in zip(self.rounds, base.rounds, strict=True)], n=4)


def run(case: Case, contenders: Sequence[Contender], rounds: int, say: Callable[[str], None]) -> list[Result]:
    """Check and time ``contenders`` on ``case``; collective. Says which do not fit."""
    errors: dict[Contender, float] = {}
    for contender in contenders:
        units = len(case.costs(contender.stages))
        if units < contender.stages:
            say(f"  {contender} is left out: {units} units are too few for {contender.stages} stages")
            continue
        try:
            errors[contender] = gradient_error(case, contender)
        except (ValueError, ConfigError) as refusal:  # of this number of micro-batches, the same on both ranks
            say(f"  {contender} is left out: {refusal}")
    running = {contender: contender.start(case) for contender in errors}
    times: dict[Contender, list[float]] = {contender: [] for contender in running}
    for number in range(rounds):
        order = list(running)
        random.Random(number).shuffle(order)
        for contender in order:
            running[contender].step()  # what the one before left in the caches is gone
            times[contender].append(median(step_seconds(running[contender].step) for _ in range(case.steps)))
        say(f"  round {number + 1} of {rounds}")
    for pipeline in running.values():
        pipeline.close()
    return [Result(contender, errors[contender], times[contender]) for contender in running]


def step_seconds(step: Callable[[], object]) -> float:
    """From a barrier until every rank has ended its step; the ranks share a clock."""
    dist.barrier()
    start = time.perf_counter()
    step()
    ends = torch.tensor([-start, time.perf_counter()], dtype=torch.float64)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return float(ends.sum())


def gradient_error(case: Case, contender: Contender) -> float:
    """How far a step of plain SGD at rate 1 is from the unsplit model's, by the largest gradient entry; collective.

    Raises ``AssertionError`` where the error is too large.
    """
    plain = replace(case, optimizer=torch.optim.SGD, options={"lr": 1.0})
    model = plain.model(contender.stages)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for x, y in zip(case.x.chunk(case.microbatches), case.y.chunk(case.microbatches), strict=True):
        (case.loss_fn(model(x), y) / case.microbatches).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    running = contender.start(plain)
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
