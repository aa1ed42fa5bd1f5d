"""Low precision that meets a float32 buffer: which buffers there are, and what to do, whatever torch says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values


class Positions(nn.Module):
    """Adds a table to its input; ``mended``: in the dtype of the input."""

    table: Tensor

    def __init__(self, mended: bool):
        super().__init__()
        self.register_buffer("table", torch.ones(4))
        self.mended = mended

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.table.to(x.dtype) if self.mended else self.table)


class Attention(nn.Module):
    """Of queries that a buffer has changed."""

    def __init__(self, mended: bool):
        super().__init__()
        self.positions = Positions(mended)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(1, -1, 4)
        return F.scaled_dot_product_attention(self.positions(x), x, x).flatten(0, 1)


class Convolution(nn.Conv1d):
    """Over a sample's numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1)).squeeze(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.LayerNorm(4),
    "convolution": lambda: Convolution(1, 1, 1),
    "attention": nn.Identity,
}


def _model(kind: str, mended: bool) -> nn.Sequential:
    middle = Attention(mended) if kind == "attention" else Positions(mended)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), middle, LAYERS[kind]())


def _said(kind: str, split: list[int], **options: Any) -> list[str]:
    """What training and evaluation say; then a step of the mended model."""
    x, texts = torch.randn(4, 4), []
    shared: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 2, "precision": "bf16", "timeout": 20.0, **options}
    for call in (pk.Pipeline.train_step, pk.Pipeline.eval_step):
        pipe = pk.Pipeline(_model(kind, False), split=split, **shared)
        with pytest.raises((pk.ConfigError, pk.Aborted)) as caught:
            call(pipe, x, x)
        texts.append(str(caught.value))
    with pk.Pipeline(_model(kind, True), split=split, **shared) as pipe:
        pipe.train_step(x, x)
    return texts


NAMES = {"attention": "2.positions.table"}


@pytest.mark.parametrize("kind", LAYERS)
def test_golden(kind: str) -> None:
    """The cut is before the buffer; that of a batch normalisation is none of it."""
    for text in _said(kind, [2, 2], ranks=2):
        assert text.startswith("stage 1 mixes dtypes (")
        assert f"computed with {NAMES.get(kind, '2.table')} has another one" in text
        assert "x + self.buffer.to(x.dtype)" in text


def test_a_buffer_of_an_earlier_stage() -> None:
    """Its sum arrives in float32."""
    for texts in values(launch(_said, 2, "linear", [3, 1])):
        for text in texts:
            assert "stage 1 mixes dtypes (" in text
            assert "computed with 2.table has another one" in text


def test_where_no_buffer_can_be_meant_torch_has_the_word() -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double())

    for precision, model in ((None, _model("linear", False)), ("bf16", nn.Sequential(nn.Linear(4, 4)))):
        model.append(Wide(4, 4))
        pipe = pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, precision=precision, ranks=2)
        with pytest.raises(RuntimeError, match="same dtype"):
            pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
