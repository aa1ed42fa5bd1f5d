"""The recorder that tests of an executor use."""

from __future__ import annotations

import pytest
import torch

from pipekern.errors import PeerDied, TransportError
from pipekern.transport.base import Link, Receiver, Sender, Transport
from pipekern.transport.null import Call, NullTransport

LINKS = [Link("0>1", 0, 1, 2), Link("1>2", 1, 2, 2), Link("2>1", 2, 1, 2)]


def test_golden() -> None:
    null = NullTransport(rank=1)
    senders, receivers = null.open(LINKS)
    assert list(senders) == ["1>2"] and list(receivers) == ["0>1", "2>1"]
    value = (torch.ones(2, 3), {"mask": torch.tensor([True])})
    null.script("0>1", value, digest=9)
    message = receivers["0>1"].recv(tag=7)
    assert message is not None and message.value is value and message.digest == 9
    assert senders["1>2"].send(8, torch.zeros(4, dtype=torch.bfloat16))
    null.close()
    assert null.calls == [
        Call("open"),
        Call("recv", "0>1", 7, ((2, 3), (1,)), (torch.float32, torch.bool)),
        Call("send", "1>2", 8, ((4,),), (torch.bfloat16,)),
        Call("close"),
    ]


def test_it_has_the_interface_of_a_transport() -> None:
    transport: Transport = NullTransport()
    senders, receivers = transport.open(LINKS)
    sender: Sender = senders["0>1"]
    receiver: Receiver = receivers["0>1"]
    assert sender.link == receiver.link == LINKS[0]
    assert receiver.held() == [] and not receiver.owns(0) and not receiver.ready()


def test_sends_find_no_slot_as_often_as_told() -> None:
    null = NullTransport()
    senders, _ = null.open(LINKS)
    null.refuse("0>1", 2)
    assert [senders["0>1"].send(tag, None) for tag in range(4)] == [False, False, True, True]
    assert [call.op for call in null.calls] == ["open", "full", "full", "send", "send"]


def test_nothing_scripted_is_nothing_received() -> None:
    null = NullTransport()
    _, receivers = null.open(LINKS)
    assert receivers["0>1"].recv(3, wait=0.0) is None
    with pytest.raises(TransportError, match="nothing is scripted on link 0>1"):
        receivers["0>1"].recv(3)


def test_a_failure_is_raised_by_every_call() -> None:
    null = NullTransport()
    senders, receivers = null.open(LINKS)
    null.script("0>1", "never seen")
    null.abort(PeerDied("rank 2 has died", 2), "rank 0")
    for call in (null.check, lambda: senders["0>1"].send(0, 1), lambda: receivers["0>1"].recv(0)):
        with pytest.raises(PeerDied, match="rank 2"):
            call()
