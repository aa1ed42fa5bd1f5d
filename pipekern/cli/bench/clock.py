"""Times of what runs on a GPU, by CUDA events, with cold caches and without waits in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

WARM, ROUNDS = 5, 25
FLUSH = 2**28  # bytes written before each round: more than the second-level cache, and long enough to run ahead


class Timing(NamedTuple):
    """Medians of microseconds; kernels, copies and fills launched; bytes beyond those there before."""

    gpu_us: float
    host_us: float
    launches: int
    peak_bytes: int


def clocked(run: Callable[[Any], Any], before: Callable[[], Any] = lambda: None) -> Timing:
    """``run(before())``, of which ``before`` is not measured. The host runs ahead, so gaps between launches only count
    where the host is slower than the GPU by more than the fill that precedes each round.
    """
    for _ in range(WARM):
        run(before())
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    pairs, host = [], []
    for _ in range(ROUNDS):
        given = before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        begun = time.perf_counter()
        kept = run(given)
        host.append(time.perf_counter() - begun)
        end.record()
        pairs.append((start, end))
        del kept
    torch.cuda.synchronize()
    del flush
    gpu = median(start.elapsed_time(end) for start, end in pairs)
    return Timing(1e3 * gpu, 1e6 * median(host), _launches(run, before()), _peak(run, before()))


def _launches(run: Callable[[Any], Any], given: Any) -> int:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(given)
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in seen.events() or ())


def _peak(run: Callable[[Any], Any], given: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    run(given)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - there


def captured(run: Callable[[], Any]) -> Callable[[Any], None]:
    """``run`` as a CUDA graph, to be replayed."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(_: Any, graph: Any = graph, kept: Any = kept) -> None:
        graph.replay()

    return replay
