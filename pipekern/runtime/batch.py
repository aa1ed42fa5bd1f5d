"""A step's batch, as one process has it: checked, and split into micro-batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipekern.errors import ConfigError
from pipekern.runtime import microbatch
from pipekern.schedule.ir import Schedule
from pipekern.transport.value import map_tensors


@dataclass
class Batch:
    """One step's micro-batches on this process: inputs and targets where they are known, else None."""

    inputs: Sequence[Any] | Mapping[int, Any] | None
    targets: list[Any] | None
    sizes: list[int]
    digest: int = 0
    step: int = 0
    step_key: int = 0
    outputs: list[Any] = field(default_factory=list)

    @property
    def tag(self) -> int:
        """The step's part of every tag, so that ranks that run different steps notice."""
        return (self.step & 0xFFFFFF) << 32

    def keep(self, output: Any) -> None:
        """Take what the last stage made where there are no targets; its memory may be a slot."""
        self.outputs.append(map_tensors(torch.clone, output))


def divide(x: Any, y: Any, schedule: Schedule, here: Collection[int], training: bool, digested: bool) -> Batch:
    """``x`` for the first stage and ``y`` for the last, where they are among ``here``, this process's stages.

    ``digested``: other processes may have been given another batch. Raises ``ConfigError``.
    """
    first, last = 0 in here, schedule.stages - 1 in here
    for name, value, needed in (("x", x, first), ("y", y, training and last)):
        if value is None and needed:
            raise ConfigError(
                f"{name} is None on a rank that needs it; x goes to the first stage's rank, y to the last's"
            )
    sizes = {name: microbatch.batch_size(value, name) for name, value in (("x", x), ("y", y)) if value is not None}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"x has {sizes['x']} samples and y has {sizes['y']}; they must be the same batch")
    m = schedule.microbatches
    return Batch(
        microbatch.split(x, m, "x") if x is not None and first else None,
        microbatch.split(y, m, "y") if y is not None and last else None,
        microbatch.sizes(next(iter(sizes.values()), 0), m),
        microbatch.digest(x, y) if len(sizes) == 2 and digested else 0,
    )
