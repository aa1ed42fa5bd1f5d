"""Keyword arguments: a batch by the names of the forward's parameters, optional ones included."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import reference
from tests.runtime.step import PLACES, SCHEDULES, gradients, make_seeded, run, union

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


class Attention(nn.Module):
    """Takes what every layer shares by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, use_cache: bool = False) -> tuple[Tensor, None]:
        q, k, v = self.qkv(hidden).chunk(3, -1)
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, -1e9)
        return hidden + self.out(scores.softmax(-1) @ v), None


class Model(nn.Module):
    """A forward like those of Hugging Face: nothing but the ids is always given."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.types = nn.Embedding(2, 6)
        self.layers = nn.ModuleList(Attention() for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        hidden = self.words(input_ids)
        if token_type_ids is not None:
            hidden = hidden + self.types(token_type_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask=attention_mask, use_cache=False)[0]
        logits = self.head(hidden)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def _loss(output: dict[str, Any], target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"].flatten(0, 1), target.flatten())


class _ByName(nn.Module):
    """The unsplit call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return self.model(**batch)


def _step(ranks: int, seed: int, x: Any, y: Tensor, options: dict[str, Any]) -> tuple[float, dict[str, Any], Any]:
    model = make_seeded(Model, seed)
    with pk.Pipeline(model, loss_fn=_loss, microbatches=4, ranks=ranks, timeout=20.0, **options) as pipe:
        loss = pipe.train_step(x, y)
        grads = gradients(pipe)
        outputs = pipe.eval_step(x)
        assert pk.verify(pipe, x, y).max_error <= 1e-12
        return float(loss), grads, outputs


@PLACES
@SCHEDULES
def test_optional_arguments_are_given_by_name(processes: bool, schedule: str, seed: int) -> None:
    ids, target = torch.randint(0, 11, (7, 5)), torch.randint(0, 3, (7, 5))
    mask = (torch.rand(7, 5) > 0.4).long()
    mask[:, 0] = 1
    batches: list[tuple[list[str] | None, dict[str, Any]]] = [
        (None, {"input_ids": ids, "attention_mask": None, "labels": None}),
        (INPUTS, {"attention_mask": mask, "input_ids": ids, "token_type_ids": ids % 2}),
    ]
    for inputs, x in batches:
        model = make_seeded(Model, seed)
        loss = reference.step(_ByName(model), _loss, x, target).item()
        want = reference.evaluate(_ByName(model), x)
        results = run(processes, _step, 2, seed, x, target, {"schedule": schedule, "inputs": inputs})
        assert all(abs(result[0] - loss) <= 1e-12 for result in results)
        assert reference.distance(union([result[1] for result in results]), reference.gradients(model)) <= 1e-12
        (outputs,) = [result[2] for result in results if result[2] is not None]
        assert reference.distance(outputs, want) <= 1e-12


def test_an_argument_that_the_model_was_cut_without_is_refused() -> None:
    """It would be dropped, and the model trained without its mask."""
    ids = torch.randint(0, 11, (4, 5))
    pipe = pk.Pipeline(Model(), loss_fn=_loss, microbatches=2, ranks=2)
    with pipe, pytest.raises(pk.ConfigError, match=r"inputs=\['input_ids', 'attention_mask'\]"):
        pipe.train_step({"input_ids": ids, "attention_mask": torch.ones(4, 5)}, ids % 3)


def test_costs_are_measured_with_the_same_inputs() -> None:
    ids = torch.randint(0, 11, (4, 5))
    x = {"input_ids": ids, "attention_mask": torch.ones(4, 5), "token_type_ids": ids % 2}
    costs = pk.profile(Model(), x, repeats=1, inputs=INPUTS)
    assert costs.names == ("before", *(f"layers.{i}" for i in range(4)), "after")
    with pk.Pipeline(Model(), loss_fn=_loss, microbatches=2, ranks=2, split=costs, inputs=INPUTS) as pipe:
        assert pipe.train_step(x, ids % 3).isfinite()


def _other_inputs(ranks: int) -> str:
    inputs = INPUTS[: 1 + int(os.environ["RANK"])]
    with pytest.raises(pk.ConfigError) as caught:
        pk.Pipeline(Model(), loss_fn=_loss, microbatches=2, ranks=ranks, inputs=inputs, timeout=20.0)
    return str(caught.value)


def test_ranks_that_are_given_other_inputs_say_so() -> None:
    for text in run(True, _other_inputs, 2):
        assert "inputs" in text and "attention_mask" in text
