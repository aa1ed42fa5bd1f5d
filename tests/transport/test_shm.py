"""Shared memory: what arrives, and when a slot is free again."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import secrets
from typing import Any

import pytest
import torch
from torch import Tensor

from pipekern import _C
from pipekern.errors import ConfigError, MessageMismatch
from pipekern.transport.base import Link
from tests.launch import launch, values
from tests.transport.shm_job import alone, barrier, join, neighbours, rank_of, receive

# What arrives


def golden_worker(token: str) -> Any:
    transport = join(token)
    senders, receivers = transport.open(neighbours(2))
    if rank_of() == 0:
        hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        assert senders["0>1"].send(7, hidden, digest=99)
        gradient = receive(receivers["1>0"], 8)
        transport.close()
        return gradient.tolist()
    message = receivers["0>1"].recv(7)
    assert message is not None and message.digest == 99
    assert message.value.is_leaf and message.value.requires_grad
    (message.value**2).sum().backward()
    assert senders["1>0"].send(8, message.value.grad)
    transport.close()
    return message.value.tolist()


def test_golden() -> None:
    gradient, hidden = values(launch(golden_worker, 2, secrets.token_hex(16)))
    assert hidden == [[1.0, 2.0], [3.0, 4.0]]
    assert gradient == [[2.0, 4.0], [6.0, 8.0]]


def any_tensor(choice: random.Random, most: int) -> Tensor:
    dtype = choice.choice([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64])
    shape = [choice.randint(0, 2) for _ in range(choice.randint(0, 5))] + [choice.randint(0, most)]
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    return tensor.transpose(0, -1) if choice.random() < 0.3 else tensor


def stream_worker(token: str, seed: int, count: int) -> int:
    """Values of any size, type and nesting; the receiver keeps some of them, and each must stay what it was."""
    transport = join(token)
    senders, receivers = transport.open([Link("0>1", 0, 1, 5)])
    choice, own_choice = random.Random(seed), random.Random(seed + 1)  # the first one the same on both ranks
    torch.manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    for n in range(count):
        most = choice.choice([3, 50, 50, 50, 2000])
        value = any_tensor(choice, most)
        bundle = choice.random() < 0.2
        if rank_of() == 0:
            while not senders["0>1"].send(n, {"x": (value, n)} if bundle else value, digest=n):
                os.sched_yield()
            continue
        kept = kept[-own_choice.randint(1, 4) :]  # 5 slots: one is free for what comes
        arrived = receive(receivers["0>1"], n)
        got = arrived["x"][0] if bundle else arrived
        del arrived
        assert got.dtype == value.dtype and torch.equal(got, value), n
        kept.append((got, value))
        assert all(torch.equal(*pair) for pair in kept), n
    barrier("sent")
    transport.close()
    return count


@pytest.mark.parametrize("count", [2**10, pytest.param(2**16, marks=pytest.mark.full)])
def test_streams_of_random_messages(count: int) -> None:
    seed = random.randrange(2**32)
    assert values(launch(stream_worker, 2, secrets.token_hex(16), seed, count, timeout=100.0)) == [count] * 2, seed


def test_size_dtype_and_shape_may_change_at_any_message() -> None:
    transport, sender, receiver = alone(2)
    for n, count in enumerate([1, 0, 5000, 3, 2_000_000, 7]):
        for dtype in (torch.float64, torch.bfloat16, torch.bool):
            sent = torch.arange(count).to(dtype)
            assert sender.send(n, sent)
            assert torch.equal(receive(receiver, n), sent)
    transport.close()


@pytest.mark.parametrize("shape", [(2, 1, 2, 1, 2), (2**33, 0), ()], ids=str)
def test_shapes_that_a_header_does_not_hold(shape: tuple[int, ...]) -> None:
    transport, sender, receiver = alone(1)
    sent = torch.zeros(shape, dtype=torch.float16)
    assert sender.send(0, sent)
    got = receive(receiver, 0)
    assert got.shape == sent.shape and got.dtype == sent.dtype
    transport.close()


def test_raw_bytes() -> None:
    transport, sender, receiver = alone(1)
    for data in (b"", b"activations", os.urandom(100_000)):
        assert sender.end.send_bytes(3, data) and isinstance(receiver.end, _C.Receiver)
        assert receiver.end.recv_bytes(3, -1.0) == data
    transport.close()


def test_what_cannot_travel_is_refused_and_nothing_is_sent() -> None:
    transport, sender, receiver = alone(1)
    for value in (object(), torch.eye(2).to_sparse(), torch.empty(1, device="meta")):
        with pytest.raises(ConfigError):
            sender.send(0, value)
    assert not receiver.ready()
    transport.close()


def test_a_digest_of_memory() -> None:
    tensor = torch.randn(1000)
    of = lambda t, seed=0: _C.digest(t.data_ptr(), t.nbytes, seed)  # noqa: E731
    assert of(tensor) == of(tensor.clone()) != of(tensor, 1)
    changed = tensor.clone()
    changed[500] = -changed[500]
    assert of(changed) != of(tensor)


# When a slot is free again


def test_credit_returns_with_the_last_view_in_any_order() -> None:
    transport, sender, receiver = alone(3)
    for n in range(3):
        assert sender.send(n, torch.full((n + 1,), float(n)))
    assert not sender.send(3, torch.zeros(1))
    first, second, third = (receive(receiver, n) for n in range(3))
    assert receiver.held() == [(1,), (2,), (3,)]
    assert all(receiver.owns(view.data_ptr()) for view in (first, second, third))
    assert not receiver.owns(torch.zeros(1).data_ptr())
    del second, third
    assert receiver.held() == [(1,)]
    assert not sender.send(3, torch.zeros(1))  # the next slot is the first one's
    part = first[:1]
    del first
    assert not sender.send(3, torch.zeros(1))  # a view of the view
    del part
    assert sender.send(3, torch.zeros(4)) and receiver.held() == []
    transport.close()


def test_a_bundles_tensors_share_the_slot_and_nothing_else() -> None:
    transport, sender, receiver = alone(1)
    assert sender.send(0, {"a": torch.ones(3, requires_grad=True), "b": [torch.zeros(2, 2), None]})
    value = receive(receiver, 0)
    assert receiver.held() == [(3,), (2, 2)]
    product = value["a"] * value["a"]
    value["b"][0].add_(1)  # in place, beside a tensor that autograd has saved
    product.sum().backward()
    assert value["a"].grad.tolist() == [2.0, 2.0, 2.0]
    kept = value["b"][0]
    del value, product
    assert not sender.send(1, None)
    del kept
    assert sender.send(1, None) and receive(receiver, 1) is None
    assert sender.send(2, "the slot of a message without tensors is free at once")
    transport.close()


def test_autograd_holds_the_slot_until_backward() -> None:
    """Later messages are poison: a slot that is given back early turns the gradient into NaN."""
    transport, sender, receiver = alone(2)
    weight = torch.ones(2, 2, requires_grad=True)
    assert sender.send(0, torch.full((1, 2), 3.0))
    loss = (receive(receiver, 0) @ weight).sum()
    poison = torch.full((1, 2), float("nan"))
    sent = 0
    for n in range(1, 5):
        sent += sender.send(n, poison)
        if receiver.ready():
            receive(receiver, n)
    assert sent == 1  # into the second slot; the first is the loss's
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    del loss
    assert sender.send(2, poison)
    transport.close()


def test_a_view_outlives_transport_and_sender() -> None:
    transport, sender, receiver = alone(1)
    assert sender.send(0, torch.arange(5))
    view = receive(receiver, 0)
    transport.close()
    del transport, sender, receiver
    gc.collect()
    assert view.tolist() == [0, 1, 2, 3, 4]


def test_the_slots_memory_is_what_the_tensor_shows() -> None:
    transport, sender, receiver = alone(1)
    assert sender.send(0, torch.zeros(4, dtype=torch.uint8))
    view = receive(receiver, 0)
    ctypes.memset(view.data_ptr(), 7, 4)
    assert view.tolist() == [7, 7, 7, 7]
    transport.close()


def test_a_wrong_tag_names_both() -> None:
    transport, sender, receiver = alone(1)
    assert sender.send(5, torch.zeros(1))
    with pytest.raises(MessageMismatch, match=r"link '0>0' from rank 0 has tag 5, the program expects 6") as caught:
        receiver.recv(6)
    assert caught.value.rank == 0
    transport.close()
