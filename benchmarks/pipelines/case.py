"""One case of the benchmark: a model as a list of units, one batch, and how both are cut."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from examples.gpt.model import Layer, Size, loss_fn
from pipekern.plan.partition import partition

VOCABULARY = 256  # byte tokens: head and loss weigh little beside the layers


@dataclass(frozen=True)
class Case:
    """``units`` makes the model's units for so many stages, always with the same weights.

    ``x`` and ``y`` are the whole batch of ``microbatches``; ``costs`` estimates the units for the split, which is
    the same for all contenders with as many stages. ``steps`` are timed in one turn.
    """

    name: str
    units: Callable[[int], list[nn.Module]]
    costs: Callable[[int], list[float]]
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    microbatches: int
    steps: int
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-4})

    def split(self, stages: int) -> list[int]:
        """Units a stage."""
        bounds = partition(self.costs(stages), stages).bounds
        return [end - start for start, end in pairwise(bounds)]

    def model(self, stages: int) -> nn.Sequential:
        """The unsplit model that ``stages`` stages are cut from."""
        return nn.Sequential(*self.units(stages))

    def stages(self, stages: int) -> list[nn.Sequential]:
        """The stages, whose parameters have the names that they have in :meth:`model`."""
        units = list(enumerate(self.units(stages)))
        return [
            nn.Sequential(OrderedDict((str(i), unit) for i, unit in part)) for part in _cut(units, self.split(stages))
        ]


def _cut(units: Sequence[tuple[int, nn.Module]], counts: Sequence[int]) -> list[Sequence[tuple[int, nn.Module]]]:
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [units[start : start + count] for start, count in zip(starts, counts, strict=True)]


def gpt(width: int, depth: int, length: int, samples: int, microbatches: int, steps: int) -> Case:
    """The GPT of the training example on byte tokens; ``samples`` a micro-batch."""
    size = Size(vocabulary=VOCABULARY, width=width, depth=depth, heads=max(2, width // 64), length=length)

    def units(_: int) -> list[nn.Module]:
        torch.manual_seed(0)
        layers = [Layer(size) for _ in range(depth)]
        head = nn.Linear(width, VOCABULARY, bias=False)
        return [nn.Embedding(VOCABULARY, width), *layers, nn.RMSNorm(width), head]

    tokens = torch.randint(VOCABULARY, (samples * microbatches, length + 1), generator=torch.Generator().manual_seed(1))
    return Case(
        name=f"GPT {width} wide, {depth} layers, {length} tokens, {samples} samples, m={microbatches}",
        units=units,
        costs=lambda _: [1.0, *(12.0 * width * width,) * depth, 1.0, float(VOCABULARY * width)],
        loss_fn=loss_fn,
        x=tokens[:, :-1].contiguous(),
        y=tokens[:, 1:].contiguous(),
        microbatches=microbatches,
        steps=steps,
    )


def trivial(microbatches: int, steps: int) -> Case:
    """A Linear 8×8 a stage, one sample a micro-batch: what is timed is the pipeline itself."""

    def units(stages: int) -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(8, 8) for _ in range(stages)]

    generator = torch.Generator().manual_seed(1)
    return Case(
        name=f"one Linear 8×8 a stage, m={microbatches}",
        units=units,
        costs=lambda stages: [1.0] * stages,
        loss_fn=F.mse_loss,
        x=torch.randn(microbatches, 8, generator=generator),
        y=torch.randn(microbatches, 8, generator=generator),
        microbatches=microbatches,
        steps=steps,
    )


def cases() -> list[Case]:
    """All cases, by the weight of their stages."""
    return [
        trivial(64, steps=5),
        gpt(64, 4, length=32, samples=2, microbatches=8, steps=5),
        gpt(256, 8, length=128, samples=4, microbatches=2, steps=2),
        gpt(256, 8, length=128, samples=4, microbatches=4, steps=1),
        gpt(256, 8, length=128, samples=4, microbatches=8, steps=1),
    ]
