"""The kernels without a GPU: the tests of this folder, and those of the optimizer over them, once more, in a process in
which Triton interprets them.

The variable must be set before Triton is imported, and holds for the whole process, hence one of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INSIDE, reason="this is the process that it starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
@pytest.mark.timeout(600)
def test_kernels_interpreted() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        str(HERE),
        str(HERE.parent / "optim" / "test_adamw.py"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
