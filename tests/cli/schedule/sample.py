"""What tests of ``pipekern schedule`` share."""

from __future__ import annotations

GRID = ["--ranks", "2", "--microbatches", "3"]
BAD = "pipekern-schedule name=bad microbatches=1 stage_rank=0,1\n0BW0 0F0\n1F0 1BW0\n"
