"""Reading a checkpoint, tensor by tensor, after its bytes have been compared with their digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pipekern.checkpoint.manifest import NAME, Entry, File, read
from pipekern.errors import CheckpointError

_BLOCK = 1 << 22  # bytes read at once


class Checkpoint:
    """The checkpoint in ``folder``: only its manifest is read. ``values``: what each process gave, by rank;
    ``entries``: the tensors by key.

    Raises ``CheckpointError`` where there is none, or the manifest is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        top = Path(folder)
        manifest = read(top)
        if manifest is None:
            raise CheckpointError(
                f"{top} has no {NAME}: no save into it was ever finished; look whether the path is the one saved to"
            )
        self.values: list[Any] = manifest.values
        self.entries: Mapping[str, Entry] = manifest.entries
        self._folder, self._manifest = top / manifest.folder, manifest

    @property
    def digest(self) -> str:
        """That of the manifest: the same wherever the same checkpoint is read."""
        return self._manifest.digest()

    def verify(self, keys: Iterable[str] | None = None) -> None:
        """Compare size and digest of the files that hold ``keys``, by default of all. Raises ``CheckpointError`` with
        every fault.
        """
        files = self._manifest.files
        wanted = files if keys is None else dict.fromkeys(self.entries[key].file for key in keys)
        faults = [fault for name in wanted for fault in _faults(self._folder / name, files[name])]
        if faults:
            raise CheckpointError(
                "\n".join(["the checkpoint is damaged:", *(f"  * {fault}" for fault in faults)])
                + "\nrestore these files, or load another checkpoint"
            )

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU, whose memory is the file's."""
        path = self._folder / self.entries[key].file
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)


def _faults(path: Path, file: File) -> Iterator[str]:
    try:
        size = path.stat().st_size
        if size != file.size:
            yield f"{path} has {size} bytes, {file.size} were written"
            return
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as data:
            while block := data.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}"
        return
    if digest.hexdigest() != file.sha256:
        yield f"{path} holds other bytes than were written (sha256 {digest.hexdigest()}, not {file.sha256})"
