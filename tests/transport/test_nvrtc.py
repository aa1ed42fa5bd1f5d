from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import shutil
from pathlib import Path

import pytest

from pipekern.transport import nvrtc
from tests.transport import fake_cuda


def test_the_newest_of_a_package_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = fake_cuda.library("fake_nvrtc", "libnvrtc.so.13")
    for folder in ("cu12", "cu13"):
        (tmp_path / folder / "lib").mkdir(parents=True)
        shutil.copy(built, tmp_path / folder / "lib" / f"libnvrtc.so.{folder[2:]}")
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert nvrtc.preload() == str(tmp_path / "cu13/lib/libnvrtc.so.13")
    assert ctypes.CDLL("libnvrtc.so.13")  # by its name, from now on


def test_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert nvrtc.preload() == ""
