"""Models of transformers train, evaluate and write as they do unsplit; nothing of theirs is traced or rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from tests.runtime.huggingface import MODELS, TIME, WORDS, loss_fn
from tests.runtime.models import Batch
from tests.runtime.reference import split
from tests.runtime.step import run

STEPS, MICROBATCHES, SAMPLES = 20, 4, 8


def _build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name].build().to(MODELS[name].dtype)


def _batches(name: str, seed: int) -> list[Batch]:
    torch.manual_seed(seed + 1)
    return [_cast(MODELS[name].batch(SAMPLES), MODELS[name].dtype) for _ in range(4)]


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    x = batch.x
    return Batch(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, batch.y)


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)
    return model


def _losses(ranks: int, name: str, seed: int, schedule: str) -> list[float]:
    batches, losses = _batches(name, seed), []
    model = _without_dropout(_build(name, seed))
    with pk.Pipeline(
        model,
        loss_fn=loss_fn,
        microbatches=MICROBATCHES,
        ranks=ranks,
        schedule=schedule,
        inputs=MODELS[name].inputs,
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=3e-3)
        for number in range(STEPS):
            losses.append(float(pipe.train_step(*batches[number % len(batches)])))
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _wanted(name: str, seed: int) -> list[float]:
    model, losses = _without_dropout(_build(name, seed)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = _batches(name, seed)
    for number in range(STEPS):
        x, y = batches[number % len(batches)]
        total = 0.0
        for part, target in zip(split(x, MICROBATCHES), split(y, MICROBATCHES), strict=True):
            loss = loss_fn(model(**part) if isinstance(part, dict) else model(part), target) / MICROBATCHES
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("processes", "ranks", "schedule"),
    [
        (False, 3, "1f1b"),
        pytest.param(False, 2, "zb-v", marks=pytest.mark.full),
        pytest.param(True, 2, "zb-v", marks=pytest.mark.full),
        pytest.param(True, 3, "zb-h1", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_as_the_unsplit_models_does(
    name: str, processes: bool, ranks: int, schedule: str, seed: int
) -> None:
    for losses in run(processes, _losses, ranks, name, seed, schedule):
        wanted = _wanted(name, seed)
        assert sum(wanted[-4:]) < sum(wanted[:4])  # the same four batches
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-6, (losses, wanted)


def _verified(ranks: int, name: str, seed: int, recompute: str) -> float:
    batch = _batches(name, seed)[0]
    with pk.Pipeline(
        _build(name, seed).train(),
        loss_fn=loss_fn,
        microbatches=MICROBATCHES,
        ranks=ranks,
        schedule="zb-h1",
        recompute=recompute,
        inputs=MODELS[name].inputs,
    ) as pipe:
        return pk.verify(pipe, *batch).max_error


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", ["gpt-2", "bert", "t5"])
def test_dropout_draws_what_the_unsplit_model_draws(name: str, recompute: str, seed: int) -> None:
    assert _verified(2, name, seed, recompute) <= 1e-12


def _text_and_names(ranks: int, seed: int) -> tuple[Any, Any, list[str]]:
    model: Any = _build("gpt-2", seed)
    model.config.use_cache = False  # else eval_step has a cache a micro-batch to return, and refuses
    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=2, ranks=ranks) as pipe:
        pipe.train_step(*_batches("gpt-2", seed)[0])
        ids = torch.arange(8).reshape(2, 4)
        outputs = pipe.eval_step(_batches("gpt-2", seed)[0].x)
        return pipe.generate(ids, 5), None if outputs is None else outputs.logits, list(pipe.state_dict())


@pytest.mark.parametrize("processes", [False, True])
def test_text_outputs_and_names(processes: bool, seed: int) -> None:
    model = _build("gpt-2", seed).eval()
    ids, names = torch.arange(8).reshape(2, 4), []
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        wanted = model(_batches("gpt-2", seed)[0].x).logits
    found = run(processes, _text_and_names, 2, seed)
    for text, logits, own in found:
        assert torch.equal(text, ids)
        assert logits is None or torch.allclose(logits, wanted, rtol=0, atol=1e-12)
        names += own
    assert found[-1][1] is not None
    assert set(names) == set(model.state_dict())


def test_the_batch_is_of_the_models_words() -> None:
    """The batches would not tell masks apart if none ended early."""
    torch.manual_seed(0)
    x, y = MODELS["llama"].batch(SAMPLES)
    assert x["attention_mask"].shape == y.shape == (SAMPLES, TIME)
    assert 0 < int(x["attention_mask"].sum()) < SAMPLES * TIME
    assert int(x["input_ids"].max()) < WORDS
