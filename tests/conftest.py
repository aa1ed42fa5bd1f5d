"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import settings

# No deadline: a machine that does something else meanwhile must not fail a test.
settings.register_profile("pipekern", deadline=None, print_blob=True)
settings.load_profile("pipekern")
