"""Two ranks of one thread, each alone on its core."""

from __future__ import annotations

import os
import sys

import torch


def start(module: str) -> None:
    """Become two ranks that run ``module`` with this command line; in a rank, take its core."""
    if "RANK" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv[1:]])
    take_core(int(os.environ["RANK"]))


def take_core(rank: int) -> None:
    """Take the core of ``rank``, with one thread."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"this benchmark needs a core for each of its two ranks; this process may use {len(cores)}")
    os.sched_setaffinity(0, {cores[rank]})  # before a thread starts: all of them inherit it
    torch.set_num_threads(1)
