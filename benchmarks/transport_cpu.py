"""Messages through shared memory beside gloo's send and recv, and beside a memcpy.

    python -m benchmarks.transport_cpu [--rounds 15] [--out benchmarks/results/transport_cpu.csv]

Two ranks of one thread, each pinned to a core. A message's time is half of a round trip: each rank sends its own
buffer and receives the other's. "tensor" is what the pipeline does: from tensor to tensor, from Python, with header,
check of the tag and the slot's credit; "raw" moves bytes without making a tensor of them. gloo receives into a buffer
that is there already. The memcpy is the C library's, between two buffers of one process. All take turns in shuffled
rounds; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist

from benchmarks.pipelines.machine import describe
from benchmarks.record import write
from benchmarks.two_ranks import start
from pipekern import _C
from pipekern.transport.base import Link
from pipekern.transport.shm import ShmReceiver, ShmSender, ShmTransport

SIZES = (64, 1 << 10, 16 << 10, 256 << 10, 4 << 20, 64 << 20)  # bytes
LARGEST_RAW = 256 << 10  # beyond, copying the bytes out once more tells nothing
SECONDS = 0.05  # a contender's share of a round and size
GOALS = (  # size, contender, against, the ratio's bound, whether it is a least or a most
    (1 << 10, "raw", "gloo", 100.0, "least"),
    (1 << 10, "tensor", "gloo", 20.0, "least"),
    (64 << 20, "tensor", "gloo", 3.0, "least"),
    (64 << 20, "tensor", "memcpy", 1.25, "most"),
)

Key = tuple[int, str]  # bytes, contender
Times = dict[Key, list[float]]  # seconds a message, by round
Row = dict[str, str | int]


def main() -> None:
    """Start two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args()
    start("benchmarks.transport_cpu")
    rank_main(options.rounds, options.out)


def rank_main(rounds: int, out: Path | None) -> None:
    """One rank of two, alone on its core."""
    dist.init_process_group("gloo")
    tokens = [secrets.token_hex(16)]
    dist.broadcast_object_list(tokens)
    transport = ShmTransport(dist.get_rank(), 2, tokens[0], 60.0, dist.barrier)
    times = measure(contenders(transport), rounds)
    transport.close()
    if dist.get_rank() == 0:
        machine = describe()
        print("\n".join(f"{key}: {value}" for key, value in machine.items()))
        rows = tabulate(times)
        print(show(rows))
        print("\n".join(judge(times)))
        if out:
            write(out, machine, rows)
    dist.barrier()
    dist.destroy_process_group()


def measure(turns: Mapping[Key, Callable[[], object]], rounds: int) -> Times:
    """Every contender at every size, in shuffled rounds; collective."""
    repeats = {key: _repeats(turn) for key, turn in turns.items()}
    times: Times = {key: [] for key in turns}
    gc.collect()
    gc.freeze()
    for number in range(rounds):
        order = list(turns)
        random.Random(number).shuffle(order)  # the same order on both ranks
        for key in order:
            dist.barrier()
            turns[key]()  # what the one before left in the caches is gone
            start = time.perf_counter()
            for _ in range(repeats[key]):
                turns[key]()
            times[key].append((time.perf_counter() - start) / repeats[key])
        if dist.get_rank() == 0:
            print(f"round {number + 1} of {rounds}", flush=True)
    # A round trip is two messages; a memcpy is one.
    return {key: [t if key[1] == "memcpy" else t / 2 for t in values] for key, values in times.items()}


def _repeats(turn: Callable[[], object]) -> int:
    """Turns that take about SECONDS; the same number on both ranks."""
    for _ in range(5):
        turn()  # the first ones grow slots and touch fresh memory
    start = time.perf_counter()
    for _ in range(5):
        turn()
    count = torch.tensor(max(3.0, SECONDS / ((time.perf_counter() - start) / 5)))
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return int(count)


