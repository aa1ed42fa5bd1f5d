"""Every exception class of pipekern. A message says the value, the rule it broke, and the mend."""

from __future__ import annotations


class PipekernError(Exception):
    """Base of all errors that pipekern raises on purpose."""


class ConfigError(PipekernError, ValueError):
    """Refused before anything starts: the value, the rule and the mend are in the text."""


class ScheduleError(PipekernError):
    """A schedule that cannot run. ``faults`` lists every fault found, not only the first; ``mend`` says what to do."""

    def __init__(self, summary: str, faults: list[str] | None = None, mend: str = ""):
        self.faults = list(faults or [])
        lines = [summary, *(f"  * {fault}" for fault in self.faults), *([mend] if mend else [])]
        super().__init__("\n".join(lines))


class NumericsError(PipekernError):
    """A loss or gradient that is not finite; names stage, rank and micro-batch where it arose."""


class CheckpointError(PipekernError):
    """A checkpoint that cannot be written or read: said on all ranks, and nothing has changed."""


class TransportError(PipekernError):
    """A message that could not be moved. ``rank`` is the rank at fault, -1 where there is none."""

    def __init__(self, message: str, rank: int = -1):
        super().__init__(message)
        self.rank = rank


class PeerDied(TransportError):
    """The process of rank ``rank`` has ended."""


class PeerFrozen(TransportError):
    """The process of rank ``rank`` lives but has not moved for the whole deadline."""


class TransportTimeout(TransportError):
    """Every rank has waited for the whole deadline: nobody can go on."""


class Aborted(TransportError):
    """Another rank failed; its traceback is in the text, its number in ``rank``."""


class MessageMismatch(TransportError):
    """A message that is not the one the program expects (tag, dtype, shape, or batch)."""
