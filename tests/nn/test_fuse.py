"""Modules replaced by what they compute, in place, and given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.kernels.accuracy import DTYPES, close
from tests.nn.foreign import KNOWN, OTHERS, Gated, H, Rms


class Model(nn.Module):
    """A norm used twice, a feed-forward, and weights that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, H)
        self.norm, self.again = Rms(), nn.Sequential(nn.Linear(H, H), nn.GELU())
        self.mlp = Gated()
        self.same = self.norm
        self.last = nn.LayerNorm(H)
        self.head = nn.Linear(H, 9, bias=False)
        self.head.weight = self.embed.weight
        self.norm.scale.requires_grad_(False)
        self.mlp.eval()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + self.again(self.norm(h))
        return self.head(self.last(h + self.mlp(self.same(h))))


def test_golden() -> None:
    model = Model()
    report = pk.nn.fuse(model)
    assert str(report).splitlines() == [
        "norm: Rms → RMSNorm",
        "again.1: GELU → GELU",
        "mlp: Gated → SwiGLU",
        "last: LayerNorm → LayerNorm",
    ]
    assert report.left == [] and isinstance(model.norm, Rms) and type(model.last) is pk.nn.LayerNorm


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "modules": {name: (id(m), type(m), m.training, dict(vars(m))) for name, m in model.named_modules()},
        "requires": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "text": repr(model),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_undone_bit_for_bit() -> None:
    """Fused, only classes differ; undone, nothing does, and the outputs are the same bits. Random numbers stay."""
    model, ids = Model(), torch.randint(0, 9, (4, 5))
    before, output, state = everything(model), model(ids), torch.get_rng_state()
    report = pk.nn.fuse(model)
    fused = everything(model)
    assert same(before["state"], fused["state"]) and same(before["requires"], fused["requires"])
    assert torch.equal(torch.get_rng_state(), state)
    assert pk.nn.fuse(model).replaced == []  # a second time finds nothing
    report.undo()
    assert same(before, everything(model)) and torch.equal(model(ids), output)


def test_training_goes_on_through_undo() -> None:
    """Parameters stay those that an optimizer has, before, meanwhile and after."""
    model, ids = Model(), torch.randint(0, 9, (4, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = pk.nn.fuse(model)
    model(ids).square().mean().backward()
    optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    report.undo()
    assert same(trained, model.state_dict())


def test_undo_refuses_what_has_changed_since() -> None:
    model = Model()
    report = pk.nn.fuse(model)
    nn.utils.parametrize.register_parametrization(model.last, "weight", nn.Identity())
    with pytest.raises(pk.ConfigError, match="ParametrizedLayerNorm"):
        report.undo()
    assert type(model.mlp) is not Gated
    nn.utils.parametrize.remove_parametrizations(model.last, "weight")
    report.undo()
    assert type(model.mlp) is Gated


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y: Tensor = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str, dtype: torch.dtype) -> None:
    """Replaced, and at most four times as far from float64 as the original in the same dtype."""
    make, op = KNOWN[name]
    module = make().to(dtype)
    exact = copy.deepcopy(module).double()
    x, dy = (torch.randn(200, 3, H).to(dtype) for _ in range(2))
    theirs = run(module, x, dy)
    report = pk.nn.fuse(module)
    assert [(row.name, row.op) for row in report.replaced] == [("", op)] and not report.left
    for i, (a, b, e) in enumerate(zip(run(module, x, dy), theirs, run(exact, x.double(), dy.double()), strict=True)):
        close(a, b, e, f"tensor {i}")


def test_one_class_for_all_of_a_kind() -> None:
    """So that a compiler sees one."""
    model = nn.Sequential(Rms(), Rms(), Gated(), Gated())
    pk.nn.fuse(model)
    kinds = [type(m) for m in model]
    assert kinds[0] is kinds[1] and kinds[2] is kinds[3] and len(set(kinds)) == 2


def test_called_by_name() -> None:
    module = Rms()
    pk.nn.fuse(module)
    x = torch.randn(2, H)
    assert torch.equal(module(states=x), module(x))


def test_reads_what_changes_later() -> None:
    """An epsilon that is set after fusing counts."""
    module, plain, x = Rms(), Rms(), torch.randn(2, H)
    plain.load_state_dict(module.state_dict())
    pk.nn.fuse(module)
    module.tiny = plain.tiny = 3.0
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left(name: str) -> None:
    make, why = OTHERS[name]
    module = make()
    kind = type(module)
    report = pk.nn.fuse(module)
    assert not report.replaced and type(module) is kind
    assert [why in row.why for row in report.left] == ([True] if why else [])


def test_compiled_regions_are_left() -> None:
    within: Any = torch.compile(nn.Sequential(nn.LayerNorm(H)))
    model = nn.Sequential(nn.LayerNorm(H), within, nn.LayerNorm(H))
    model[2].compile()
    report = pk.nn.fuse(model)
    assert [row.name for row in report.replaced] == ["0"]
    assert [row.name for row in report.left] == ["1._orig_mod.0", "2"]


def test_on_the_meta_device() -> None:
    """Nothing of the model itself is run: it may be without memory, and large."""
    with torch.device("meta"):
        model = nn.Sequential(Rms(), Gated(), nn.LayerNorm(H))
    assert len(pk.nn.fuse(model).replaced) == 3


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_in_a_pipeline(schedule: str) -> None:
    """A fused model that is cut trains as the fused model does whole."""
    model = nn.Sequential(nn.Linear(H, H), Rms(), Gated(), nn.GELU(), nn.LayerNorm(H), nn.Linear(H, 9)).double()
    assert len(pk.nn.fuse(model).replaced) == 4
    whole = copy.deepcopy(model)
    x, y = torch.randn(8, H, dtype=torch.float64), torch.randint(0, 9, (8,))
    with pk.Pipeline(model, loss_fn=nn.CrossEntropyLoss(), microbatches=4, ranks=2, schedule=schedule) as pipe:
        ours, theirs = (torch.optim.AdamW(m.parameters(), 0.01, eps=1e-3) for m in (pipe, whole))
        for _ in range(3):
            loss, wanted = pipe.train_step(x, y), nn.functional.cross_entropy(whole(x), y)
            wanted.backward()
            torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
