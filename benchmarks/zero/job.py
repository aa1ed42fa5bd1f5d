"""One process of a library's job: take steps with each of its contenders, and count.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m benchmarks.zero.job LIBRARY FILE

The first process writes the rows of all into ``FILE``, as JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pipekern as pk
from benchmarks.pipelines.case import Case, gpt
from benchmarks.zero.contender import Contender, Running, Start, contenders
from benchmarks.zero.ours import Ours
from benchmarks.zero.watch import Watch, distinct_bytes
from pipekern.plan.cost import Layer
from pipekern.plan.memory import rank_memory

REPLICAS, MICROBATCHES, STEPS = 2, 4, 4
TOLERANCES = {None: 1e-5, "bf16": 1e-2}  # of the loss in the last step, by precision
LEARNING = {"lr": 1e-3}

Row = dict[str, Any]


def main() -> None:
    """Be one process."""
    library, file = sys.argv[1:]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    dist.init_process_group("gloo")
    wanted = unsplit_loss()
    rows: list[Row] = []
    for contender, start in contenders(library).items():
        if contender.mesh[0] * contender.mesh[1] == dist.get_world_size():
            rows += measure(contender, start, wanted)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def whole_case() -> Case:
    """The batch of all replicas. Weights are most of the memory: a micro-batch is one sample of 16 tokens."""
    case = gpt(256, 4, length=16, samples=1, microbatches=REPLICAS * MICROBATCHES, steps=STEPS)
    return replace(case, options=LEARNING)


def own_case(replica: int) -> Case:
    """What one replica gets of it."""
    case = whole_case()
    x, y = case.x.chunk(REPLICAS)[replica], case.y.chunk(REPLICAS)[replica]
    return replace(case, x=x, y=y, microbatches=MICROBATCHES)


def unsplit_loss() -> float:
    """In the last step, of the model on one device."""
    case = whole_case()
    model = case.model(1)
    optimizer = case.optimizer(model.parameters(), **case.options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = case.loss_fn(model(case.x), case.y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def measure(contender: Contender, start: Start, wanted: float) -> list[Row]:
    """A row a pipeline stage, of its first replica; collective."""
    stage, replica = divmod(dist.get_rank(), contender.mesh[1])
    row: Row = {**contender._asdict(), "mesh": "×".join(map(str, contender.mesh)), "stage": stage}
    with Watch() as watch:
        running = start(own_case(replica), contender)
        row["start_peak"] = watch.peak
        for _ in range(STEPS - 1):
            running.step()
        gc.collect()
        watch.start()
        loss = running.step()
        gc.collect()
        resting = watch.alive()
    row |= {f"sent_{kind}": watch.sent[kind] for kind in ("reduce", "gather", "broadcast")}
    row |= {"collectives": watch.collectives, "peak": watch.peak, "resting": resting, **kinds(running, resting)}
    if isinstance(running, Ours):
        row |= planned(running, contender, row)
    mean = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(mean)
    row["loss"] = float(mean) / dist.get_world_size()
    running.close()
    error = abs(row["loss"] - wanted) / wanted
    if not error < TOLERANCES[contender.precision]:
        raise AssertionError(f"{contender}: the loss is {row['loss']}, and the unsplit model's {wanted}")
    rows: list[Row] = [{}] * dist.get_world_size()
    dist.all_gather_object(rows, row)
    return rows[:: contender.mesh[1]]


def kinds(running: Running, resting: int) -> Row:
    """What is held between two steps, by kind."""
    taken: set[int] = set()
    found = {f"resting_{kind}": distinct_bytes(held, taken) for kind, held in running.memory().items()}
    return {**found, "resting_rest": resting - sum(found.values())}


def planned(running: Ours, contender: Contender, row: Row) -> Row:
    """What ``pipekern.plan`` says of the same rank; checks pipekern's own count of what it sends."""
    if (own := running.last_sent) != {kind: row[f"sent_{kind}"] for kind in own}:
        raise AssertionError(f"{contender} counts {own} bytes, and sent {row}")
    each = pk.plan.MIXED if contender.precision else pk.plan.FLOAT32
    program, stages = running.pipe._parts.blueprint.train, layers(contender)
    resting, peak = (
        rank_memory(program, stages, each.over(REPLICAS, contender.zero, between))[row["stage"]]
        for between in (True, False)
    )
    rest = resting.weights + resting.gradients + resting.optimizer
    most = peak.total - peak.slots  # which are not torch's memory
    return {
        "planned_resting": round(rest),
        "resting_over_planned": f"{row['resting'] / rest:.3f}",
        "planned_peak": round(most),
        "peak_over_planned": f"{row['peak'] / most:.3f}",
    }


def layers(contender: Contender) -> list[list[Layer]]:
    """The planner's layers of each pipeline stage: parameters, and activations of a micro-batch as measured."""
    case, pp = whole_case(), contender.mesh[0]
    model = case.model(pp)
    counts = [sum(p.numel() for p in unit.parameters()) for unit in model]
    model.to(torch.bfloat16 if contender.precision else torch.float32)
    kept = [row[0] for row in pk.profile(model, case.x[:1], repeats=1).kept]
    every = iter([Layer("", 1, 1, 1, n, held) for n, held in zip(counts, kept, strict=True)])
    return [list(islice(every, count)) for count in case.split(pp)]


if __name__ == "__main__":
    main()
