"""A user's optimizer over what a process has of the parameters, and the norm of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.optim import AdamW, clip
from pipekern.runtime.assembly import Assembly

WHOLE = (torch.optim.Adafactor, torch.optim.LBFGS, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else []))


def bound(
    parts: Callable[[], Assembly],
    running: Callable[[], AbstractContextManager[None]],
    cls: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """See ``Pipeline.optimizer``. ``parts()`` are today's; what an ``AdamW`` exchanges happens within ``running()``."""
    now = parts()
    if now.zero and issubclass(cls, WHOLE):
        raise ConfigError(
            f"zero={now.zero} with {cls.__name__}, which looks at whole matrices, and here has shards of them; use "
            "zero=0, or an optimizer that treats every number alone"
        )
    optimizer = cls([{"params": now.distinct()}], **options)
    attach(optimizer, now, running)
    if isinstance(optimizer, AdamW) and now.store is not None:
        optimizer.register_step_post_hook(lambda *_: parts().store.mark())  # type: ignore[union-attr]  # stays one
    return optimizer


def attach(
    optimizer: torch.optim.Optimizer, parts: Assembly, running: Callable[[], AbstractContextManager[None]]
) -> None:
    """Let an ``AdamW`` clip by the norm over all ranks of ``parts``, and write their low-precision values."""
    if isinstance(optimizer, AdamW):

        def share(stats: Tensor, parameters: list[nn.Parameter]) -> Tensor:
            with running():
                return _rows(parts, stats, parameters)

        optimizer.bind(share, {} if parts.store is None else parts.store.copies())


def gradient_norm(parts: Assembly, norm_type: float) -> tuple[Tensor, str]:
    """One norm over all ranks, and the name of the first parameter whose own is not finite, if any; collective."""
    place = parts.blueprint.parameters
    own = {place[name]: p for name, p in parts.counted().items()}
    total, bad = clip.total_norm(parts.of_parameters(clip.partials(own, norm_type)), norm_type)
    return total, next((name for name, index in place.items() if index == bad), "")


def _rows(parts: Assembly, stats: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The rows of all ranks' parameters, each parameter once, in the model's order."""
    places = {id(p): parts.blueprint.parameters[name] for name, p in parts.counted().items()}
    rows = [(places[id(p)], i) for i, p in enumerate(parameters) if id(p) in places]
    own = torch.tensor([place for place, _ in rows], dtype=torch.int64), stats[[i for _, i in rows]]
    found = parts.of_parameters(own)
    order = torch.cat([place for place, _ in found]).argsort(stable=True)
    return torch.cat([values.to(stats.device) for _, values in found])[order.to(stats.device)]
