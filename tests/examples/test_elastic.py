"""Training that goes on with more or fewer ranks is the training that was never broken off, up to rounding."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from examples.elastic import train
from tests.launch import launch, values

EPOCHS, EVERY = 2, 7
STEPS = EPOCHS * 32

Curve = dict[int, float]
Job = Callable[[str, int], None]  # folder, step


def _some(folder: str, most: int = STEPS) -> Curve:
    """Losses by step, ``most`` of them, from the last save on."""
    torch.set_default_dtype(torch.float64)
    return dict(islice(train(Path(folder), EPOCHS, EVERY), most))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """What two ranks do that are left alone."""
    return values(launch(_some, 2, str(tmp_path_factory.mktemp("unbroken"))))[0]


def _same(curve: Curve, unbroken: Curve) -> None:
    assert max(abs(loss - unbroken[step]) for step, loss in curve.items()) < 1e-12


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1)])
def test_any_number_of_ranks_goes_on(before: int, after: int, unbroken: Curve, tmp_path: Path) -> None:
    """Dropout, moments, and the place in an epoch; stopped at any step, also before the first save."""
    stop = random.randint(1, STEPS - 1)
    begun = values(launch(_some, before, str(tmp_path), stop))
    ended = values(launch(_some, after, str(tmp_path)))
    for curve in begun:
        assert list(curve) == list(range(stop))
        _same(curve, unbroken)
    for curve in ended:
        assert list(curve) == list(range((stop - 1) // EVERY * EVERY, STEPS))
        _same(curve, unbroken)


def _agent(job: Job, folder: str, step: int) -> None:
    """What torchrun is on one of three machines, with a process each; two are enough."""
    if job is _joined and os.environ["RANK"] == "2":
        _wait_for(Path(folder, "reached"))
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=3,
        nproc_per_node=1,
        max_restarts=3,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{os.environ['MASTER_PORT']}",
        rdzv_configs={"is_host": "0", "last_call_timeout": 1, "keep_alive_interval": 1, "keep_alive_max_attempt": 3},
        start_method="fork",
    )
    elastic_launch(config, _started)(job, folder, step)


def _started(job: Job, folder: str, step: int) -> None:
    job(folder, step)


def _wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


def _logged(folder: str, each: Callable[[int, int, int], None]) -> None:
    """Train; rank 0 writes a line a step: ranks, step, loss. ``each`` is called before, with rank, ranks, and step."""
    torch.set_default_dtype(torch.float64)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with open(Path(folder, "curve"), "a") as log:
        for step, loss in train(Path(folder, "checkpoint"), EPOCHS, EVERY):
            if rank == 0:
                log.write(json.dumps([ranks, step, loss]) + "\n")
                log.flush()
            each(rank, ranks, step)


def _lost(victim: int, folder: str, step: int) -> None:
    """At ``step`` one of three machines is gone, with its part of torchrun."""

    def die(rank: int, ranks: int, at: int) -> None:
        if (rank, ranks, at) == (victim, 3, step):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torch sends it to what outlives its part of torchrun
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    _logged(folder, die)


def _joined(folder: str, step: int) -> None:
    """Two machines do not go on after ``step``."""

    def wait(rank: int, ranks: int, at: int) -> None:
        if (rank, ranks, at) == (0, 2, step):
            Path(folder, "reached").touch()
            signal.pause()

    _logged(folder, wait)


def _curves(folder: Path) -> list[tuple[int, Curve]]:
    """Losses by step of each start, with its number of ranks."""
    curves: list[tuple[int, Curve]] = []
    for line in (folder / "curve").read_text().splitlines():
        ranks, step, loss = json.loads(line)
        if not curves or curves[-1][0] != ranks:
            curves.append((ranks, {}))
        curves[-1][1][step] = loss
    return curves


APART = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a store a start: otherwise nobody can join, nor the first be lost


@pytest.mark.parametrize(
    ("job", "ranks", "environ"),
    [
        pytest.param(partial(_lost, 2), [3, 2], {}, id="lost"),
        pytest.param(_joined, [2, 3], APART, id="joined"),
        pytest.param(partial(_lost, 2), [3, 2], APART, id="lost-apart", marks=pytest.mark.full),
        pytest.param(partial(_lost, 0), [3, 2], APART, id="first-lost", marks=pytest.mark.full),
    ],
)
def test_torchrun_starts_again_with_the_machines_that_are_there(
    job: Job, ranks: list[int], environ: dict[str, str], unbroken: Curve, tmp_path: Path
) -> None:
    step = random.randint(EVERY, STEPS - 2)
    outcomes = launch(_agent, 3, job, str(tmp_path), step, timeout=60.0, environ=environ)
    values([outcome for outcome in outcomes if outcome.exitcode != -signal.SIGKILL])
    assert sum(outcome.exitcode == 0 for outcome in outcomes) == ranks[-1]
    (before, begun), (after, ended) = _curves(tmp_path)
    assert [before, after] == ranks
    assert list(begun) == list(range(step + 1))
    assert list(ended) == list(range(step // EVERY * EVERY, STEPS))
    _same(begun, unbroken)
    _same(ended, unbroken)
