"""Host memory: what is put there comes back, in buffers that are used again."""

from __future__ import annotations

from pathlib import Path

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