def contenders(transport: ShmTransport) -> dict[Key, Callable[[], object]]:
    """One round trip (or one copy), by size and contender; collective."""
    ways = [(f"{size} up", f"{size} down") for size in SIZES]
    links = [link for up, down in ways for link in (Link(up, 0, 1, 2), Link(down, 1, 0, 2))]
    senders, receivers = transport.open(links)
    turns: dict[Key, Callable[[], object]] = {}
    for size, (up, down) in zip(SIZES, ways, strict=True):
        first = dist.get_rank() == 0
        sender, receiver = senders[up if first else down], receivers[down if first else up]
        named = _turns(size, sender, receiver)
        turns |= {(size, name): turn for name, turn in named.items() if name != "raw" or size <= LARGEST_RAW}
    return turns


def _turns(size: int, sender: ShmSender, receiver: ShmReceiver) -> dict[str, Callable[[], object]]:
    rank = dist.get_rank()
    mine, other = torch.full((size // 4,), float(rank)), torch.zeros(size // 4)
    copy = torch.zeros(size // 4)
    source, target = mine.data_ptr(), copy.data_ptr()
    data = bytes(size)

    def both(send: Callable[[], object], recv: Callable[[], object]) -> Callable[[], None]:
        """One way and back."""

        def leading() -> None:
            send()
            recv()

        def answering() -> None:
            recv()
            send()

        return leading if rank == 0 else answering

    raw_sender, raw_receiver = sender.end, receiver.end
    assert isinstance(raw_receiver, _C.Receiver)
    return {
        "gloo": both(lambda: dist.send(mine, 1 - rank), lambda: dist.recv(other, 1 - rank)),
        "tensor": both(lambda: sender.send(1, mine), lambda: receiver.recv(1)),
        "raw": both(lambda: raw_sender.send_bytes(1, data), lambda: raw_receiver.recv_bytes(1, -1.0)),
        "memcpy": lambda: (ctypes.memmove(target, source, size), copy),  # the name keeps the buffer alive
    }


def tabulate(times: Times) -> list[Row]:
    """A row a size and contender: microseconds, and how many times faster than gloo and slower than a memcpy."""
    return [_row(size, name, times) for size, name in times]


def _row(size: int, name: str, times: Times) -> Row:
    row: Row = {"bytes": size, "contender": name}
    own = times[size, name]
    columns = {
        "us": [seconds * 1e6 for seconds in own],
        "gloo_over_it": _ratios(times[size, "gloo"], own),
        "it_over_memcpy": _ratios(own, times[size, "memcpy"]),
    }
    for column, values in columns.items():
        for quartile, value in zip(("q1", "median", "q3"), quantiles(values, n=4), strict=True):
            row[f"{column}_{quartile}"] = f"{value:.4g}"
    return {**row, "rounds": len(own)}


def _ratios(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(left, right, strict=True)]


def show(rows: Sequence[Row]) -> str:
    """The table in a terminal, as median [quartiles]."""
    lines = [f"{'bytes':>10} {'contender':10}{'us a message':>30}{'gloo over it':>30}{'it over memcpy':>30}"]
    for row in rows:
        spans = [
            f"{row[f'{column}_median']} [{row[f'{column}_q1']}, {row[f'{column}_q3']}]"
            for column in ("us", "gloo_over_it", "it_over_memcpy")
        ]
        lines.append(f"{row['bytes']:>10} {row['contender']:10}" + "".join(f"{span:>30}" for span in spans))
    return "\n".join(lines)


def judge(times: Times) -> list[str]:
    """A line a goal: the median ratio, and whether it is reached."""
    lines = []
    for size, name, against, bound, kind in GOALS:
        own, other = times[size, name], times[size, against]
        ratio = median(_ratios(other, own) if kind == "least" else _ratios(own, other))
        reached = ratio >= bound if kind == "least" else ratio <= bound
        meaning = f"{against} over {name}" if kind == "least" else f"{name} over {against}"
        lines.append(f"{size} bytes, {meaning}: {ratio:.4g}, at {kind} {bound:g}: {'yes' if reached else 'NO'}")
    return lines


if __name__ == "__main__":
    main()
