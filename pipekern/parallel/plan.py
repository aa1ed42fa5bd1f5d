"""Which module of a model is in parts, and how: by the user's plan, or by that of a Hugging Face model.

{"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}      # torch.distributed.tensor.parallel
"auto"                                                                      # model.tp_plan
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from pipekern.errors import ConfigError

Plan = Mapping[str, ParallelStyle] | str | None
Styles = dict[str, ParallelStyle]  # by the module's name


def choose_styles(plan: Plan, model: Any, modules: Mapping[str, nn.Module], size: int) -> Styles:
    """The style of each of ``modules`` that ``plan`` names, for ``size`` parts.

    A pattern matches name by name between the dots, as those of ``parallelize_module``. Raises ``ConfigError`` for a
    pattern that matches nothing or what another one matches, a model without a plan of its own, a style of it that has
    no counterpart in torch, and widths or heads that do not divide.
    """
    if plan == "auto":
        found = _matched(_own_plan(model), modules, strict=False)
        _refuse_heads(model, size)
    elif isinstance(plan, Mapping):
        wrong = {pattern: style for pattern, style in plan.items() if not isinstance(style, ParallelStyle)}
        if wrong:
            raise ConfigError(
                f"tensor_parallel={wrong}: give a style of torch.distributed.tensor.parallel, such as ColwiseParallel()"
            )
        found = _matched(plan, modules, strict=True)
    else:
        raise ConfigError(
            f"tensor_parallel={plan!r}; give styles by module, or 'auto' for the plan of a Hugging Face model"
        )
    for name, style in found.items():
        _refuse_uneven(name, modules[name], style, size)
    return found


def _matched(plan: Mapping[str, ParallelStyle], modules: Mapping[str, nn.Module], strict: bool) -> Styles:
    found: Styles = {}
    by: dict[str, str] = {}
    for pattern, style in plan.items():
        names = [name for name in modules if _matches(name, pattern)]
        if not names and strict:
            raise ConfigError(f"tensor_parallel: {pattern!r} matches no module; {_examples(pattern, modules)}")
        for name in names:
            if name in found:
                raise ConfigError(f"tensor_parallel: {by[name]!r} and {pattern!r} both match {name}; leave one out")
            found[name], by[name] = style, pattern
    if not found:
        raise ConfigError(f"tensor_parallel: nothing in the plan ({', '.join(plan)}) matches a module of the model")
    return found


def _matches(name: str, pattern: str) -> bool:
    own, wanted = name.split("."), pattern.split(".")
    return len(own) == len(wanted) and all(map(fnmatchcase, own, wanted))


def _examples(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    last = pattern.rpartition(".")[2]
    alike = [name for name in modules if fnmatchcase(name.rpartition(".")[2], last)]
    some = (alike or [name for name, module in modules.items() if isinstance(module, nn.Linear)])[:4]
    return f"names in the model are such as {', '.join(some)}" if some else "the model has no linear layers"


def _own_plan(model: Any) -> Styles:
    """The plan of a Hugging Face model, in torch's styles."""
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise ConfigError(
            f"tensor_parallel='auto': {type(model).__name__} has no tp_plan of its own; give styles by module"
        )
    known = _counterparts()
    unknown = {pattern: style for pattern, style in plan.items() if style not in known}
    if unknown:
        raise ConfigError(
            f"tensor_parallel='auto': the tp_plan of {type(model).__name__} has styles without a counterpart in torch, "
            f"{unknown}; give styles by module"
        )
    return {pattern: style for pattern, name in plan.items() if (style := known[name]) is not None}


def _counterparts() -> dict[str, ParallelStyle | None]:
    """By the name of a style in transformers; None: the module stays whole."""
    column, row = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    return {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        "colwise_rep": column,
        "colwise_gather_output": column,
        "rowwise_rep": row,
        "rowwise_split_input": row,
        "embedding_rowwise": row,
        "embedding_colwise": column,
        "replicate": None,
        "replicated_with_grad_allreduce": None,
    }


def _refuse_heads(model: Any, size: int) -> None:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count % size:
            raise ConfigError(
                f"tensor_parallel='auto': {name} is {count}, which {size} parts do not divide; a head stays whole: use "
                "a tp that divides it"
            )


def _refuse_uneven(name: str, module: nn.Module, style: ParallelStyle, size: int) -> None:
    """Parts of different widths would meet in code that knows nothing of them, where the output or input is one."""
    if not isinstance(module, nn.Linear):
        return
    if isinstance(style, ColwiseParallel) and style.output_layouts[0].is_shard():
        width, what = module.out_features, "out_features"
    elif isinstance(style, RowwiseParallel) and style.input_layouts[0].is_shard():
        width, what = module.in_features, "in_features"
    else:
        return
    if width % size:
        raise ConfigError(f"tensor_parallel: {name} has {what}={width}, which {size} parts do not divide; leave it out")
