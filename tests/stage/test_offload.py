"""A stage's activations away and back: the same gradients, and memory that is really gone meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipekern.errors import ConfigError
from pipekern.runtime.footprint import Made
from pipekern.stage.host import Host
from pipekern.stage.offload import Mark, Offload
from pipekern.stage.stage import Stage
from pipekern.stage.unit import cut

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: copies on streams")
DEVICES = pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda", 0), marks=[pytest.mark.gpu, GPU])], ids=["cpu", "gpu"]
)
WIDTH = 32


class Block(nn.Module):
    """Views of one product, attention, dropout, a mask that is no one's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attend(self.norm(x)).chunk(3, dim=-1)
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        x = x + (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9).softmax(-1) @ v
        return x + self.mix(x)


def _stage(net: nn.Module, away: bool, defers: bool = False, how: str = "none", device: torch.device = CPU) -> Stage:
    root, units = cut(nn.Sequential(copy.deepcopy(net)).to(device), 0)
    offload = Offload([0], device, Host(device)) if away else None
    keys = [list(range(len(units))) for _ in range(2)]
    return Stage(1, root, units, device, keys, 0, defers, [how] * len(units), offload=offload)


def _input(device: torch.device = CPU) -> Tensor:
    return torch.randn(4, 8, WIDTH, device=device).requires_grad_()


def _gradients(stage: Stage, value: Any, gradient: Any, away: bool) -> list[Any]:
    """Of the input and of all weights, by one micro-batch."""
    stage.begin()
    stage.forward(0, value, 7)
    if away:
        stage.put_away(0)
        assert stage.live == 0
        stage.bring_back(0)
    assert stage.live == 1
    back = stage.backward_input(0, gradient)
    stage.backward_weight(0)
    return [back, *(p.grad for p in stage.parameters())]


@DEVICES
@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("defers", [False, True])
def test_the_same_bits(defers: bool, how: str, device: torch.device, seed: int) -> None:
    net = nn.Sequential(Block(), Block(), Block())
    value, gradient = _input(device), torch.randn(4, 8, WIDTH, device=device)
    want, got = (
        _gradients(_stage(net, away, defers, how, device), value.detach().clone().requires_grad_(), gradient, away)
        for away in (False, True)
    )
    assert all(map(torch.equal, got, want))


class Bytes(NamedTuple):
    """Alive of what was made, without host memory."""

    before: int
    away: int
    back: int
    after: int


def _bytes(how: str, away: bool) -> Bytes:
    stage = _stage(nn.Sequential(Block(), Block(), Block()), away, how=how)
    for _ in range(2):  # the second time host memory is there already
        stage.begin()
        with Made() as made:
            stage.forward(0, _input(), 7)
            alive = [made.alive()]
            for move in (stage.put_away, stage.bring_back):
                if away:
                    move(0)
                alive.append(made.alive())
            stage.backward_input(0, torch.zeros(4, 8, WIDTH))
            stage.backward_weight(0)
            for parameter in stage.parameters():
                parameter.grad = None
            alive.append(made.alive())
    return Bytes(*alive)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_memory_is_gone_and_back(how: str) -> None:
    """Nothing but what is too small to be worth a copy stays, of what the graph, the stash or checkpoints held."""
    plain, moved = _bytes(how, away=False), _bytes(how, away=True)
    assert moved.away <= plain.before / 64 + 64
    assert moved.before <= plain.before  # a stage's output is not held
    assert moved.before <= moved.back <= moved.before + 64
    assert moved.after == plain.after == 0


def _saved(forward: Callable[[], Any], there: list[Tensor]) -> tuple[Tensor, Offload]:
    offload = Offload([0], CPU, Host(CPU))
    with offload.saving(0):
        output = forward()
    offload.put(0, there)
    return output, offload


