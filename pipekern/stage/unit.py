"""Units: the pieces of a model that a cut never divides, in the order in which a batch goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.stage.arguments import Arguments
from pipekern.stage.graph import UntraceableError, cut_graph
from pipekern.stage.skeleton import Skeleton
from pipekern.stage.skip import Skip, carrying, needed_after
from pipekern.stage.spec import LayerSpec


@dataclass(frozen=True)
class Unit:
    """One piece of a model. ``train`` and ``evaluate`` take the value before it and return the value after it.

    They are one module, or two traces of the same code where that code looks at ``self.training``. ``prefix`` is put
    before the parameters' names to give those of the whole model. ``build`` makes a lazy unit real.
    ``needed``: in a model with skips, the names that are joined after this unit.
    """

    name: str
    train: nn.Module
    evaluate: nn.Module
    prefix: str = ""
    build: Callable[[], nn.Module] | None = None
    arguments: Arguments | None = None
    skeleton: Skeleton | None = None
    needed: frozenset[str] | None = None

    def call(self, module: nn.Module) -> Callable[[Any], Any]:
        """``module`` (train or evaluate) as a function of the value before it; with a ``skeleton``, of one call of a
        module: (module, args, kwargs).
        """
        return self.spreading(module) if self.skeleton is None else _call

    def spreading(self, module: nn.Module) -> Callable[[Any], Any]:
        """``module`` as a function of one value, which the first unit of a model whose forward has several parameters
        takes apart; see :meth:`Arguments.spread`.
        """
        if self.needed is not None:
            return carrying(module, self.needed)
        arguments = self.arguments
        if arguments is None or not arguments.several:
            return module

        def spreading(value: Any) -> Any:
            positional, named = arguments.spread(value)
            return module(*positional, **named)

        return spreading

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the whole model, a tied one under each of its names."""
        for name, parameter in self.train.named_parameters(remove_duplicate=False):
            yield self.prefix + name, parameter

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers under their names in the whole model."""
        return {self.prefix + name: value for name, value in self.train.state_dict().items()}

    def built(self) -> Unit:
        """This unit with memory and weights."""
        if self.build is None:
            return self
        layer = self.build()
        return replace(self, train=layer, evaluate=layer, build=None)


def cut(
    model: nn.Module | Sequence[LayerSpec], seed: int, inputs: Sequence[str] | None = None
) -> tuple[nn.Module, list[Unit]]:
    """The root module and its units.

    ``nn.Sequential`` is cut at its children (nested ones included), a list of specs at its layers, any other module
    at the layers of its longest ``nn.ModuleList`` or ``nn.Sequential``, which its forward must call one after the
    other; what is before and after them are units of their own. A forward that cannot be traced is run by every stage
    (``replay.py``). ``inputs`` names the parameters of that forward which a batch gives, by default those without a
    default. Raises ``ConfigError``.
    """
    if isinstance(model, nn.Sequential) and type(model).forward not in (nn.Sequential.forward, Skip.forward):
        raise ConfigError(
            f"{type(model).__name__} is an nn.Sequential with a forward of its own, which a cut at its layers would "
            "leave out; hold the layers in an attribute of an nn.Module, or leave that forward out"
        )
    if inputs is not None and (isinstance(model, nn.Sequential) or not isinstance(model, nn.Module)):
        raise ConfigError(
            f"inputs={list(inputs)} for a {type(model).__name__}, whose first layer takes a batch as it is; leave "
            "inputs out"
        )
    if isinstance(model, nn.Sequential):
        _refuse_hooks(model)
        units = _with_skips([Unit(name, layer, layer, f"{name}.") for name, layer in _children(model, "")], model)
        root: nn.Module = model
    elif isinstance(model, nn.Module):
        root = model
        units = _around_layers(model, Arguments.of(model, inputs))
        _refuse_hooks(model)
    else:
        root, units = _lazy(model, seed)
        units = _with_skips(units, model)
    if not units:
        raise ConfigError("the model has no layers: there is nothing to cut; give at least one layer a stage")
    return root, units


def _around_layers(model: nn.Module, arguments: Arguments) -> list[Unit]:
    try:
        units = [Unit(piece.name, piece.train, piece.evaluate) for piece in cut_graph(model, arguments)]
    except UntraceableError:
        skeleton = Skeleton.of(model, arguments)
        named = zip(skeleton.names, skeleton.holders(), strict=True)
        units = [Unit(name, holder, holder, skeleton=skeleton) for name, holder in named]
    units[0] = replace(units[0], arguments=arguments)
    return units


def _call(value: tuple[nn.Module, tuple[Any, ...], dict[str, Any]]) -> Any:
    module, args, kwargs = value
    return module(*args, **kwargs)


def _children(container: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in container._modules.items():  # named_children() leaves out a module that stands here twice
        assert child is not None
        if type(child) is nn.Sequential and len(child) > 0 and not hooked(child):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _with_skips(units: list[Unit], model: nn.Sequential | Sequence[LayerSpec]) -> list[Unit]:
    needed = needed_after([(unit.name, unit.train) for unit in units])
    if needed is None:
        return units
    if isinstance(model, nn.Sequential) and not isinstance(model, Skip):
        raise ConfigError(
            f"{type(model).__name__} holds pk.Skip.save or pk.Skip.join, and its forward hands nothing on to them; "
            "make it a pk.Skip of the same layers"
        )
    return [replace(unit, needed=names) for unit, names in zip(units, needed, strict=True)]


def _lazy(model: Sequence[LayerSpec], seed: int) -> tuple[nn.Module, list[Unit]]:
    if not isinstance(model, Sequence) or not all(isinstance(spec, LayerSpec) for spec in model):
        raise ConfigError(
            f"Pipeline got a {type(model).__name__}; give an nn.Sequential, an nn.Module with a layer list, or a list "
            "of pk.LayerSpec"
        )

    def unit(index: int, spec: LayerSpec) -> Unit:
        layer = spec.meta()
        return Unit(str(index), layer, layer, f"{index}.", lambda: spec.build(index, seed))

    return nn.Module(), [unit(index, spec) for index, spec in enumerate(model)]


def hooked(module: nn.Module) -> bool:
    """Whether hooks of its own watch it."""
    return any(
        getattr(module, kind)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _refuse_hooks(module: nn.Module) -> None:
    if hooked(module):
        raise ConfigError(
            f"{type(module).__name__} has hooks of its own, and no rank runs it whole; put the hooks on its layers"
        )
