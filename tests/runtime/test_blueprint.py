"""What is decided before anything starts."""

from __future__ import annotations

import torch
from torch import nn

from pipekern.runtime.blueprint import draw, free_others
from pipekern.runtime.options import Options


def _options(module: nn.Module) -> Options:
    return Options(module, nn.MSELoss(), 2, 2, None, None, "1f1b", None, "none", "raise", 0, "auto", 60.0)


def test_freed_parameters_keep_shapes_and_ties() -> None:
    layers = [nn.Linear(3 + i, 4 + i) for i in range(40)]
    layers.append(nn.Linear(42, 43))
    layers[-1].weight = layers[-2].weight
    net = nn.Sequential(*layers[:-1], nn.Identity(), layers[-1])
    shapes = {name: p.shape for name, p in net.named_parameters(remove_duplicate=False)}
    free_others(draw(_options(net), 2), keep=set())
    freed = dict(net.named_parameters(remove_duplicate=False))
    assert {name: p.shape for name, p in freed.items()} == shapes
    assert all(p.is_meta for p in freed.values())
    assert len(set(map(id, freed.values()))) == len(shapes) - 1
    assert freed["41.weight"] is freed["39.weight"]


def test_kept_parameters_stay() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    kept = first.weight
    value = kept.detach().clone()
    free_others(draw(_options(nn.Sequential(first, second)), 2), keep={id(kept)})
    assert first.weight is kept
    assert torch.equal(kept, value)
    assert first.bias.is_meta
    assert second.weight.is_meta
