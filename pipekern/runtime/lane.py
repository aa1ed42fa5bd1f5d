"""A way from stage to stage: what goes forward on it by micro-batch, and the gradients that come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipekern.errors import MessageMismatch
from pipekern.runtime.batch import Batch
from pipekern.runtime.microbatch import to_device
from pipekern.runtime.outgoing import BACKWARD_TAG, EVALUATE_TAG, FORWARD_TAG, GENERATE_TAG, Outgoing
from pipekern.runtime.slices import Slices
from pipekern.stage.alike import is_alike, mark
from pipekern.stage.stage import detached
from pipekern.transport.base import Receiver, Sender
from pipekern.transport.value import tensors


@dataclass
class Ends:
    """A lane's link ends, None where the other stage is on this process's rank or there is none; and what cuts the
    messages of training with the stages before and after into slices, if anything does.
    """

    forward_in: Receiver | None = None
    forward_out: Sender | None = None
    backward_in: Receiver | None = None
    backward_out: Sender | None = None
    before: Slices | None = None
    after: Slices | None = None


class Lane:
    """One stage's place on a way, on ``device``. ``previous`` and ``next`` are those of stages on the same rank, which
    are handed values directly.
    """

    batch: Batch
    beside: Callable[[Lane, int], torch.Tensor | None] | None = None  # what a gradient that comes may be added to

    def __init__(self, device: torch.device, ends: Ends, outgoing: Outgoing):
        self.previous: Lane | None = None
        self.next: Lane | None = None
        self._device = device
        self._ends = ends
        self._outgoing = outgoing
        self._inputs: dict[int, Any] = {}
        self._outputs: dict[int, Any] = {}
        self._gradients: dict[int, Any] = {}
        self._returned: dict[int, Any] = {}

    def begin(self, batch: Batch) -> None:
        """Start a step on ``batch``."""
        self.batch = batch

    def clear(self) -> None:
        """Forget what an exception left half done."""
        for held in (self._inputs, self._outputs, self._gradients, self._returned):
            held.clear()

    # -- forward

    def receive_forward(self, microbatch: int) -> None:
        """RECV_F."""
        self._receive_input(microbatch, FORWARD_TAG)

    def receive_evaluate(self, microbatch: int) -> None:
        """RECV_F of an evaluation."""
        self._receive_input(microbatch, EVALUATE_TAG)

    def receive_generate(self, microbatch: int) -> None:
        """RECV_F of a text that is generated, if there is a link."""
        if self._ends.forward_in is not None:
            self._receive_input(microbatch, GENERATE_TAG)

    def _receive_input(self, microbatch: int, kind: int) -> None:
        batch, receiver = self.batch, self._ends.forward_in
        assert receiver is not None
        message = self._outgoing.receive(receiver, kind | batch.tag | microbatch)
        if message.digest:
            self._compare(message.digest, receiver)
        slices = self._ends.before if kind == FORWARD_TAG else None
        self._inputs[microbatch] = message.value if slices is None else slices.join(microbatch, message.value)

    def _compare(self, digest: int, receiver: Receiver) -> None:
        if self.batch.digest and self.batch.digest != digest:
            source, target = receiver.link.source, receiver.link.target
            raise MessageMismatch(
                f"ranks {source} and {target} were given different batches at step {self.batch.step}; every rank of a "
                "pipeline takes the same batch: seed the sampler alike on all of them",
                target,
            )
        self.batch.digest = digest

    def take_input(self, microbatch: int) -> Any:
        """What has come for a forward."""
        return to_device(self._inputs.pop(microbatch), self._device)

    def hand_on(self, microbatch: int, value: Any) -> None:
        """Give the stage after what a forward made."""
        if self.next is not None:
            given = detached(self._outgoing.own(value))
            for one, other in zip(tensors(value), tensors(given), strict=True) if self._ends.before is not None else ():
                if one.requires_grad and is_alike(one):
                    mark(other)
            self.next._inputs[microbatch] = given
        else:
            self._outputs[microbatch] = value

    def send_forward(self, microbatch: int) -> None:
        """SEND_F."""
        self._send_output(microbatch, FORWARD_TAG)

    def send_evaluate(self, microbatch: int) -> None:
        """SEND_F of an evaluation."""
        self._send_output(microbatch, EVALUATE_TAG)

    def send_generate(self, microbatch: int) -> None:
        """SEND_F of a text that is generated, if there is a link."""
        if self._ends.forward_out is not None:
            self._send_output(microbatch, GENERATE_TAG)

    def _send_output(self, microbatch: int, kind: int) -> None:
        assert self._ends.forward_out is not None
        digest = self.batch.digest if microbatch == 0 else 0
        tag = kind | self.batch.tag | microbatch
        value = self._outputs.pop(microbatch)
        given = _computed(value)
        if kind == FORWARD_TAG and self._ends.after is not None:
            value = self._ends.after.cut(value)
        self._outgoing.send(self._ends.forward_out, tag, value, digest, given)

    # -- backward

    def receive_backward(self, microbatch: int) -> None:
        """RECV_B."""
        assert self._ends.backward_in is not None
        slices = self._ends.after
        into = None if self.beside is None or slices is not None else self.beside(self, microbatch)
        message = self._outgoing.receive(self._ends.backward_in, BACKWARD_TAG | self.batch.tag | microbatch, into)
        added = into is not None and message.value is into
        value = message.value if slices is None else slices.joined(message.value)
        self._gradients[microbatch] = None if added else to_device(value, self._device)

    def received(self, microbatch: int) -> Any:
        """The gradient that has come over a link, and so is nobody else's; None if there is none yet."""
        return None if self._ends.backward_in is None else self._gradients.get(microbatch)

    def take_gradient(self, microbatch: int) -> Any:
        """What has come for a backward."""
        return self._gradients.pop(microbatch)

    def hand_back(self, microbatch: int, gradient: Any) -> None:
        """Give the stage before what a backward made."""
        if self.previous is not None:
            self.previous._gradients[microbatch] = self._outgoing.own(gradient)
        elif self._ends.backward_out is not None:
            self._returned[microbatch] = gradient

    def send_backward(self, microbatch: int) -> None:
        """SEND_B."""
        assert self._ends.backward_out is not None
        tag = BACKWARD_TAG | self.batch.tag | microbatch
        gradient, slices = self._returned.pop(microbatch), self._ends.before
        value = gradient if slices is None else slices.cut_gradient(microbatch, gradient)
        self._outgoing.send(self._ends.backward_out, tag, value, given=True)


def _computed(value: Any) -> bool:
    """Whether every tensor of ``value`` is the result of a graph and views no other memory.

    A parameter, a buffer or a view of one may be changed by the stage after it has been sent.
    """
    return all((tensor if tensor._base is None else tensor._base).grad_fn is not None for tensor in tensors(value))
