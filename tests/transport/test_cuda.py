"""What the CUDA transport does beyond the contract, on the stand-in driver."""

from __future__ import annotations

import copy
import gc
import os
import secrets
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.errors import ConfigError, MessageMismatch, TransportError
from pipekern.transport.base import Link
from pipekern.transport.open import choose, open_transport
from tests.launch import launch, values
from tests.transport import fake_cuda
from tests.transport.programs import CPUS, Ends, receive, run, send
from tests.transport.shm_job import failure_of

pytest.importorskip("pipekern._C")
from pipekern.transport.cuda import CudaTransport
from pipekern.transport.cuda_ends import CudaReceiver, CudaSender

Steps = Generator[str | None, None, Any]


def alone_main(body: str, name: str) -> Any:
    """In a process of its own: a job of two ranks in this process, on the stand-in."""
    leaks = fake_cuda.load(name)
    links = [Link(f"{codec} 0>1", 0, 1, 2, codec) for codec in ("none", "bf16", "fp8")]
    transport = CudaTransport(None, 2, secrets.token_hex(16), 60.0, lambda: None, CPUS[:2])
    senders, receivers = transport.open(links)
    result = BODIES[body](transport, senders, receivers)
    transport.close()
    del senders, receivers, transport
    assert leaks() == ""
    return result


def alone(body: str, name: str = "fake-cuda") -> Any:
    fake_cuda.library()
    return values(launch(alone_main, 1, body, name))[0]


def value_of(receiver: CudaReceiver, tag: int) -> Any:
    message = receiver.recv(tag)
    assert message is not None
    return message.value


