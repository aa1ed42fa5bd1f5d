"""Values that skip layers: the module alone, its faults, and what its units carry."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import pipekern as pk
from pipekern.stage.skip import Carried
from pipekern.stage.unit import cut

save, join = pk.Skip.save, pk.Skip.join


def _net() -> pk.Skip:
    """Two skips that cross, one of them joined twice."""
    return pk.Skip(
        nn.Linear(3, 3), save("a"), nn.Tanh(), save("b"), nn.Linear(3, 3),
        join("a", torch.add), nn.Tanh(), join("b", nn.Bilinear(3, 3, 3)), join("a", torch.mul), nn.Linear(3, 2),
    ).double()  # fmt: skip


def _by_hand(net: nn.Sequential, x: Tensor) -> Tensor:
    into, between, mix, out = net[0], net[4], net.get_submodule("7.combine"), net[9]
    a = into(x)
    b = torch.tanh(a)
    h = torch.tanh(between(b) + a)
    return out(mix(h, b) * a)


def test_golden() -> None:
    """``join`` gets the value and what was saved; names in the state are those of an ``nn.Sequential``."""
    net = pk.Skip(save("x"), nn.ReLU(), join("x", lambda value, saved: value - 10 * saved))
    assert net(torch.tensor([-1.0, 2.0])).tolist() == [10.0, -18.0]
    assert list(_net().state_dict())[:5] == ["0.weight", "0.bias", "4.weight", "4.bias", "7.combine.weight"]
    assert str(save("a")) == "Save('a')"


def test_it_computes_what_it_says() -> None:
    net, x = _net(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for module in (net, copy.deepcopy(net), pk.Skip(*net)):
        torch.testing.assert_close(module(x), _by_hand(net, x), rtol=0, atol=1e-15)
    got = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    want = torch.autograd.grad(_by_hand(net, x).square().sum(), [x, *net.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(got, want, strict=True))
    with torch.inference_mode():
        torch.testing.assert_close(net(x), _by_hand(net, x), rtol=0, atol=1e-15)


def test_nothing_stays_in_the_module() -> None:
    """Two forwards at once, each within the other's, and a forward that runs again in the backward."""
    inner: list[Tensor] = []
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    class Within(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            if len(value) == 2:
                inner.append(net(y))
            return value

    net = _net()
    plain = copy.deepcopy(net)
    net.insert(3, Within())
    assert torch.equal(net(x), plain(x))
    assert torch.equal(inner[0], plain(y))
    leaf = x.clone().requires_grad_()
    once = checkpoint_sequential(nn.Sequential(plain), 1, leaf, use_reentrant=False)
    (got,) = torch.autograd.grad(once.sum(), leaf)
    (want,) = torch.autograd.grad(plain(leaf).sum(), leaf)
    assert torch.equal(got, want)


def test_any_value_is_saved() -> None:
    net = pk.Skip(save("pair"), nn.Identity(), join("pair", lambda value, saved: value[0] * saved[1]))
    assert net((torch.tensor(2.0), 3)) == 6.0


# -- units


def _run(units: list[Any], value: Any) -> tuple[Any, list[list[str]]]:
    kept = []
    for unit in units:
        value = unit.call(unit.train)(value)
        kept.append(sorted(value.kept) if isinstance(value, Carried) else [])
    return value, kept


def test_units_carry_what_is_needed_and_no_more() -> None:
    net, x = _net(), torch.randn(4, 3, dtype=torch.float64)
    root, units = cut(net, seed=0)
    assert root is net
    value, kept = _run(units, x)
    assert torch.equal(value, net(x))
    assert kept == [[], ["a"], ["a"], ["a", "b"], ["a", "b"], ["a", "b"], ["a", "b"], ["a"], [], []]


def test_a_list_of_specs() -> None:
    specs = [pk.LayerSpec(nn.Linear, 3, 3), pk.LayerSpec(save, "a"), pk.LayerSpec(nn.Tanh)]
    specs.append(pk.LayerSpec(join, "a", torch.add))
    _, units = cut(specs, seed=0)
    built, x = [unit.built() for unit in units], torch.randn(2, 3)
    h = built[0].train(x)
    assert torch.equal(_run(built, x)[0], torch.tanh(h) + h)


def test_without_skips_a_unit_is_its_layer() -> None:
    layer = nn.Linear(2, 2)
    _, (unit,) = cut(pk.Skip(layer), seed=0)
    assert unit.call(unit.train) is layer


def test_a_skip_within_a_model_is_traced() -> None:
    """As the layer list of a module with a forward of its own; and whole, as one layer of another."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x * 2) + 1

    model, x = Model(), torch.randn(4, 3, dtype=torch.float64)
    _, units = cut(model, seed=0)
    assert len(units) > 5
    assert torch.allclose(_run(units, x)[0], _by_hand(model.body, x * 2) + 1, rtol=0, atol=1e-15)
    _, units = cut(nn.Sequential(nn.Tanh(), _net()), seed=0)
    assert len(units) == 2


# -- what is refused


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ([join("a", torch.add), nn.Tanh(), save("a")], r"layer 0 joins 'a' before it is saved"),
        ([save("a"), nn.Tanh(), save("a"), join("a", torch.add)], r"layer 2 saves 'a' again, after layer 0"),
        ([save("a"), nn.Tanh()], r"layer 0 saves 'a', which is never joined"),
        ([nn.Tanh(), nn.Sequential(save("a"), nn.Tanh()), join("a", torch.add)], r"layer 1\.0 saves or joins within"),
        ([nn.ModuleDict({"x": save("a")})], r"layer 0 saves or joins within a module"),
    ],
)
def test_faults(layers: list[nn.Module], fault: str) -> None:
    with pytest.raises(pk.ConfigError, match=fault + r".*A name is saved once and joined after that.*give every"):
        cut(pk.Skip(*layers), seed=0)


def test_every_fault_is_told() -> None:
    net = pk.Skip(join("x", torch.add), save("y"), save("y"))
    with pytest.raises(pk.ConfigError, match=r"joins 'x' before.*saves 'y' again.*never joined"):
        cut(net, seed=0)


def test_a_sequential_cannot_hand_on() -> None:
    net = nn.Sequential(save("a"), nn.Tanh(), join("a", torch.add))
    with pytest.raises(pk.ConfigError, match=r"Sequential holds pk\.Skip\.save.*make it a pk\.Skip"):
        cut(net, seed=0)
    with pytest.raises(pk.ConfigError, match=r"Skip\.join\('a'\) was called with one value.*a pk\.Skip"):
        net(torch.ones(1))


def test_the_module_alone_refuses_to_join_nothing() -> None:
    with pytest.raises(pk.ConfigError, match=r"has nothing to join: save 'a'"):
        pk.Skip(join("a", torch.add))(torch.ones(1))


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_saved_may_not_be_written(alone: bool) -> None:
    net = pk.Skip(nn.Linear(2, 2), save("a"), nn.ReLU(inplace=True), join("a", torch.add))
    with pytest.raises(pk.ConfigError, match=r"ReLU wrote in place into what was saved as 'a'.*save the value after"):
        net(torch.ones(1, 2)) if alone else _run(cut(net, seed=0)[1], torch.ones(1, 2))
