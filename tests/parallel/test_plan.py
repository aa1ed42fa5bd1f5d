"""Plans: which modules a pattern names, what of transformers has a counterpart, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from pipekern.errors import ConfigError
from pipekern.parallel.plan import Styles, choose_styles

COLUMN, ROW = ColwiseParallel(), RowwiseParallel()


def _model(**own: Any) -> nn.Module:
    """Two blocks, an embedding and a head of 5 words."""
    block = lambda: nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "embed": nn.Embedding(5, 4)})
    model["head"] = nn.Linear(4, 5)
    vars(model).update(own)
    return model


def _chosen(plan: Any, size: int = 2, **own: Any) -> Styles:
    model = _model(**own)
    return choose_styles(plan, model, dict(model.named_modules()), size)


def test_golden_patterns() -> None:
    found = _chosen({"blocks.*.up": COLUMN, "blocks.[1].d*": ROW})
    assert found == {"blocks.0.up": COLUMN, "blocks.1.up": COLUMN, "blocks.1.down": ROW}


def _config(**numbers: int) -> Any:
    config = SimpleNamespace(**numbers)
    config.get_text_config = lambda: config
    return config


def test_a_plan_of_transformers() -> None:
    plan = {
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "blocks.*.norm": "replicated_with_grad_allreduce",
        "blocks.*.router": "rowwise_rep",  # of other models of the kind
        "embed": "embedding_rowwise",
        "head": "colwise_gather_output",
    }
    found = _chosen("auto", tp_plan=plan, config=_config(num_attention_heads=4))
    assert sorted(found) == ["blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up", "embed", "head"]
    column, row, embed, head = (found[name] for name in ("blocks.0.up", "blocks.0.down", "embed", "head"))
    assert isinstance(column, ColwiseParallel)
    assert column.output_layouts[0].is_shard()
    assert isinstance(row, RowwiseParallel)
    assert row.input_layouts[0].is_shard()
    assert isinstance(embed, RowwiseParallel)
    assert embed.input_layouts == (Replicate(),)
    assert isinstance(head, ColwiseParallel)
    assert head.output_layouts == (Replicate(),)


@pytest.mark.parametrize(
    ("plan", "own", "text"),
    [
        (
            {"layers.*.up": COLUMN},
            {},
            r"'layers\.\*\.up' matches no module; names in the model are such as blocks\.0\.up",
        ),
        ({"up": COLUMN}, {}, r"'up' matches no module"),
        ({"blocks.*.up": COLUMN, "blocks.0.*": COLUMN}, {}, r"'blocks\.\*\.up' and 'blocks\.0\.\*' both match"),
        ({"blocks.*.up": "colwise"}, {}, "give a style of torch"),
        ({}, {}, "nothing in the plan"),
        ("rows", {}, "tensor_parallel='rows'; give styles by module, or 'auto'"),
        ("auto", {}, "ModuleDict has no tp_plan of its own"),
        ("auto", {"tp_plan": {"blocks.*.up": "moe_tp_experts"}}, r"without a counterpart in torch, .*moe_tp_experts"),
        ("auto", {"tp_plan": {"layers.*.up": "colwise"}, "config": _config()}, "nothing in the plan"),
        (
            "auto",
            {"tp_plan": {"blocks.*.up": "colwise"}, "config": _config(num_key_value_heads=3)},
            "num_key_value_heads is 3, which 2 parts do not divide",
        ),
        ({"head": COLUMN}, {}, "head has out_features=5, which 2 parts do not divide"),
        ({"head": ROW}, {"size": 3}, "head has in_features=4, which 3 parts do not divide"),
    ],
)
def test_refusals(plan: Any, own: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _chosen(plan, **own)


def test_an_uneven_width_may_be_whole_outside() -> None:
    assert list(_chosen({"head": ColwiseParallel(output_layouts=Replicate())})) == ["head"]
