"""The CUDA transport on one GPU: what waits cost, what a put costs beside a copy, what casts on the way save.

    python -m benchmarks.transport_gpu [--rounds 7] [--out benchmarks/results/transport_gpu.csv]

First the three facts that the transport rests on, each yes or no: memory opens over IPC between two processes, a
stream's wait hands off while the peer computes, and a write of the host releases a parked stream. Then times, medians
over rounds in shuffled order, each ratio taken within one round:

* put: 64 MB from process to process, beside ``copy_`` in one process and gloo's send through the host
* parked: a product's time beside a stream that waits
* cast: float32 sent as bfloat16 in one pass, beside a cast and then a put
* pack: bfloat16 sent as fp8, by bytes moved, beside the bandwidth of ``copy_``
* step: a GPT of about 350 M parameters, both stages in one process and in two, beside the unsplit model
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.pipelines.device import BYTES, CARD, MESSAGES, cast_turns, park, parked_turns, send, timed, value_of
from benchmarks.pipelines.machine import describe
from benchmarks.record import write
from pipekern import _C
from pipekern.transport.base import Link
from pipekern.transport.cuda import CudaTransport
from pipekern.transport.open import device_obstacle

GOALS = {
    "put over copy_": 0.9,
    "put over gloo": 5.0,
    "product while parked": 0.98,
    "fused cast over cast then put": 1.5,
    "fp8 pack, of copy bandwidth": 0.85,
    "one process, of the unsplit step": 1 / 1.03,
}  # all at least

Rows = dict[str, list[float]]


def main() -> None:
    """Start two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    parser.add_argument("--no-step", action="store_true", help="leave out the steps of a GPT")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; torch sees none")
    if device_obstacle(CARD):
        raise SystemExit(f"this benchmark needs the CUDA transport: {device_obstacle(CARD)}")
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __spec__.name]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv[1:]])
    dist.init_process_group("gloo")
    torch.cuda.set_device(CARD)
    rank = dist.get_rank()
    tokens = [secrets.token_hex(16)]
    dist.broadcast_object_list(tokens)
    transport = CudaTransport(rank, 2, tokens[0], 60.0, dist.barrier, [CARD] * 2)
    links = [Link("there", 0, 1, 4), Link("back", 1, 0, 4)]
    senders, receivers = transport.open(links)
    ends = senders["there" if rank == 0 else "back"], receivers["back" if rank == 0 else "there"]
    facts = probes(rank, transport, *ends)
    rows = measure(rank, options.rounds, *ends)
    transport.close()
    if not options.no_step:
        steps(rank, options.rounds, rows)
    if rank == 0:
        report(facts, rows, options.out)
    dist.barrier()
    dist.destroy_process_group()


def probes(rank: int, transport: CudaTransport, sender: Any, receiver: Any) -> dict[str, str]:
    """The facts, on rank 0."""
    send(sender, 0, torch.ones(4, device=CARD))
    value_of(receiver, 0)
    way = transport.ways()[sender.link.name]
    # Rank 0's stream waits for a message that is queued behind a second of rank 1's own work.
    dist.barrier()
    start = time.perf_counter()
    if rank == 1:
        torch.cuda._sleep(2_000_000_000)
        send(sender, 1, torch.ones(4, device=CARD))
        torch.cuda.synchronize()
    else:
        arrived = value_of(receiver, 1)
        queued = time.perf_counter() - start
        got = arrived.sum().item()
        handed = got == 4 and time.perf_counter() - start > 2 * queued
    dist.barrier()
    if rank == 1:
        return {}
    stream = torch.cuda.Stream()
    release = park(stream)
    time.sleep(0.1)
    stayed = not stream.query()
    release()
    deadline = time.perf_counter() + 5
    while not stream.query() and time.perf_counter() < deadline:
        time.sleep(0.001)
    return {
        "IPC opens between two processes": "yes" if way == "ipc" else way,
        "a stream wait hands off while the peer computes": "yes" if handed else "NO",
        "a host write releases a parked stream": "yes" if stayed and stream.query() else "NO",
    }


