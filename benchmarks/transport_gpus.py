"""Links between two and more GPUs: bandwidth and latency, beside a peer copy of one process and beside NCCL's send.

    python -m benchmarks.transport_gpus [--seconds 2] [--out benchmarks/results/transport_gpus.csv]

A rank a GPU. For every ordered pair: 64 MB messages in a row, and a small one there and back. The peer copy is what
nvbandwidth's device-to-device test times: ``cudaMemcpyAsync`` from one device to the other.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.pipelines.machine import describe
from benchmarks.record import write
from pipekern.transport.base import Link
from pipekern.transport.cuda import CudaTransport
from pipekern.transport.open import Opened
from pipekern.transport.probe import BYTES, Measured, measure

ROUNDS = 30


def main() -> None:
    """Start a rank a GPU, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair")
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit(f"this benchmark needs two GPUs or more; torch sees {gpus}")
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m", __spec__.name]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv[1:]])
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    tokens = [secrets.token_hex(16)]
    dist.broadcast_object_list(tokens, device=torch.device("cpu"))
    host = dist.new_group(backend="gloo")
    devices = [torch.device("cuda", r) for r in range(gpus)]
    transport = CudaTransport(rank, gpus, tokens[0], 60.0, lambda: dist.barrier(host), devices)
    links = [Link(f"{a}>{b}", a, b, 4) for a in range(gpus) for b in range(gpus) if a != b]
    opened = Opened(transport, *transport.open(links))
    own = measure(rank, links, opened, devices, [BYTES] * len(links), options.seconds * len(links))
    transport.close()
    own_nccl = {link.name: over_nccl(rank, link.source, link.target, device) for link in links}
    seen: list[tuple[list[Measured], dict[str, tuple[float, float]]]] = [([], {})] * gpus
    dist.all_gather_object(seen, (own, own_nccl), group=host)
    ours = [row for rows, _ in seen for row in rows]
    nccl = {link.name: seen[link.source][1][link.name] for link in links}
    if rank == 0:
        rows = [
            {
                "link": row.link,
                "way": row.way,
                "us": f"{row.latency:.2f}",
                "GB_s": f"{row.bandwidth / 1e9:.1f}",
                "nccl_us": f"{nccl[row.link][0]:.2f}",
                "nccl_GB_s": f"{nccl[row.link][1] / 1e9:.1f}",
                "copy_GB_s": f"{peer_copy(*map(int, row.link.split('>'))) / 1e9:.1f}",
            }
            for row in ours
        ]
        report(rows, options.out)
    dist.barrier(host)
    dist.destroy_process_group()


def over_nccl(rank: int, source: int, target: int, device: torch.device) -> tuple[float, float]:
    """Microseconds of a small message and bytes a second of large ones; seen by the two ranks."""
    small, large = torch.zeros(2, device=device), torch.zeros(BYTES, dtype=torch.uint8, device=device)
    if rank not in (source, target):
        return 0.0, 0.0

    def there_and_back() -> None:
        if rank == source:
            dist.send(small, target)
            dist.recv(small, target)
        else:
            dist.recv(small, source)
            dist.send(small, source)

    def there() -> None:
        dist.send(large, target) if rank == source else dist.recv(large, source)

    seconds = []
    for work in (there_and_back, there):
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            work()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / ROUNDS)
    return 1e6 * seconds[0] / 2, BYTES / seconds[1]


def peer_copy(source: int, target: int) -> float:
    """Bytes a second."""
    there = torch.zeros(BYTES, dtype=torch.uint8, device=f"cuda:{target}")
    here = torch.zeros(BYTES, dtype=torch.uint8, device=f"cuda:{source}")
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        start = time.perf_counter()
        there.copy_(here)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        times.append(time.perf_counter() - start)
    return BYTES / median(times)


def report(rows: list[dict[str, str]], out: Path | None) -> None:
    """Print the table, and write it."""
    machine = {**describe(), "gpu": torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda)}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if out:
        write(out, machine, rows)


if __name__ == "__main__":
    main()
