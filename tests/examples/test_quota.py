"""A process that gets a share of its core."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_SLOWED = """
import time
from examples.quota import Quota
with Quota(4.0):
    print("begun", flush=True)
    input()
print("ended", flush=True)
"""


def _state(pid: int) -> str:
    """As in proc(5): T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def _wait_for(pid: int, stopped: bool) -> None:
    deadline = time.monotonic() + 30
    while (_state(pid) == "T") is not stopped:
        assert time.monotonic() < deadline, f"never {'stopped' if stopped else 'continued'}"


def test_stopped_and_continued_until_it_ends() -> None:
    """Again and again; when the context ends nobody stops it any more."""
    command = [sys.executable, "-c", _SLOWED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as slowed:
        assert slowed.stdin is not None and slowed.stdout is not None
        assert slowed.stdout.readline() == "begun\n"
        for _ in range(5):
            _wait_for(slowed.pid, stopped=True)
            _wait_for(slowed.pid, stopped=False)
        slowed.stdin.write("\n")
        slowed.stdin.flush()
        assert slowed.stdout.readline() == "ended\n"
    assert slowed.returncode == 0
