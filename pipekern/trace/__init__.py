"""Timelines: what every rank did and when, as data and as pictures."""

from pipekern.trace.timeline import Span, Timeline

__all__ = ["Span", "Timeline"]
