"""Bytes sent and memory a rank by stage of ZeRO, beside torch's DDP and FSDP2, and DeepSpeed where it is installed.

    python -m benchmarks.zero_cpu [--out benchmarks/results/zero_cpu.csv]

Two data-parallel processes of a GPT of 3.3 million parameters, and for pipekern two pipeline stages of two as well;
AdamW of torch, 4 micro-batches of 16 tokens a step, so that weights are most of the memory. Every library in a job of
its own. Counts are of the fourth step. All must come to the loss of the unsplit model, else the benchmark fails.

``sent_*`` are bytes that a rank sends in a step to sum gradients and to gather weights, as a ring of n sends what a
collective was given: (n - 1) / n of it, twice for an all-reduce. The same for all libraries, whatever gloo does.
pipekern's own counter must say the same. Memory is what storages of tensors take: at the ``peak`` of a step,
``resting`` between two steps after ``zero_grad`` and by kind, and at the peak while the model is made
(``start_peak``). What kernels and gloo take for themselves is not in it; the memory in which pipekern's sum of parts
arrives on a CPU is, and gloo's own for others is not. ``planned_*`` is what ``pipekern.plan`` says of the rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.pipelines.machine import describe
from benchmarks.record import write
from benchmarks.zero.contender import libraries

Row = dict[str, Any]


def main() -> None:
    """Run all jobs, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    jobs = [("pipekern", 2), ("pipekern", 4), *((name, 2) for name in libraries() if name != "pipekern")]
    rows = [row for library, processes in jobs for row in run(library, processes)]
    plain = next(row for row in rows if row["way"].startswith("DDP, no_sync"))
    for row in rows:
        check(row, plain)
    print(show(rows), flush=True)
    if options.out:
        write(options.out, describe(), rows)


def run(library: str, processes: int) -> list[Row]:
    """The rows of a job."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", "benchmarks.zero.job", library, str(file)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found: list[Row] = json.loads(file.read_text())
    return found


def check(row: Row, plain: Row) -> None:
    """Raise where pipekern sends more than plain data parallelism does."""
    if row["library"] == "pipekern" and row["mesh"] == plain["mesh"] and row["precision"] is None:
        sent, wanted = (each["sent_reduce"] + each["sent_gather"] for each in (row, plain))
        if not wanted <= sent <= wanted + 1024:  # parameters are aligned
            raise AssertionError(f"pipekern {row['way']} sends {sent} bytes a step, and DDP {wanted}")


def show(rows: list[Row]) -> str:
    """The table in a terminal, in MB."""
    columns = ["sent_reduce", "sent_gather", "peak", "resting", "planned_peak", "planned_resting"]
    lines = ["  ".join([f"{'MB a rank':58}", *(f"{name:>16}" for name in columns)])]
    for row in rows:
        where = "" if row["mesh"] == "1×2" else f", stage {row['stage']} of 2"
        name = f"{row['library']} {row['way']}, {row['precision'] or 'float32'}{where}"
        values = [f"{row[column] / 1e6:.2f}" if column in row else "" for column in columns]
        lines.append("  ".join([f"{name:58}", *(f"{value:>16}" for value in values)]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
