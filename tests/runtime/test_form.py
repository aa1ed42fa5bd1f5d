"""Which units are taken to be alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipekern.runtime.form import form
from pipekern.stage.unit import Unit, cut
from tests.runtime.models import KINDS, build


def unit(module: nn.Module) -> Unit:
    return Unit("name", module, module)


def test_golden() -> None:
    x = torch.randn(2, 4)
    here = form(unit(nn.Linear(4, 4)), x)
    assert form(unit(nn.Linear(4, 4)), torch.zeros(2, 4)) == here  # whatever the weights, and the numbers
    assert form(unit(nn.Linear(4, 4)), torch.randn(3, 4)) != here
    assert form(unit(nn.Linear(4, 4, bias=False)), x) != here


def test_what_makes_a_difference() -> None:
    """Classes, settings, functions, modes, hooks, frozen and shared tensors, dtypes, layouts, and plain values."""
    x = torch.randn(4, 4)

    def layer(change: Any = None, **options: Any) -> nn.Module:
        made = nn.TransformerEncoderLayer(4, 2, 8, **options)
        if change is not None:
            change(made)
        return made

    def tie(made: Any) -> None:
        made.norm2.weight = made.norm1.weight

    modules = [
        layer(),
        layer(dropout=0.2),
        layer(norm_first=True),
        layer(activation=nn.functional.gelu),
        layer(lambda made: made.eval()),
        layer(lambda made: made.linear1.requires_grad_(False)),
        layer(tie),
        layer(lambda made: made.linear1.register_forward_hook(print)),
        layer(dtype=torch.float64),
    ]
    values = [x, x.t(), x.double(), x.clone().requires_grad_(), (x,), [x], (x, x), (x, x.clone()), (x, 1), (x, 2)]
    assert len({form(unit(module), x) for module in modules}) == len(modules)
    assert len({form(unit(modules[0]), value) for value in values}) == len(values)
    assert form(unit(layer()), x) == form(unit(modules[0]), x)


def test_traced_and_lazy_layers_are_alike() -> None:
    """Under names of their own, and before they have memory."""
    blocks = [one for one in cut(build("gpt", 0), 0)[1] if one.name.startswith("blocks")]
    value = (torch.zeros(2), torch.zeros(3), torch.zeros(4))
    assert len(blocks) > 3 and len({form(block, value) for block in blocks[:-1]}) == 1  # the last hands less on
    lazy = cut(build("lazy", 0), 0)[1]
    x = KINDS["lazy"].batch(4).x
    assert len({form(one, x) for one in lazy[3:5]}) == 2 and form(lazy[1], x) == form(lazy[3], x)
