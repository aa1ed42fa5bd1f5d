"""How long schedules take to simulate, to search and to cut for, what memory that needs, and what bubbles they have.

    python -m benchmarks.schedules [--rounds 5] [--quick] [--out benchmarks/results/schedules.csv]

Every case runs in a process of its own, one thread, with costs that differ from stage to stage; its time is the median
of the rounds, its memory the most that the process ever had (an interpreter with pipekern loaded is the row "nothing").
"simulate" builds a schedule and simulates it in Python, "stream" does both at once in C++, straight from the rules.
The last table sets bubbles beside those published (Zero Bubble Pipeline Parallelism, table 5, which has no search with
V placement); searches have the memory of the published one, 2p activations of which about half goes with B.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.pipelines.machine import describe
from benchmarks.record import write
from pipekern.plan.partition import StageMemory, partition
from pipekern.schedule import Costs, build, search
from pipekern.schedule.stream import NAMES, simulate_large

SIMULATED = ((8, 32), (16, 64), (32, 256), (64, 256), (128, 512))
STREAMED = ((64, 256), (256, 1024), (1024, 4096), (4096, 16384))
SEARCHED = ((4, 8), (8, 24), (16, 48), (32, 256), (64, 256), (128, 512))
CUT = ((100, 8), (500, 64), (2000, 256))
GOALS = {  # seconds, MiB
    ("stream", "1f1b", 4096, 16384): (10, 2048),
    ("stream", "zb-h1", 4096, 16384): (10, 2048),
    ("stream", "zb-h2", 4096, 16384): (10, 2048),
    ("search", "single", 64, 256): (1, None),
    ("search", "v", 64, 256): (1, None),
    ("partition", "speeds and cut costs", 2000, 256): (2, None),
    ("partition", "step of 1024 micro-batches", 2000, 256): (2, None),
    ("partition", "step of 16 micro-batches", 2000, 256): (2, None),
    ("partition", "three kinds, caps", 2000, 256): (2, None),
    ("partition", "three kinds, caps, step of 256", 2000, 256): (2, None),
}
PUBLISHED = (  # p, m, F, B, W, c, then bubble rates: 1f1b and zb-h1 of the makespan, zb-h2 and the search of the span
    (8, 24, 18522, 18086, 9337, 601, 0.2431, 0.1585, 0.1083, 0.0433),
    (8, 32, 18513, 18086, 9331, 626, 0.1985, 0.1242, 0.0837, 0.0039),
    (8, 64, 18546, 18097, 9321, 762, 0.1240, 0.0674, 0.0444, 0.0026),
    (16, 48, 11347, 11248, 8132, 377, 0.2552, 0.1397, 0.0672, 0.0066),
)


MEANS = (18522, 18086, 9337, 601)  # µs: F, B, W, a message
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "speeds and cut costs": {"speeds": True, "cut_costs": True},
    "step of 1024 micro-batches": {"speeds": True, "cut_costs": True, "microbatches": 1024},
    "step of 16 micro-batches": {"speeds": True, "cut_costs": True, "microbatches": 16},
    "three kinds, caps": {"kinds": True, "cut_costs": True},
    "three kinds, caps, step of 256": {"kinds": True, "cut_costs": True, "microbatches": 256},
}
KINDS = ((1.0, 1.0), (1.7, 0.8), (2.6, 1.5))  # speed, and memory in twice the mean share


class Case(NamedTuple):
    """``what`` is run on ``name`` at ``size``: ranks and micro-batches, or layers and devices."""

    what: str
    name: str
    size: tuple[int, int]

    @property
    def actions(self) -> int:
        """Forwards and backwards, whole or in two, that are placed in time; of a cut: layers."""
        first, second = self.size
        if self.what in ("partition", "nothing"):
            return first
        return first * second * (2 if self.name == "1f1b" else 6 if self.name == "v" else 3)


def main() -> None:
    """Run all cases and print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the sizes that take less than a second")
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    machine = describe()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    rows = [measure(case, options.rounds) for case in cases(options.quick)]
    print(show(rows))
    bubbles = compare()
    print(show(bubbles))
    if options.out:
        write(options.out, machine, [*rows, *bubbles])


def cases(quick: bool) -> list[Case]:
    """What to measure, the smallest first."""
    largest = 64 * 256 if quick else 1 << 60
    found = [Case("nothing", "-", (0, 0))]
    found += [Case("simulate", name, size) for size in SIMULATED for name in NAMES]
    found += [Case("stream", name, size) for size in STREAMED for name in NAMES]
    found += [Case("search", name, size) for size in SEARCHED for name in ("single", "v")]
    found += [Case("partition", name, size) for size in CUT for name in WAYS]
    return [case for case in found if case.size[0] * case.size[1] <= largest]


