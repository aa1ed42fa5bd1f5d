"""How real interpreters end: none hangs or crashes, and an error outside of the pipeline is told to the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import rendezvous
from tests.transport import fake_cuda
from tests.transport.programs import PATIENCE, SHM

# With a stand-in, an interpreter more to start for what C++ does alike.
on_processes = pytest.mark.parametrize(
    "transport", [SHM, "dist", *(pytest.param(name, marks=pytest.mark.full) for name in fake_cuda.KNOBS)]
)

SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
from pipekern.transport.base import Link
from pipekern.transport.open import open_transport
from pipekern.transport.world import join
from tests.transport import fake_cuda
fake_cuda.load(sys.argv[1])
name = fake_cuda.real_name(sys.argv[1])
world = join(name, 30.0)
links = [Link("0>1", 0, 1, 2), Link("1>0", 1, 0, 2)]
transport, senders, receivers = open_transport(name, links, [torch.device("cpu")] * 2, world)
if world.rank == 0:
    senders["0>1"].send(0, torch.ones(3))
    kept = receivers["1>0"].recv(0).value
    senders["0>1"].send(1, "arrived")
else:
    kept = receivers["0>1"].recv(0).value
    senders["1>0"].send(0, kept + 1)
    receivers["0>1"].recv(1)
print("fine", flush=True)
if sys.argv[2] == "error" and world.rank == 1:
    raise KeyError("outside of the pipeline")
if sys.argv[2] == "error":
    receivers["1>0"].recv(1)
print("ended", flush=True)
"""


@on_processes
@pytest.mark.parametrize("end", ["plain", "error"])
def test_an_interpreter_ends_without_close(transport: str, end: str, tmp_path: Path) -> None:
    with rendezvous("outside") as address:
        processes = []
        for rank in range(2):
            environ = {**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", SCRIPT, transport, end]
            with (tmp_path / f"{rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=3 * PATIENCE) for process in processes]
        finally:
            for process in processes:
                process.kill()
    texts = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert all("fine" in text.splitlines() for text in texts), texts
    if end == "plain":
        assert codes == [0, 0], texts
    else:
        assert codes == [1, 1] and "KeyError: 'outside of the pipeline'" in texts[0], texts
