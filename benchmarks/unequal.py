"""Steps on ranks of which one has become slow, with and without re-balancing, and what a move of layers costs.

    python -m benchmarks.unequal [--rounds 11] [--out benchmarks/results/unequal.csv]

Two ranks of one thread, each pinned to a core; a GPT of 12 layers, 128 wide, 64 tokens, 4 micro-batches of 4 samples,
1f1b. For each slow-down rank 1 gets a share of its core (examples/quota.py), and three pipelines take turns in shuffled
rounds: ``still`` keeps its split, ``rebalanced`` has rebalance="auto" and has settled, ``planned`` has the planner's
split from the start. A step is `train_step`, from a barrier until every rank has ended it. ``optimum_ms`` is what the
planner says of its split: the layers' costs are those of `pk.profile`, and a rank's speed what its computing takes
meanwhile, by the clocks of ``still``, over what the profile says of it. ``steps_until_moved`` counts from the
slow-down on.

A move: one layer of so many bytes, without an optimizer, from one rank to the other and back in turn, by what
`pk.Move` says; ``over_link`` is its time over that of as many bytes at the bandwidth of a link of shared memory, whose
messages of 64 MB are measured in the same run.
"""

from __future__ import annotations

import argparse
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipekern as pk
from benchmarks.pipelines.case import Case, gpt
from benchmarks.pipelines.machine import describe
from benchmarks.pipelines.rank import step_seconds
from benchmarks.record import write
from benchmarks.two_ranks import start
from examples.quota import Quota
from pipekern.plan.balance import UnitCosts, balance, predicted
from pipekern.transport.base import Link
from pipekern.transport.shm import ShmTransport

SLOWER = (1.25, 1.5, 2.0, 4.0)
SIZES = (1_000_000, 4_000_000, 16_000_000, 64_000_000, 250_000_000, 500_000_000)  # bytes
SLOW, MICROBATCHES = 1, 4  # the rank that is slowed
LEARNING, FOLLOWING, SETTLING = 32, 40, 15  # steps before the first slow-down; until the split follows, at most; more
MOVES = 9  # of each size
MESSAGE = 64_000_000  # bytes, of the link's bandwidth

Row = dict[str, Any]


def main() -> None:
    """Start two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    start("benchmarks.unequal")
    dist.init_process_group("gloo")
    rows = [*slow_downs(gpt(128, 12, 64, 4, MICROBATCHES, steps=1), options.rounds), *moves()]
    if dist.get_rank() == 0 and options.out:
        write(options.out, describe(), rows)
    dist.barrier()
    dist.destroy_process_group()


def slow_downs(case: Case, rounds: int) -> Iterator[Row]:
    """A row a slow-down; collective."""
    costs = profiled(case)
    running = {name: pipeline(case, costs, name) for name in ("still", "rebalanced", "planned")}
    moving = running["rebalanced"]
    for _ in range(LEARNING):
        moving.train_step(case.x, case.y)
    for slower in SLOWER:
        before = moving.split
        with slowed(slower):
            taken = until_moved(moving, case)
            row = compare(running, case, costs, rounds)
        until_moved(moving, case)
        yield told({"slower": slower, "steps_until_moved": taken, "split_before": shown(before), **row})
    for pipe in running.values():
        pipe.close()


def profiled(case: Case) -> pk.LayerCosts:
    """The costs of the case's layers, of one micro-batch on rank 0 alone, for all ranks."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [pk.profile(case.model(2), case.x[: len(case.x) // case.microbatches])]
    dist.broadcast_object_list(found)
    costs: pk.LayerCosts = found[0]
    return costs


def pipeline(case: Case, costs: pk.LayerCosts, name: str) -> pk.Pipeline:
    """By the planner's split for ranks that are alike."""
    pipe = pk.Pipeline(
        case.model(2),
        loss_fn=case.loss_fn,
        microbatches=case.microbatches,
        split=costs,
        rebalance="auto" if name == "rebalanced" else None,
    )
    pipe.optimizer(case.optimizer, **case.options)
    return pipe


@contextmanager
def slowed(slower: float) -> Iterator[None]:
    """Rank 1 gets a share of its core."""
    dist.barrier()
    if dist.get_rank() == SLOW:
        with Quota(slower):
            yield
    else:
        yield
    dist.barrier()


def until_moved(pipe: pk.Pipeline, case: Case) -> int | None:
    """Steps until the split changes, after which there are some more. None where it does not change."""
    before = pipe.split
    for step in range(FOLLOWING):
        pipe.train_step(case.x, case.y)
        if pipe.split != before:
            for _ in range(SETTLING):
                pipe.train_step(case.x, case.y)
            return step + 1
    return None


