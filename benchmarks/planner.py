"""How long the planner takes for clusters of unequal devices, and what it proves.

    python -m benchmarks.planner [--rounds 3] [--out benchmarks/results/planner.csv]

"any order" arranges 256 devices of three kinds, in random numbers and of random speeds, and cuts 2,000 layers for
them: layers of random costs, with costs of cuts, with caps on memory, and layers that are all equal. No micro-batches
stands for the smallest bottleneck. "gap" is by how much the result may be above the best one; 0 where it is proven to
be the best. "balance" is what re-balancing asks at the end of a training step: the split of a model's units for a
schedule, of which two ranks are slow. Each round is a cluster or a model of its own; "seconds" is by the clock, "of the
processor" what the process used.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.pipelines.machine import describe
from benchmarks.record import write
from pipekern.plan import StageMemory, UnitCosts, balance, partition_types
from pipekern.schedule import build

LAYERS, DEVICES, IN_FLIGHT = 2000, 256, 128
MODELS = ("random", "cuts", "caps", "equal")
MICROBATCHES = (None, 64, 256, 1024)
PIPELINES = (("1f1b", 4, 8, 26), ("1f1b", 8, 32, 48), ("zb-h1", 8, 32, 48), ("interleaved-1f1b", 8, 32, 48))


def main() -> None:
    """Run all and print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    machine, rows = describe(), []
    for row in chain(_arranged(options.rounds), _balanced(options.rounds)):
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    if options.out:
        write(options.out, machine, rows)


def _arranged(rounds: int) -> Iterator[dict[str, object]]:
    for seed in range(rounds):
        rng = random.Random(seed)
        speeds = [1.0, round(rng.uniform(1.2, 2), 2), round(rng.uniform(2, 4), 2)]
        first, second = rng.randint(20, 110), rng.randint(20, 110)
        counts = [first, second, DEVICES - first - second]
        for model in MODELS:
            costs, options = _model(model, rng)
            for microbatches in MICROBATCHES:
                found, seconds, used = timed(
                    partial(partition_types, costs, counts, speeds, microbatches=microbatches, **options)
                )
                yield {
                    "what": "any order",
                    "name": model,
                    "size": f"{LAYERS}x{'+'.join(map(str, counts))}",
                    "speeds": "/".join(map(str, speeds)),
                    "microbatches": microbatches or "",
                    "time": round(found.bottleneck if microbatches is None else found.step(microbatches), 4),
                    "gap": f"{found.gap:.1e}" if found.gap else 0,
                    "seconds": round(seconds, 3),
                    "of the processor": round(used, 3),
                }


def _model(name: str, rng: random.Random) -> tuple[list[float], dict[str, Any]]:
    costs = [1.0 if name == "equal" else rng.uniform(1, 3) for _ in range(LAYERS)]
    if name == "cuts":
        return costs, {"cut_costs": [0.0, *(rng.uniform(0, 0.3) for _ in range(LAYERS - 1)), 0.0]}
    if name == "caps":
        fixed, activations = ([rng.uniform(low, 3 * low) for _ in range(LAYERS)] for low in (5, 0.5))
        in_flight = [min(IN_FLIGHT, DEVICES - k) for k in range(DEVICES)]
        return costs, {"memory": StageMemory(fixed, activations, in_flight, [900, 1500, 2500])}
    return costs, {}


def _balanced(rounds: int) -> Iterator[dict[str, object]]:
    for name, ranks, microbatches, units in PIPELINES:
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        for seed in range(rounds):
            rng = random.Random(seed)
            forward, backward, weight = ([rng.uniform(1, 3) for _ in range(units)] for _ in range(3))
            slowness = [2.0, 1.5, *[1.0] * (ranks - 2)]
            rng.shuffle(slowness)
            costs = UnitCosts(forward, backward, weight, 0.2)
            found, seconds, used = timed(partial(balance, costs, schedule, slowness))
            yield {
                "what": "balance",
                "name": name,
                "size": f"{units}x{ranks}",
                "microbatches": microbatches,
                "time": round(found.step, 4),
                "seconds": round(seconds, 4),
                "of the processor": round(used, 4),
            }


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, and the seconds it took by the clock and of the processor."""
    begin, used = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - begin, time.process_time() - used


if __name__ == "__main__":
    main()