def measure(rank: int, rounds: int, sender: Any, receiver: Any) -> Rows:
    """All but the steps, in rounds; collective."""
    big = torch.zeros(BYTES, dtype=torch.uint8, device=CARD)
    other = torch.empty_like(big)
    turns: dict[str, Callable[[], float]] = {
        "put": lambda: put(rank, sender, receiver, big),
        "gloo": lambda: gloo(rank, big),
    }
    if rank == 0:
        turns |= {
            "copy_": lambda: timed(lambda: [other.copy_(big) for _ in range(MESSAGES)]) / MESSAGES,
            **parked_turns(),
            **cast_turns(),
        }
    else:
        turns |= dict.fromkeys(["copy_", "product", "product parked", "fused", "cast then put", "pack"], lambda: 0.0)
    rows: Rows = {name: [] for name in turns}
    for number in range(rounds + 1):
        order = sorted(turns)
        random.Random(number).shuffle(order)  # the same on both ranks
        for name in order:
            dist.barrier()
            seconds = turns[name]()
            if number:  # the first round warms up
                rows[name].append(seconds)
    return rows


def put(rank: int, sender: Any, receiver: Any, big: Tensor) -> float:
    """Seconds a message, from rank 0 to rank 1 and one small one back."""
    start = time.perf_counter()
    for tag in range(MESSAGES):
        if rank == 0:
            send(sender, tag, big)
        else:
            last = value_of(receiver, tag)
    if rank == 0:
        value_of(receiver, 0).item()
    else:
        send(sender, 0, last[-1])
        del last
    return (time.perf_counter() - start) / MESSAGES


def gloo(rank: int, big: Tensor) -> float:
    """The same through the host's memory and gloo."""
    start = time.perf_counter()
    if rank == 0:
        dist.send(big.cpu(), 1)
        dist.recv(torch.empty(1), 1)
    else:
        staged = torch.empty(BYTES, dtype=torch.uint8)
        dist.recv(staged, 0)
        staged.to(CARD)[-1].item()
        dist.send(torch.empty(1), 0)
    return time.perf_counter() - start


def steps(rank: int, rounds: int, rows: Rows) -> None:
    """Seconds a step: unsplit and with both stages in one process, on rank 0; then a stage a process. Collective."""
    from benchmarks.pipelines.gpt_step import Steps

    if rank == 0:
        for name in ("unsplit", "one process"):
            rows[name] = Steps(name, CARD).times(rounds)
            torch.cuda.empty_cache()
    dist.barrier()
    rows["two processes"] = Steps("two processes", CARD).times(rounds)


def ratios(rows: Rows) -> dict[str, float]:
    """Medians of ratios within one round."""

    def over(left: str, right: str, factor: float = 1.0) -> float:
        return median(factor * a / b for a, b in zip(rows[left], rows[right], strict=True))

    # bfloat16 in, codes and scales out: 2 + 1 + 4/128 bytes a value where copy_ moves twice its bytes.
    moved = (BYTES + BYTES / 2 * (1 + 4 / 128)) / (2 * BYTES)
    found = {
        "put over copy_": over("copy_", "put"),
        "put over gloo": over("gloo", "put"),
        "product while parked": over("product", "product parked"),
        "fused cast over cast then put": over("cast then put", "fused"),
        "fp8 pack, of copy bandwidth": over("copy_", "pack", moved),
    }
    if "unsplit" in rows:
        found["one process, of the unsplit step"] = over("unsplit", "one process")
        found["two processes, of the unsplit step"] = over("unsplit", "two processes")
    return found


def report(facts: dict[str, str], rows: Rows, out: Path | None) -> None:
    """Print everything, and write it."""
    driver = _C.cuda_driver()["version"]
    card = {"gpu": torch.cuda.get_device_name(CARD), "cuda": str(torch.version.cuda), "driver": driver}
    machine = {**describe(), **card, "kernels": _C.cuda_kernels(), **facts}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    lines: list[dict[str, object]] = []
    for name, times in rows.items():
        lines.append({"what": name, "median_us": f"{1e6 * median(times):.4g}", "rounds": len(times)})
        print(f"{name:20} {1e6 * median(times):12.1f} µs")
    for name, ratio in ratios(rows).items():
        goal = GOALS.get(name)
        reached = "" if goal is None else f", at least {goal:.3g}: {'yes' if ratio >= goal else 'NO'}"
        lines.append({"what": name, "ratio": f"{ratio:.4g}", "at_least": "" if goal is None else f"{goal:.3g}"})
        print(f"{name}: {ratio:.3f}{reached}")
    if out:
        write(out, machine, lines)


if __name__ == "__main__":
    main()
