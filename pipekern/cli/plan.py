"""``pipekern plan``: micro-batches, schedule, cut and memory for a model on a cluster. Works without torch and GPUs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipekern.cli.output import emit
from pipekern.errors import ConfigError
from pipekern.plan import toml
from pipekern.plan.choose import label
from pipekern.plan.cluster import Cluster
from pipekern.plan.cost import read
from pipekern.plan.fit import Plan, fit
from pipekern.plan.memory import FLOAT32, MIXED, size

_EXAMPLE = """\
pipekern plan --transformer layers=32,dim=4096,heads=32,vocab=32000,sequence=2048 \\
    --devices count=8,flops=4e14,memory=80e9,bandwidth=2e12,latency=10,link=5e10 --samples 64
"""
_LINK = {"latency": "latency", "link": "bandwidth"}


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "plan",
        help="schedule, split and memory for a model on a cluster; exit 2 where it does not fit",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="TOML or JSON: layers with their costs, as LayerCosts.save writes",
    )
    model.add_argument(
        "--transformer", type=_pairs, metavar="NAME=VALUE,…", help="layers dim heads vocab sequence hidden"
    )
    cluster = parser.add_mutually_exclusive_group(required=True)
    cluster.add_argument("--cluster", type=Path, metavar="FILE", help="TOML or JSON: devices and links, or a profile")
    cluster.add_argument(
        "--devices",
        type=_pairs,
        metavar="NAME=VALUE,…",
        help="count flops memory bandwidth, latency (µs) link (bytes/s)",
    )
    parser.add_argument("--samples", type=int, required=True, help="of a step, over all micro-batches")
    parser.add_argument("--microbatches", type=_numbers, metavar="N,…", help="numbers to try (default: up to 8 a rank)")
    parser.add_argument(
        "--schedules", type=_words, metavar="NAME,…", help="to choose from (default: all that can be run)"
    )
    parser.add_argument("--precision", choices=("mixed", "float32"), default="mixed")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="data-parallel, each on such a cluster")
    parser.add_argument("--zero", type=int, choices=range(4), default=0, help="what replicas share out")
    parser.add_argument("--order", choices=("fixed", "any"), default="fixed", help="whether devices may be rearranged")
    parser.add_argument("--overhead", type=float, default=0.0, metavar="µs", help="of an action, besides its layers")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    model = read(_read(args.model) if args.model else {"transformer": args.transformer})
    found = fit(
        model,
        Cluster.from_dict(_read(args.cluster) if args.cluster else _cluster(args.devices)),
        samples=args.samples,
        microbatches=args.microbatches,
        schedules=args.schedules,
        bytes_each=(MIXED if args.precision == "mixed" else FLOAT32).over(args.replicas, args.zero),
        order=args.order,
        overhead=args.overhead,
    )
    emit(args.json, found.to_dict(), _table(found))
    return 0


def _pairs(text: str) -> dict[str, float]:
    pairs = [word.partition("=") for word in text.split(",")]
    return {name.strip(): int(value) if value.isdecimal() else float(value) for name, _, value in pairs}


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _cluster(values: dict[str, float]) -> dict[str, Any]:
    link = {_LINK[name]: value for name, value in values.items() if name in _LINK}
    return {"devices": [{name: value for name, value in values.items() if name not in _LINK}], "link": link}


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        return toml.load(path)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a JSON file, or a .toml one") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no JSON object; it needs one")
    return data


_KINDS = ("weights", "gradients", "optimizer", "activations", "slots", "total")


def _table(plan: Plan) -> str:
    choice = plan.choice
    head = ("rank", "device", "layers", *_KINDS, "capacity")
    rows: list[tuple[str, ...]] = [head]
    for rank, (memory, device) in enumerate(zip(plan.memory, plan.cluster.devices, strict=True)):
        parts = " ".join(f"{part.start}-{part.stop - 1}" for part in plan.layers_of(rank))
        sizes = (size(getattr(memory, kind)) for kind in _KINDS)
        rows.append((str(rank), f"{device.name} {plan.devices[rank]}", parts, *sizes, size(device.memory)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    summary = (
        f"{label(choice)} of {plan.samples:g} sample{'s' * (plan.samples != 1)}\n"
        f"step {plan.step_time:,.10g} µs   bubble {choice.bubble_ratio:.4f} of it   messages {choice.messages}"
    )
    return "\n".join([summary, "", *lines])
