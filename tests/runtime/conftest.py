"""Fixtures of the runtime's tests."""

from __future__ import annotations

import os
import random

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As a rank under a launcher: threads that wait for each other on shared cores cost up to fifty times the work."""
    torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """A fresh seed for a test's random input; printed, so that a failure can be repeated with ``SEED=… pytest``."""
    value = int(os.environ.get("SEED", random.SystemRandom().getrandbits(31)))
    print(f"SEED={value}")
    torch.manual_seed(value)
    return value
