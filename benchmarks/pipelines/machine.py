"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path


def describe() -> dict[str, str]:
    """Date, processor, kernel and versions."""
    versions = {name: _version(name) for name in ("torch", "pipekern", "deepspeed")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{fields.get('model name', platform.machine())} family {fields.get('cpu family', '?')}"
