"""Host memory: what is put there comes back, in buffers that are used again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from pipekern.errors import ConfigError
from pipekern.stage.host import ALIGNED, Host

CPU = torch.device("cpu")


def _bytes(*sizes: int) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]


@pytest.mark.parametrize("filed", [False, True])
def test_golden(filed: bool, tmp_path: Path) -> None:
    """Three parts of odd sizes, in one buffer and aligned; nothing with a name is left in the folder."""
    host = Host(CPU, str(tmp_path) if filed else None)
    parts = _bytes(100, 7, 64)
    want = [part.clone() for part in parts]
    buffer, places, event = host.put(parts)
    assert event is None and buffer.memory.nbytes == 2 * ALIGNED + ALIGNED + ALIGNED
    assert [place.data_ptr() - buffer.memory.data_ptr() for place in places] == [0, 128, 192]
    for part in parts:
        part.zero_()
    back, _ = host.fetch(buffer, places)
    assert all(map(torch.equal, back, want)) and list(tmp_path.iterdir()) == []


def test_buffers_are_used_again() -> None:
    """The smallest that is large enough; where none is, a new one takes the place of the largest."""
    host = Host(CPU)

    def held(*sizes: int) -> list[int]:
        """Addresses of buffers that are filled at once."""
        put = [host.put(_bytes(size)) for size in sizes]
        for buffer, places, _ in put:
            host.fetch(buffer, places)
        return [buffer.memory.data_ptr() for buffer, _, _ in put]

    small, large = held(64, 640)
    assert held(64, 600) == [small, large] and held(65) == [large]
    assert held(64, 6400)[0] == small and len(host._free) == 2
    assert held(0)[0] == small


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Host(CPU, str(tmp_path)).put(_bytes(10))


def test_files_are_not_for_gpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="page-locked"):
        Host(torch.device("cuda", 0), str(tmp_path))


class Stream:
    """Stands for a stream: what work of each stream is done before its next one begins, by vector clocks."""

    def __init__(self, name: str):
        self.name, self.before = name, {name: 0}

    def record_event(self) -> dict[str, int]:
        self.before[self.name] += 1
        return dict(self.before)

    def wait_event(self, event: Any) -> None:
        for name, time in event.items():
            self.before[name] = max(self.before.get(name, 0), time)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def comes_after(self, event: Any, name: str) -> bool:
        return bool(self.before.get(name, 0) >= event[name])


def test_every_use_of_memory_comes_after_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three steps with one buffer: made, copied out, freed, taken again, copied in, used, copied out again."""
    host, compute = Host(CPU), Stream("compute")
    out, back = Stream("out"), Stream("back")
    fields: dict[str, Any] = {"_out": out, "_back": back}
    vars(host).update(fields)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    for step in range(3):
        made = compute.record_event()
        buffer, places, copied = host.put(_bytes(64))
        read = buffer.read
        assert out.comes_after(made, "compute") and not compute.comes_after(copied, "out")
        assert (read is None) == (step == 0)
        assert read is None or out.comes_after(read, "back")  # it overwrites what was read
        host.wait(copied)
        freed = compute.record_event()
        assert compute.comes_after(copied, "out")
        _, there = host.fetch(buffer, places)
        assert back.comes_after(freed, "compute") and back.comes_after(copied, "out")
        assert not compute.comes_after(there, "back")
        host.wait(there)
        assert compute.comes_after(there, "back")
