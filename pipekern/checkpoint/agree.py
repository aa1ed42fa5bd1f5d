"""What one process cannot do, none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pipekern.errors import CheckpointError

Gather = Callable[[Any], list[Any]]  # collective: the row of every process, by rank; rows are JSON
_Result = TypeVar("_Result")


def alone(row: Any) -> list[Any]:
    """``gather`` where one process has everything."""
    return [row]


def together(action: Callable[[], _Result], gather: Gather) -> list[_Result]:
    """What ``action()``, JSON, returns on each process. Raises ``CheckpointError`` on all of them, with what every one
    that failed says, after all have come to their end.
    """
    failure: Exception | None = None
    row: list[Any] = [None, ""]
    try:
        row[0] = action()
    except Exception as error:  # of whatever kind: the others wait to hear of it
        failure = error
        row[1] = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    rows = gather(row)
    faults = {rank: text for rank, (_, text) in enumerate(rows) if text}
    if not faults:
        return [result for result, _ in rows]
    if len(set(faults.values())) == 1 and len(faults) == len(rows):
        raise CheckpointError(next(iter(faults.values()))) from failure
    raise CheckpointError("\n".join(f"rank {rank}: {text}" for rank, text in faults.items())) from failure
