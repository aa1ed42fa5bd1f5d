"""Parameters and state that several stages share: what a split keeps equal, and what it must refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from pipekern.errors import ConfigError
from pipekern.stage.unit import Unit


class Tie(NamedTuple):
    """One parameter that several ranks hold: ``names[rank]`` is its name on that rank. The lowest rank owns it."""

    names: dict[int, str]


def refuse_shared_state(stages: Sequence[Sequence[Unit]]) -> None:
    """Raise ``ConfigError`` for each module with buffers that would be in two stages: its copies would drift apart."""
    home: dict[nn.Module, tuple[int, str]] = {}
    faults = []
    for index, units in enumerate(stages):
        for unit in units:
            for name, module in unit.train.named_modules():
                if not _has_state(module):
                    continue
                path = (unit.prefix + name).rstrip(".")
                stage, first = home.setdefault(module, (index, path))
                if stage != index:
                    kind = type(module).__name__
                    faults.append(f"{path} ({kind}) is in stages {stage} and {index} (there as {first})")
    if faults:
        raise ConfigError(
            "modules with buffers cannot be shared between stages, each would update a copy of its own: "
            + "; ".join(faults)
            + ". Move the split so that one stage has both, or give each place a module of its own"
        )


def _has_state(module: nn.Module) -> bool:
    return next(iter(module.buffers(recurse=False)), None) is not None and type(module).__name__ != "GraphModule"


def find_ties(stages: Sequence[Sequence[Unit]], stage_rank: Sequence[int]) -> list[Tie]:
    """The parameters that units of several ranks hold, in the model's order."""
    holders: dict[int, dict[int, str]] = {}
    for stage, units in enumerate(stages):
        for unit in units:
            for name, parameter in unit.named_parameters():
                holders.setdefault(id(parameter), {}).setdefault(stage_rank[stage], name)
    return [Tie(dict(sorted(names.items()))) for names in holders.values() if len(names) > 1]
