"""Fixtures of the replicas' tests."""

from tests.runtime.conftest import seed

__all__ = ["seed"]
