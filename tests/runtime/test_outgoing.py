"""Messages that found no free slot: order, retries, and what a queue may hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from pipekern.runtime.outgoing import BACKWARD_TAG, FORWARD_TAG, Outgoing, describe
from pipekern.transport.base import Link, Message, Transport
from pipekern.transport.null import NullTransport


class Slots:
    """Both ends of a link whose slots are freed by hand."""

    def __init__(self, name: str, slots: int, memory: Tensor | None = None):
        self.link = Link(name, 0, 1, slots)
        self.sent: list[tuple[int, Any]] = []
        self.free = slots
        self.memory = memory

    def send(self, tag: int, value: Any, digest: int = 0, given: bool = False) -> bool:
        if not self.free:
            return False
        self.free -= 1
        self.sent.append((tag, value))
        return True

    def ready(self) -> bool:
        return bool(self.sent)

    def recv(self, tag: int, wait: float | None = None, into: Tensor | None = None) -> Message | None:
        self.free += 1
        return Message(self.sent.pop(0)[1], 0) if self.sent else None

    def held(self) -> list[tuple[int, ...]]:
        return []

    def owns(self, pointer: int) -> bool:
        return self.memory is not None and self.memory.untyped_storage().data_ptr() == pointer


def _outgoing(*receivers: Slots, alone: bool = False) -> Outgoing:
    transport: Transport = NullTransport()
    return Outgoing(transport, receivers, alone)


def test_golden() -> None:
    """One slot: the second message waits, and the third waits behind it even where a slot is free by then."""
    link, outgoing = Slots("0>1", 1), _outgoing()
    for tag in range(3):
        outgoing.send(link, tag, "value")
        link.free = 1 if tag == 1 else link.free
    assert [tag for tag, _ in link.sent] == [0]
    outgoing.flush()
    assert [tag for tag, _ in link.sent] == [0, 1]
    link.free = 5
    outgoing.drain()
    assert [tag for tag, _ in link.sent] == [0, 1, 2]
    assert not outgoing.queued


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=40), st.integers(1, 3))
def test_each_link_is_first_in_first_out_and_none_holds_up_another(moves: list[tuple[int, bool]], slots: int) -> None:
    links = [Slots(name, slots) for name in ("a", "b", "c")]
    outgoing, wanted = _outgoing(), [[], [], []]  # type: tuple[Outgoing, list[list[int]]]
    for tag, (which, is_send) in enumerate(moves):
        if is_send:
            outgoing.send(links[which], tag, None)
            wanted[which].append(tag)
        else:
            links[which].free += 1
            outgoing.flush()
            assert links[which].link.name not in outgoing.queued or not links[which].free
    for link in links:
        link.free = 100
    outgoing.drain()
    assert [[tag for tag, _ in link.sent] for link in links] == wanted


def test_a_receive_goes_on_sending() -> None:
    """Two ranks that both wait for a slot of the other's: the queue moves while the receive waits."""
    out, back, outgoing = Slots("0>1", 1), Slots("1>0", 1), _outgoing()
    outgoing.send(out, 0, "first")
    outgoing.send(out, 1, "second")
    out.free = 1
    back.sent.append((7, "answer"))
    assert outgoing.receive(back, 7).value == "answer"
    assert [tag for tag, _ in out.sent] == [0, 1]


def test_a_queued_message_holds_no_received_slot() -> None:
    """A stage that hands on what it received: what waits is a copy, so that the slot can go back to its sender."""
    slot = torch.ones(3, requires_grad=True)
    link, outgoing = Slots("1>2", 0), _outgoing(Slots("0>1", 1, slot))
    own = torch.ones(2)
    outgoing.send(link, 0, {"received": slot, "view": slot[1:], "own": own})
    (queued,) = outgoing.queued["1>2"]
    value = queued[2]
    assert value["own"] is own
    for tensor in (value["received"], value["view"]):
        assert tensor.untyped_storage().data_ptr() != slot.untyped_storage().data_ptr()
        assert tensor.requires_grad
    assert torch.equal(value["view"], torch.ones(2))


def test_where_nobody_could_free_a_slot_waiting_is_an_error() -> None:
    outgoing = _outgoing(alone=True)
    outgoing.send(Slots("0>1", 0), 0, None)
    with pytest.raises(pk.TransportError, match=r"no free slot on 0>1 .*must be a copy"):
        outgoing.drain()
    outgoing.clear()
    outgoing.drain()


def test_a_tag_in_words() -> None:
    assert describe(FORWARD_TAG | 3 << 32 | 5) == "activation, step 3, micro-batch or number 5"
    assert describe(BACKWARD_TAG | 0xFFFFFF << 32) == f"gradient, step {0xFFFFFF}, micro-batch or number 0"


@pytest.mark.parametrize(("schedule", "most"), [("1f1b", 5), ("gpipe", 65)])
def test_slots_are_as_many_as_in_flight(schedule: str, most: int) -> None:
    """64 micro-batches on 4 ranks: 1f1b never has more than 4 on their way, whatever their number."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=64, ranks=4, schedule=schedule) as pipe:
        slots = [end.link.slots for name, end in pipe._parts.receivers.items() if ">" in name]
        assert len(slots) == 6
        assert max(slots) <= most
        assert min(slots) >= 1
        pipe.train_step(torch.randn(64, 2), torch.randn(64, 2))
