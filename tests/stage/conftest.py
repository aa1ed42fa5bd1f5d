"""Fixtures of the stages' tests."""

from tests.runtime.conftest import seed

__all__ = ["seed"]
