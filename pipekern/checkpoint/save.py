"""Saving so that a folder always holds one good checkpoint, whenever a save ends.

1. The first process makes a new sub-folder. 2. Every process writes its files into it and waits until they are on disk.
3. The first process puts the manifest that names them in the place of the old one, in one step, and waits until that is
on disk. 4. Only then what the old one named is removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from pipekern.checkpoint.agree import Gather, alone, together
from pipekern.checkpoint.manifest import DTYPES, NAME, Entry, File, Manifest, check_json, read
from pipekern.errors import CheckpointError

Shard = tuple[str, Callable[[], Mapping[str, Tensor]]]
_STAGED = f"{NAME}.new"
_NUMBERED = re.compile(r"save-(\d{8})")


def save(
    folder: str | os.PathLike[str],
    shards: Iterable[Shard],
    values: Callable[[], object],
    *,
    rank: int = 0,
    gather: Gather = alone,
) -> None:
    """Write a checkpoint into ``folder``, in the place of the one that may be there; collective.

    ``shards``: pairs of a file's stem, unique over all processes, and a function that returns its tensors by key; it is
    called when its turn comes, so that one shard's copies are in memory at a time. ``values()`` is this process's JSON.
    Processes see one file system. Raises ``CheckpointError`` on all of them; then the last checkpoint is as it was.
    """
    top = Path(folder)
    name = together(lambda: _begin(top) if rank == 0 else "", gather)[0]
    try:
        rows = together(lambda: _write(top / name, shards, values), gather)
        together(lambda: _publish(top, name, rows) if rank == 0 else None, gather)
    except CheckpointError:
        if rank == 0:
            _discard(top, name)
        raise
    if rank == 0:
        _remove(top, lambda saved: saved.name != name)


def _begin(top: Path) -> str:
    """Clear away what failed saves have left, and make a sub-folder."""
    _make(top)
    saved = _saved(top)
    with suppress(CheckpointError):  # nobody knows what a damaged manifest named: all stays until there is a new one
        last = _named(top)
        _remove(top, lambda one: one.name != last)
    name = f"save-{1 + max(saved.values(), default=0):08d}"
    (top / name).mkdir()
    sync(top)
    return name


def _write(folder: Path, shards: Iterable[Shard], values: Callable[[], object]) -> dict[str, Any]:
    """The part of the manifest that tells of this process's files."""
    own = values()
    check_json(own, "values")
    files, entries = {}, {}
    for stem, tensors in shards:
        name = f"{stem}.safetensors"
        plain = {key: _plain(key, tensor) for key, tensor in tensors().items()}
        data = safetensors.save(plain)
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        files[name] = asdict(File(len(data), hashlib.sha256(data).hexdigest()))
        for key, tensor in plain.items():
            entries[key] = asdict(Entry(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))
    sync(folder)
    return {"files": files, "entries": entries, "values": own}


def _plain(key: str, tensor: Tensor) -> Tensor:
    """A copy in memory of its own: safetensors refuses tensors that share theirs."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{key} is a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}; a checkpoint holds "
            "plain dense tensors with data"
        )
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(f"{key} is of {tensor.dtype}, which safetensors does not hold; save it as another dtype")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _publish(top: Path, name: str, rows: list[dict[str, Any]]) -> None:
    files = {file: File(**row) for part in rows for file, row in part["files"].items()}
    away = [file for file, row in files.items() if not _there(top / name / file, row.size)]
    if away:
        raise CheckpointError(
            f"{', '.join(away)}: written by another process, and not in {top / name}; all must see one file system"
        )
    twice = sum(len(part["entries"]) for part in rows) - len({key for part in rows for key in part["entries"]})
    if twice:
        raise CheckpointError(f"{twice} keys are in several files; every tensor is saved by one process, once")
    entries = {key: Entry(**row) for part in rows for key, row in part["entries"].items()}
    staged = top / _STAGED
    with open(staged, "w", encoding="ascii") as file:
        file.write(Manifest(name, files, entries, [part["values"] for part in rows]).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, top / NAME)
    sync(top)


def _there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _named(top: Path) -> str | None:
    manifest = read(top)
    return None if manifest is None else manifest.folder


def _saved(top: Path) -> dict[Path, int]:
    """The sub-folders of saves, with their numbers."""
    found = ((path, _NUMBERED.fullmatch(path.name)) for path in top.iterdir())
    return {path: int(match[1]) for path, match in found if match}


def _remove(top: Path, unwanted: Callable[[Path], bool]) -> None:
    """Remove sub-folders of saves; what cannot be removed now is at the next save."""
    with suppress(OSError):  # also with ignore_errors rmtree raises some
        for path in filter(unwanted, _saved(top)):
            shutil.rmtree(path, ignore_errors=True)


def _discard(top: Path, name: str) -> None:
    """Remove what a failed save has written, unless the manifest may name it already."""
    with suppress(CheckpointError, OSError):
        (top / _STAGED).unlink(missing_ok=True)
        if _named(top) != name:
            _remove(top, lambda one: one.name == name)


def _make(folder: Path) -> None:
    """Make ``folder`` and those above it, so that they outlive a power failure."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
