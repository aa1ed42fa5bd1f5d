"""How activations travel over a link: as they are, or with fewer bits where the link is slower than what hides it."""

from __future__ import annotations

from collections.abc import Sequence

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Link

CODECS = ("none", "bf16", "fp8")  # from the least loss to the most
_BYTES = {"bf16": 2.0, "fp8": 1.0 + 4 / 128}  # of a value; in fp8 with a scale of four bytes each 128 values


def choose_codec(link: Link, size: float, width: int, compute: float, allowed: Sequence[str] = CODECS) -> str:
    """The codec with the least loss among those whose messages take at most ``compute`` microseconds, else the fastest.

    ``size`` is the message's bytes without a codec, ``width`` those of one of its values (4 or 2); ``compute`` is the
    work of the slower of the two stages on one micro-batch, behind which a message is hidden in the steady state.
    ``allowed``: those of ``CODECS`` that may be chosen. Raises ``ConfigError`` for values that cannot be.

    >>> choose_codec(Link(5, 10e9), size=64e6, width=2, compute=5000)
    'fp8'
    """
    unknown = [name for name in allowed if name not in CODECS]
    if unknown or not allowed:
        raise ConfigError(f"allowed={list(allowed)}: give some of {', '.join(CODECS)}")
    if width not in (2, 4) or not size >= 0 or not compute >= 0:
        raise ConfigError(
            f"size={size}, width={width}, compute={compute}: bytes and microseconds of at least 0, and 2 or 4 bytes a "
            "value"
        )
    times = {name: link.time(message_bytes(name, size, width)) for name in CODECS if name in allowed}
    hidden = [name for name, time in times.items() if time <= compute]
    return hidden[0] if hidden else min(times, key=lambda name: times[name])


def message_bytes(codec: str, size: float, width: int) -> float:
    """What a message of ``size`` bytes in values of ``width`` bytes takes on a link; never more than without."""
    return size * min(1.0, _BYTES.get(codec, float(width)) / width)
