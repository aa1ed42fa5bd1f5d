"""What a batch gives to a forward, and how."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.stage.arguments import Arguments
from pipekern.stage.spec import LayerSpec
from pipekern.stage.unit import cut


class Encoder(nn.Module):
    """A forward like those of language models: one parameter that is needed, many that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        scale: float = 2.0,
        *extra: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        h = self.table(input_ids)
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        for layer in self.layers:
            h = layer(h) * scale
        return {"hidden": h} if return_dict else (h,)


def test_golden() -> None:
    needed = Arguments.of(Encoder())
    assert needed.given == ("input_ids",)
    assert needed.optional == {"attention_mask": None, "scale": 2.0, "return_dict": True}
    both = Arguments.of(Encoder(), ["input_ids", "attention_mask"])
    for batch in ((1, 2), {"attention_mask": 2, "input_ids": 1, "scale": 2.0}):
        positional, named = both.spread(batch)
        assert list(positional) == [] and named == {"input_ids": 1, "attention_mask": 2}


def _run(model: nn.Module, inputs: list[str] | None, batch: Any) -> Any:
    _, units = cut(model, 0, inputs)
    for unit in units:
        batch = unit.call(unit.train)(batch)
    return batch


IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
Batch = namedtuple("Batch", "input_ids attention_mask")


@pytest.mark.parametrize(
    ("inputs", "batch", "call"),
    [
        (None, IDS, {}),
        (None, {"input_ids": IDS}, {}),
        (None, {"input_ids": IDS, "attention_mask": None, "scale": 2.0, "return_dict": True}, {}),
        (["input_ids", "attention_mask"], (IDS, MASK), {"attention_mask": MASK}),
        (["input_ids", "attention_mask"], Batch(IDS, MASK), {"attention_mask": MASK}),
        (["attention_mask", "input_ids"], (MASK, IDS), {"attention_mask": MASK}),
        (["input_ids", "attention_mask"], {"attention_mask": MASK, "input_ids": IDS}, {"attention_mask": MASK}),
        (
            ["input_ids", "scale", "attention_mask"],
            {"scale": 0.25, "attention_mask": MASK, "input_ids": IDS},
            {"attention_mask": MASK, "scale": 0.25},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_batches_of_every_form(inputs: list[str] | None, batch: Any, call: dict[str, Any]) -> None:
    model = Encoder()
    assert torch.equal(_run(model, inputs, batch)["hidden"], model(IDS, **call)["hidden"])


class All(Encoder):
    """Every parameter has a default, and branches look at which are given."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, embeds: Tensor | None = None
    ) -> Any:
        if embeds is None:
            assert input_ids is not None
            return super().forward(input_ids, attention_mask)
        return self.layers[1](self.layers[0](embeds))


def test_the_first_parameter_is_given_where_none_is_needed() -> None:
    model = All()
    assert torch.equal(_run(model, None, IDS)["hidden"], model(IDS)["hidden"])
    assert torch.equal(_run(model, None, {"input_ids": IDS})["hidden"], model(IDS)["hidden"])
    embeds = torch.randn(2, 3, 4)
    assert torch.equal(_run(model, ["embeds"], embeds), model(embeds=embeds))


class Bare(Encoder):
    """Parameters without a name for the caller, and with one alone."""

    def forward(self, a: Tensor, b: Tensor, /, c: Tensor, *, d: Tensor) -> Tensor:  # type: ignore[override]
        return self.layers[1](self.layers[0](a - 2 * b)) + c - d


def test_parameters_by_position_and_by_name_alone() -> None:
    model = Bare()
    a, b, c, d = torch.randn(4, 3, 4)
    want = model(a, b, c, d=d)
    assert torch.equal(_run(model, None, (a, b, c, d)), want)
    assert torch.equal(_run(model, None, {"d": d, "b": b, "a": a, "c": c}), want)
    assert torch.equal(_run(model, ["d", "c", "b", "a"], {"d": d, "b": b, "a": a, "c": c}), want)


class Whole(Encoder):
    """One parameter, which is a dict or tuple itself."""

    def forward(self, batch: Any, scale: float = 1.0) -> Any:  # type: ignore[override]
        return self.layers[1](self.layers[0](batch["x"] if isinstance(batch, dict) else batch[0])) * scale


def test_a_batch_that_is_one_argument_stays_whole() -> None:
    arguments = Arguments.of(Whole())
    x = torch.randn(3, 4)
    for batch in ({"x": x}, {"x": x, "batch": 1}, (x, x), [x], {}, x):
        (got,), named = arguments.spread(batch)
        assert got is batch and named == {}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["ids"], [r"no \['ids'\]", "input_ids", "attention_mask"]),
        (["attention_mask"], [r"needs \['input_ids'\]"]),
        (["input_ids", "input_ids"], ["each once"]),
        (["input_ids", "kwargs"], [r"no \['kwargs'\]"]),
        ([], [r"needs \['input_ids'\]"]),
    ],
)
def test_inputs_that_the_forward_does_not_have(inputs: list[str], words: list[str]) -> None:
    for word in words:
        with pytest.raises(ConfigError, match=word):
            Arguments.of(Encoder(), inputs)


@pytest.mark.parametrize(
    ("inputs", "batch", "words"),
    [
        (None, {"input_ids": IDS, "attention_mask": MASK}, r"inputs=\['input_ids', 'attention_mask'\]"),
        (None, {"input_ids": IDS, "scale": 3.0}, r"inputs=\['input_ids', 'scale'\]"),
        (["input_ids", "attention_mask"], {"input_ids": IDS}, r"gives \['input_ids'\].*'attention_mask'"),
        (["input_ids", "attention_mask"], (IDS,), "tuple of 1.*input_ids, attention_mask"),
        (["input_ids", "attention_mask"], (IDS, MASK, 1), "tuple of 3"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(inputs: list[str] | None, batch: Any, words: str) -> None:
    """An optional argument would otherwise be dropped, and the model trained without it."""
    with pytest.raises(ConfigError, match=words):
        Arguments.of(Encoder(), inputs).spread(batch)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(2, 2)), [LayerSpec(nn.Linear, 2, 2)]], ids=["seq", "specs"])
def test_a_list_of_layers_has_no_inputs(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"inputs=\['x'\].*leave inputs out"):
        cut(model, 0, ["x"])
