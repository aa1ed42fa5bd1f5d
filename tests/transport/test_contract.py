"""What every transport does alike: one suite on all of them.

Slots and credit are in test_contract_slots.py, failing ranks in test_faults.py, the interpreter's end in test_exit.py.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

from pipekern.errors import ConfigError, MessageMismatch, TransportError
from pipekern.transport import message
from pipekern.transport.base import Link
from pipekern.transport.value import tensors
from tests.transport.programs import ALL, PROCESSES, WAIT, Ends, receive, run, send
from tests.transport.samples import Frozen, Hidden, records, same

Steps = Generator[str | None, None, Any]
on_all = pytest.mark.parametrize("transport", ALL)
on_processes = pytest.mark.parametrize("transport", PROCESSES)


def golden(ends: Ends) -> Steps:
    if ends.rank == 0:
        value = {"hidden": torch.arange(6.0).reshape(2, 3).requires_grad_(), "mask": (torch.tensor([True]), None)}
        yield from send(ends, "0>1", 7, value, digest=2**63 - 1)
        return None
    hidden = (got := (yield from receive(ends, "0>1", 7))).value["hidden"]
    return got.digest, hidden.tolist(), hidden.requires_grad, hidden.is_leaf, got.value["mask"][1]


@on_all
def test_golden(transport: str) -> None:
    assert run(transport, golden)[1] == (2**63 - 1, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], True, True, None)


def sample(seed: int) -> list[Any]:
    """One value of every kind that may travel, made from ``seed`` alike on every rank."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    matrix = torch.randn(6, 8, generator=g)
    return [
        matrix.clone(),
        matrix.clone().requires_grad_(),
        matrix.T,
        matrix[1:5, ::2],
        matrix[0].expand(3, 8),
        matrix.double().requires_grad_(),
        matrix.bfloat16(),
        matrix.half().requires_grad_(),
        matrix > 0,
        torch.randint(-(2**62), 2**62, (5,), generator=g),
        torch.randint(0, 255, (3, 0, 2), generator=g).to(torch.uint8),
        torch.tensor(float(seed)),
        torch.tensor(float("nan")).requires_grad_(),
        torch.randn(1, 2, 1, 3, 1, 2, generator=g),
        torch.complex(matrix, matrix).conj(),
        torch.complex(matrix, matrix).conj().imag,  # negated when it is read
        torch._efficientzerotensor(3),  # has no memory
        *(torch.randint(0, 2, (64,), generator=g, dtype=torch.uint8).view(dtype) for dtype in message.DTYPES),
        None,
        True,
        -(2**70),
        float("-inf"),
        "Grüße",
        (),
        [],
        {},
        torch.Size([2, 3]),
        {"a": (matrix.clone(), None, [1, 2.5, "x"]), "b": {"c": matrix.clone().requires_grad_()}, "": (matrix.T, 0)},
        [torch.empty(0), (torch.empty(2, 0).requires_grad_(),)],
        tuple(torch.full((n,), float(n)) for n in range(1, 40)),
        *records(g),
    ]


def round_trip(ends: Ends) -> Steps:
    for tag, value in enumerate(sample(1)):
        if ends.rank == 0:
            yield from send(ends, "0>1", tag, value)
            back = yield from receive(ends, "1>0", tag)
            assert same(value, back.value), (tag, value, back.value)
        else:
            there = yield from receive(ends, "0>1", tag)
            assert same(value, there.value), (tag, value, there.value)
            yield from send(ends, "1>0", tag, there.value)
        leaves = tensors((there if ends.rank else back).value)
        assert all(leaf.is_leaf and leaf.is_contiguous() for leaf in leaves) or ends.shared


@on_all
def test_every_kind_of_value_goes_there_and_back(transport: str) -> None:
    run(transport, round_trip)


def shapes_change(ends: Ends) -> Steps:
    for tag, size in enumerate([3, 100_000, 1, 0, 2_000_000, 7]):
        if ends.rank == 0:
            yield from send(ends, "0>1", tag, torch.arange(size))
        else:
            got = yield from receive(ends, "0>1", tag)
            assert torch.equal(got.value, torch.arange(size))


@on_all
def test_shapes_change_from_message_to_message(transport: str) -> None:
    run(transport, shapes_change)


def in_order(ends: Ends, messages: int) -> Steps:
    others = [rank for rank in range(4) if rank != ends.rank]
    for tag in range(messages):
        for other in others:
            yield from send(ends, f"{ends.rank}>{other}", tag, torch.tensor([ends.rank, tag]), digest=tag)
        for other in reversed(others):
            got = yield from receive(ends, f"{other}>{ends.rank}", tag)
            assert got.value.tolist() == [other, tag] and got.digest == tag


@on_all
def test_first_in_first_out_on_all_links_of_four_ranks(transport: str) -> None:
    links = [Link(f"{a}>{b}", a, b, 1 + (a + b) % 3) for a in range(4) for b in range(4) if a != b]
    run(transport, in_order, 12, ranks=4, links=links)


