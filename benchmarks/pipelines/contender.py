"""What the benchmark asks of every pipeline, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch

from benchmarks.pipelines.case import Case


class Running(Protocol):
    """A pipeline on this rank, ready to take steps."""

    def step(self) -> None:
        """Forward, backward, optimizer, gradients cleared, on the case's batch."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by their names in the unsplit model."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Contender(NamedTuple):
    """A way to run a case: ``start`` is called on every rank."""

    library: str
    schedule: str
    stages: int
    start: Callable[[Case], Running]

    def __str__(self) -> str:
        return f"{self.library} {self.schedule}"


def contenders() -> list[Contender]:
    """Every contender that is installed; two ranks."""
    from benchmarks.pipelines import ours, torch_pipelining

    found = [*ours.contenders(), *torch_pipelining.contenders()]
    if find_spec("deepspeed") is not None:
        from benchmarks.pipelines import deepspeed_pipe

        found.extend(deepspeed_pipe.contenders())
    return found