def compare(running: dict[str, pk.Pipeline], case: Case, costs: pk.LayerCosts, rounds: int) -> Row:
    """Step times of all in turn, and the planner's optimum for the ranks' speeds meanwhile; collective."""
    still, planned = running["still"], running["planned"]
    slowness = measured(still, case, costs, 5)
    planned.replan(split=best(costs, still, slowness)[0])
    times: dict[str, list[float]] = {name: [] for name in running}
    rows: list[list[float]] = []
    for number in range(rounds):
        for name in random.Random(number).sample(list(running), len(running)):
            pipe = running[name]
            pipe.train_step(case.x, case.y)  # what the one before left in the caches is gone
            times[name].append(step_seconds(lambda pipe=pipe: pipe.train_step(case.x, case.y)) * 1e3)  # type: ignore[misc]
            if pipe is still:
                rows.append(slowness_of(still, costs))
    slowness = [fmean(column) for column in zip(*rows, strict=True)]
    split, optimum, unmoved = best(costs, still, slowness)
    row: Row = {
        "split_rebalanced": shown(running["rebalanced"].split),
        "split_planned": shown(planned.split),
        "split_optimum": shown(split),
        "slowness": " ".join(f"{value:.3f}" for value in slowness),
        "still_predicted_ms": f"{unmoved:.4g}",
        "optimum_ms": f"{optimum:.4g}",
    }
    for name, values in times.items():
        row |= quartiles(f"{name}_ms", values)
    row |= quartiles("rebalanced_over_optimum", [value / optimum for value in times["rebalanced"]])
    ratios = [a / b for a, b in zip(times["still"], times["rebalanced"], strict=True)]
    return {**row, **quartiles("still_over_rebalanced", ratios), "rounds": rounds}


def measured(pipe: pk.Pipeline, case: Case, costs: pk.LayerCosts, steps: int) -> list[float]:
    """How much slower than the profile each rank is; collective."""
    rows = []
    for _ in range(steps):
        pipe.train_step(case.x, case.y)
        rows.append(slowness_of(pipe, costs))
    return [fmean(column) for column in zip(*rows, strict=True)]


def slowness_of(pipe: pk.Pipeline, costs: pk.LayerCosts) -> list[float]:
    """In the last step, by rank: what its computing took over what the profile says; collective."""
    timeline, starts = pipe.timeline(), list(accumulate(pipe.split, initial=0))
    m = sum(span.op == "F" and span.stage == 0 for span in timeline.spans)
    total = costs.total()
    shares = [sum(total[start : start + count]) for start, count in zip(starts, pipe.split, strict=False)]
    return [busy / (m * share) for busy, share in zip(timeline.busy, shares, strict=True)]


def best(costs: pk.LayerCosts, pipe: pk.Pipeline, slowness: Sequence[float]) -> tuple[tuple[int, ...], float, float]:
    """The planner's split, and milliseconds of a step with it and with that of ``pipe``."""
    units = UnitCosts(costs.forward, costs.backward, costs.weight)
    order = pk.schedule.build("1f1b", ranks=2, microbatches=MICROBATCHES)
    found = balance(units, order, slowness)
    return found.split, found.step / 1e3, predicted(pipe.split, units, order, slowness) / 1e3


class Heavy(nn.Module):
    """Many bytes and no work."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size // 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[-1]]


def moves() -> Iterator[Row]:
    """A row a size; collective."""
    bandwidth = link_bandwidth()
    for size in SIZES:
        net = nn.Sequential(nn.Linear(4, 4), Heavy(size), nn.Linear(4, 4))
        net.requires_grad_(False)
        net[0].requires_grad_(True)
        found: list[pk.Move] = []
        with pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=2, split=[1, 2]) as pipe:
            pipe.optimizer(torch.optim.SGD, lr=0.0)
            for number in range(MOVES + 2):
                made = pipe.replan(split=[2, 1] if number % 2 == 0 else [1, 2])
                pipe.train_step(torch.ones(2, 4), torch.ones(2, 4))
                if number >= 2:  # the first ones touch memory that is fresh
                    found.append(made)
        row: Row = {"bytes": found[0].bytes, "link_gb_a_second": f"{bandwidth / 1e9:.3g}", "rounds": MOVES}
        row |= quartiles("move_ms", [one.seconds * 1e3 for one in found])
        yield told({**row, **quartiles("over_link", [one.seconds * bandwidth / one.bytes for one in found])})


def link_bandwidth() -> float:
    """Bytes a second of a link between the ranks, the median of messages there and back; collective."""
    tokens = [secrets.token_hex(16)]
    dist.broadcast_object_list(tokens)
    rank = dist.get_rank()
    transport = ShmTransport(rank, 2, tokens[0], 60.0, dist.barrier)
    senders, receivers = transport.open([Link("up", 0, 1, 2), Link("down", 1, 0, 2)])
    sender, receiver = (senders["up"], receivers["down"]) if rank == 0 else (senders["down"], receivers["up"])
    data = torch.zeros(MESSAGE // 4)
    turns: list[Callable[[], object]] = [lambda: sender.send(1, data), lambda: receiver.recv(1)]
    seconds = []
    for _ in range(15):
        dist.barrier()
        began = time.perf_counter()
        for turn in turns if rank == 0 else turns[::-1]:
            turn()
        seconds.append((time.perf_counter() - began) / 2)
    transport.close()
    return float(MESSAGE / quantiles(seconds[5:], n=2)[0])


def quartiles(name: str, values: Sequence[float]) -> Row:
    """Three columns."""
    return {
        f"{name}_{quartile}": f"{value:.4g}"
        for quartile, value in zip(("q1", "median", "q3"), quantiles(values, n=4), strict=True)
    }


def shown(split: Sequence[int]) -> str:
    return "+".join(map(str, split))


def told(row: Row) -> Row:
    """``row``, once it is printed."""
    if dist.get_rank() == 0:
        print(
            "  ".join(f"{name} {value}" for name, value in row.items() if not name.endswith(("q1", "q3"))), flush=True
        )
    return row


if __name__ == "__main__":
    main()
