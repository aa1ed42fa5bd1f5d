"""Weight work put into the waits of an order that is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pipekern.schedule.ir import Action


def weave(rows: Sequence[Sequence[Action]]) -> list[list[Action]]:
    """The order ``rows`` (of one chain) with every BW as a B, and its W where the rank would wait, or at the end.

    At F = B = W = 1 without latency. No rank holds more activations than the fullest one does in ``rows``: where
    another forward would make it more, a W goes first.
    """
    last = max(action.stage for row in rows for action in row)
    todo = [deque(Action("B" if a.op == "BW" else a.op, a.stage, a.microbatch) for a in row) for row in rows]
    room = [max(map(_peak, rows))] * len(rows)
    put_off: list[deque[Action]] = [deque() for _ in rows]
    woven: list[list[Action]] = [[] for _ in rows]
    done: set[Action] = set()
    while any(todo) or any(put_off):
        taken = [_next(*each, last, done) for each in zip(todo, put_off, room, strict=True)]
        assert any(taken), "the order that was given cannot run"
        for rank, action in enumerate(taken):
            if action is None:
                continue
            (put_off if action.op == "W" else todo)[rank].popleft()
            woven[rank].append(action)
            room[rank] += {"F": -1, "B": 0, "W": 1}[action.op]
            if action.op == "B":
                put_off[rank].append(action._replace(op="W"))
        done.update(action for action in taken if action is not None)
    return woven


def _next(todo: deque[Action], put_off: deque[Action], room: int, last: int, done: set[Action]) -> Action | None:
    """What a rank begins now; None while it waits."""
    if todo and _ready(todo[0], last, done) and (todo[0].op == "B" or room > 0 or not put_off):
        return todo[0]
    return put_off[0] if put_off else None


def _ready(action: Action, last: int, done: set[Action]) -> bool:
    op, stage, microbatch = action
    if op == "F":
        return stage == 0 or Action("F", stage - 1, microbatch) in done
    return Action("F", stage, microbatch) in done and (stage == last or Action("B", stage + 1, microbatch) in done)


def _peak(row: Sequence[Action]) -> int:
    held = peak = 0
    for action in row:
        held += 1 if action.op == "F" else -1
        peak = max(peak, held)
    return peak