def uneven(stages: int, rng: random.Random) -> Costs:
    """Integer costs that differ from stage to stage by up to a fifth."""

    def values(mean: int, count: int) -> list[int]:
        return [rng.randint(mean * 9 // 10, mean * 11 // 10) for _ in range(count)]

    forward, backward, weight, comm = MEANS
    return Costs(values(forward, stages), values(backward, stages), values(weight, stages), values(comm, stages - 1))


def prepare(case: Case, rng: random.Random) -> Callable[[], object]:
    """The call that is timed."""
    first, second = case.size
    if case.what == "simulate":
        costs = uneven(first, rng)
        return lambda: build(case.name, ranks=first, microbatches=second).simulate(costs)
    if case.what == "stream":
        costs = uneven(first, rng)
        return lambda: simulate_large(case.name, first, second, costs)
    if case.what == "search":
        costs = uneven(first if case.name == "single" else 2 * first, rng)
        placement: Any = case.name
        return lambda: search(first, second, costs, 2 * first, placement)
    if case.what == "partition":
        layers = [rng.uniform(1, 100) for _ in range(first)]
        options = dict(WAYS[case.name])
        if "cut_costs" in options:
            options |= {"cut_costs": [rng.uniform(0, 20) for _ in range(first + 1)]}
        if "speeds" in options:
            options |= {"speeds": [rng.uniform(0.5, 2) for _ in range(second)]}
        if options.pop("kinds", False):
            options |= cluster(first, second, rng)
        return lambda: partition(layers, second, **options)
    return lambda: None


def cluster(layers: int, devices: int, rng: random.Random) -> dict[str, Any]:
    """Devices of three kinds in a random order, that hold fewer micro-batches the later they are, as under 1f1b."""
    speeds, caps = zip(*(rng.choice(KINDS) for _ in range(devices)), strict=True)
    fixed = [rng.uniform(50, 150) for _ in range(layers)]
    activations = [rng.uniform(1, 3) for _ in range(layers)]
    in_flight = [devices - stage for stage in range(devices)]
    share = (sum(fixed) + sum(activations) * devices / 2) / devices
    memory = StageMemory(fixed, activations, in_flight, [2 * cap * share for cap in caps])
    return {"speeds": speeds, "memory": memory}


def measure(case: Case, rounds: int) -> dict[str, object]:
    """A row: the median time of ``rounds`` calls in a fresh process, and the memory of that process."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_run, args=(case, rounds, there))
    process.start()
    there.close()
    times, peak = here.recv()
    process.join()
    seconds, mebibytes = median(times), peak / 1024
    row: dict[str, object] = {
        "what": case.what,
        "name": case.name,
        "size": f"{case.size[0]}x{case.size[1]}",
        "seconds": round(seconds, 6),
        "slowest": round(max(times), 6),
        "ns an action": round(1e9 * seconds / max(case.actions, 1), 2),
        "peak MiB": round(mebibytes, 1),
        "goal": "",
    }
    goal = GOALS.get((case.what, case.name, *case.size))
    if goal:
        limit, room = goal
        met = seconds < limit and (room is None or mebibytes < room)
        row["goal"] = f"{limit} s{f', {room} MiB' if room else ''}: {'met' if met else 'missed'}"
    return row


def _run(case: Case, rounds: int, out: Connection) -> None:
    times = []
    for _ in range(rounds):
        call = prepare(case, random.Random(1))
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    out.send((times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def compare() -> list[dict[str, object]]:
    """Bubble rates beside the published ones."""
    rows: list[dict[str, object]] = []
    for ranks, microbatches, forward, backward, weight, comm, *published in PUBLISHED:
        costs = Costs(forward, backward, weight, comm)
        halves = Costs(forward, backward, weight, comm, kept=0.5)
        found = [simulate_large(name, ranks, microbatches, costs) for name in NAMES]
        ours = [found[0].bubble_ratio, found[1].bubble_ratio, found[2].span_bubble_ratio]
        names: Sequence[str] = [*NAMES, "search, one chunk", "search, V placement"]
        for placement in ("single", "v"):
            best = search(ranks, microbatches, halves, 2 * ranks, placement)
            ours.append(best.simulate(halves).span_bubble_ratio)
        for name, value, known in zip(names, ours, [*(f"{rate:.4f}" for rate in published), ""], strict=True):
            rows.append(
                {
                    "what": "bubble",
                    "name": name,
                    "size": f"{ranks}x{microbatches}",
                    "bubble": f"{value:.4f}",
                    "published": known,
                }
            )
    return rows


def show(rows: Sequence[Mapping[str, object]]) -> str:
    """A table."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n" + "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    main()
