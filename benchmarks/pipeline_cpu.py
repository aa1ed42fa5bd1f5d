"""pipekern beside every schedule of torch.distributed.pipelining, and DeepSpeed where it is installed.

    python -m benchmarks.pipeline_cpu [--rounds 10] [--case TEXT] [--out benchmarks/results/pipeline_cpu.csv]

Two ranks of one thread, each pinned to a core; each library in two processes of its own, with what its users have by
default, blocked while another's are at work. The same model, weights, batch, split and optimizer for all; gradients
are compared with the unsplit model's before anything is timed. A step lasts from a barrier until every rank has ended
it; contenders take turns in shuffled rounds, and ratios are taken round by round: contender over pipekern, so that more
than 1 is slower than pipekern.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles

from benchmarks.pipelines import overhead, rounds
from benchmarks.pipelines.case import cases, trivial
from benchmarks.pipelines.contender import libraries
from benchmarks.pipelines.machine import describe
from benchmarks.pipelines.pair import Pair
from benchmarks.pipelines.rounds import Result
from benchmarks.record import write
from benchmarks.two_ranks import take_core

Row = dict[str, str | int]


def main() -> None:
    """Time all cases, print the tables, and write them."""
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    machine = describe()
    chosen = [name for name in libraries() if name == "pipekern" or options.library in name]
    pairs = [Pair(library) for library in chosen]
    rows: list[Row] = []
    say("\n".join(f"{key}: {value}" for key, value in machine.items()))
    for number, case in enumerate(cases()):
        if options.case in case.name:
            say(f"\n{case.name}")
            table = tabulate(case.name, rounds.run(number, pairs, options.rounds, say))
            rows.extend(table)
            say(show(table))
    take_core(0)
    own = overhead.measure(trivial(64, steps=5), repeats=20)
    say(
        f"\nexecutor's own cost: {own.instruction:.1f} µs an instruction ({own.instructions} a step, sends and "
        f"receives counted), {own.computation:.1f} µs a computation; stages' work: {own.work:.1f} µs an instruction"
    )
    machine["executor_us_an_instruction"] = f"{own.instruction:.1f}"
    machine["executor_us_a_computation"] = f"{own.computation:.1f}"
    if options.out:
        write(options.out, machine, rows)


def say(text: str) -> None:
    """Print it now."""
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--library", default="", help="only pipekern and this library")
    parser.add_argument("--out", type=Path, help="write a CSV file")
    return parser.parse_args()


def tabulate(case: str, results: Sequence[Result]) -> list[Row]:
    """Rows of the table, the fastest first."""
    ours = [r for r in results if r.contender.library == "pipekern"]
    fastest = min(ours, key=lambda r: r.seconds)
    plain = next(r for r in ours if r.contender.schedule == "1f1b")
    return [_row(case, result, fastest, plain) for result in sorted(results, key=lambda r: r.seconds)]


def _row(case: str, result: Result, fastest: Result, plain: Result) -> Row:
    row: Row = {
        "case": case,
        "library": result.contender.library,
        "schedule": result.contender.schedule,
        "stages": result.contender.stages,
    }
    milliseconds = [seconds * 1e3 for seconds in quantiles(result.rounds, n=4)]
    columns = {"ms": milliseconds, "ratio": result.ratios(fastest), "ratio_to_1f1b": result.ratios(plain)}
    for column, values in columns.items():
        for quartile, value in zip(("q1", "median", "q3"), values, strict=True):
            row[f"{column}_{quartile}"] = f"{value:.4g}"
    return {**row, "gradient_error": f"{result.error:.1e}", "rounds": len(result.rounds)}


def show(rows: Sequence[Row]) -> str:
    """The table in a terminal: milliseconds and ratios as median [quartiles]."""
    lines = [f"  {'':32}{'ms a step':>26}{'over pipekern’s fastest':>30}{'over its 1f1b':>26}"]
    for row in rows:
        name = f"{row['library']} {row['schedule']}"
        spans = [f"{row[f'{k}_median']} [{row[f'{k}_q1']}, {row[f'{k}_q3']}]" for k in ("ms", "ratio", "ratio_to_1f1b")]
        lines.append(f"  {name:32}{spans[0]:>26}{spans[1]:>30}{spans[2]:>26}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
