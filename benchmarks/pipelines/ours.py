"""pipekern's schedules."""

from __future__ import annotations

from functools import partial

import torch

import pipekern as pk
from benchmarks.pipelines.case import Case
from benchmarks.pipelines.contender import Contender, Start
from pipekern.trace.timeline import Timeline

RANKS = 2


class Ours:
    """A ``pk.Pipeline`` on the case's model."""

    def __init__(self, schedule: str, chunks: int, case: Case, transport: str = "auto"):
        stages = RANKS * chunks
        self._case = case
        self._pipe = pk.Pipeline(
            case.model(stages),
            loss_fn=case.loss_fn,
            microbatches=case.microbatches,
            ranks=RANKS,
            schedule=schedule,
            chunks=chunks,
            split=case.split(stages),
            transport=transport,
        )
        self._optimizer = self._pipe.optimizer(case.optimizer, **case.options)

    def train(self) -> torch.Tensor:
        """Forward and backward."""
        return self._pipe.train_step(self._case.x, self._case.y)

    def update(self) -> None:
        """Optimizer step, gradients cleared."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def step(self) -> None:
        self.train()
        self.update()

    def timeline(self) -> Timeline:
        """Of the last step; collective."""
        return self._pipe.timeline()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self._pipe.named_parameters()}

    def close(self) -> None:
        self._pipe.close()


def contenders() -> dict[Contender, Start]:
    """Schedules that the runtime executes, interleaved ones with 2 and 4 chunks a rank."""
    grid = [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1)]
    grid += [("interleaved-1f1b", 2), ("interleaved-1f1b", 4), ("looped-bfs", 2), ("zb-v", 2), ("v-half", 2)]
    grid += [("zb-interleaved", 2), ("zb-interleaved", 4)]
    return {
        Contender("pipekern", name if chunks == 1 else f"{name} ×{chunks}", RANKS * chunks): partial(Ours, name, chunks)
        for name, chunks in grid
    }
