"""Relative costs of a model's units without running them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipekern.stage.deferral import deferrable
from pipekern.stage.unit import Unit


def estimate(units: Sequence[Unit]) -> list[float]:
    """One positive number a unit: multiplications a sample position, which are the elements of its weight matrices.

    Embeddings are look-ups and count nothing; a unit without matrices counts one thousandth of the mean, so that
    light units spread evenly. A convolution's reuse over positions is not seen: ``pk.profile`` measures it.
    """
    weights = [sum(_products(module) for module in unit.train.modules()) for unit in units]
    floor = max(1.0, sum(weights) / len(weights) / 1000)
    return [weight + floor for weight in weights]


def estimate_waiting(units: Sequence[Unit]) -> list[float]:
    """Of each unit's number, the share of layers whose weight gradient can be put off."""
    return [float(sum(map(_products, deferrable(unit.train.modules())))) for unit in units]


def _products(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    return sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
