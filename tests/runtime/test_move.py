"""Layers that move from rank to rank while a model trains: nothing of the training changes, not a bit."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pipekern as pk
from pipekern.checkpoint.load import Checkpoint
from tests.launch import launch, values
from tests.runtime.moving import RUNNABLE, Case, Trained, compare, cuts, move, same, train, whole
from tests.runtime.step import PLACES, run

WITHIN = 2.0  # seconds until every rank knows of a death


def _golden(ranks: int) -> tuple[pk.Move, tuple[int, ...], list[str], list[str]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(4, 4)
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, split=[2, 2]) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        pipe.train_step(x, x)
        optimizer.step()
        optimizer.zero_grad()
        before, loss = list(pipe.state_dict()), pipe.eval_step(x, x)
        made = pipe.replan(split=[1, 3])
        assert torch.equal(pipe.eval_step(x, x), loss)
        return made, pipe.split, before, list(pipe.state_dict())


def test_golden() -> None:
    """One of four layers goes from rank 0 to rank 1: its weight and bias, and a momentum of each."""
    results = values(launch(_golden, 2, 2))
    for made, split, _, _ in results:
        assert (made.before, made.after, split) == ((2, 2), (1, 3), (1, 3))
        assert made.bytes == 2 * 4 * (4 * 4 + 4)
        assert made.seconds > 0
    assert results[0][2:] == (["0.weight", "0.bias", "1.weight", "1.bias"], ["0.weight", "0.bias"])
    names = [f"{layer}.{what}" for layer in (1, 2, 3) for what in ("weight", "bias")]
    assert results[1][2:] == (names[2:], names)


def test_golden_in_one_process() -> None:
    """Nothing is sent."""
    made, split, before, after = _golden(2)
    assert (made.before, made.after, made.bytes, split) == ((2, 2), (1, 3), 0, (1, 3))
    assert before == after


def _both(ranks: int, case: Case, seed: int, moves: int) -> tuple[Trained, Trained]:
    """A run that moves, and one that does not; ``ranks`` are those of the job."""
    return train(case, seed, case.splits(seed, moves)), train(case, seed, {})


def _check(case: Case, seed: int, moves: int, processes: bool) -> None:
    if processes:
        results = values(launch(_both, case.ranks, case.ranks, case, seed, moves, timeout=300.0))
    else:
        results = [_both(case.ranks, case, seed, moves)]
    moved, still = (whole(parts) for parts in zip(*results, strict=True))
    assert moved.order == still.order
    compare(moved, still)


SAMPLE = [
    ("everything", 3, "zb-v", True),
    ("tied gpt", 4, "zb-h1", True),
    ("everything", 4, "interleaved-1f1b", False),
    ("tied gpt", 2, "1f1b", False),
]


@pytest.mark.parametrize(("kind", "ranks", "schedule", "processes"), SAMPLE)
def test_bits_are_those_of_a_run_that_never_moved(
    kind: str, ranks: int, schedule: str, processes: bool, seed: int
) -> None:
    """Losses, norms, parameters, buffers, moments and names: with tied weights, dropout, running statistics, AdamW, and
    gradients added up over two steps with moves between them.
    """
    _check(Case(kind, ranks, schedule, 16), seed, 6, processes)


HUNDRED = [
    *(("everything", ranks, schedule, True) for ranks in (2, 3, 4) for schedule in RUNNABLE),
    *(("everything", 3, schedule, False) for schedule in RUNNABLE),
    *(("tied gpt", 3, schedule, True) for schedule in RUNNABLE),
]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "ranks", "schedule", "processes"), HUNDRED)
def test_a_hundred_moves_in_three_hundred_steps(
    kind: str, ranks: int, schedule: str, processes: bool, seed: int
) -> None:
    _check(Case(kind, ranks, schedule, 300), seed, 100, processes)


REPLICATED = list(product(range(4), (None, "bf16", "fp16")))


def _replicated(zero: int, precision: str | None, steps: int) -> Case:
    mesh = {"dp": 2, "pp": 2}
    return Case("everything", 2, "1f1b", steps, {"mesh": mesh, "zero": zero, "precision": precision}, fused=True)


@pytest.mark.parametrize(("zero", "precision"), [(0, "bf16"), (1, None), (3, "fp16")])
def test_replicas_shards_and_masters(zero: int, precision: str | None, seed: int) -> None:
    """Of each replica alike; losses and weights after further steps show that moments came along."""
    _check_replicated(_replicated(zero, precision, 10), seed, 3)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("zero", "precision"), REPLICATED)
def test_replicas_shards_and_masters_all(zero: int, precision: str | None, seed: int) -> None:
    _check_replicated(_replicated(zero, precision, 100), seed, 30)


def _check_replicated(case: Case, seed: int, moves: int) -> None:
    results = values(launch(_both, 4, 4, case, seed, moves, timeout=300.0))
    for replica in (results[:2], results[2:]):  # buffers are each replica's own
        moved, still = (whole(parts) for parts in zip(*replica, strict=True))
        if case.options["zero"]:  # moments are in shards, cut otherwise for another split
            moved, still = moved._replace(moments={}), still._replace(moments={})
        compare(moved, still)


def _replanned(ranks: int, folder: str, plans: Sequence[dict[str, Any]], seed: int) -> list[tuple[bool, bool]]:
    """Change all of a plan, and train on beside a new pipeline that loads what was saved before."""
    case = Case("everything", ranks, "1f1b", 0)
    generator = torch.Generator().manual_seed(seed)
    pipe, optimizer = case.pipeline(seed)
    found = []
    with pipe:
        for plan in plans:
            pipe.save(folder)
            made = pipe.replan(**plan)
            assert made.after == pipe.split
            fresh, other = case.pipeline(seed + 1, **plan | {"split": pipe.split})
            with fresh:
                fresh.load(folder)
                for _ in range(2):
                    batch = case.batch(generator)
                    losses = []
                    for one, its in ((pipe, optimizer), (fresh, other)):
                        losses.append(one.train_step(*batch))
                        its.step()
                        its.zero_grad()
                    found.append((same(losses[0], losses[1]), same(_state(pipe), _state(fresh))))
    return found


def _state(pipe: pk.Pipeline) -> dict[str, Any]:
    return {name: value.clone() for name, value in pipe.state_dict().items()}


def _plans(ranks: int, count: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    plans = []
    for _ in range(count):
        schedule = generator.choice(RUNNABLE)
        chunks = generator.choice([c for c in pk.schedule.describe(schedule).chunks[:2] if c * ranks <= 14])
        order = {"schedule": schedule, "chunks": chunks, "microbatches": generator.choice([2, 4]) * ranks}
        plans.append({**order, "split": cuts(14, ranks * chunks, generator)})
    return plans


@PLACES
@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.full)])
def test_another_schedule_chunks_and_microbatches(processes: bool, count: int, seed: int, tmp_path: Path) -> None:
    """As a pipeline that is made so, and goes on from a checkpoint."""
    for found in run(processes, _replanned, 3, str(tmp_path), _plans(3, count, seed), seed):
        assert found == [(True, True)] * (2 * count)


def _more_chunks(ranks: int) -> tuple[int, list[bool]]:
    case = Case("everything", ranks, "1f1b", 0)
    pipe, _ = case.pipeline(0)
    with pipe:
        pipe.replan(schedule="zb-v")
        stages = len(pipe.split)
        kept = [pipe.replan(microbatches=8).before == pipe.split, pipe.replan(microbatches=2).after == pipe.split]
        batch = case.batch(torch.Generator().manual_seed(0))
        return stages, [*kept, bool(pipe.train_step(*batch).isfinite())]


@PLACES
def test_what_is_not_said_stays(processes: bool) -> None:
    """A schedule with two chunks has its own split; other micro-batches keep the split that there is."""
    assert run(processes, _more_chunks, 2) == [(4, [True] * 3)] * (2 if processes else 1)


def _others_are_freed(ranks: int, moves: Sequence[Sequence[int]]) -> tuple[int, int, list[tuple[int, int]]]:
    """Numbers of parameters held and owned; files and threads open each time that the first split is back."""
    case = Case("everything", ranks, "1f1b", 0)
    pipe, optimizer = case.pipeline(0)
    generator = torch.Generator().manual_seed(0)
    with pipe:
        first, left = pipe.split, []
        for _ in range(3):
            for split in [*moves, first]:
                move(pipe, split)
                pipe.train_step(*case.batch(generator))
                optimizer.step()
                optimizer.zero_grad()
            left.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
        held = {id(p): p.numel() for m in pipe._parts.blueprint.modules() for p in m.parameters() if not p.is_meta}
        owned = {id(p): p.numel() for _, p in pipe.named_parameters()}
        return sum(held.values()), sum(owned.values()), left


@pytest.mark.parametrize("ranks", [2, 3])
def test_nothing_is_left_behind(ranks: int, seed: int) -> None:
    """A rank has the memory of its own layers alone; links of former splits are closed."""
    generator = random.Random(seed)
    moves = [cuts(14, ranks, generator) for _ in range(3)]
    for held, owned, left in values(launch(_others_are_freed, ranks, ranks, moves)):
        assert held == owned
        assert left == [left[0]] * 3, left


IMPOSSIBLE: list[dict[str, Any]] = [
    {"split": [7, 8]},
    {"split": [14, 0]},
    {"split": [4, 5, 5]},
    {"schedule": "nonsense"},
    {"schedule": "chimera"},
    {"microbatches": 0},
    {"chunks": 2},
]
DISAGREEING = [{"split": [1, 13]}, {"microbatches": 8}, *IMPOSSIBLE[:1], *IMPOSSIBLE[3:4]]


def _refused(ranks: int, plans: Sequence[dict[str, Any]], seed: int) -> tuple[str, tuple[int, ...], Trained]:
    """In the middle of training rank r asks for ``plans[r]``, in one process all for the first; none where empty."""
    case = Case("everything", ranks, "1f1b", 4)
    pipe, optimizer = case.pipeline(seed)
    generator = torch.Generator().manual_seed(seed)
    losses, text = [], ""
    with pipe:
        for step in range(case.steps):
            if step == 2 and plans:
                try:
                    pipe.replan(**plans[int(os.environ.get("RANK", "0"))])
                except pk.PipekernError as error:
                    text = f"{type(error).__name__}: {error}"
            losses.append(pipe.train_step(*case.batch(generator)))
            optimizer.step()
            optimizer.zero_grad()
        state = _state(pipe)
        return text, pipe.split, Trained(losses, [], state, {}, list(state))


def _check_refused(ranks: int, processes: bool, plans: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """What each process was told; all then train on as if nobody had asked."""
    texts, splits, trained = zip(*run(processes, _refused, ranks, plans, seed), strict=True)
    _, before, still = zip(*run(processes, _refused, ranks, [], seed), strict=True)
    assert splits == before
    compare(whole(trained), whole(still))
    assert all(text.startswith(("ConfigError", "ScheduleError")) for text in texts), texts
    return list(texts)


@pytest.mark.parametrize("plan", DISAGREEING, ids=str)
def test_ranks_that_disagree_change_nothing(plan: dict[str, Any], seed: int) -> None:
    """All are refused."""
    _check_refused(2, True, [{"split": [5, 9]}, plan], seed)


@pytest.mark.parametrize("plan", IMPOSSIBLE, ids=str)
@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.full)])
def test_what_cannot_be_changes_nothing(plan: dict[str, Any], processes: bool, seed: int) -> None:
    for text in _check_refused(2, processes, [plan, plan], seed):
        assert str(next(iter(plan.values()))) in text


class Survived(NamedTuple):
    """What a rank saw: lines that its move ran for, the error, its rank, and when."""

    lines: int
    kind: str
    rank: int
    at: float


def _die_moving(folder: str, ranks: int, victim: int, line: int, stamp: str) -> Survived:
    """Save, then move, rank ``victim`` dying before a line that it runs for that; then train on."""
    rank, lines = int(os.environ["RANK"]), 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if rank == victim and lines == line:
                Path(stamp).write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    case = Case("everything", ranks, "1f1b", 0)
    pipe, optimizer = case.pipeline(0)
    generator = torch.Generator().manual_seed(0)
    first = [5, 9] if ranks == 2 else [5, 5, 4]
    pipe.replan(split=first)
    pipe.train_step(*case.batch(generator))
    optimizer.step()
    optimizer.zero_grad()
    pipe.save(folder, 1)
    try:
        sys.settrace(trace)
        try:
            pipe.replan(split=first[::-1])
        finally:
            sys.settrace(None)
        pipe.train_step(*case.batch(generator))
        pipe.close()
    except pk.PipekernError as error:
        return Survived(lines, type(error).__name__, getattr(error, "rank", -1), time.monotonic())
    return Survived(lines, "", -1, time.monotonic())


def _loaded(folder: str) -> tuple[Any, dict[str, Any]]:
    case = Case("everything", 2, "1f1b", 0)
    pipe, _ = case.pipeline(1)
    with pipe:
        return pipe.load(folder), _state(pipe)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("points", [2, pytest.param(60, marks=pytest.mark.full)])
def test_a_rank_dies_while_all_move(points: int, tmp_path: Path) -> None:
    """All others hear at once who died; the last checkpoint is good."""
    ranks, stamp = 3, tmp_path / "stamp"
    alive = values(launch(_die_moving, ranks, str(tmp_path / "alive"), ranks, -1, 0, str(stamp)))
    assert [survived.kind for survived in alive] == [""] * ranks
    wanted = _loaded(str(tmp_path / "alive"))
    for point in range(points):
        victim, folder = random.randrange(ranks), tmp_path / str(point)
        line = random.randint(1, alive[victim].lines)
        stamp.unlink(missing_ok=True)
        outcomes = launch(_die_moving, ranks, str(folder), ranks, victim, line, str(stamp))
        for outcome in outcomes:
            if outcome.rank != victim:
                assert outcome.error is None, outcome.error
        if stamp.exists():  # waits have no fixed number of lines
            assert outcomes[victim].exitcode == -signal.SIGKILL, outcomes[victim].error
            struck = float(stamp.read_text())
            for outcome in outcomes[:victim] + outcomes[victim + 1 :]:
                survived: Survived = outcome.value
                assert (survived.kind, survived.rank) == ("PeerDied", victim), survived
                assert survived.at - struck < WITHIN, f"after {survived.at - struck:.1f} s"
        Checkpoint(folder).verify()
        assert same(list(_loaded(str(folder))), list(wanted))


def _die_first(ranks: int, victim: int) -> tuple[str, int]:
    case = Case("everything", ranks, "1f1b", 0)
    pipe, _ = case.pipeline(0)
    if pipe._parts.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        pipe.replan(split=cuts(case.units, ranks, random.Random(0)))
    except pk.PipekernError as error:
        return type(error).__name__, getattr(error, "rank", -1)
    return "", -1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_died_before_the_others_meet(victim: int) -> None:
    """They do not wait for it to come until their timeout: the links that they still have know."""
    outcomes = launch(_die_first, 3, 3, victim, timeout=20.0)  # and not the 30 s of the pipeline
    assert [o.value for o in outcomes if o.rank != victim] == [("PeerDied", victim)] * 2, outcomes
