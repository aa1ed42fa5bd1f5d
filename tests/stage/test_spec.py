"""Layers described now and built later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.stage.random import layer_key
from pipekern.stage.spec import LayerSpec


def test_golden() -> None:
    """Built under the key of its position, as ``torch.manual_seed`` with that key gives it."""
    built = LayerSpec(nn.Linear, 3, 2, bias=False).build(index=5, seed=1)
    torch.manual_seed(layer_key(1, 5))
    want = nn.Linear(3, 2, bias=False)
    assert isinstance(built, nn.Linear)
    assert built.state_dict().keys() == {"weight"}
    assert torch.equal(built.weight, want.weight)


def test_weights_depend_on_seed_and_position_alone() -> None:
    spec = LayerSpec(nn.Linear, 3, 2)
    weights = {}
    for seed, index in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        torch.manual_seed(index * 17)
        weights[seed, index] = spec.build(index, seed).state_dict()["weight"]
        torch.rand(9)
        assert torch.equal(spec.build(index, seed).state_dict()["weight"], weights[seed, index])
    assert len({tuple(weight.flatten().tolist()) for weight in weights.values()}) == 4


def test_building_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    LayerSpec(nn.Linear, 3, 2).build(0, 0)
    LayerSpec(nn.Embedding, 3, 2).meta()
    assert torch.equal(torch.get_rng_state(), before)


def test_meta_has_shapes_and_names_but_no_memory() -> None:
    layer = LayerSpec(nn.TransformerEncoderLayer, 8, 2, dim_feedforward=1 << 40, dtype=torch.bfloat16).meta()
    sizes = {name: (p.device.type, p.dtype) for name, p in layer.named_parameters()}
    assert sizes["linear1.weight"] == ("meta", torch.bfloat16)
    assert set(sizes.values()) == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("build", ["build", "meta"])
def test_what_is_no_module_is_refused(build: str) -> None:
    spec = LayerSpec(dict, a=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"LayerSpec\(dict\) built a dict.*nn\.Module"):
        spec.build(0, 0) if build == "build" else spec.meta()


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LayerSpec\(3\): .*module class or a function"):
        LayerSpec(3)  # type: ignore[arg-type]
