"""A save ends with the new state, or with the last one, whatever happens to it."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.checkpoint.load import Checkpoint
from pipekern.checkpoint.manifest import NAME
from pipekern.checkpoint.save import save
from tests.checkpoint.sample import Ring, shards, state, tidy, write
from tests.launch import launch

OLD, NEW = 1, 2


def test_golden_folder(tmp_path: Path) -> None:
    """Folders that are missing are made; a second save takes the first one's place."""
    folder = tmp_path / "a" / "b"
    for i in (OLD, NEW):
        save(folder, [("one", {"x": torch.full((2,), i)}.copy)], {"state": i}.copy)
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
            "manifest.json",
            f"save-0000000{i}",
            f"save-0000000{i}/one.safetensors",
        ]
    assert Checkpoint(folder).values == [{"state": NEW}]
    assert Checkpoint(folder).tensor("x").tolist() == [NEW, NEW]


def test_shards_are_made_one_at_a_time(tmp_path: Path) -> None:
    """When the second is asked for, the first is on disk."""
    seen: list[int] = []

    def tensors() -> dict[str, torch.Tensor]:
        seen.append(len(list(tmp_path.rglob("*.safetensors"))))
        return {f"x{len(seen)}": torch.zeros(3)}

    save(tmp_path, [(str(i), tensors) for i in range(4)], dict)
    assert seen == [0, 1, 2, 3]


# -- failures that Python sees