def cast(_: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> dict[str, Any]:
    got = {}
    for name, sender in senders.items():
        value = (torch.linspace(-3, 3, 256), torch.arange(200), torch.linspace(-1, 1, 256).bfloat16(), torch.ones(5))
        assert sender.send(0, value)
        got[name.split()[0]] = value, tuple(map(torch.clone, value_of(receivers[name], 0)))
    return got


def test_golden_codecs() -> None:
    """bf16 rounds float32, fp8 rounds floats of at least a group; everything else is exact."""
    for codec, (sent, got) in alone("cast").items():
        assert [t.dtype for t in sent] == [t.dtype for t in got]
        assert torch.equal(got[1], sent[1]) and torch.equal(got[3], sent[3])
        if codec == "bf16":
            assert torch.equal(got[0], sent[0].bfloat16().float()) and torch.equal(got[2], sent[2])
        elif codec == "fp8":
            scale = 2.0**-7  # 3 at most, over 448, up to a power of two
            assert torch.equal(got[0], (sent[0] / scale).to(torch.float8_e4m3fn).float() * scale)
            assert not torch.equal(got[2], sent[2])
        else:
            assert torch.equal(got[0], sent[0]) and torch.equal(got[2], sent[2])


def add(_: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> None:
    for name, sender in senders.items():
        value = torch.randn(300, 3)
        for tag in range(2):
            assert sender.send(tag, value, given=True)
        got, total = value_of(receivers[name], 0), torch.randn(300, 3)
        before, expected = total.clone(), total + got
        message = receivers[name].recv(1, into=total)
        assert message is not None and (message.value is total) == (sender.link.codec != "none")
        assert torch.equal(total, before if sender.link.codec == "none" else expected)
        del got, message
        # What cannot be added is received as ever.
        for into, other in (
            (total[:5], value),
            (total.T, value),
            (total, (value, 1)),
            (total, None),
            (total, value > 0),
        ):
            kept = into.clone()
            assert sender.send(2, other)
            message = receivers[name].recv(2, into=into)
            assert message is not None and message.value is not into and torch.equal(into, kept)
            del message
        assert receivers[name].end.recv_into(3, total, 0.0, 0) is None
        assert sender.send(3, value)
        with pytest.raises(MessageMismatch, match="has tag 3, the program expects 4"):
            receivers[name].recv(4, into=total)


def test_what_a_codec_carries_is_added_to_a_sum_in_one_pass() -> None:
    alone("add")


def gift(transport: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> str:
    sender, receiver = senders["none 0>1"], receivers["none 0>1"]
    for given in (False, True):
        value = torch.zeros(1000)
        assert sender.send(0, value, given=given)
        value.fill_(1.0)
        if not given:
            assert not value_of(receiver, 0).any()  # the change came after the read
            transport.check()
    with pytest.raises(TransportError, match=r"changed in place after rank 0 had sent it on link 'none 0>1'") as caught:
        while True:
            transport.check()
    return str(caught.value)


def test_a_gift_that_is_changed_is_an_error_and_everything_else_is_read_first() -> None:
    assert "[[1000]]" in alone("gift")


def nobody(_: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> None:
    with pytest.raises(TransportError, match="rank 1 receives on link none 0>1, but rank 0 has not sent"):
        receivers["none 0>1"].recv(0)
    assert senders["none 0>1"].send(0, "there")
    assert value_of(receivers["none 0>1"], 0) == "there"
    assert senders["none 0>1"].send(1, torch.arange(3.0), given=True)
    assert value_of(receivers["none 0>1"], 1).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("name", list(fake_cuda.KNOBS))
def test_in_one_process_nobody_waits_for_what_is_not_sent(name: str) -> None:
    alone("nobody", name)


def again(transport: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> None:
    for name, sender in senders.items():
        assert sender.send(0, torch.zeros(300)) and sender.send(1, (torch.zeros(3), "unread"))
        assert not sender.send(2, "no slot is free")
        transport.abort(ValueError("by the model"), "a stage")
        for tag in (5, 6):
            assert sender.send(tag, torch.full((300,), float(tag)))
        assert [value_of(receivers[name], tag).unique().item() for tag in (5, 6)] == [5.0, 6.0]


@pytest.mark.parametrize("name", list(fake_cuda.KNOBS))
def test_in_one_process_links_can_be_used_after_a_failure(name: str) -> None:
    alone("again", name)


def lets_go(transport: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> None:
    import weakref

    value = torch.zeros(100_000)
    reference = weakref.ref(value)
    assert senders["none 0>1"].send(0, value)
    del value
    assert value_of(receivers["none 0>1"], 0).numel() == 100_000
    while reference() is not None:
        transport.check()


def test_a_sent_tensor_is_held_until_it_has_been_read() -> None:
    alone("lets_go")


def outlives(transport: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> None:
    assert senders["none 0>1"].send(0, torch.arange(10.0))
    kept = value_of(receivers["none 0>1"], 0)
    transport.close()
    assert kept.tolist() == list(range(10))
    del kept
    gc.collect()


def test_a_received_tensor_outlives_the_transport() -> None:
    alone("outlives")


def forks(_: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> None:
    sender, receiver = senders["none 0>1"], receivers["none 0>1"]
    assert sender.send(0, torch.arange(3.0))
    kept = value_of(receiver, 0)
    child = os.fork()
    if child == 0:
        # No assertion may leave this process: the test would go on in it.
        del kept
        texts = [failure_of(call)[2] for call in (lambda: sender.send(1, torch.ones(1)), lambda: receiver.recv(1))]
        os._exit(0 if all("forked" in text for text in texts) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept.tolist() == [0.0, 1.0, 2.0]
    del kept
    assert sender.send(1, torch.ones(1)) and value_of(receiver, 1).tolist() == [1.0]


@pytest.mark.parametrize("name", sorted(fake_cuda.KNOBS))
def test_a_forked_child_is_refused_and_frees_nothing(name: str) -> None:
    alone("forks", name)


def relays(transport: CudaTransport, senders: dict[str, CudaSender], receivers: dict[str, CudaReceiver]) -> None:
    """Every slot's message goes on out of its slot, alone and in a bundle; nobody looks whether that was read."""
    for given in (False, True):
        for tag in (0, 1):
            assert senders["none 0>1"].send(tag, torch.full((300,), 1.0 + tag))
        one, other = value_of(receivers["none 0>1"], 0), value_of(receivers["none 0>1"], 1)
        assert senders["bf16 0>1"].send(0, one, given=given)
        assert senders["bf16 0>1"].send(1, (other, other[:0], torch.ones(300)), given=given)
        del one, other
        assert receivers["none 0>1"].held() == []
        for tag in (2, 3):
            assert senders["none 0>1"].send(tag, torch.zeros(300))
        assert not value_of(receivers["none 0>1"], 2).any() and not value_of(receivers["none 0>1"], 3).any()
        assert value_of(receivers["bf16 0>1"], 0).unique().item() == 1.0
        assert [part.unique().item() for part in value_of(receivers["bf16 0>1"], 1)[::2]] == [2.0, 1.0]


@pytest.mark.parametrize("name", list(fake_cuda.KNOBS))
def test_what_is_sent_on_out_of_its_slot_does_not_keep_it(name: str) -> None:
    alone("relays", name)


BODIES: dict[str, Callable[..., Any]] = {
    body.__name__: body for body in (again, relays, cast, add, forks, gift, nobody, lets_go, outlives)
}


def ways(ends: Ends) -> Steps:
    other = 1 - ends.rank
    yield from send(ends, f"{ends.rank}>{other}", 0, torch.ones(3))
    yield from receive(ends, f"{other}>{ends.rank}", 0)
    assert isinstance(ends.transport, CudaTransport)
    return ends.transport.ways()


@pytest.mark.parametrize("name", ["fake-cuda", "fake-cuda-staged"])
def test_each_link_says_which_way_it_goes(name: str) -> None:
    for row in run(name, ways):
        (way,) = row.values()
        assert way == "ipc" if name == "fake-cuda" else way.startswith("staged: CUDA refused an IPC handle")


def test_a_link_to_the_cpu_is_staged() -> None:
    """A CPU rank's own links are those of shared memory, and so have no way to tell."""
    assert run("fake-mixed-odd", ways) == [{"0>1": "staged: rank 1 is on the CPU"}, {}]


def test_a_codec_needs_the_cuda_transport() -> None:
    with pytest.raises(ConfigError, match="codec='bf16': the transport here is 'local', and only 'cuda' casts"):
        pk.Pipeline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), loss_fn=nn.MSELoss(), microbatches=2, codec="bf16")
    with pytest.raises(ConfigError, match="codec='fp4'"):
        pk.Pipeline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), loss_fn=nn.MSELoss(), microbatches=2, codec="fp4")


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("pipekern._C.cuda_obstacle", lambda: "no CUDA driver here")
    yield


@pytest.mark.usefixtures("no_driver")
def test_auto_and_what_cannot_be_had() -> None:
    cards = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose("auto", None, cards) == "local"
    with pytest.raises(ConfigError, match="transport='cuda' cannot be used: no CUDA driver here"):
        choose("cuda", None, cards)
    with pytest.raises(ConfigError, match="its device is cpu"):
        open_transport("cuda", [], copy.copy(CPUS[:2]), None)


def test_auto_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipekern._C.cuda_obstacle", lambda: "")
    assert choose("auto", None, [torch.device("cuda", 0), torch.device("cuda", 1)]) == "cuda"
    assert choose("auto", None, [torch.device("cuda", 0)] * 2) == "local"  # by reference: nothing is faster
    assert choose("auto", None, CPUS[:2]) == "local"