def graphs_apart(ends: Ends) -> Steps:
    if ends.rank == 0:
        weight = torch.tensor(3.0, requires_grad=True)
        output = weight * torch.ones(4)
        yield from send(ends, "0>1", 0, (output, weight.detach()))
        gradient = yield from receive(ends, "1>0", 0)
        assert weight.grad is None
        output.backward(gradient.value)
        return weight.grad
    output, plain = (yield from receive(ends, "0>1", 0)).value
    assert output.is_leaf and output.requires_grad and not plain.requires_grad
    (output * torch.arange(4.0)).sum().backward()
    yield from send(ends, "1>0", 0, output.grad)
    return None


@on_all
def test_both_sides_have_graphs_of_their_own(transport: str) -> None:
    assert run(transport, graphs_apart)[0] == torch.tensor(6.0)


def one_tensor_in_two_places(ends: Ends) -> Steps:
    if ends.rank == 0:
        weight = torch.tensor(3.0, requires_grad=True)
        output = weight * torch.ones(4)
        yield from send(ends, "0>1", 0, Frozen(output, {"again": Hidden(output, mask=weight.detach())}))
        gradient = yield from receive(ends, "1>0", 0)
        output.backward(gradient.value)
        return weight.grad
    got = (yield from receive(ends, "0>1", 0)).value
    assert got.left is got.right["again"].state
    (got.left * torch.arange(4.0) + got.right["again"].state).sum().backward()
    assert ends.receivers["0>1"].held().count((4,)) == 1
    yield from send(ends, "1>0", 0, got.left.grad)
    return None


@on_all
def test_a_tensor_in_two_places_arrives_as_one_and_gets_one_gradient(transport: str) -> None:
    assert run(transport, one_tensor_in_two_places)[0] == torch.tensor(10.0)


def wrong_tag(ends: Ends) -> Steps:
    if ends.rank == 0:
        yield from send(ends, "0>1", 11, torch.ones(1))
        yield None
    else:
        yield None
        with pytest.raises(MessageMismatch, match=r"'0>1'.*11.*22") as caught:
            ends.receivers["0>1"].recv(22)
        return caught.value.rank
    return None


@on_all
def test_a_message_with_another_tag_is_refused(transport: str) -> None:
    assert run(transport, wrong_tag)[1] == 0


def limits(ends: Ends) -> Steps:
    if ends.rank == 0:
        yield None
        yield from send(ends, "0>1", 5, "late")
    else:
        receiver = ends.receivers["0>1"]
        assert receiver.recv(5, wait=0.0) is None
        assert receiver.recv(5, wait=0.05) is None
        assert not receiver.ready()
        yield None
        while not receiver.ready():
            yield WAIT
        got = receiver.recv(5, wait=0.0)
        assert got is not None and got.value == "late"


@on_processes
def test_a_limited_wait_returns_nothing(transport: str) -> None:
    run(transport, limits)


def refusals(ends: Ends) -> Steps:
    if ends.rank == 0:
        for value, named in [
            ({1, 2}, "builtins.set"),
            ([0, object()], "the value\\[1\\]"),
            ({3: 4}, "key 3"),
            (torch.ones(2).to_sparse(), "torch.sparse_coo"),
            ((torch.empty(2, device="meta"),), "meta"),
        ]:
            with pytest.raises(ConfigError, match=named):
                ends.senders["0>1"].send(0, value)
        yield from send(ends, "0>1", 1, "still fine")
    else:
        assert (yield from receive(ends, "0>1", 1)).value == "still fine"


@on_all
def test_what_cannot_travel_is_refused_and_the_link_goes_on(transport: str) -> None:
    run(transport, refusals)


def close_first(ends: Ends, first: int) -> Steps:
    """One rank closes while the other still has a message to read."""
    other = 1 - ends.rank
    yield from send(ends, f"{ends.rank}>{other}", 3, torch.full((1000,), float(ends.rank)))
    yield None
    if ends.rank != first:
        got = yield from receive(ends, f"{other}>{ends.rank}", 3)
        assert bool((got.value == float(other)).all())
        ends.transport.check()
    ends.transport.close()
    ends.transport.close()
    with pytest.raises(TransportError):
        ends.transport.check()
    with pytest.raises(TransportError):
        ends.senders[f"{ends.rank}>{other}"].send(4, None)


@on_processes
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("store", ["outside", "rank 0"])
def test_a_clean_close_is_no_error_whoever_is_first(transport: str, first: int, store: str) -> None:
    run(transport, close_first, first, store=store)


def test_local_closes_twice() -> None:
    def program(ends: Ends) -> Steps:
        yield from send(ends, f"{ends.rank}>{1 - ends.rank}", 0, 1)
        yield None
        ends.transport.close()
        ends.transport.close()
        with pytest.raises(TransportError):
            ends.senders[f"{ends.rank}>{1 - ends.rank}"].send(1, 1)

    run("local", program)
