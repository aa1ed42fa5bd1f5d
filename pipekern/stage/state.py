"""Where a module holds its layers, parameters and buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipekern.errors import ConfigError


def layer_list(root: nn.Module) -> tuple[str, list[str]]:
    """Path of the longest layer list that is in no other one, and the paths of its layers. Raises ``ConfigError``."""
    lists = [(name, m) for name, m in root.named_modules() if name and isinstance(m, nn.ModuleList | nn.Sequential)]
    if not lists:
        raise ConfigError(
            f"{type(root).__name__} has no nn.ModuleList or nn.Sequential to cut; hold its layers in one, "
            "or give an nn.Sequential or a list of pk.LayerSpec"
        )
    outer = [(name, m) for name, m in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    path, layers = max(outer, key=lambda item: len(item[1]))
    return path, [f"{path}.{name}" for name in layers._modules]


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under every name they have."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def container(into: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` in ``into``, made of modules that do nothing where there is none."""
    for part in path.split(".") if path else ():
        if part not in into._modules:
            into.add_module(part, nn.Module())
        into = into.get_submodule(part)
    return into


def adopt(root: nn.Module, into: nn.Module, names: Sequence[str]) -> None:
    """Hold ``root``'s parameters and buffers ``names`` in ``into`` as well, in modules that do nothing."""
    for path, _, name in (whole.rpartition(".") for whole in names):
        source, target = root.get_submodule(path), container(into, path)
        if name in source._parameters:
            target.register_parameter(name, source._parameters[name])
        else:
            target.register_buffer(name, source._buffers[name], name not in source._non_persistent_buffers_set)
