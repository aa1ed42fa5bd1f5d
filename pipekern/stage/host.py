"""Host memory that activations are put away in, and the copies there and back."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipekern.errors import ConfigError

ALIGNED = 64  # bytes, as torch's own memory


@dataclass
class Buffer:
    """Bytes of host memory, and the copy out of it that was queued last."""

    memory: Tensor
    read: torch.cuda.Event | None = None


class Host:
    """Buffers beside one rank's ``device``, used again from step to step, and the streams that fill and read them.

    They are page-locked for a GPU. On a CPU they are memory, or files without a name in ``folder``, which the system
    may write out. Nothing here makes the host wait for the device.
    """

    def __init__(self, device: torch.device, folder: str | None = None):
        self._device = device
        self._free: list[Buffer] = []
        self._folder = folder
        on_gpu = device.type == "cuda"
        if on_gpu and folder is not None:
            raise ConfigError(
                f"offload_folder={folder!r} on {device}: a GPU copies into page-locked memory, not into files; leave "
                "offload_folder out"
            )
        # One each way: a link to the host carries both at once.
        self._out, self._back = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))

    def put(self, parts: Sequence[Tensor]) -> tuple[Buffer, list[Tensor], torch.cuda.Event | None]:
        """Begin to copy ``parts``, flat tensors of bytes, which must live until the event (None: it is done already).

        Returns the buffer and the place of each part in it.
        """
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + -(-part.nbytes // ALIGNED) * ALIGNED)
        buffer = self._take(starts[-1])
        places = [buffer.memory[at : at + part.nbytes] for at, part in zip(starts, parts, strict=False)]
        done = self._copy(self._out, places, parts, buffer.read)
        return buffer, places, done

    def fetch(self, buffer: Buffer, places: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Begin to copy ``places`` of ``buffer`` back, and give the buffer up; new tensors, to use after the event."""
        parts = [torch.empty_like(place, device=self._device) for place in places]
        buffer.read = self._copy(self._back, parts, places, None)
        self._free.append(buffer)
        return parts, buffer.read

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let what is queued from now on run after ``event``."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def _copy(
        self,
        stream: torch.cuda.Stream | None,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        after: torch.cuda.Event | None,
    ) -> torch.cuda.Event | None:
        """On ``stream``, after ``after`` and what the current stream has queued: it made the sources, and last used the
        memory of the targets.
        """
        if stream is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def _take(self, size: int) -> Buffer:
        """The smallest free buffer of at least ``size`` bytes, else a new one in the place of the largest."""
        self._free.sort(key=lambda buffer: buffer.memory.nbytes)
        for index, buffer in enumerate(self._free):
            if buffer.memory.nbytes >= size:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        return Buffer(self._allocate(size))

    def _allocate(self, size: int) -> Tensor:
        if self._folder is None or size == 0:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        with tempfile.TemporaryFile(dir=self._folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a signal at the first write
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
