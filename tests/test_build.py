"""The build without a C++ compiler: it succeeds, says so once, and leaves the reason for `pipekern doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = """
import runpy, sys
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
assert "torch" not in sys.modules
"""


def build(out: Path, compiler: str) -> tuple[dict[str, str], str]:
    """The note that a build with this compiler leaves, and what the build printed."""
    environ = {**os.environ, "CXX": compiler}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert not list(out.rglob("*.so"))
    note: dict[str, str] = json.loads((out / "pipekern/_build.json").read_text())
    return note, done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is compiled at all")
def test_without_a_compiler(tmp_path: Path) -> None:
    note, printed = build(tmp_path, "no-such-compiler")
    assert note["tier"] == "python" and "no C++ compiler: install g++" in note["reason"]
    assert printed.count("installed as pure Python, over gloo") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is compiled at all")
def test_with_a_compiler_that_does_not_work(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    note, printed = build(tmp_path / "out", str(broken))
    assert note["tier"] == "python" and note["reason"].endswith("Python.h: No such file")
    assert printed.count("installed as pure Python, over gloo") == 1
