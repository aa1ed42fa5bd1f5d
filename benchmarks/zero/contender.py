"""What the benchmark asks of every way to train with replicas, and where those of each library are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from benchmarks.pipelines.case import Case


class Contender(NamedTuple):
    """A way to train on ``mesh``. ``zero`` is what the library shares out, as stages of ZeRO count it; ``precision`` is
    pipekern's word.
    """

    library: str
    way: str
    zero: int
    precision: str | None
    mesh: tuple[int, int] = (1, 2)  # pp, dp


class Running(Protocol):
    """A model on this process, ready to take steps on its replica's batch."""

    def step(self) -> float:
        """Forward, backward, optimizer, gradients cleared. The mean loss of all that this process knows."""
        ...

    def memory(self) -> Mapping[str, Iterable[Tensor]]:
        """What is there between two steps: "parameters", "gradients", "moments"; masters are parameters."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


Start = Callable[[Case, Contender], Running]  # called on every process
LIBRARIES = {"pipekern": "ours", "torch": "sharding", "DeepSpeed": "deepspeed_zero"}


def libraries() -> list[str]:
    """Every library that is installed."""
    return [name for name in LIBRARIES if name != "DeepSpeed" or find_spec("deepspeed")]


def contenders(library: str) -> dict[Contender, Start]:
    """Those of one library, which is imported."""
    found: dict[Contender, Start] = import_module(f"benchmarks.zero.{LIBRARIES[library]}").contenders()
    return found


def held(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """The memory of ``parameters``, of those of ``optimizer``, and of what it keeps."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    every: list[Tensor] = [*parameters, *own, *optimizer.state]
    return {
        "parameters": [p.detach() for p in every],
        "gradients": [p.grad for p in every if p.grad is not None],
        "moments": [value for row in optimizer.state.values() for value in row.values() if isinstance(value, Tensor)],
    }
