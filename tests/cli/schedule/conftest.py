from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.schedule.sample import BAD


@pytest.fixture
def bad(tmp_path: Path) -> str:
    """A file whose schedule deadlocks."""
    path = tmp_path / "bad.txt"
    path.write_text(BAD)
    return str(path)
