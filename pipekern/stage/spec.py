"""Layers that are described now and built later, on the rank that owns them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipekern.errors import ConfigError
from pipekern.stage.random import layer_key


class LayerSpec:
    """``LayerSpec(nn.Linear, 8, 8)``: a layer of a lazy model.

    A list of specs is given to ``Pipeline`` in place of a module, so that a rank builds only its own layers.
    The layer's weights come from the pipeline's seed and the layer's position alone, so any number of ranks builds
    the same model, bit for bit. Names in ``state_dict`` are those of ``nn.Sequential``: ``"0.weight"``.
    """

    def __init__(self, build: Callable[..., nn.Module], /, *args: Any, **kwargs: Any):
        if not callable(build):
            raise ConfigError(
                f"LayerSpec({build!r}): the first argument is a module class or a function that returns one"
            )
        self._build, self._args, self._kwargs = build, args, kwargs

    def build(self, index: int, seed: int) -> nn.Module:
        """The layer at position ``index``, with its own random weights; the global random state is not touched."""
        with torch.random.fork_rng():
            torch.manual_seed(layer_key(seed, index))
            layer = self._build(*self._args, **self._kwargs)
        return self._checked(layer)

    def meta(self) -> nn.Module:
        """The layer without memory: shapes, dtypes and names only."""
        with torch.device("meta"):
            return self._checked(self._build(*self._args, **self._kwargs))

    def _checked(self, layer: object) -> nn.Module:
        if not isinstance(layer, nn.Module):
            raise ConfigError(f"{self!r} built a {type(layer).__name__}; a layer spec builds an nn.Module")
        return layer

    def __repr__(self) -> str:
        return f"LayerSpec({getattr(self._build, '__name__', self._build)!s})"
