"""What is particular to several ranks in one thread. The common contract is in test_contract.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipekern.errors import ConfigError, TransportError
from pipekern.transport.base import Link, Receiver, Sender
from pipekern.transport.local import LocalTransport


def pair(slots: int = 2) -> tuple[LocalTransport, Sender, Receiver]:
    transport = LocalTransport(2)
    senders, receivers = transport.open([Link("0>1", 0, 1, slots)])
    return transport, senders["0>1"], receivers["0>1"]


def received(receiver: Receiver, tag: int) -> Any:
    message = receiver.recv(tag)
    assert message is not None
    return message.value


def test_tensors_are_passed_by_reference() -> None:
    _, sender, receiver = pair()
    hidden = torch.ones(3, requires_grad=True)
    assert sender.send(0, {"hidden": hidden})
    got = received(receiver, 0)["hidden"]
    assert got.data_ptr() == hidden.data_ptr() and got is not hidden
    assert got.is_leaf and got.requires_grad and got.grad_fn is None


def test_changing_a_received_tensor_that_the_sender_has_saved_is_an_error() -> None:
    _, sender, receiver = pair()
    weight = torch.ones(3, requires_grad=True)
    hidden = weight.exp()  # its backward needs its own output
    assert sender.send(0, hidden.detach())
    received(receiver, 0).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


def test_receiving_what_was_not_sent_raises_at_once() -> None:
    _, _, receiver = pair()
    for wait in (None, 1000.0):
        with pytest.raises(TransportError, match="rank 1 receives on link 0>1, but rank 0 has not sent"):
            receiver.recv(0, wait)


def test_a_graph_keeps_the_slot_until_its_backward() -> None:
    _, sender, receiver = pair(slots=1)
    assert sender.send(0, torch.ones(3, requires_grad=True))
    loss = (received(receiver, 0) ** 2).sum()  # only autograd holds the received tensor
    assert receiver.held() == [(3,)] and not sender.send(1, None)
    loss.backward()
    del loss
    assert receiver.held() == [] and sender.send(1, None)


def test_after_an_abort_the_links_are_empty_and_usable() -> None:
    transport, sender, receiver = pair(slots=2)
    assert sender.send(0, torch.ones(1)) and sender.send(1, torch.ones(1))
    kept = received(receiver, 0)  # as a traceback would keep it
    transport.abort(ValueError(), "rank 0, stage 0, micro-batch 1, instruction 3 (F)")
    with pytest.raises(TransportError, match="has not sent"):
        receiver.recv(1)
    transport.check()
    assert sender.send(5, 1) and sender.send(6, 2)
    assert received(receiver, 5) == 1
    del kept


def test_a_link_to_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are 2 ranks"):
        LocalTransport(2).open([Link("0>2", 0, 2, 1)])
