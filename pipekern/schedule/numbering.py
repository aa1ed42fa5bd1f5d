"""From operations and stages to actions: each operation of a stage takes the micro-batches in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from pipekern.schedule.ir import Action


class Token(NamedTuple):
    """An action without its micro-batch."""

    op: str
    stage: int


Item = Token | tuple[Token, Token]
FROM_ZERO: Mapping[int, int] = MappingProxyType({})


def numbered(row: Iterable[Item], first: Mapping[int, int] = FROM_ZERO) -> Iterator[Action | tuple[Action, Action]]:
    """The row with micro-batches. ``first`` has a stage's first one where it is not 0; a BW counts as a B and a W."""
    done: Counter[tuple[str, int]] = Counter()

    def action(token: Token) -> Action:
        microbatch = first.get(token.stage, 0) + done[token.op[0], token.stage]
        done.update((part, token.stage) for part in token.op)
        return Action(*token, microbatch)

    for item in row:
        yield action(item) if isinstance(item, Token) else (action(item[0]), action(item[1]))
