"""Options that several commands share: costs, ranks and micro-batches."""

from __future__ import annotations

import argparse

from pipekern.schedule.simulate import Cost, Costs

_DEFAULTS = {"forward": 1, "backward": 1, "weight": 1, "comm": 0, "pair": None, "gather": 0, "reduce": 0}
_HELP = {
    "forward": "F",
    "backward": "B, the input gradient",
    "weight": "W, the weight gradient",
    "comm": "latency of a message; a list has one a pair of neighbouring stages",
    "pair": "an overlapped F and BW; default: their sum",
    "gather": "fetching the values of its share from replicas (ZeRO), beside its work",
    "reduce": "summing the gradients of its share over replicas, beside its work",
}


def cost(word: str) -> Cost:
    """``3``, or ``3,4,5``: one a stage."""
    values = [int(part) if part.strip().isdecimal() else float(part) for part in word.split(",")]
    return values if "," in word else values[0]


def add_costs(parser: argparse.ArgumentParser, *more: str) -> None:
    """The options of the costs; ``more`` names those that only some commands take."""
    group = parser.add_argument_group(
        "costs, in µs of one micro-batch through a rank's whole share; a,b,c: one a stage"
    )
    for name in ("forward", "backward", "weight", "comm", *more):
        default = _DEFAULTS[name]
        note = "" if default is None else f" (default {default})"
        group.add_argument(f"--{name}", type=cost, metavar="µs", default=default, help=_HELP[name] + note)
    group.add_argument("--kept", type=float, default=1.0, help="share of an activation held from B to W (default 1)")


def costs_of(args: argparse.Namespace) -> Costs:
    """The costs that the options give; raises ``ConfigError``."""
    more = {name: getattr(args, name) for name in ("pair", "gather", "reduce") if hasattr(args, name)}
    return Costs(args.forward, args.backward, args.weight, comm=args.comm, kept=args.kept, **more)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Ranks and micro-batches, both required."""
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--microbatches", type=int, required=True)
