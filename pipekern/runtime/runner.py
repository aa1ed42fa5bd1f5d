"""What one stage does at each instruction: takes values in, runs the stage, hands values on."""

from __future__ import annotations

from typing import Any

import torch

from pipekern.optim.store import Store
from pipekern.runtime.batch import Batch
from pipekern.runtime.detours import Detours
from pipekern.runtime.lane import Ends, Lane
from pipekern.runtime.loss import Loss
from pipekern.runtime.microbatch import to_device
from pipekern.runtime.outgoing import Outgoing
from pipekern.stage.stage import Stage


class Held:
    """The activations that the stages of one rank hold between forward and weight work; ``peak`` is the most of a step.

    They are counted in chunks: those of one micro-batch through one stage.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.peak = 0

    def count(self) -> None:
        """Look, after a forward and where an activation begins to come back."""
        self.peak = max(self.peak, sum(stage.live for stage in self.stages))


class Runner(Lane):
    """A stage on the way from each stage to the next, and on ``detours``, the lanes past others, if it has any."""

    def __init__(
        self,
        stage: Stage,
        ends: Ends,
        detours: Detours | None,
        outgoing: Outgoing,
        loss: Loss | None,
        held: Held,
    ):
        self.store: Store | None = None
        super().__init__(stage.device, ends, outgoing)
        self.stage = stage
        self.detours = detours
        if detours is not None:
            detours.join(self)
        self._loss = loss
        self._held = held
        held.stages.append(stage)

    @property
    def scores(self) -> bool:
        """Whether this is the last stage, which computes the loss."""
        return self._loss is not None

    def begin(self, batch: Batch) -> None:
        """Start a step on ``batch``."""
        super().begin(batch)
        self.stage.begin()
        self._held.peak = 0
        if self.detours is not None:
            self.detours.begin(batch)

    def clear(self) -> None:
        """Forget what an exception left half done."""
        super().clear()
        self.stage.clear()
        if self.detours is not None:
            self.detours.clear()

    def lane(self, peer: int) -> Lane:
        """The lane to the stage ``peer``: the stage's own to its neighbours."""
        return self if self.detours is None else self.detours.lanes.get(peer, self)

    def forward(self, microbatch: int) -> None:
        """F, and on the last stage the loss."""
        value = self.take_input(microbatch)
        if self._loss is None:
            self.hand_on(microbatch, self.stage.forward(microbatch, value, self.batch.step_key))
        else:
            self.stage.forward(microbatch, value, self.batch.step_key, lambda output: self._score(microbatch, output))
        self._held.count()

    def _score(self, microbatch: int, output: Any) -> torch.Tensor:
        assert self._loss is not None and self.batch.targets is not None
        loss, weight = self._loss.forward(
            microbatch, output, to_device(self.batch.targets[microbatch], self.stage.device)
        )
        self._gradients[microbatch] = torch.full((), weight, dtype=loss.dtype, device=loss.device)
        return loss

    def evaluate(self, microbatch: int) -> None:
        """F of an evaluation: the last stage keeps the loss, or the outputs where there are no targets."""
        value = self.take_input(microbatch)
        if self._loss is None:
            self.hand_on(microbatch, self.stage.evaluate(value))
        elif self.batch.targets is not None:
            self.stage.evaluate(value, lambda output: self._score(microbatch, output))
            del self._gradients[microbatch]
        else:
            self.batch.keep(self._loss.takes(self.stage.evaluate(value)))
        if self.detours is not None:
            self.detours.forget(microbatch)

    def take_input(self, microbatch: int) -> Any:
        """The stage's input, whole."""
        if microbatch not in self._inputs:
            assert self.batch.inputs is not None
            return to_device(self.batch.inputs[microbatch], self.stage.device)
        value = super().take_input(microbatch)
        return value if self.detours is None else self.detours.merge(microbatch, value)

    def hand_on(self, microbatch: int, value: Any) -> None:
        """Give the stage's output to those after it."""
        super().hand_on(microbatch, value if self.detours is None else self.detours.divide(microbatch, value))

    def backward(self, microbatch: int) -> None:
        """BW."""
        self.hand_back(microbatch, self.stage.backward(microbatch, self.take_gradient(microbatch)))

    def backward_input(self, microbatch: int) -> None:
        """B."""
        self.hand_back(microbatch, self.stage.backward_input(microbatch, self.take_gradient(microbatch)))

    def backward_weight(self, microbatch: int) -> None:
        """W."""
        self.stage.backward_weight(microbatch)

    def put_away(self, microbatch: int) -> None:
        """AWAY."""
        self.stage.put_away(microbatch)

    def bring_back(self, microbatch: int) -> None:
        """BACK."""
        self.stage.bring_back(microbatch)
        self._held.count()

    def take_gradient(self, microbatch: int) -> Any:
        """The gradients of the stage's output, whole."""
        gradient = super().take_gradient(microbatch)
        return gradient if self.detours is None else self.detours.gather(microbatch, gradient)

    def hand_back(self, microbatch: int, gradient: Any) -> None:
        """Give the gradients of the stage's input to those before it."""
        super().hand_back(microbatch, gradient if self.detours is None else self.detours.scatter(microbatch, gradient))

    def begin_gather(self, bucket: int) -> None:
        """GATHER."""
        if self.store is not None:
            self.store.gather(self.stage.index, bucket)

    def join(self, _: int) -> None:
        """JOIN."""
        if self.store is not None:
            self.store.join(self.stage.index)

    def begin_reduce(self, bucket: int) -> None:
        """REDUCE."""
        if self.store is not None:
            self.store.reduce(self.stage.index, bucket)

    def receive_generate(self, microbatch: int) -> None:
        """Every RECV_F of a text that is generated, if there is any."""
        super().receive_generate(microbatch)
        for lane in self.detours.lanes.values() if self.detours is not None else ():
            lane.receive_generate(microbatch)

    def send_generate(self, microbatch: int) -> None:
        """Every SEND_F of a text that is generated, if there is any."""
        super().send_generate(microbatch)
        for lane in self.detours.lanes.values() if self.detours is not None else ():
            lane.send_generate(microbatch)
