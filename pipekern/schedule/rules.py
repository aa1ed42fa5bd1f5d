"""Rules that a generator's numbers must keep, said in one way: value, rule, nearest value that keeps it."""

from __future__ import annotations

from pipekern.errors import ConfigError


def at_least(schedule: str, what: str, value: float, least: float) -> None:
    """Raise ``ConfigError`` where ``value`` of ``what`` is below ``least``."""
    if not value >= least:
        raise ConfigError(f"{what}={value}: {schedule} needs at least {least}; nearest {what}={least}")


def multiple(schedule: str, what: str, value: int, unit: int, unit_name: str = "") -> None:
    """Raise ``ConfigError`` where ``value`` of ``what`` is not a multiple of ``unit``, which may have a name."""
    if value % unit:
        below, above = value // unit * unit, -(-value // unit) * unit
        nearest = below if below and value - below < above - value else above
        rule = f"a multiple of {unit_name}={unit}" if unit_name else f"a multiple of {unit}"
        raise ConfigError(f"{what}={value}: {schedule} needs {rule}; nearest {what}={nearest}")
