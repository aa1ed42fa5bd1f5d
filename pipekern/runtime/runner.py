"""What one stage does at each instruction: takes values in, runs the stage, hands values on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipekern.errors import MessageMismatch
from pipekern.runtime.batch import Batch
from pipekern.runtime.loss import Loss
from pipekern.runtime.microbatch import to_device
from pipekern.runtime.outgoing import BACKWARD_TAG, EVALUATE_TAG, FORWARD_TAG, GENERATE_TAG, Outgoing
from pipekern.stage.stage import Stage, detached
from pipekern.transport.base import Receiver, Sender


@dataclass
class Ends:
    """A stage's link ends, None where the neighbour is on this process's rank or there is none."""

    forward_in: Receiver | None = None
    forward_out: Sender | None = None
    backward_in: Receiver | None = None
    backward_out: Sender | None = None


class Held:
    """The activations that the stages of one rank hold between forward and weight work; ``peak`` is the most of a step.

    They are counted in chunks: those of one micro-batch through one stage.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.peak = 0

    def count(self) -> None:
        """Look, after a forward."""
        self.peak = max(self.peak, sum(stage.live for stage in self.stages))


class Runner:
    """A stage with its links. ``previous`` and ``next`` are neighbours on the same rank, which are handed values
    directly.
    """

    def __init__(self, stage: Stage, ends: Ends, outgoing: Outgoing, loss: Loss | None, held: Held):
        self.stage = stage
        self.previous: Runner | None = None
        self.next: Runner | None = None
        self._ends = ends
        self._outgoing = outgoing
        self._loss = loss
        self._held = held
        held.stages.append(stage)
        self._inputs: dict[int, Any] = {}
        self._outputs: dict[int, Any] = {}
        self._gradients: dict[int, Any] = {}
        self._returned: dict[int, Any] = {}

    @property
    def scores(self) -> bool:
        """Whether this is the last stage, which computes the loss."""
        return self._loss is not None

    def begin(self, batch: Batch) -> None:
        """Start a step on ``batch``."""
        self.batch = batch
        self.stage.begin()
        self._held.peak = 0

    def clear(self) -> None:
        """Forget what an exception left half done."""
        self.stage.clear()
        for held in (self._inputs, self._outputs, self._gradients, self._returned):
            held.clear()

    def receive_forward(self, microbatch: int) -> None:
        """RECV_F."""
        self._receive_input(microbatch, FORWARD_TAG)

    def receive_evaluate(self, microbatch: int) -> None:
        """RECV_F of an evaluation."""
        self._receive_input(microbatch, EVALUATE_TAG)

    def receive_generate(self, microbatch: int) -> None:
        """RECV_F of a text that is generated."""
        self._receive_input(microbatch, GENERATE_TAG)

    def _receive_input(self, microbatch: int, kind: int) -> None:
        batch, receiver = self.batch, self._ends.forward_in
        assert receiver is not None
        message = self._outgoing.receive(receiver, kind | batch.tag | microbatch)
        if message.digest:
            self._compare(message.digest, receiver)
        self._inputs[microbatch] = message.value

    def _compare(self, digest: int, receiver: Receiver) -> None:
        if self.batch.digest and self.batch.digest != digest:
            source, target = receiver.link.source, receiver.link.target
            raise MessageMismatch(
                f"ranks {source} and {target} were given different batches at step {self.batch.step}; every rank of a "
                "pipeline takes the same batch: seed the sampler alike on all of them",
                target,
            )
        self.batch.digest = digest

    def forward(self, microbatch: int) -> None:
        """F, and on the last stage the loss."""
        value = self._take_input(microbatch)
        if self._loss is None:
            self._hand_on(microbatch, self.stage.forward(microbatch, value, self.batch.step_key))
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
        output = self.stage.evaluate(self._take_input(microbatch))
        if self._loss is None:
            self._hand_on(microbatch, output)
        elif self.batch.targets is not None:
            self._loss.forward(microbatch, output, to_device(self.batch.targets[microbatch], self.stage.device))
        else:
            self.batch.keep(output)

    def _take_input(self, microbatch: int) -> Any:
        if microbatch in self._inputs:
            value = self._inputs.pop(microbatch)
        else:
            assert self.batch.inputs is not None
            value = self.batch.inputs[microbatch]
        return to_device(value, self.stage.device)

    def _hand_on(self, microbatch: int, value: Any) -> None:
        if self.next is not None:
            self.next._inputs[microbatch] = detached(value)
        else:
            self._outputs[microbatch] = value

    def send_forward(self, microbatch: int) -> None:
        """SEND_F."""
        self._send_output(microbatch, FORWARD_TAG)

    def send_evaluate(self, microbatch: int) -> None:
        """SEND_F of an evaluation."""
        self._send_output(microbatch, EVALUATE_TAG)

    def send_generate(self, microbatch: int) -> None:
        """SEND_F of a text that is generated."""
        self._send_output(microbatch, GENERATE_TAG)

    def _send_output(self, microbatch: int, kind: int) -> None:
        assert self._ends.forward_out is not None
        digest = self.batch.digest if microbatch == 0 else 0
        self._outgoing.send(
            self._ends.forward_out, kind | self.batch.tag | microbatch, self._outputs.pop(microbatch), digest
        )

    def receive_backward(self, microbatch: int) -> None:
        """RECV_B."""
        assert self._ends.backward_in is not None
        message = self._outgoing.receive(self._ends.backward_in, BACKWARD_TAG | self.batch.tag | microbatch)
        self._gradients[microbatch] = to_device(message.value, self.stage.device)

    def backward(self, microbatch: int) -> None:
        """BW."""
        self._hand_back(microbatch, self.stage.backward(microbatch, self._gradients.pop(microbatch)))

    def backward_input(self, microbatch: int) -> None:
        """B."""
        self._hand_back(microbatch, self.stage.backward_input(microbatch, self._gradients.pop(microbatch)))

    def backward_weight(self, microbatch: int) -> None:
        """W."""
        self.stage.backward_weight(microbatch)

    def _hand_back(self, microbatch: int, gradient: Any) -> None:
        if self.previous is not None:
            self.previous._gradients[microbatch] = gradient
        elif self._ends.backward_out is not None:
            self._returned[microbatch] = gradient

    def send_backward(self, microbatch: int) -> None:
        """SEND_B."""
        assert self._ends.backward_out is not None
        self._outgoing.send(
            self._ends.backward_out, BACKWARD_TAG | self.batch.tag | microbatch, self._returned.pop(microbatch)
        )
