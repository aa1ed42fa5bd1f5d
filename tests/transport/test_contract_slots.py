"""What every transport does alike with a link's slots: who has one, until when, and what nobody may touch meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Generator
from typing import Any

import pytest
import torch

from pipekern.transport.base import Link
from tests.transport.programs import ALL, FROM_CPU, PROCESSES, Ends, receive, run, send

Steps = Generator[str | None, None, Any]
on_all = pytest.mark.parametrize("transport", [*ALL, FROM_CPU])
on_processes = pytest.mark.parametrize("transport", [*PROCESSES, FROM_CPU])


def credit(ends: Ends, slots: int, values: list[Any]) -> Steps:
    """Rank 0 fills the link; rank 1 takes all, keeps them, and then drops one."""
    if ends.rank == 0:
        sent = [ends.senders["0>1"].send(tag, values[tag % len(values)]) for tag in range(slots + 1)]
        assert sent == [True] * slots + [False]
        yield None
        yield None
        assert not ends.senders["0>1"].send(slots, values[0])
        yield None
        yield from send(ends, "0>1", slots, torch.zeros(2))
        assert not ends.senders["0>1"].send(slots + 1, values[0])
        yield None
    else:
        yield None
        kept = []
        for tag in range(slots):
            kept.append((yield from receive(ends, "0>1", tag)).value)
        assert len(ends.receivers["0>1"].held()) >= slots
        yield None
        yield None
        del kept[0]
        gc.collect()
        kept.append((yield from receive(ends, "0>1", slots)).value)
        yield None
        del kept
        assert ends.receivers["0>1"].held() == []


@on_all
@pytest.mark.parametrize("slots", [1, 3])
def test_a_slot_is_in_use_until_its_last_tensor_dies(transport: str, slots: int) -> None:
    values = [torch.ones(5), {"a": torch.ones(2), "b": (torch.zeros(300_000), None)}, torch.tensor(1.0)]
    run(transport, credit, slots, values, links=[Link("0>1", 0, 1, slots)])


def views_hold(ends: Ends) -> Steps:
    if ends.rank == 0:
        yield from send(ends, "0>1", 0, torch.arange(8.0).requires_grad_())
        yield None
        assert not ends.senders["0>1"].send(1, None)
        yield None
        yield None
        yield from send(ends, "0>1", 1, None)
    else:
        receiver = ends.receivers["0>1"]
        got = (yield from receive(ends, "0>1", 0)).value
        pointer = got.data_ptr()
        saved = (got[2:4] * got[4:6]).sum()  # views, which autograd keeps
        del got
        assert receiver.held() == [(8,)] and receiver.owns(pointer) and receiver.owns(pointer + 31)
        assert not receiver.owns(pointer + 2**40)
        yield None
        yield None
        saved.backward()
        del saved
        gc.collect()
        yield None
        assert (yield from receive(ends, "0>1", 1)).value is None
        assert receiver.held() == []


@on_processes
def test_a_view_that_autograd_keeps_holds_the_slot(transport: str) -> None:
    run(transport, views_hold, links=[Link("0>1", 0, 1, 1)])


def poison(ends: Ends) -> Steps:
    """Rank 1 keeps what it got while rank 0 overwrites its source and sends on."""
    source = torch.zeros(50_000)
    if ends.rank == 0:
        for tag in range(20):
            source.fill_(float(tag))
            yield from send(ends, "0>1", tag, source)
            source.fill_(-1.0)
    else:
        kept: list[torch.Tensor] = []
        for tag in range(20):
            kept.append((yield from receive(ends, "0>1", tag)).value)
            assert all(bool((tensor == float(tag - age)).all()) for age, tensor in enumerate(reversed(kept)))
            del kept[:-1]


@on_processes
def test_nothing_overwrites_a_tensor_that_lives(transport: str) -> None:
    run(transport, poison)


def independent(ends: Ends) -> Steps:
    if ends.rank == 0:
        assert ends.senders["full"].send(0, torch.ones(3))
        assert not ends.senders["full"].send(1, torch.ones(3))
        for tag in range(10):
            yield from send(ends, "free", tag, tag)
        yield from receive(ends, "back", 0)
    else:
        for tag in range(10):
            assert (yield from receive(ends, "free", tag)).value == tag
        assert ends.receivers["full"].ready() or not ends.shared
        yield from send(ends, "back", 0, None)
        assert (yield from receive(ends, "full", 0)).value.tolist() == [1.0, 1.0, 1.0]


@on_all
def test_a_full_link_stops_no_other(transport: str) -> None:
    run(transport, independent, links=[Link("full", 0, 1, 1), Link("free", 0, 1, 2), Link("back", 1, 0, 1)])
