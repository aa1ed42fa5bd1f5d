"""NVRTC where pip has put it: packages of NVIDIA's libraries are on no search path of the system's."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def preload() -> str:
    """Load the newest ``libnvrtc.so`` of an installed package, so that the extension finds it by its name.

    Returns its path; nothing where there is none, and the extension looks on the system's paths.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = sorted(path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*"))
    if not found:
        return ""
    ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)
    return str(found[-1])
