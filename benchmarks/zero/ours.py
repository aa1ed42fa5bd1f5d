"""pipekern, with and without a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

import pipekern as pk
from benchmarks.pipelines.case import Case
from benchmarks.zero.contender import Contender, Start, held


class Ours:
    """A ``pk.Pipeline`` on the case's model."""

    def __init__(self, case: Case, contender: Contender):
        pp, dp = contender.mesh
        self.pipe = pk.Pipeline(
            case.model(pp),
            loss_fn=case.loss_fn,
            microbatches=case.microbatches,
            split=case.split(pp),
            mesh={"pp": pp, "dp": dp},
            precision=contender.precision,
            zero=contender.zero,
        )
        self._case = case
        self._parameters = [p for unit in self.pipe._parts.units() for _, p in unit.named_parameters()]
        self._optimizer = self.pipe.optimizer(case.optimizer, **case.options)
        assert self.pipe._parts.replicas is not None
        self._sent = self.pipe._parts.replicas.sent
        self.last_sent: dict[str, int] = {}  # in the last step, as pipekern counts it

    def step(self) -> float:
        before = dict(self._sent)
        loss = float(self.pipe.train_step(self._case.x, self._case.y))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.last_sent = {kind: count - before[kind] for kind, count in self._sent.items()}
        return loss

    def memory(self) -> Mapping[str, Iterable[Tensor]]:
        found = held(self._parameters, self._optimizer)
        for bucket in self.pipe._parts.store or ():
            found["gradients"] += [t for t in (bucket._gradients, bucket._reduced) if t is not None]
        return found

    def close(self) -> None:
        self.pipe.close()


def contenders() -> dict[Contender, Start]:
    """Every stage, alone and with two pipeline stages, in float32 and bfloat16."""
    grid = [(m, p, zero) for m in ((1, 2), (2, 2)) for p in (None, "bf16") for zero in range(4)]
    return {Contender("pipekern", f"zero={zero}", zero, precision, mesh): Ours for mesh, precision, zero in grid}
