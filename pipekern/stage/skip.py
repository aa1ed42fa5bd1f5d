"""Skips: values handed past layers, from where they are saved to where they are joined.

Nothing is kept in a module: the model's forward, or a stage's, carries what is saved beside the value, so that
micro-batches may be under way together and a layer may run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipekern.errors import ConfigError
from pipekern.transport.value import tensors


class Save(nn.Module):
    """Hands its value on, and marks it as what a later :class:`Join` of the same ``name`` takes."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, value: Any) -> Any:
        return value

    def extra_repr(self) -> str:
        return repr(self.name)


class Join(nn.Module):
    """``combine(value, saved)`` of its value and the one saved as ``name``."""

    def __init__(self, name: str, combine: Callable[[Any, Any], Any]):
        super().__init__()
        self.name = name
        self.combine = combine

    def forward(self, value: Any, *saved: Any) -> Any:
        if not saved:
            raise ConfigError(
                f"Skip.join({self.name!r}) was called with one value; only pk.Skip hands on what is saved: make the "
                "container of this layer a pk.Skip"
            )
        return self.combine(value, *saved)

    def extra_repr(self) -> str:
        return repr(self.name)


class Skip(nn.Sequential):
    """An ``nn.Sequential`` in which values skip layers::

        net = pk.Skip(
            stem,
            pk.Skip.save("a"), down, middle, up, pk.Skip.join("a", torch.add),
            head,
        )

    ``Skip.save(name)`` hands on the value that reaches it and keeps it; ``Skip.join(name, combine)`` hands on
    ``combine(value, saved)``, where ``combine`` is a function or a module with weights of its own. A name is saved
    once, and joined once or several times after that; values are any that may go between stages. Both are layers of
    the ``Skip`` itself, not of a module within it; in a list of ``LayerSpec`` write ``LayerSpec(Skip.save, "a")``.
    What is saved may not be written in place afterwards. Raises ``ConfigError`` for all of this: a pipeline before it
    starts, the module alone when it runs.
    """

    save = Save
    join = Join

    def forward(self, value: Any) -> Any:
        kept: dict[str, Any] = {}
        for layer in self:
            value, kept = _step(layer, value, kept)
        return value


@dataclass
class Carried:
    """A value on its way through a pipeline, and what has been saved for layers after it, by name."""

    value: Any
    kept: dict[str, Any]


def carrying(layer: nn.Module, needed: frozenset[str]) -> Callable[[Any], Any]:
    """``layer`` as a function of a value or a :class:`Carried`; of what is kept, it hands on the names ``needed``."""

    def run(value: Any) -> Any:
        carried = value if isinstance(value, Carried) else Carried(value, {})
        value, kept = _step(layer, carried.value, carried.kept)
        kept = {name: saved for name, saved in kept.items() if name in needed}
        return Carried(value, kept) if kept else value

    return run


def _step(layer: nn.Module, value: Any, kept: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    before = list(_versions(kept))
    if isinstance(layer, Save):
        return layer(value), {**kept, layer.name: value}
    if isinstance(layer, Join):
        if layer.name not in kept:
            raise ConfigError(f"{layer} has nothing to join: save {layer.name!r} in a layer of the pk.Skip before it")
        value = layer(value, kept[layer.name])
    else:
        value = layer(value)
    written = {name for (name, old), (_, new) in zip(before, _versions(kept), strict=True) if old != new}
    if written:
        raise ConfigError(
            f"{type(layer).__name__} wrote in place into what was saved as {', '.join(map(repr, sorted(written)))}; "
            "its copy on another stage would not change: write to a copy, or save the value after the write"
        )
    return value, kept


def _versions(kept: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """How often each saved tensor has been written, where torch counts that."""
    for name, value in kept.items():
        yield from ((name, tensor._version) for tensor in tensors(value) if not tensor.is_inference())


def needed_after(layers: Sequence[tuple[str, nn.Module]]) -> list[frozenset[str]] | None:
    """For each layer, given with its name in the model, what is still joined after it; None where nothing skips.

    Raises ``ConfigError`` that lists every fault.
    """
    saved: dict[str, int] = {}
    joined: dict[str, int] = {}
    faults = []
    for index, (place, layer) in enumerate(layers):
        if not isinstance(layer, Save | Join) or "." in place:
            faults += [f"layer {place} saves or joins within a module"] * _hides(layer)
        elif isinstance(layer, Save):
            if saved.setdefault(layer.name, index) != index:
                faults.append(f"layer {place} saves {layer.name!r} again, after layer {layers[saved[layer.name]][0]}")
        else:
            joined[layer.name] = index
            if layer.name not in saved:
                faults.append(f"layer {place} joins {layer.name!r} before it is saved")
    faults += [
        f"layer {layers[i][0]} saves {name!r}, which is never joined" for name, i in saved.items() if name not in joined
    ]
    if faults:
        raise ConfigError(
            f"skips: {'; '.join(faults)}. A name is saved once and joined after that, by layers of the pk.Skip itself: "
            "give every skip a name of its own, and move, add or take out what is named here"
        )
    return [frozenset(n for n in saved if saved[n] <= i < joined[n]) for i in range(len(layers))] if saved else None


def _hides(module: nn.Module) -> bool:
    """Whether there is a :class:`Save` or :class:`Join` that is not a layer of a :class:`Skip` in ``module``."""
    return isinstance(module, Save | Join) or (not isinstance(module, Skip) and any(map(_hides, module.children())))
