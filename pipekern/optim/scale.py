"""The dynamic loss scale of float16 training. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipekern.errors import ConfigError


class LossScale:
    """What a loss is multiplied by, so that gradients in float16 neither vanish nor overflow.

    Backs off after an overflow and grows after a run of steps without one, as Megatron-LM's ``DynamicGradScaler``.

    Args:
        initial: The first value.
        growth_factor: The value is multiplied by it after ``growth_interval`` good steps in a row.
        backoff_factor: The value is multiplied by it after an overflow that is not tolerated.
        growth_interval: Steps.
        hysteresis: The overflow from which on the value backs off: at 1 the first, at 2 the second, and each later one.
            Counted anew after each growth.
        minimum: The value never falls below.

    Raises:
        ConfigError: A number out of range.
    """

    def __init__(
        self,
        initial: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        minimum: float = 1.0,
    ):
        self._minimum = _within("minimum", minimum, 0, math.inf)
        self._growth = _within("growth_factor", growth_factor, 1, math.inf)
        self._backoff = _within("backoff_factor", backoff_factor, 0, 1)
        self._interval = _whole("growth_interval", growth_interval, 1)
        self._hysteresis = _whole("hysteresis", hysteresis, 1)
        self._value = _within("initial", initial, 0, math.inf)
        if self._value < self._minimum:
            raise ConfigError(f"initial is {initial}; it must be at least minimum, {minimum}")
        self._good = 0  # steps without an overflow since the last one, or since the last growth
        self._overflows = 0  # since the last growth

    @property
    def value(self) -> float:
        return self._value

    def update(self, overflow: bool) -> bool:
        """Count a step. Returns whether it overflowed at the minimum, where a smaller scale cannot help."""
        if not overflow:
            self._good += 1
            if self._good == self._interval:
                self._good = self._overflows = 0
                self._value *= self._growth
            return False
        at_minimum = self._value == self._minimum
        self._good = 0
        self._overflows += 1
        if self._overflows >= self._hysteresis:
            self._value = max(self._value * self._backoff, self._minimum)
        return at_minimum

    def state(self) -> dict[str, float]:
        """What changes from step to step, for JSON."""
        return {"value": self._value, "good": self._good, "overflows": self._overflows}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`. Raises ``ConfigError``, and changes nothing, where it is not one."""
        if set(state) != set(self.state()):
            raise ConfigError(f"the state of a loss scale has {sorted(self.state())}, and this one {sorted(state)}")
        value = _within("value", state["value"], 0, math.inf)
        good, overflows = _whole("good", state["good"], 0), _whole("overflows", state["overflows"], 0)
        if value < self._minimum:
            raise ConfigError(f"value is {value}; it must be at least minimum, {self._minimum}: set a lower minimum")
        # A shorter interval than that of the saved run: the next good step grows.
        self._value, self._good, self._overflows = value, min(good, self._interval - 1), overflows


def _within(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        raise ConfigError(f"{name} is {value!r}; it must be a number above {low} and below {high}")
    return float(value)


def _whole(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, at least {low}")
    return value
