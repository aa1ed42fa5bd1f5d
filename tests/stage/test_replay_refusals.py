"""What a forward that is run by every stage may not do; each is refused, for a guess would be wrong in silence."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from tests.stage.untraced import Around, Layer, run, through


def _writes(model: Around, ids: Tensor) -> Any:
    into = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.float64)
    hidden = model.embed(ids)
    into[0, 0] = hidden.mean()
    for layer in model.layers:
        hidden = layer(hidden, mask=into + 1)
    return model.head(hidden)


def _skips(model: Around, ids: Tensor) -> Any:
    first = model.embed(ids)
    return model.head(through(model, first)) + first.mean()


def _regularised(model: Around, ids: Tensor) -> Any:
    return model.head(through(model, model.embed(ids))) + sum(p.square().sum() for p in model.parameters())


def _tied_by_hand(model: Around, ids: Tensor) -> Any:
    return through(model, model.embed(ids)) @ model.embed.weight.T + model.head.bias


def _writes_out(model: Around, ids: Tensor) -> Any:
    into = torch.zeros(*ids.shape, 4, dtype=torch.float64)
    hidden = model.embed(ids)
    torch.mul(hidden.detach(), 2, out=into)
    return model.head(through(model, hidden) + into)


def _writes_batch(model: Around, ids: Tensor) -> Any:
    ids.clamp_(min=1)
    return model.head(through(model, model.embed(ids)))


def _writes_buffer(model: Around, ids: Tensor) -> Any:
    output = model.head(through(model, model.embed(ids)))
    model.table[0] += 1
    return output


def _assigns_buffer(model: Around, ids: Tensor) -> Any:
    model.table = model.table + 1
    return model.head(through(model, model.embed(ids)))


def _draws_python(model: Around, ids: Tensor) -> Any:
    scale = 1 + random.random()
    return model.head(through(model, model.embed(ids) * scale)) / scale


def _takes_from_hook(model: Around, ids: Tensor) -> Any:
    """As transformers takes attentions and router logits: of the layers of this stage, there would be some."""
    seen: list[Tensor] = []
    hooks = [_mix(layer).register_forward_hook(lambda *call: seen.append(call[2])) for layer in model.layers]
    try:
        output = model.head(through(model, model.embed(ids)))
    finally:
        for hook in hooks:
            hook.remove()
    return {"logits": output, "seen": tuple(seen)}


def _mix(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, Layer)
    return layer.mix


def _draws(model: Around, ids: Tensor) -> Any:
    model.embed(ids)
    return model.head(through(model, model.embed(ids) + torch.rand(())))


def _looks(model: Around, ids: Tensor) -> Any:
    hidden = model.embed(ids)
    return model.head(through(model, -hidden if bool(hidden.mean() > 0) else hidden))


def _ends_early(model: Around, ids: Tensor) -> Any:
    return through(model, model.embed(ids))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (_writes, "writes a value of a layer into a tensor by __setitem__"),
        (_skips, "holds a value that an earlier stage made"),
        (_draws, r"draws random numbers \(rand\)"),
        (_looks, "looks into a value of an earlier stage"),
        (_ends_early, "ended without a call of after"),
        (_regularised, "holds a value that an earlier stage made"),
        (_tied_by_hand, "takes a value of shape|holds a value"),
        (_writes_out, "writes a value of a layer into a tensor by mul"),
        (_writes_batch, "writes into its batch in place"),
        (_writes_buffer, "writes into a buffer of its own"),
        (_assigns_buffer, "assigns its buffer table"),
        (_draws_python, "random numbers of Python"),
        (_takes_from_hook, "left a layer by another way"),
    ],
)
def test_what_no_cut_can_follow_is_refused(body: Callable[[Around, Tensor], Any], said: str) -> None:
    model, ids = Around(body).double(), torch.randint(11, (2, 3))
    counts = (4, 1) if body is _ends_early else (2, 3) if body is _skips else (1, 4)
    with pytest.raises(ConfigError, match=said):
        run(model, ids, *counts)
