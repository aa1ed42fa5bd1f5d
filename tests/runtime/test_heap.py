"""Memory that a rank on the CPU frees stays with it; each case in processes of its own, for it is theirs for good."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import pipekern as pk
from tests.launch import launch, values

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap is left alone")

PAGES = 32  # of 2 MiB, the largest that nobody asked for


def faults() -> int:
    """Page faults while 64 MiB are taken in parts, written and freed: the fewest of some times, once the heap is in
    order.
    """
    return min(_faults() for _ in range(5))


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.full((PAGES // 8 * (2 << 20),), 1, dtype=torch.uint8) for _ in range(8)]
    del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def address_space() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def make_pipeline() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pipe = pk.Pipeline(net, loss_fn=nn.MSELoss(), microbatches=1, ranks=2, devices=["cpu"], transport="local")
    pipe.train_step(torch.ones(1, 2), torch.ones(1, 2))
    pipe.close()


def observe(variables: dict[str, str], limit: int) -> tuple[list[int], list[int]]:
    """Faults before a pipeline is made, after, and after a second one; bytes that each adds to the address space."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))]:
        del os.environ[name]
    os.environ.update(variables)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: no part comes from the heap, as in a fresh process
    seen, sizes = [faults()], [address_space()]
    for _ in range(2):
        make_pipeline()
        sizes.append(address_space())
        seen.append(faults())
    return seen, [after - before for before, after in pairwise(sizes)]


def observed(variables: dict[str, str], limit: int = resource.RLIM_INFINITY) -> tuple[list[int], list[int]]:
    (outcome,) = values(launch(observe, 1, variables, limit))
    seen, sizes = outcome
    assert seen[0] >= PAGES // 2  # a part of 4 huge pages may begin between two
    return seen, sizes


def test_golden_memory_that_is_freed_is_there_again() -> None:
    seen, sizes = observed({})
    assert max(seen[1:]) < 8, seen
    memory = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    assert (sizes[0] >= memory // 2) == (not strict)
    assert sizes[1] < 1 << 30  # taken once


@pytest.mark.parametrize(
    "variable", [("MALLOC_ARENA_TEST", "8"), ("GLIBC_TUNABLES", "glibc.malloc.check=0"), ("LD_PRELOAD", "")]
)
def test_what_the_user_chose_stays(variable: tuple[str, str]) -> None:
    seen, sizes = observed(dict([variable]))
    assert min(seen) >= PAGES // 2, seen
    assert max(sizes) < 1 << 30


def test_no_address_space_where_it_is_limited() -> None:
    seen, sizes = observed({}, limit=1 << 46)
    assert max(seen[1:]) < 8, seen
    assert max(sizes) < 1 << 30