class Fault:
    """Lets ``count`` calls of ``os.<name>`` through, then fails; ``calls`` were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, count: int):
        self.calls, self._count, self._real = 0, count, getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > self._count:
            raise OSError(errno.EIO, "a broken disk")
        return self._real(*args, **kwargs)


@pytest.mark.parametrize("name", ["fsync", "replace", "open", "mkdir", "close"])
def test_every_call_failing(name: str, tmp_path: Path) -> None:
    """From the first on, from the second on, and so on: the old state until the new manifest is in its place."""
    ended = []
    for count in range(100):
        folder = tmp_path / str(count)
        write(folder, OLD)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, name, count)
            try:
                write(folder, NEW)
            except pk.CheckpointError as error:
                assert "a broken disk" in str(error)
        ended.append(state(folder))
        write(folder, NEW + 1)
        assert state(folder) == NEW + 1
        assert tidy(folder)
        if fault.calls <= count:
            break
    assert ended == sorted(ended)
    assert ended[-1] == NEW
    assert len(ended) > 1


@pytest.mark.parametrize("failing", ["shard", "values", "folder"])
def test_one_of_two_fails_and_both_raise(failing: str, tmp_path: Path) -> None:
    """With the number of the one that failed and its reason; the next save is well."""
    ring = Ring(2)

    def broken() -> Any:
        raise RuntimeError("no memory left")

    def run(rank: int, i: int, broken_rank: int) -> str:
        mine, folder = list(shards(i, rank)), tmp_path
        values: Any = lambda: {"state": i}  # noqa: E731
        if rank == broken_rank:
            mine = [*mine, ("more", broken)] if failing == "shard" else mine
            values = broken if failing == "values" else values
            folder = tmp_path / "elsewhere" if failing == "folder" else folder
        try:
            save(folder, mine, values, rank=rank, gather=lambda row: ring.gather(rank, row))
        except pk.CheckpointError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (0, 1), (OLD, OLD), (-1, -1))) == ["", ""]
        one, other = pool.map(run, (0, 1), (NEW, NEW), (1, 1))
        assert one == other
        assert one.startswith("rank 1: ")
        assert ("No such file" if failing == "folder" else "RuntimeError: no memory left") in one
        assert state(tmp_path) == OLD
        assert tidy(tmp_path)
        assert list(pool.map(run, (0, 1), (NEW, NEW), (-1, -1))) == ["", ""]
    assert state(tmp_path) == NEW
    assert tidy(tmp_path)


def test_a_key_of_two_processes_is_refused(tmp_path: Path) -> None:
    ring = Ring(2)

    def run(rank: int) -> str:
        with pytest.raises(pk.CheckpointError) as refusal:
            shard = (f"file-{rank}", lambda: {"x": torch.zeros(1)})
            save(tmp_path, [shard], dict, rank=rank, gather=lambda row: ring.gather(rank, row))
        return str(refusal.value)

    with ThreadPoolExecutor(2) as pool:
        for text in pool.map(run, (0, 1)):
            assert "1 keys are in several files" in text


class Labelled(torch.Tensor):
    """A subclass that a plain file would lose."""


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2).as_subclass(Labelled), "Labelled"),
    ],
)
def test_what_a_file_cannot_hold_is_named(tensor: torch.Tensor, named: str, tmp_path: Path) -> None:
    with pytest.raises(pk.CheckpointError, match="a/key is") as refusal:
        save(tmp_path, [("one", lambda: {"a/key": tensor})], dict)
    assert named in str(refusal.value)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {"all": base, "again": base, "part": base[2:5], "other": base[4:8], "weight": nn.Parameter(base[:1])}
    tensors["across"] = base.reshape(3, 4).t()
    tensors["wide"] = base[:1].expand(7)
    save(tmp_path, [("one", lambda: tensors)], dict)
    for key, tensor in tensors.items():
        assert torch.equal(Checkpoint(tmp_path).tensor(key), tensor)


def test_a_damaged_manifest_is_replaced(tmp_path: Path) -> None:
    """Its files stay until the new one is there: a person may still mend it."""
    write(tmp_path, OLD)
    good = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(good[:-9])
    with pytest.raises(pk.CheckpointError):
        save(tmp_path, [("one", dict[str, torch.Tensor])], lambda: {1, 2})
    (tmp_path / NAME).write_bytes(good)
    assert state(tmp_path) == OLD
    (tmp_path / NAME).write_bytes(good[:-9])
    write(tmp_path, NEW)
    assert state(tmp_path) == NEW
    assert tidy(tmp_path)


# -- a full disk, and death


_MANY = 12  # files: their manifest is longer than two of them


def _full_disk(folder: str, limit: int) -> str:
    write(Path(folder), OLD, _MANY)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write(Path(folder), NEW, _MANY)
        text = ""
    except pk.CheckpointError as error:
        text = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    after = state(Path(folder)), tidy(Path(folder))
    write(Path(folder), NEW + 1)
    return f"{text} {after} {state(Path(folder))} {tidy(Path(folder))}"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 2.0])
def test_a_full_disk(share: float, tmp_path: Path) -> None:
    """The old state, nothing of the new one in its way, and the reason; ``share`` of a file's bytes fit."""
    write(tmp_path / "size", OLD, _MANY)
    shard = max(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 2 * shard < (tmp_path / "size" / NAME).stat().st_size, "with 2.0 the manifest must not fit"
    (outcome,) = launch(_full_disk, 1, str(tmp_path / "full"), int(share * shard))
    assert outcome.error is None, outcome.error
    assert "File too large" in outcome.value
    assert outcome.value.endswith(f" ({OLD}, True) {NEW + 1} True")


def _die_at_line(folder: str, count: int) -> int:
    """Save the new state and die before line ``count`` of all that Python runs for it; returns how many there are."""
    write(Path(folder), OLD)
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    write(Path(folder), NEW)
    sys.settrace(None)
    return lines


def _die_in_time(folder: str, share: float) -> None:
    """Save the new state, and die at a share of the time that it took before, at whatever instruction that is."""
    write(Path(folder), OLD)
    start = time.perf_counter()
    write(Path(folder), OLD)
    took = time.perf_counter() - start
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # death, without a word to Python
    signal.setitimer(signal.ITIMER_REAL, share * took)
    write(Path(folder), NEW)
    signal.pause()


def _after_death(folder: Path) -> int:
    found = state(folder)
    assert found in (OLD, NEW)
    write(folder, NEW + 1)
    assert state(folder) == NEW + 1
    assert tidy(folder)
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("points", [6, pytest.param(100, marks=pytest.mark.full)])
def test_death_at_a_random_line(points: int, tmp_path: Path) -> None:
    (outcome,) = launch(_die_at_line, 1, str(tmp_path / "alive"), -1)
    assert outcome.value is not None, outcome.error
    found = []
    for point in range(points):
        line = random.randint(1 + point * outcome.value // points, (point + 1) * outcome.value // points)
        folder = tmp_path / str(point)
        (death,) = launch(_die_at_line, 1, str(folder), line)
        assert death.exitcode == -signal.SIGKILL, f"line {line} of {outcome.value}: {death.error}"
        found.append(_after_death(folder))
    assert found == sorted(found), "the new state, then the old one again"
    assert found[0] == OLD


@pytest.mark.timeout(600)
@pytest.mark.parametrize("points", [4, pytest.param(100, marks=pytest.mark.full)])
def test_death_at_a_random_time(points: int, tmp_path: Path) -> None:
    for point in range(points):
        share = random.uniform(point, point + 1) / points
        (death,) = launch(_die_in_time, 1, str(tmp_path / str(point)), share)
        assert death.exitcode == -signal.SIGALRM, f"{share} of its time: {death.error}"
        _after_death(tmp_path / str(point))
