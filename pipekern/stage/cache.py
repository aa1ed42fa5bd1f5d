"""Key-value caches: what a layer keeps of the tokens it has seen, so that each new one is computed alone."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError

NAME = "cache"


class Cache:
    """What one layer keeps of the tokens that one group of prompts has already shown it.

    A module takes a cache where its forward has a parameter ``cache`` with the default None. It is given one wherever
    it is in the model, and its callers need not know::

        def forward(self, x, cache=None):                  # x: (samples, new tokens, width)
            start = 0 if cache is None else cache.length   # the position of the first new token
            ...
            if cache is not None:
                key, value = cache.append(key, value)      # all tokens so far, (samples, heads, tokens, width)

    ``length`` is the number of tokens before, 0 in the first forward, which gets the whole prompt; every later one gets
    one new token. All samples of a forward have the same length, and there is no padding. ``capacity`` is the most
    tokens that will come. A module that looks at positions and keeps nothing reads ``length`` and appends nothing.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._kept: list[torch.Tensor] = []
        self._appended = False

    def begin(self, length: int) -> None:
        """Start a forward that comes after ``length`` tokens."""
        self.length, self._appended = length, False

    def append(self, *new: torch.Tensor, dim: int = -2) -> tuple[torch.Tensor, ...]:
        """Keep tensors of the new tokens, which lie along ``dim``; returns them with those of all tokens before.

        Once a forward, with as many tensors of the same shapes each time, but for ``dim``; they are copied, and what
        is returned may be read only. Raises ``ConfigError``.
        """
        if self._appended:
            raise ConfigError("cache.append was called twice in one forward; give it all tensors in one call")
        self._appended = True
        if not self._kept:
            self._kept = [self._memory(tensor, dim) for tensor in new]
        if len(new) != len(self._kept):
            raise ConfigError(
                f"cache.append got {len(new)} tensors, and {len(self._kept)} before; give the same each time"
            )
        return tuple(self._write(memory, tensor, dim) for memory, tensor in zip(self._kept, new, strict=True))

    def _memory(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        if self.length:
            raise ConfigError(f"cache.append was first called after {self.length} tokens; call it in every forward")
        shape = list(tensor.shape)
        shape[dim] = self.capacity
        return tensor.new_empty(shape)

    def _write(self, memory: torch.Tensor, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        tokens = tensor.shape[dim]
        whole = list(tensor.shape)
        whole[dim] = self.capacity
        if whole != list(memory.shape) or self.length + tokens > self.capacity:
            raise ConfigError(
                f"cache.append got {tuple(tensor.shape)} with tokens along dimension {dim}, after {self.length} tokens "
                f"in {tuple(memory.shape)}; only the number of tokens may change, and no more may come than the "
                "forward was given"
            )
        memory.narrow(dim, self.length, tokens).copy_(tensor)
        return memory.narrow(dim, 0, self.length + tokens)


def takes_cache(module: nn.Module) -> bool:
    """Whether its forward has a parameter ``cache``."""
    return _place(module) is not None


def _place(module: nn.Module) -> int | None:
    names = list(inspect.signature(module.forward).parameters)
    return names.index(NAME) if NAME in names else None


class Caches:
    """The caches of those ``modules`` that take one: one for each call in a forward, by stage and group."""

    def __init__(self, modules: Iterable[nn.Module]):
        places = {module: _place(module) for module in modules}
        self._places = {module: place for module, place in places.items() if place is not None}
        self._kept: dict[tuple[int, int], dict[tuple[nn.Module, int], Cache]] = {}
        self._calls: Counter[nn.Module] = Counter()

    @contextmanager
    def given(self) -> Iterator[None]:
        """Modules get their caches as long as this lasts; then all is forgotten."""
        hooks = [module.register_forward_pre_hook(self._give, with_kwargs=True) for module in self._places]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._kept.clear()
            self._calls.clear()

    def begin(self, stage: int, group: int, length: int, capacity: int) -> None:
        """Start a forward of ``stage`` for ``group``, after ``length`` tokens of ``capacity``."""
        self._current = self._kept.setdefault((stage, group), {})
        self._length, self._capacity = length, capacity
        self._calls.clear()

    def drop(self, stage: int, group: int) -> None:
        """Free what ``stage`` keeps for ``group``."""
        self._kept.pop((stage, group), None)

    def _give(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self._places[module]
        if (args[place] if place < len(args) else kwargs.get(NAME)) is not None:
            return None  # its caller hands on its own
        key = module, self._calls[module]
        self._calls[module] += 1
        cache = self._current.get(key)
        if cache is None:
            cache = self._current[key] = Cache(self._capacity)
        cache.begin(self._length)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, {**kwargs, NAME: cache}
