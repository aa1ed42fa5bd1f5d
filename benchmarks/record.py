"""The CSV file of a benchmark."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def write(path: Path, machine: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> None:
    """All rows, with the machine in comment lines before them; a column that a row lacks stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in machine.items())
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
