"""The C library's heap, set up for steps that allocate the same memory again and again."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # mallopt(3)
_LARGE = 32 << 20  # the most that mallopt takes, and what glibc's own adaption ends at
_MAPPINGS = 65536  # glibc's default


def keep_freed_memory() -> None:
    """Make this process keep what it frees, in huge pages where the kernel gives them on advice.

    By default glibc hands memory back to the kernel when much of it is free at the top of the heap, and the next
    micro-batch gets it again page by page, zeroed. A step of a GPT of 8 layers, 256 wide, 4 micro-batches, faults some
    5 000 times on each of two ranks, and 5 times after this. The heap is then never trimmed, and holds all blocks of
    less than 32 MiB from the start. It gets address space of half the machine's memory at once: what it grows by later
    would not have the advice.

    For the whole process, with glibc alone; a second call changes nothing. What is freed serves later allocations,
    until ``malloc_trim(3)`` gives it back, so the process keeps its peak. Nothing is done where the user chose an
    allocator or its settings: by ``LD_PRELOAD``, ``GLIBC_TUNABLES``, or a variable ``MALLOC_...`` of mallopt(3). No
    address space is taken where it is limited or counted as memory (``ulimit -v``, ``ulimit -d``,
    ``vm.overcommit_memory=2``).
    """
    if platform.libc_ver()[0] != "glibc" or _chosen_by_user():
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    if not _address_space_is_free():
        return
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.free.argtypes = (ctypes.c_void_p,)
    size = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2
    libc.mallopt(_M_MMAP_MAX, 0)  # this one block shall lie in the heap
    block = libc.malloc(size)
    if block is not None:
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, block + size - start, mmap.MADV_HUGEPAGE)  # a refusal changes nothing but speed
        libc.free(block)
    libc.mallopt(_M_MMAP_MAX, _MAPPINGS)


def _chosen_by_user() -> bool:
    return any(name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith("MALLOC_") for name in os.environ)


def _address_space_is_free() -> bool:
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    counted = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    return not counted and all(limit == resource.RLIM_INFINITY for limit in limits)
