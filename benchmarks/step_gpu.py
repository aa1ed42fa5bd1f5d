"""Training steps of a GPT of about 1.3 G parameters on one GPU: tokens a second, utilisation, memory.

    python -m benchmarks.step_gpu [--rounds 10] [--only TEXT] [--out benchmarks/results/step_gpu.csv]
    python -m benchmarks.step_gpu --small     the same on a CPU with a tiny model: that it runs, no speeds

Sequences of 2048 tokens, 8 micro-batches of 4; forward, backward, clipping to a norm of 1 and AdamW. pipekern has
bfloat16 weights with float32 masters and gradients, in one process with 1, 2 and 4 stages and in two processes that
share the GPU. torch has its fused AdamW and the same micro-batches: eager and compiled, each with float32 weights under
autocast and, of other numerics, all in bfloat16; and torch.distributed.pipelining with all stages on one rank.
Contenders run one after the other, medians over rounds. All with float32 weights must come to the same loss.

Model FLOP utilisation counts 6 a weight and token, and causal attention, of the data sheet's dense bfloat16 peak.
Memory is the most that torch had allocated, of both processes together.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.pipelines.machine import describe
from benchmarks.pipelines.training import Result, Task, contenders, large, measure, ours, small
from benchmarks.record import write

EAGER, COMPILED = "torch eager", "torch.compile"
KINDS = ("float32 weights", "all bfloat16")
FIRST = "pipekern, 1 stage"
TOGETHER = "pipekern, 2 processes"
TOLERANCE = 0.02  # of the loss after the last step, between contenders with float32 weights


def main() -> None:
    """Start two ranks, or be one of them."""
    options = arguments()
    if not options.small and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; torch sees none")
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "benchmarks.step_gpu"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv[1:]])
    dist.init_process_group("gloo")
    device = torch.device("cpu") if options.small else torch.device("cuda", 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    results = run(small(device) if options.small else large(device), options)
    if dist.get_rank() == 0:
        report(results, device.type == "cuda", options.out)
    dist.barrier()
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path, help="write a CSV file")
    return parser.parse_args()


def run(task: Task, options: argparse.Namespace) -> dict[str, Result]:
    """One after the other, on rank 0; then both ranks together."""
    first = dist.get_rank() == 0
    results: dict[str, Result] = {}
    for name, start in contenders().items() if first else ():
        if options.only in name:
            results[name] = measure(task, start, options.rounds)
            print(f"{name}: {1e3 * results[name].seconds:.1f} ms", flush=True)
            gc.collect()
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
    dist.barrier()
    if options.only in TOGETHER:
        transport = "cuda" if task.device.type == "cuda" else "auto"
        own = measure(task, lambda task: ours(task, stages=2, transport=transport), options.rounds)
        peaks: list[int] = [0, 0]
        dist.all_gather_object(peaks, own.peak)
        results[TOGETHER] = Result(task, own.rounds, own.losses, sum(peaks))
    return results


def report(results: dict[str, Result], on_gpu: bool, out: Path | None) -> None:
    """Print everything, and write it; then check that losses agree."""
    machine = describe()
    if on_gpu:
        machine |= {"gpu": torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda)}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    rows = [row(name, result) for name, result in results.items()]
    for line in rows:
        print("  ".join(f"{key} {value}" for key, value in line.items() if value != ""))
    reached = ratios(results) if on_gpu else {}
    for name, (ratio, goal) in reached.items():
        print(f"{name}: {ratio:.3f}, at least {goal:.3g}: {'yes' if ratio >= goal else 'NO'}")
    if out:
        goals = [(name, f"{ratio:.4g}", f"{goal:.4g}") for name, (ratio, goal) in reached.items()]
        rows += [dict(zip(("contender", "ratio", "goal"), line, strict=True)) for line in goals]
        write(out, machine, rows)
    last = {name: result.losses[-1] for name, result in results.items() if KINDS[1] not in name}
    if last and max(last.values()) - min(last.values()) > TOLERANCE * max(last.values()):
        raise SystemExit(f"contenders do not train alike, losses after the last step: {last}")


def row(name: str, result: Result) -> dict[str, object]:
    """A line of the table."""
    share = result.utilisation
    return {
        "contender": name,
        "ms_a_step": f"{1e3 * result.seconds:.4g}",
        "tokens_a_second": f"{result.task.tokens / result.seconds:.5g}",
        "utilisation": "" if share is None else f"{share:.3f}",
        "peak_gib": f"{result.peak / 2**30:.2f}" if result.peak else "",
        "first_loss": f"{result.losses[0]:.4f}",
        "last_loss": f"{result.losses[-1]:.4f}",
        "rounds": len(result.rounds),
    }


def ratios(results: dict[str, Result]) -> dict[str, tuple[float, float]]:
    """What is to be reached, of what was run: value and goal, at least."""
    found: dict[str, tuple[float, float]] = {}
    if FIRST not in results:
        return found
    mine = results[FIRST].seconds
    for peer, goal in ((EAGER, 1.25), (COMPILED, 1.0)):
        for kind in KINDS:
            if (name := f"{peer}, {kind}") in results:
                found[f"tokens a second, of {name}"] = results[name].seconds / mine, goal
    if (share := results[FIRST].utilisation) is not None:
        found["utilisation"] = share, 0.5
    for stages in (2, 4):
        if (name := f"pipekern, {stages} stages") in results:
            found[f"tokens a second with {stages} stages, of 1"] = mine / results[name].seconds, 1 / 1.03
    return found


if __name__ == "__main__":
    main()
