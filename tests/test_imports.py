"""The arrows of the architecture: a package imports itself and lower layers, nothing else of pipekern."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = {
    "errors": 0,
    "_version": 0,
    "_C": 0,
    "trace": 1,
    "schedule": 2,
    "plan": 3,
    "transport": 4,
    "parallel": 4,
    "kernels": 4,
    "nn": 5,
    "stage": 5,
    "optim": 5,
    "checkpoint": 5,
    "runtime": 6,
    "hf": 7,
    "cli": 8,
    "__init__": 9,
}


def test_golden_imports() -> None:
    source = (
        "import os\nfrom pipekern.plan import partition\nfrom pipekern import _C\nfrom . import ir\nfrom .. import cli"
    )
    assert list(imported(source, "pipekern.schedule")) == ["plan", "_C", "schedule", "cli"]
    assert list(imported("import pipekern\nimport pipekern.trace.text", "pipekern.plan")) == ["__init__", "trace"]


def imported(source: str, package: str) -> Iterator[str]:
    """The parts of pipekern that ``source``, a module of ``package``, imports anywhere in it, type checks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "pipekern":
                yield parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"


def modules() -> list[Path]:
    return sorted([*(ROOT / "pipekern").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_points_up(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = parts if parts[0] == "pipekern" else ("pipekern", *parts)
    own = names[1]
    assert own in LAYERS, f"{own} has no layer: give it one here and in docs/architecture.md"
    for other in imported(path.read_text(), ".".join(names[:-1])):
        assert other == own or LAYERS[other] < LAYERS[own], (
            f"{'/'.join(parts)} imports {other}, which is not below {own}"
        )


CODE = """
import sys
for name in ("torch", "triton", "matplotlib", "numpy"):
    sys.modules[name] = None
import pipekern as pk
import pipekern.cli, pipekern.plan, pipekern.schedule, pipekern.trace.chrome, pipekern.trace.gantt, pipekern.trace.text
schedule = pk.schedule.build("1f1b", ranks=4, microbatches=8)
assert schedule.simulate(pk.schedule.Costs(1, 1, 1)).makespan == 33
assert pk.plan.partition([1, 1, 3, 2, 3], 4).bottleneck == 3
assert pipekern.cli.main(["schedule", "check", "gpipe", "--ranks", "2", "--microbatches", "2"]) == 0
"""


def test_schedules_plans_and_traces_need_neither_torch_nor_triton() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_lazy_names() -> None:
    import pipekern

    assert set(dir(pipekern)) >= {"Pipeline", "schedule", "plan", "trace", "ConfigError", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pipekern.nothing
