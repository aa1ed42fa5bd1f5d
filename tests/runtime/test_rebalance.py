"""A split that follows the speeds of the ranks, by a clock that the layers turn themselves."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from itertools import groupby, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import pipekern as pk
from tests.runtime.step import PLACES, run
from tests.runtime.virtual import Machine, Noise, collected, heavy_tailed, quiet, slight

READY, CLEAN = 15, 45  # steps until the first look at the split, and until a rank's usual speed is known
WITHIN = 30  # steps after a change until the split is right for it
NEAR = 1.1  # of the optimum
FORMS = (slight, heavy_tailed, collected)


class Trial(NamedTuple):
    """What happens to whom: layers' ``seconds``, and rank ``victim`` that is ``slower`` for a while."""

    ranks: int
    schedule: str
    seconds: tuple[float, ...]
    known: bool  # whether the pipeline is told what the layers cost
    victim: int
    slower: float
    noise: Noise
    seed: int

    @classmethod
    def drawn(cls, seed: int) -> Trial:
        """A random one that is slowed 2 ×."""
        generator = random.Random(seed)
        ranks, known = generator.randint(2, 4), generator.random() < 0.5
        count = ranks * generator.randint(4, 5)
        seconds = tuple(generator.uniform(0.005, 0.015) if known else 0.01 for _ in range(count))
        schedule = generator.choice(["1f1b", "gpipe", "zb-h1"])
        return cls(ranks, schedule, seconds, known, generator.randrange(ranks), 2.0, slight, seed)

    def pipeline(self, machine: Machine, net: nn.Module | None = None, **options: Any) -> pk.Pipeline:
        split = pk.LayerCosts.given(self.seconds) if self.known else None
        pipe = pk.Pipeline(
            net or machine.net(), loss_fn=nn.MSELoss(), microbatches=2 * self.ranks, ranks=self.ranks,
            schedule=self.schedule, split=split, timeout=30.0, **options,
        )  # fmt: skip
        pipe.optimizer(torch.optim.SGD, lr=0.0)
        return pipe


class Course(NamedTuple):
    """Of every step: the split after it, its time over the planner's optimum."""

    splits: list[tuple[int, ...]]
    over: list[float]

    def tried(self, start: int, end: int) -> list[tuple[int, ...]]:
        """The splits of these steps, one after the other."""
        return [split for split, _ in groupby(self.splits[start:end])]

    def moves(self, start: int, end: int) -> int:
        """How often the split changed in these steps."""
        return len(self.tried(start, end)) - 1


def _course(ranks: int, trial: Trial, phases: Sequence[tuple[float, int]], **options: Any) -> Course:
    """Steps of ``phases``: how much slower the victim is, how many."""
    machine = Machine(trial.seconds, ranks, trial.noise, random.Random(trial.seed))
    course, x = Course([], []), torch.ones(4 * ranks, 4)
    with trial.pipeline(machine, rebalance="auto", **options) as pipe, machine.running(pipe):
        for slower, steps in phases:
            machine.slower[trial.victim] = slower
            for _ in range(steps):
                pipe.train_step(x, x)
                course.splits.append(pipe.split)
                course.over.append(machine.step() / machine.optimum())
    return course


def _check(trial: Trial, processes: bool) -> None:
    """A rank becomes slow and stays so for a while, then it is as before."""
    phases = [(1.0, CLEAN), (trial.slower, 3 * WITHIN), (1.0, 3 * WITHIN)]
    courses = run(processes, _course, trial.ranks, trial, phases)
    assert all(course == courses[0] for course in courses)
    course, slow, again = courses[0], CLEAN, CLEAN + 3 * WITHIN
    assert course.over[slow] > NEAR, "the slow rank is no bottleneck: this trial proves nothing"
    for start, end in ((0, slow), (slow, again), (again, again + 3 * WITHIN)):
        tried = course.tried(start, end)  # a gain near the least that counts may be taken late, but nothing swings
        assert len(tried) <= 4 and len(set(tried)) == len(tried), tried
    for change in (slow, again):
        assert max(course.over[change + WITHIN : change + 3 * WITHIN]) <= NEAR, course.over[change:]


def test_golden() -> None:
    """Two ranks with six equal layers each; when the second takes twice as long, it keeps three of them: with four, a
    step of four micro-batches would take 120 times a layer's forward, and not 117.
    """
    trial = Trial(2, "1f1b", (0.01,) * 12, False, victim=1, slower=2.0, noise=quiet, seed=0)
    course = _course(2, trial, [(1.0, CLEAN), (2.0, WITHIN)])
    assert set(course.splits[:CLEAN]) == {(6, 6)}
    assert course.splits[-1] == (9, 3)
    assert course.over[CLEAN] > 1.3 and course.over[-1] == 1.0


