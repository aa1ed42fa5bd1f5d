"""``pk.profile``: measured costs of layers."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from tests.runtime.models import KINDS, build
from tests.runtime.parity import same_bits


def test_golden() -> None:
    """A layer of 512 × 512 costs more than one of 4 × 4, forward and backward, and the split follows."""
    model = nn.Sequential(
        nn.Linear(512, 512), *(nn.Linear(512, 512) for _ in range(2)), nn.Linear(512, 4), nn.Linear(4, 4)
    )
    costs = pk.profile(model, torch.randn(256, 512))
    assert costs.names == ("0", "1", "2", "3", "4")
    assert min(costs.forward[1], costs.forward[2]) > costs.forward[4]
    assert min(costs.backward[1], costs.backward[2]) > costs.backward[4]
    assert min(costs.weight[1], costs.weight[2]) > costs.weight[4]
    assert costs.total() == [sum(row) for row in zip(costs.forward, costs.backward, costs.weight, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_model_changes(kind: str, seed: int) -> None:
    """Weights, gradients, buffers, modes, the input and the random state; and the model can be cut afterwards."""
    model = build(kind, seed)
    x = KINDS[kind].batch(4).x
    before = _everything(model), x.clone(), torch.get_rng_state()
    costs = pk.profile(model, x, repeats=2)
    assert same_bits((_everything(model), x, torch.get_rng_state()), before)
    assert min(costs.forward) > 0
    assert len(costs.names) == len(costs.forward) == len(costs.backward) == len(costs.weight)
    with pk.Pipeline(model, loss_fn=KINDS[kind].loss_fn, microbatches=2, ranks=2, split=costs) as pipe:
        pipe.train_step(*KINDS[kind].batch(4))


def _everything(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        return None
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return grads, state, tuple(module.training for module in model.modules())


class Mixed(nn.Module):
    """Makes integers, a frozen result and None beside its output, and writes into its input."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        x = x.relu_()
        return x * 2, torch.arange(3), None, x.detach()


class Take(nn.Module):
    def forward(self, value: tuple[Any, ...]) -> Tensor:
        return value[0] + value[3]


def test_values_of_every_kind_and_writes_in_place() -> None:
    x = torch.randn(4, 4)
    before = x.clone()
    costs = pk.profile(nn.Sequential(Mixed(), Take(), nn.Linear(4, 4)), x, repeats=1)
    assert torch.equal(x, before)
    assert len(costs.total()) == 3


def test_copies_of_outputs() -> None:
    """What is saved is an output; what is carried past a layer is not. A larger one takes longer."""
    net = pk.Skip(
        nn.Linear(4, 2048), pk.Skip.save("large"), nn.Linear(2048, 4), nn.ReLU(), pk.Skip.join("large", lambda a, b: a)
    )
    costs = pk.profile(net, torch.randn(512, 4))
    assert min(costs.copy[0], costs.copy[1]) > max(costs.copy[2:])


@pytest.mark.parametrize(("costs", "text"), [([], "at least 0"), ([1.0, -2.0], r"\[1.0, -2.0\].*at least 0")])
def test_given_costs_that_are_none(costs: list[float], text: str) -> None:
    with pytest.raises(pk.ConfigError, match=text):
        pk.LayerCosts.given(costs)


def test_the_split_follows_given_costs() -> None:
    """Costs 5, 1, 1, 1, 1 are cut after the first; those of another model are refused."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    options: dict[str, Any] = {"loss_fn": nn.MSELoss(), "microbatches": 1, "ranks": 2}
    with pk.Pipeline(copy.deepcopy(model), split=pk.LayerCosts.given([5, 1, 1, 1, 1]), **options) as pipe:
        pipe.train_step(torch.randn(1, 4), torch.randn(1, 4))
        simulated = pipe.timeline()
        assert {span.stage for span in simulated.spans} == {0, 1}
    with pytest.raises(pk.ConfigError, match="costs of 3 units, the model has 5"):
        pk.Pipeline(model, split=pk.LayerCosts.given([1, 2, 3]), **options)


class Counted(nn.Linear):
    """Counts the calls of all of its kind, in a list that copies share."""

    calls: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return super().forward(x)


def test_layers_of_one_form_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve equal layers take as many calls as one, and have the same costs; one of another size is apart."""
    monkeypatch.setattr(Counted, "calls", [])
    pk.profile(nn.Sequential(Counted(4, 4)), torch.randn(2, 4), repeats=2)
    one = len(Counted.calls)
    equal = [Counted(4, 4) for _ in range(12)]
    for layer in equal[1:]:
        layer.weight.requires_grad_(True)
    costs = pk.profile(nn.Sequential(nn.Linear(4, 4), *equal, Counted(4, 5)), torch.randn(2, 4), repeats=2)
    assert len(Counted.calls) == 3 * one
    assert len(set(costs.forward[1:13])) == 1 and len(set(costs.kept[1:13])) == 1
    assert costs.parameters == (20,) * 13 + (25,)


def test_layers_of_one_form_hold_what_each_would() -> None:
    """Bytes counted with every layer run by itself are those of the one that stands for them."""
    model = build("gpt", 0)
    x = KINDS["gpt"].batch(4).x
    alike = pk.profile(model, x, repeats=1)
    for place, module in enumerate(model.modules()):
        module.place = place  # a setting: no two are alike
    apart = pk.profile(model, x, repeats=1)
    assert len(set(alike.forward)) < len(set(apart.forward)) == len(apart.names)
    assert (alike.kept, alike.waiting, alike.outputs, alike.ends) == (
        apart.kept,
        apart.waiting,
        apart.outputs,
        apart.ends,
    )


@pytest.mark.parametrize(("devices", "text"), [([], "nothing to measure on"), (["cuda:99"], "no 'cuda:99' here")])
def test_devices_that_are_not_there(devices: list[str], text: str) -> None:
    with pytest.raises(pk.ConfigError, match=text):
        pk.profile(nn.Linear(4, 4), torch.randn(2, 4), devices=devices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_two_kinds_of_devices() -> None:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    costs = pk.profile(model, torch.randn(256, 512), devices=["cpu", "cuda:0"])
    (other,) = costs.others
    assert other.device == torch.cuda.get_device_name(0) and min(other.forward) > 0
    assert costs.cluster is not None and costs.cluster.devices[1].flops == pytest.approx(
        sum(costs.total()) / sum(map(sum, (other.forward, other.backward, other.weight)))
    )
    assert 0 < costs.cluster.links[0].bandwidth < 1e14 and next(model.parameters()).device.type == "cpu"