def test_golden_marks() -> None:
    """Two views of one tensor are one block; a weight stays."""
    x, weight = torch.randn(64, 64), torch.randn(32, requires_grad=True)
    own = [x.clone()]
    held = StorageWeakRef(own[0].untyped_storage())
    output, offload = _saved(lambda: sum((part * weight).sum() for part in own[0].split(32, 1)), [weight])
    assert [place.nbytes for place in offload._parcels[0].places] == [64 * 64 * 4]
    own.clear()
    assert not held.expired()
    offload.settle(0)
    assert held.expired() and offload.away == {0}
    offload.fetch(0)
    offload.join(0)
    output.backward()
    assert weight.grad is not None and torch.allclose(weight.grad, x[:, :32].sum(0) + x[:, 32:].sum(0), atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_written_in_place_after_it_was_saved(left: bool) -> None:
    """Raises as autograd does, also when the memory has left before the write."""
    x = torch.randn(64, requires_grad=True)
    saved = x.sin()
    output, offload = _saved(lambda: (saved * saved).sum(), [])
    if left:
        offload.settle(0)
    with torch.no_grad():
        saved.add_(1)
    if left:
        offload.fetch(0)
    offload.join(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_strange_tensors() -> None:
    """Sparse, conjugated, of another type, empty, overlapping: right, whether they move or not."""
    x = torch.randn(64, 64, dtype=torch.complex64, requires_grad=True)
    sparse = torch.eye(64).to_sparse()
    wide = torch.randn(64, 1).expand(64, 64)

    def forward(x: Tensor) -> Tensor:
        y = (x.conj() * x).real * wide
        return (torch.sparse.mm(sparse, y) ** 2).sum() + (y.double() ** 3).sum() + y[:0].exp().sum()

    want = torch.autograd.grad(forward(x), x)[0]
    output, offload = _saved(lambda: forward(x), [])
    offload.settle(0)
    offload.fetch(0)
    offload.join(0)
    assert torch.equal(torch.autograd.grad(output, x)[0], want)


def test_what_a_stage_keeps_for_itself_is_never_touched() -> None:
    """A module that looks at its input later sees its input."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.seen = nn.Linear(WIDTH, WIDTH), torch.empty(0)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return self.inner(x)

    stage = _stage(Keeping(), away=True)
    value = _input()
    want = value.detach().clone()
    stage.begin()
    stage.forward(0, value, 7)
    stage.put_away(0)
    module = next(m for m in stage.units[0].train.modules() if isinstance(m, Keeping))
    assert torch.equal(module.seen, want)


def test_a_batch_is_its_owners() -> None:
    """On the first stage, also where it asks for a gradient."""
    stage = _stage(nn.Linear(WIDTH, WIDTH), away=True)
    stage.index = 0
    value = _input()
    want = value.detach().clone()
    stage.begin()
    stage.forward(0, value, 7)
    stage.put_away(0)
    assert torch.equal(value, want)


def test_cleared_between() -> None:
    """After an exception at any point nothing is held, and the next micro-batch runs."""
    net, value, gradient = Block(), _input(), torch.randn(4, 8, WIDTH)
    want = _gradients(_stage(net, away=False), value.detach().clone().requires_grad_(), gradient, away=False)
    stage = _stage(net, away=True)
    for moves in ([], [stage.put_away], [stage.put_away, stage.bring_back]):
        with Made() as made:
            stage.begin()
            stage.forward(0, value.detach().clone().requires_grad_(), 7)
            for move in moves:
                move(0)
            stage.clear()
            assert stage.live == 0
        assert made.alive(host._cdata for host in _host_memory(stage)) == 0
    assert all(map(torch.equal, _gradients(stage, value, gradient, away=True), want))


def _host_memory(stage: Stage) -> list[torch.UntypedStorage]:
    assert stage._offload is not None
    return [buffer.memory.untyped_storage() for buffer in stage._offload._host._free]


def test_torch_func_is_refused() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda y: (y**3).sum())(x)

    stage = _stage(nn.Sequential(nn.Linear(WIDTH, WIDTH), Inner()), away=True)
    stage.begin()
    with pytest.raises(ConfigError, match=r"torch\.func.*leave out offload"):
        stage.forward(0, _input(), 7)


def test_a_mark_without_its_memory_is_no_number() -> None:
    mark = Mark(torch.randn(3))
    assert torch.equal(mark.get(), mark.get())
    assert mark.movable(CPU, set()) is mark.get()
    assert mark.movable(torch.device("meta"), set()) is None


@pytest.mark.gpu
@GPU
def test_no_call_waits_for_the_device(seed: int) -> None:
    """Forward, copies both ways and backward are queued with synchronising calls forbidden."""
    device = torch.device("cuda", 0)
    stage = _stage(nn.Sequential(Block(), Block()), away=True, device=device)
    value, gradient = _input(device), torch.randn(4, 8, WIDTH, device=device)
    _gradients(stage, value, gradient, away=True)  # host memory is made, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(stage, value, gradient, away=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@GPU
def test_memory_of_the_device_falls(seed: int) -> None:
    device = torch.device("cuda", 0)
    stage = _stage(
        nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(8))), True, device=device
    )
    stage.begin()
    value = torch.randn(1 << 14, WIDTH, device=device, requires_grad=True)
    start = torch.cuda.memory_allocated(device)
    stage.forward(0, value, 7)
    full = torch.cuda.memory_allocated(device) - start
    stage.put_away(0)
    assert torch.cuda.memory_allocated(device) - start < full / 16
    stage.bring_back(0)
    stage.backward(0, torch.randn(1 << 14, WIDTH, device=device))