@pytest.mark.parametrize("number", [*range(2), *(pytest.param(i, marks=pytest.mark.full) for i in range(2, 20))])
def test_a_rank_that_becomes_twice_as_slow(number: int, seed: int) -> None:
    """Within 30 steps a step takes at most 1.1 times what the planner makes of the speeds, and so when it is over."""
    _check(Trial.drawn(seed + number), processes=False)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)])
def test_among_processes(ranks: int, seed: int) -> None:
    """All ranks have the same split after every step."""
    _check(Trial(ranks, "1f1b", (0.01,) * (5 * ranks), False, ranks - 1, 2.0, slight, seed), processes=True)


# Of seven layers either rank may have four under gpipe: both splits are as good.
NOISES = [
    *((slight, schedule, layers, 250) for schedule, layers in (("1f1b", 8), ("gpipe", 7))),
    *((noise, schedule, layers, 1000) for noise, (schedule, layers) in product(FORMS, (("1f1b", 8), ("gpipe", 7)))),
]


@pytest.mark.parametrize(
    ("noise", "schedule", "layers", "steps"),
    [pytest.param(*row, marks=pytest.mark.full if row[-1] == 1000 else ()) for row in NOISES],
)
def test_noise_alone_moves_nothing(noise: Noise, schedule: str, layers: int, steps: int, seed: int) -> None:
    """Not once; of strays with no finite variance one in 1,000 steps is let pass, as in one of 32 runs."""
    trial = Trial(2, schedule, (0.01,) * layers, False, 0, 1.0, noise, seed)
    course = _course(2, trial, [(1.0, steps)])
    assert course.moves(0, steps) <= (noise is not slight), course.splits


def _asked(ranks: int, slower: float) -> tuple[pk.Move | None, pk.Move | None, tuple[int, ...], list[str]]:
    """Two calls after steps in which rank 0 was ``slower`` all along; the log."""
    lines: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("pipekern")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    trial = Trial(ranks, "1f1b", (0.01,) * 12, False, 0, slower, quiet, 0)
    machine, x = Machine(trial.seconds, ranks, quiet, random.Random(0)), torch.ones(4 * ranks, 4)
    machine.slower[0] = slower
    with trial.pipeline(machine) as pipe, machine.running(pipe):
        for _ in range(20):
            pipe.train_step(x, x)
        first = pipe.rebalance()
        for _ in range(20):
            pipe.train_step(x, x)
        found = first, pipe.rebalance(), pipe.split, lines
    log.removeHandler(handler)
    return found


@PLACES
def test_asked_for(processes: bool) -> None:
    """A rank that was slow from the start is given fewer layers once; on ranks that are alike nothing moves."""
    for first, second, split, _ in run(processes, _asked, 2, 2.0):
        assert first is not None and (first.before, first.after) == ((6, 6), (4, 8)) == ((6, 6), split)
        assert second is None
    for first, second, split, _ in run(processes, _asked, 2, 1.0):
        assert (first, second, split) == (None, None, (6, 6))


def test_the_log_says_what_moves() -> None:
    """In the first process."""
    lines, others = (found[3] for found in run(True, _asked, 2, 2.0))
    assert others == []
    told = [line for line in lines if "(6, 6)" in line and "(4, 8)" in line]
    assert len(told) == 2 and "ms a step" in told[0] and "bytes moved" in told[1], lines


def test_a_word_that_is_none() -> None:
    with pytest.raises(pk.ConfigError, match=r"rebalance='always'.*'auto'"):
        pk.Pipeline(nn.Sequential(nn.Linear(2, 2)), loss_fn=nn.MSELoss(), microbatches=1, ranks=1, rebalance="always")


def test_before_the_first_step() -> None:
    """Nothing is known yet, so nothing moves."""
    with pk.Pipeline(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), loss_fn=nn.MSELoss(), microbatches=1) as pipe:
        assert pipe.rebalance() is None


def test_a_split_that_cannot_be_had(caplog: pytest.LogCaptureFixture) -> None:
    """Layers 8 and 9 share running statistics, which the best split would divide: it is told once, training goes on."""
    trial = Trial(2, "1f1b", (0.01,) * 12, False, victim=1, slower=2.0, noise=quiet, seed=0)
    machine, x = Machine(trial.seconds, 2, quiet, random.Random(0)), torch.ones(8, 4)
    net = machine.net()
    net[8].norm = net[9].norm = nn.BatchNorm1d(4)
    with trial.pipeline(machine, net=net, rebalance="auto") as pipe, machine.running(pipe):
        machine.slower[1] = 2.0
        with caplog.at_level("WARNING", "pipekern"):
            for _ in range(CLEAN):
                pipe.train_step(x, x)
        assert pipe.split == (6, 6) and pipe.rebalance() is None
        assert pipe.replan(split=[10, 2]).after == (10, 2)
        pipe.train_step(x, x)
    (line,) = [record.getMessage() for record in caplog.records if "cannot be had" in record.getMessage()]
    assert "(9, 3)" in line and "share" in line
