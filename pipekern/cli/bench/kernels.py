"""``pipekern bench kernels``: every op beside torch and other libraries, and beside a copy measured in the same run.

A row: op, shape, dtype, direction (forward or backward; a graph has both in one), contender, mode (eager, compiled,
graph), microseconds on the GPU and on the host, launches, the fewest bytes that must move and what share of the copy's
rate that is (for products: of the plain product's rate), peak bytes beyond what was there, and the error against
float64 at a small shape beside torch's own. Without a CUDA device only the errors of ours and torch's, on the CPU.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipekern.cli.output import emit
from pipekern.errors import ConfigError
from pipekern.trace.figure import check_format

if TYPE_CHECKING:
    from pipekern.cli.bench.row import Row

OPS = (
    "rms_norm", "layer_norm", "swiglu", "gelu", "rope", "cross_entropy", "linear_cross_entropy",
    "linear_backward_input", "linear_backward_weight", "pack", "unpack", "accumulate_", "grad_stats", "adamw_step",
)  # fmt: skip


def add(actions: Any) -> None:
    """Add the action to the parser's ``actions``."""
    parser = actions.add_parser(
        "kernels", help="kernels; without a GPU their errors alone; exit 1 where one is too large"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rooflines (.png .svg .pdf); needs a GPU")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.names if name not in OPS]
    if unknown:
        raise ConfigError(f"no kernel is called {', '.join(unknown)}; choose of {', '.join(OPS)}")
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"torch does not load ({error}); pip install 'torch>=2.10'") from error
    from pipekern.cli.bench import accuracy, machine, roofline, speed

    gpu = torch.cuda.is_available()
    if args.plot is not None:
        check_format(args.plot)
        if not gpu:
            raise ConfigError("--plot draws measured times, and torch sees no CUDA device; leave it out")
    names = args.names or list(OPS)
    judged = accuracy.judge(names, "cuda" if gpu else "cpu")
    rates = machine.rates() if gpu else None
    rows = judged if rates is None else speed.measure(names, judged, rates)
    where = machine.describe(rates)
    wrong = [row for row in judged if row.contender == "pipekern" and not row.close]
    wrong += [row for row in rows if row.contender == "pipekern" and row.note]
    if args.csv is not None:
        write(args.csv, where, rows)
    if args.plot is not None and rates is not None:
        roofline.draw(rows, rates, args.plot, where["gpu"])
    data = {"ok": not wrong, "machine": where, "rows": [row._asdict() for row in rows]}
    emit(args.json, data, table(rows, where, wrong))
    return 1 if wrong else 0


def write(path: Path, where: dict[str, str], rows: list[Row]) -> None:
    """CSV, with the machine in comment lines before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in where.items())
        writer = csv.DictWriter(file, rows[0]._fields)
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row._asdict().items()} for row in rows)


def table(rows: list[Row], where: dict[str, str], wrong: list[Row]) -> str:
    """What a reader sees: the machine, and a line a row, without the columns that no row has."""
    names = [name for name in rows[0]._fields if any(getattr(row, name) not in (None, "") for row in rows)]
    cells = [names, *([_cell(getattr(row, name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"{key}: {value}" for key, value in where.items()]
    lines += ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines += [f"{row.note or 'too far from float64'}: {row.op} {row.shape} {row.dtype} {row.mode}" for row in wrong]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
