"""Text from a pipeline: groups of prompts that follow each other round the stages, one token a round.

The last stage picks a group's tokens and tells every rank over the star; the first stage goes on from them while the
other groups are in the stages between. With as many groups as ranks no stage waits::

    rank 0   a b c a b c a …        a, b, c: the groups, each in its next round when it comes back to rank 0
    rank 1     a b c a b c …
    rank 2       a b c a b …
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.runtime.batch import Batch
from pipekern.runtime.collective import Star
from pipekern.runtime.microbatch import digest
from pipekern.runtime.outgoing import TOKEN_TAG, Outgoing
from pipekern.runtime.prompts import Group
from pipekern.runtime.runner import Runner
from pipekern.runtime.sampling import Sampling
from pipekern.schedule.ir import Schedule
from pipekern.stage.cache import Caches, takes_cache


class Turn(NamedTuple):
    """A stage's work for a group in a round. In a period it belongs to this period's round, or the one ``late``
    before.
    """

    stage: int
    group: int
    late: int


def offsets(stage_rank: Sequence[int], groups: int) -> tuple[list[int], int]:
    """When each group enters the first stage, and the period of a round, in turns.

    A group that enters at o is in stage s at o + s, and in its next round a period later. A period has time for every
    group on the busiest rank, and groups enter at the first time at which they meet no other on any rank.
    """
    stages = len(stage_rank)
    period = max(stages, groups * max(Counter(stage_rank).values()))
    busy: set[tuple[int, int]] = set()
    entries: list[int] = []
    for group in range(groups):
        start = entries[-1] + 1 if entries else 0
        free = (o for o in range(start, period) if not busy.intersection(_times(stage_rank, o, period)))
        # Some placements of one's own leave no such time; then ranks take turns, in the order of the groups.
        entries.append(next(free, period * group // groups))
        busy.update(_times(stage_rank, entries[-1], period))
    return sorted(entries), period


def _times(stage_rank: Sequence[int], entry: int, period: int) -> list[tuple[int, int]]:
    return [(rank, (entry + stage) % period) for stage, rank in enumerate(stage_rank)]


def turns(stage_rank: Sequence[int], groups: int) -> list[Turn]:
    """One period of the steady state, all ranks, in an order that one thread can run.

    It is sorted by time; whatever a turn needs (the stage before, or the last stage of the round before) is at an
    earlier time. So each rank's part of it is valid too.
    """
    entries, period = offsets(stage_rank, groups)
    times = [(entry + s, group, s) for group, entry in enumerate(entries) for s in range(len(stage_rank))]
    ordered = sorted(times, key=lambda item: (item[0] % period, item[1]))
    return [Turn(stage, group, time // period) for time, group, stage in ordered]


class Forwards(Batch):
    """The forwards of a generation; a micro-batch is a group in a round."""

    def keep(self, output: Any) -> None:
        """Without a copy: it is used before anything else runs."""
        self.outputs.append(output)


def _digest(groups: Sequence[Group], sampling: Sampling) -> int:
    options = torch.tensor([*sampling.numbers(), groups[0].end, len(groups)], dtype=torch.float64)
    return digest(options, *(group.tokens for group in groups))


class Generator:
    """Runs the stages of this process for :meth:`Pipeline.generate`. ``layers`` are the modules of all units of
    the model ``root``.

    ``caching``: a layer of the model takes a cache. Then a forward gets the tokens that are new to it alone, else all.
    """

    def __init__(
        self,
        runners: Mapping[int, Runner],
        schedule: Schedule,
        rank: int | None,
        star: Star,
        outgoing: Outgoing,
        layers: Iterable[nn.Module],
        root: nn.Module,
    ):
        layers = list(layers)
        self.caching = any(takes_cache(layer) for layer in layers)
        held = set(map(id, layers))
        self._outside = next((m for m in root.modules() if id(m) not in held and takes_cache(m)), None)
        self._runners, self._schedule, self._rank = runners, schedule, rank
        self._star, self._outgoing = star, outgoing
        here = [
            module for runner in runners.values() for unit in runner.stage.units for module in unit.evaluate.modules()
        ]
        self._caches = Caches(here)
        self._at = ""

    def run(self, groups: Sequence[Group], sampling: Sampling, step: int) -> None:
        """Go on until every group has finished; on every rank the groups then hold the same tokens.

        ``step`` is that of training, which messages carry. Ranks that were given something else raise
        ``MessageMismatch``.
        """
        if self._outside is not None:
            raise ConfigError(
                f"the forward of {type(self._outside).__name__} takes a cache, and no rank runs it whole, so it would "
                "get none; move what looks at positions into a module of its own that takes one"
            )
        batch = Forwards(None, None, [], 0 if self._star.alone else _digest(groups, sampling), step)
        self._groups, self._sampling, self._batch = groups, sampling, batch
        rounds = groups[0].capacity - groups[0].given
        mine = [turn for turn in turns(self._schedule.stage_rank, len(groups)) if turn.stage in self._runners]
        for runner in self._runners.values():
            runner.begin(batch)
        with self._caches.given():
            for period in range(rounds + 1):
                for turn in mine:
                    if 0 <= period - turn.late < rounds:
                        self._turn(turn.stage, groups[turn.group], period - turn.late)
        for group in groups:
            self._learn(group, rounds)
        self._outgoing.drain()
        self._at = ""

    def where(self) -> str:
        """What was under way when :meth:`run` raised."""
        return self._at or f"rank {self._rank or 0}, before its first token"

    def clear(self) -> None:
        """Forget what an exception left half done."""
        self._at = ""

    def _turn(self, stage: int, group: Group, number: int) -> None:
        rank = self._schedule.stage_rank[stage]
        self._at = f"rank {rank}, stage {stage}, group {group.index} of the prompts, new token {number}"
        self._learn(group, number)
        if group.finished:
            self._caches.drop(stage, group.index)
            return
        runner, key = self._runners[stage], self._key(group, number)
        seen = group.length - 1 if number and self.caching else 0
        if stage == 0:
            self._batch.inputs = {key: group.tokens[:, seen : group.length].clone()}
        else:
            runner.receive_generate(key)
        self._caches.begin(stage, group.index, seen, group.capacity)
        runner.evaluate(key)
        if runner.scores:
            self._pick(group, number, group.length - seen)
        else:
            runner.send_generate(key)
        if self._outgoing.queued:
            self._outgoing.flush()

    def _key(self, group: Group, number: int) -> int:
        return number * len(self._groups) + group.index

    def _learn(self, group: Group, number: int) -> None:
        """The tokens up to ``number``, where the last stage is on another process."""
        while group.new < number and not group.finished:
            tag = TOKEN_TAG | self._batch.tag | self._key(group, group.new)
            group.add(self._star.receive(tag))

    def _pick(self, group: Group, number: int, given: int) -> None:
        output = self._batch.outputs.pop()
        logits = getattr(output, "logits", output)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or logits.shape[:2] != (len(group.prompts), given):
            what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ConfigError(
                f"the model made {what} of tokens ({len(group.prompts)}, {given}); to generate text it must return "
                "logits (prompts, length, vocabulary), or something with such ``logits``"
            )
        tokens = self._sampling.pick(logits[:, -1], group.prompts, number)
        group.add(tokens)
        self._star.publish(TOKEN_TAG | self._batch.tag | self._key(group, number), tokens)
