"""The manifest of a checkpoint: which files there are, what tensor is where, and plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pipekern.errors import CheckpointError

NAME = "manifest.json"
_FORMAT, _VERSION = "pipekern checkpoint", 1

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64, torch.bool, torch.uint8, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    )
}  # fmt: skip
"""What a checkpoint can hold, by name."""


@dataclass(frozen=True)
class File:
    """``size`` in bytes, and the hexadecimal digest of its bytes."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A tensor: the file it is in, its dtype by torch's name, its shape."""

    file: str
    dtype: str
    shape: list[int]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Manifest:
    """``folder`` is the sub-folder that the ``files`` are in, ``entries`` the tensors by key; ``values`` are the JSON
    of each process that saved, by rank.
    """

    folder: str
    files: dict[str, File]
    entries: dict[str, Entry]
    values: list[Any]

    def digest(self) -> str:
        """SHA-256 of all that it holds, hexadecimal."""
        return hashlib.sha256(json.dumps(self._body()).encode()).hexdigest()

    def encode(self) -> str:
        """JSON text, with the digest in it."""
        head = {"format": _FORMAT, "version": _VERSION, "sha256": self.digest()}
        return json.dumps(head | self._body(), indent=1) + "\n"

    def _body(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "entries": {key: asdict(entry) for key, entry in self.entries.items()},
            "values": self.values,
        }

    @staticmethod
    def decode(text: str) -> Manifest:
        """What :meth:`encode` made. Raises ``ValueError`` for any other text, a single changed bit included."""
        row = json.loads(text)
        if not isinstance(row, dict) or row.get("format") != _FORMAT:
            raise ValueError(f"it does not say that it is a {_FORMAT}")
        if row.get("version") != _VERSION:
            raise ValueError(f"it is of version {row.get('version')!r}, and this pipekern reads version {_VERSION}")
        try:
            manifest = Manifest(
                row["folder"],
                {name: File(**file) for name, file in row["files"].items()},
                {key: Entry(**entry) for key, entry in row["entries"].items()},
                row["values"],
            )
            same = manifest.encode() == text
        except (KeyError, TypeError, AttributeError, RecursionError):
            same = False
        if not same:
            raise ValueError("its text is not the one that was written")
        for name in (manifest.folder, *manifest.files):
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not the name of a file in the folder")
        return manifest


def read(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, None if there is none. Raises ``CheckpointError`` for a damaged one."""
    path = folder / NAME
    try:
        return Manifest.decode(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the manifest is damaged or not a manifest ({error}); restore it, or load another checkpoint"
        ) from error


def check_json(value: object, place: str) -> None:
    """Raise ``CheckpointError`` naming each part of ``value`` that JSON would lose or return as something else.

    A NaN and infinities are fine: they are written as Python's JSON does.
    """
    faults = list(_foreign(value, place))
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults)}: a manifest holds JSON (dict with str keys, list, str, int, float, bool, None); "
            "convert it"
        )


def _foreign(value: object, place: str) -> Iterator[str]:
    kind = type(value)
    if kind is list:
        for index, part in enumerate(cast("list[object]", value)):
            yield from _foreign(part, f"{place}[{index}]")
    elif kind is dict:
        for key, part in cast("dict[object, object]", value).items():
            if type(key) is not str:
                yield f"{place} has the key {key!r}, a {type(key).__name__}"
            yield from _foreign(part, f"{place}[{key!r}]")
    elif kind not in (str, int, float, bool, type(None)):
        yield f"{place} is a {kind.__name__}"
