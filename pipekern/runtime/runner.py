"""What one stage does at each instruction: takes values in, runs the stage, hands values on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipekern.errors import MessageMismatch
from pipekern.runtime.batch import Batch
from pipekern.runtime.loss import Loss
from pipekern.runtime.microbatch import to_device
from pipekern.runtime.outgoing import BACKWARD_TAG, EVALUATE_TAG, FORWARD_TAG, GENERATE_TAG, Outgoing
from pipekern.runtime.parts import Spread, divide, merge
from pipekern.stage.stage import Stage, detached
from pipekern.transport.base import Receiver, Sender


@dataclass
class Ends:
    """A stage's link ends, by the stage at the other end, which is on another rank."""

    receivers: Mapping[int, Receiver]
    senders: Mapping[int, Sender]


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
    """A stage with its links. ``near``: the stages on the same rank that it exchanges values with, without a link.

    ``direct[target]`` names what skips from this stage to ``target``, past the stages between.
    """

    def __init__(
        self,
        stage: Stage,
        direct: Mapping[int, Collection[str]],
        ends: Ends,
        outgoing: Outgoing,
        loss: Loss | None,
        held: Held,
    ):
        self.stage = stage
        self.near: dict[int, Runner] = {}
        self._direct = direct
        self._ends = ends
        self._outgoing = outgoing
        self._loss = loss
        self._held = held
        held.stages.append(stage)
        # By micro-batch and, in parts, by the stage at the other end.
        self._inputs: dict[int, dict[int, Any]] = {}
        self._outputs: dict[tuple[int, int], Any] = {}
        self._gradients: dict[int, dict[int, Any]] = {}
        self._returned: dict[tuple[int, int], Any] = {}
        self._spreads: dict[int, tuple[Spread, Spread]] = {}

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
        self._inputs.clear()
        self._outputs.clear()
        self._gradients.clear()
        self._returned.clear()
        self._spreads.clear()

    def receive_forward(self, microbatch: int, source: int) -> None:
        """RECV_F."""
        self._receive_input(microbatch, source, FORWARD_TAG)

    def receive_evaluate(self, microbatch: int, source: int) -> None:
        """RECV_F of an evaluation."""
        self._receive_input(microbatch, source, EVALUATE_TAG)

    def receive_generate(self, microbatch: int) -> None:
        """Every RECV_F of a text that is generated, if there is any."""
        for source in self._ends.receivers:
            if source < self.stage.index:
                self._receive_input(microbatch, source, GENERATE_TAG)

    def _receive_input(self, microbatch: int, source: int, kind: int) -> None:
        receiver = self._ends.receivers[source]
        message = self._outgoing.receive(receiver, kind | self.batch.tag | microbatch)
        if message.digest:
            self._compare(message.digest, receiver)
        self._inputs.setdefault(microbatch, {})[source] = message.value

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
        value, arrived = self._take_input(microbatch)
        if self._loss is None:
            output = self.stage.forward(microbatch, value, self.batch.step_key)
            given = self._hand_on(microbatch, output)
        else:
            self.stage.forward(microbatch, value, self.batch.step_key, lambda output: self._score(microbatch, output))
            output, given = None, {}
        self._spreads[microbatch] = Spread(value, arrived), Spread(output, given)
        self._held.count()

    def _score(self, microbatch: int, output: Any) -> torch.Tensor:
        assert self._loss is not None and self.batch.targets is not None
        loss, weight = self._loss.forward(
            microbatch, output, to_device(self.batch.targets[microbatch], self.stage.device)
        )
        start = torch.full((), weight, dtype=loss.dtype, device=loss.device)
        self._gradients[microbatch] = {self.stage.index: start}
        return loss

    def evaluate(self, microbatch: int) -> None:
        """F of an evaluation: the last stage keeps the loss, or the outputs where there are no targets."""
        output = self.stage.evaluate(self._take_input(microbatch)[0])
        if self._loss is None:
            self._hand_on(microbatch, output)
        elif self.batch.targets is not None:
            self._loss.forward(microbatch, output, to_device(self.batch.targets[microbatch], self.stage.device))
        else:
            self.batch.keep(output)

    def _take_input(self, microbatch: int) -> tuple[Any, dict[int, Any]]:
        """The stage's input, and the parts that other stages gave of it."""
        if microbatch in self._inputs:
            parts = self._inputs.pop(microbatch)
            parts = {source: to_device(part, self.stage.device) for source, part in parts.items()}
            return merge(parts), parts
        assert self.batch.inputs is not None
        return to_device(self.batch.inputs[microbatch], self.stage.device), {}

    def _hand_on(self, microbatch: int, value: Any) -> dict[int, Any]:
        """Give the next stage, and those that something skips to, their parts of ``value``."""
        parts = divide(value, self.stage.index + 1, self._direct)
        for target, part in parts.items():
            if target in self.near:
                self.near[target]._inputs.setdefault(microbatch, {})[self.stage.index] = detached(
                    self._outgoing.own(part)
                )
            else:
                self._outputs[microbatch, target] = part
        return parts

    def send_forward(self, microbatch: int, target: int) -> None:
        """SEND_F."""
        self._send_output(microbatch, target, FORWARD_TAG)

    def send_evaluate(self, microbatch: int, target: int) -> None:
        """SEND_F of an evaluation."""
        self._send_output(microbatch, target, EVALUATE_TAG)

    def send_generate(self, microbatch: int) -> None:
        """Every SEND_F of a text that is generated, if there is any."""
        for target in self._ends.senders:
            if target > self.stage.index:
                self._send_output(microbatch, target, GENERATE_TAG)

    def _send_output(self, microbatch: int, target: int, kind: int) -> None:
        digest = self.batch.digest if microbatch == 0 else 0
        value = self._outputs.pop((microbatch, target))
        self._outgoing.send(self._ends.senders[target], kind | self.batch.tag | microbatch, value, digest)

    def receive_backward(self, microbatch: int, source: int) -> None:
        """RECV_B."""
        message = self._outgoing.receive(self._ends.receivers[source], BACKWARD_TAG | self.batch.tag | microbatch)
        self._gradients.setdefault(microbatch, {})[source] = to_device(message.value, self.stage.device)

    def backward(self, microbatch: int) -> None:
        """BW."""
        self._hand_back(microbatch, self.stage.backward(microbatch, self._take_gradient(microbatch)))

    def backward_input(self, microbatch: int) -> None:
        """B."""
        self._hand_back(microbatch, self.stage.backward_input(microbatch, self._take_gradient(microbatch)))

    def backward_weight(self, microbatch: int) -> None:
        """W."""
        self.stage.backward_weight(microbatch)

    def _take_gradient(self, microbatch: int) -> Any:
        return self._spreads[microbatch][1].gather(self._gradients.pop(microbatch))

    def _hand_back(self, microbatch: int, gradient: Any) -> None:
        for target, part in self._spreads.pop(microbatch)[0].scatter(gradient).items():
            if target in self.near:
                self.near[target]._gradients.setdefault(microbatch, {})[self.stage.index] = part
            else:
                self._returned[microbatch, target] = part

    def send_backward(self, microbatch: int, target: int) -> None:
        """SEND_B."""
        value = self._returned.pop((microbatch, target))
        self._outgoing.send(self._ends.senders[target], BACKWARD_TAG | self.batch.tag | microbatch, value)
