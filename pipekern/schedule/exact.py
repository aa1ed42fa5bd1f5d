"""Costs as integers in a common fraction of their unit, so that sums and comparisons are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from pipekern.errors import ConfigError


def fractions(name: str, values: Sequence[float]) -> list[Fraction]:
    """``values`` exactly; raises ``ConfigError`` for one that is negative or not finite."""
    for value in values:
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value} is not a finite number of at least 0; give a measured or estimated cost")
    return [Fraction(value) for value in values]


def scaled(*lists: Sequence[Fraction]) -> tuple[int, list[list[int]]]:
    """A scale, and the lists as integers of 1 / scale."""
    scale = math.lcm(*(value.denominator for values in lists for value in values))
    return scale, [[value.numerator * (scale // value.denominator) for value in values] for values in lists]


def number(ticks: int, scale: int) -> float:
    """``ticks / scale``, as an int where it is one."""
    whole, rest = divmod(ticks, scale)
    return ticks / scale if rest else whole
