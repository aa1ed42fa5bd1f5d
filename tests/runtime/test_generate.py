"""Text from a pipeline: that of the unsplit model, whatever the ranks, the schedule and the transport."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values
from tests.runtime import text
from tests.runtime.step import PLACES, gradients, run

SCHEDULES = ("1f1b", "interleaved-1f1b", "v-half")  # one chunk, interleaved, V placement
RANKS = (1, 2, 3, 4)


def _pipe(module: Any, ranks: int, **options: Any) -> pk.Pipeline:
    return pk.Pipeline(module, loss_fn=F.mse_loss, ranks=ranks, microbatches=2 * ranks, timeout=20.0, **options)


def test_golden() -> None:
    """A model that counts; the second prompt meets the end first."""
    with _pipe(text.counting(), 2) as pipe:
        assert pipe.generate(torch.tensor([[1, 2], [4, 5]]), 3).tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8]]
        ended = pipe.generate(torch.tensor([[1, 2], [4, 5]]), 3, eos_token_id=6)
        assert ended.tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 6, 6]]
        ragged = pipe.generate([torch.tensor([3]), torch.tensor([1, 8]), torch.tensor([0])], 2, eos_token_id=1)
        assert [row.tolist() for row in ragged] == [[3, 4, 5], [1, 8, 9, 0], [0, 1]]


# -- equal to the unsplit model


def _texts(ranks: int, kinds: list[str], schedules: list[str], seed: int, transport: str) -> list[list[Tensor]]:
    """For each kind and schedule: prompts of different lengths, an end, and a tensor of prompts, one after another."""
    texts = []
    for kind in kinds:
        for schedule in schedules:
            with _pipe(text.build(kind, seed), ranks, schedule=schedule, seed=seed, transport=transport) as pipe:
                ragged = text.prompts(seed, [3, 1, 4, 3, 3, 1, 3])
                texts.append([*pipe.generate(ragged, 5)])
                texts.append([*pipe.generate(ragged, 5, eos_token_id=seed % text.VOCABULARY)])
                texts.append([*pipe.generate(torch.stack(text.prompts(seed, [4] * 5)), 5)])
    return texts


def _wanted(kinds: list[str], schedules: list[str], seed: int) -> list[list[Tensor]]:
    texts = []
    for kind in kinds:
        model, ragged = text.unsplit(kind, seed), text.prompts(seed, [3, 1, 4, 3, 3, 1, 3])
        want = [
            [text.greedy(model, prompt, 5) for prompt in ragged],
            [text.greedy(model, prompt, 5, seed % text.VOCABULARY) for prompt in ragged],
            [text.greedy(model, prompt, 5) for prompt in text.prompts(seed, [4] * 5)],
        ]
        texts.extend(want * len(schedules))
    return texts


def _same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return [[row.tolist() for row in rows] for rows in a] == [[row.tolist() for row in rows] for rows in b]


@pytest.mark.parametrize("kind", text.MODELS)
@pytest.mark.parametrize("ranks", RANKS)
def test_equal_to_the_unsplit_model_in_one_process(kind: str, ranks: int, seed: int) -> None:
    schedules = list(SCHEDULES)
    assert _same(_texts(ranks, [kind], schedules, seed, "auto"), _wanted([kind], schedules, seed))


@pytest.mark.parametrize("transport", ["shm", "dist"])
@pytest.mark.parametrize("ranks", RANKS)
def test_equal_to_the_unsplit_model_among_processes(ranks: int, transport: str, seed: int) -> None:
    """The same on every rank."""
    kinds, schedules = ["sequential", "no cache, tied"], list(SCHEDULES)
    want = _wanted(kinds, schedules, seed)
    for got in values(launch(_texts, ranks, ranks, kinds, schedules, seed, transport)):
        assert _same(got, want)


@pytest.mark.full
@pytest.mark.parametrize("kind", text.MODELS)
@pytest.mark.parametrize("transport", ["shm", "dist"])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_model_among_processes(ranks: int, transport: str, kind: str, seed: int) -> None:
    schedules = [*SCHEDULES, "gpipe", "looped-bfs", "hanayo", "zb-v"]
    want = _wanted([kind], schedules, seed)
    for got in values(launch(_texts, ranks, ranks, [kind], schedules, seed, transport)):
        assert _same(got, want)


# -- drawn


def _drawn(ranks: int, seed: int) -> list[list[list[int]]]:
    with _pipe(text.build("sequential", seed), ranks, seed=seed) as pipe:
        ids = text.prompts(seed, [2, 3, 3, 2, 3])
        options: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.9}, {"seed": 1}, {}]
        return [[row.tolist() for row in pipe.generate(ids, 6, temperature=20.0, **o)] for o in options]


def test_drawn_texts_do_not_depend_on_the_ranks(seed: int) -> None:
    first, *others = [_drawn(ranks, seed) for ranks in RANKS]
    assert all(other == first for other in others)
    assert first[0] == first[-1]
    assert first[0] != first[4], "another seed drew the same"
    for got in values(launch(_drawn, 3, 3, seed)):
        assert got == first


# -- what it leaves alone


def test_nothing_of_training_changes(seed: int) -> None:
    """Gradients, weights, buffers, modes, hooks, random numbers; and the step after is the same bit for bit."""
    x, y = torch.randint(0, text.VOCABULARY, (8, 4)), torch.randn(8, 4, text.VOCABULARY, dtype=torch.float64)
    after = []
    for generates in (False, True):
        model = text.build("layer list", seed)
        with _pipe(model, 2, seed=seed) as pipe:
            pipe.train_step(x, y)
            before = _everything(pipe, model)
            if generates:
                pipe.generate(x, 4)
                pipe.generate(x, 4, temperature=1.0)
            assert str(before) == str(_everything(pipe, model))
            pipe.train_step(x, y)
            after.append(gradients(pipe))
    assert after[0].keys() == after[1].keys()
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def _everything(pipe: pk.Pipeline, model: nn.Module) -> list[Any]:
    torch.set_printoptions(precision=17, threshold=1_000_000)
    tensors = [*gradients(pipe).items(), *pipe.state_dict().items(), torch.get_rng_state().sum()]
    modules = [(module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    return [*tensors, *modules, [p.requires_grad for p in model.parameters()]]


class Counted(nn.Module):
    """Counts the tokens that it is given."""

    def __init__(self, takes: bool):
        super().__init__()
        self.calls: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        if takes:
            self.forward = self._with_cache  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((x.shape[0], x.shape[1]))
        return x

    def _with_cache(self, x: Tensor, cache: pk.Cache | None = None) -> Tensor:
        assert cache is not None and cache.capacity == 7
        self.lengths.append(cache.length)
        return Counted.forward(self, x)


@pytest.mark.parametrize("takes", [True, False], ids=["cache", "no-cache"])
def test_what_a_layer_is_given(takes: bool) -> None:
    """Two groups of two prompts with three tokens, four new: the whole prompt, then one token a forward."""
    counted = Counted(takes)
    net = nn.Sequential(*text.counting(), counted)
    with _pipe(net, 2) as pipe:
        pipe.generate(torch.ones(4, 3, dtype=torch.int64), 4)
    lengths = [3, 3, 1, 1, 1, 1, 1, 1] if takes else [3, 3, 4, 4, 5, 5, 6, 6]
    assert counted.calls == [(2, length) for length in lengths]
    assert counted.lengths == ([0, 0, 3, 3, 4, 4, 5, 5] if takes else [])


def test_a_group_that_has_ended_runs_no_more() -> None:
    counted = Counted(takes=False)
    net = nn.Sequential(*text.counting(), counted)
    with _pipe(net, 2) as pipe:
        got = pipe.generate(torch.tensor([[2], [7]]), 6, eos_token_id=9)
    assert got.tolist() == [[2, 3, 4, 5, 6, 7, 8], [7, 8, 9, 9, 9, 9, 9]]
    assert len(counted.calls) == 6 + 2


# -- errors


BAD: list[tuple[str, Any, dict[str, Any], list[str]]] = [
    ("no prompts", torch.zeros(0, 3, dtype=torch.int64), {}, ["no prompts", "at least one"]),
    ("an empty list", [], {}, ["no prompts"]),
    ("an empty prompt", [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)], {}, ["prompt 1", "empty"]),
    ("prompts without tokens", torch.zeros(2, 0, dtype=torch.int64), {}, ["prompt 0", "empty"]),
    ("one dimension", torch.tensor([1, 2]), {}, ["(2,)", "(prompts, length)"]),
    ("lists of numbers", [[1, 2]], {}, ["prompt 0", "list", "1-d tensors"]),
    ("a list of rows", [torch.tensor([[1]])], {}, ["prompt 0", "(1, 1)", "1-d"]),
    ("text", "once upon", {}, ["str", "tensor"]),
    ("dtype", torch.tensor([[1.0]]), {}, ["torch.float32", "torch.int64", ".long()"]),
    ("no new tokens", torch.tensor([[1]]), {"max_new_tokens": 0}, ["max_new_tokens=0", "at least 1"]),
    ("half a token", torch.tensor([[1]]), {"max_new_tokens": 1.5}, ["max_new_tokens=1.5", "whole number"]),
    ("temperature", torch.tensor([[1]]), {"temperature": -0.5}, ["temperature=-0.5", "above 0"]),
    ("temperature 2", torch.tensor([[1]]), {"temperature": float("nan")}, ["temperature=nan"]),
    ("top_k", torch.tensor([[1]]), {"temperature": 1, "top_k": 0}, ["top_k=0", "at least 1"]),
    ("top_p", torch.tensor([[1]]), {"temperature": 1, "top_p": 1.5}, ["top_p=1.5", "at most 1"]),
    ("top_p 2", torch.tensor([[1]]), {"temperature": 1, "top_p": 0.0}, ["top_p=0.0", "above 0"]),
    ("top_k and greedy", torch.tensor([[1]]), {"top_k": 2}, ["top_k=2", "temperature=0", "above 0"]),
    ("seed", torch.tensor([[1]]), {"seed": 0.5}, ["seed=0.5", "whole number"]),
    ("end", torch.tensor([[1]]), {"eos_token_id": -1}, ["eos_token_id=-1", "None"]),
]


@pytest.mark.parametrize(("ids", "options", "parts"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_refused(ids: Any, options: dict[str, Any], parts: list[str]) -> None:
    counted = Counted(takes=False)
    with _pipe(nn.Sequential(*text.counting(), counted), 2) as pipe:
        with pytest.raises(pk.ConfigError) as refusal:
            pipe.generate(ids, **{"max_new_tokens": 2} | options)
        assert [part for part in parts if part not in str(refusal.value)] == [], str(refusal.value)
        assert counted.calls == []
        assert pipe.generate(torch.tensor([[1]]), 1).tolist() == [[1, 2]]


class Positioned(text.Deep):
    """Its own forward, which no rank runs whole, wants to know the position."""

    def forward(self, tokens: Tensor, cache: pk.Cache | None = None) -> Tensor:
        start = 0 if cache is None else cache.length
        return super().forward(tokens) + start


def test_a_cache_that_no_rank_could_give_is_refused() -> None:
    with (
        _pipe(Positioned(), 2) as pipe,
        pytest.raises(pk.ConfigError, match="forward of Positioned takes a cache"),
    ):
        pipe.generate(torch.tensor([[1, 2]]), 3)


def test_a_model_of_no_language() -> None:
    told = r"made \(1, 8\) of tokens \(1, 2\).*\(prompts, length, vocabulary\)"
    with (
        _pipe(nn.Sequential(nn.Embedding(4, 4), nn.Flatten()), 2) as pipe,
        pytest.raises(pk.ConfigError, match=told),
    ):
        pipe.generate(torch.tensor([[1, 2]]), 3)


def _poisoned(ranks: int) -> str:
    net = text.counting()
    with torch.no_grad():
        next(net.parameters())[5] = float("nan")
    with _pipe(net, ranks) as pipe:
        try:
            pipe.generate(torch.tensor([[1], [3]]), 4)
        except (pk.NumericsError, pk.Aborted) as error:
            return str(error)
    return "nothing"


@PLACES
def test_logits_that_are_not_finite(processes: bool) -> None:
    for message in run(processes, _poisoned, 2):
        assert "prompt 1 at its new token 2 is nan" in message


def _different(what: str) -> str:
    rank = int(os.environ["RANK"])
    with _pipe(text.counting(), 3) as pipe:
        ids = torch.tensor([[1 + (what == "prompts" and rank == 1)]] * 3)
        options = {"top_k": 2 + rank} if what == "options" else {}
        try:
            pipe.generate(ids, 2 + (what == "length" and rank == 2), temperature=1.0, **options)
        except pk.TransportError as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("what", ["prompts", "length", "options"])
def test_ranks_with_different_arguments(what: str) -> None:
    for message in values(launch(_different, 3, what)):
        assert "different" in message and "MessageMismatch" in message


class Fault(nn.Module):
    """Works for ``calls`` forwards."""

    def __init__(self, calls: int, dies: bool):
        super().__init__()
        self.calls, self.dies = calls, dies

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0 and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls < 0:
            raise ValueError("a fault in the user's code")
        return x


def _faulty(ranks: int, dies: bool) -> tuple[str, str, float]:
    """The fault comes on the middle one of three ranks, in the second of three groups, for its third token."""
    embed, head = text.counting(2)
    pipe = _pipe(nn.Sequential(embed, Fault(7, dies), head), ranks)
    start = time.monotonic()
    try:
        pipe.generate(torch.tensor([[1], [2], [3]]), 5)
    except (ValueError, pk.TransportError) as error:
        told = " ".join([str(error), *getattr(error, "__notes__", [])])
        return type(error).__name__, told, time.monotonic() - start
    return "nothing", "", 0.0


def test_a_fault_names_where_it_was() -> None:
    ((kind, told, _),) = run(False, _faulty, 3, False)
    assert kind == "ValueError"
    assert "rank 1, stage 1, group 1 of the prompts, new token 2" in told


@pytest.mark.parametrize("dies", [False, True], ids=["raises", "killed"])
def test_every_rank_learns_of_a_fault(dies: bool) -> None:
    outcomes = launch(_faulty, 3, 3, dies)
    for rank in (0, 2):
        kind, told, seconds = outcomes[rank].value
        assert kind == ("PeerDied" if dies else "Aborted")
        assert "rank 1" in told
        assert dies or "a fault in the user's code" in told
        assert seconds < 10.0, "long before the deadline of silence"


# -- the order of turns
