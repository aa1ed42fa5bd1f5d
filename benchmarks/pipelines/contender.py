"""What the benchmark asks of every pipeline, and where those of each library are."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
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
    """A way to run a case."""

    library: str
    schedule: str
    stages: int

    def __str__(self) -> str:
        return f"{self.library} {self.schedule}"


Start = Callable[[Case], Running]  # called on every rank


def libraries() -> list[str]:
    """Every library that is installed."""
    return ["pipekern", "torch", *(["DeepSpeed"] if find_spec("deepspeed") else [])]


def contenders(library: str) -> dict[Contender, Start]:
    """Those of one library, which is imported; two ranks."""
    folder = {"pipekern": "ours", "torch": "torch_pipelining", "DeepSpeed": "deepspeed_pipe"}
    found: dict[Contender, Start] = import_module(f"benchmarks.pipelines.{folder[library]}").contenders()
    return found
