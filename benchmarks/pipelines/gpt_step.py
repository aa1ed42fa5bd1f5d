"""Seconds a step of a GPT of about 350 M parameters in bfloat16 on one GPU: unsplit, or as two stages that share it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import pipekern as pk
from examples.gpt.model import GPT, Size, loss_fn

SIZE = Size(vocabulary=50304, width=1024, depth=24, heads=16, length=1024)  # 405 M with both embeddings
MICROBATCHES, SAMPLES = 8, 4  # samples of a micro-batch


class Steps:
    """``how``: "unsplit", "one process" or "two processes" (collective, a rank each)."""

    def __init__(self, how: str, device: torch.device):
        torch.manual_seed(0)
        model = GPT(SIZE).to(device, torch.bfloat16)
        shape = (MICROBATCHES * SAMPLES, SIZE.length)
        self._x, self._y = (torch.randint(0, SIZE.vocabulary, shape, device=device) for _ in range(2))
        self._close: Callable[[], object] = lambda: None
        self._step = self._plain(model) if how == "unsplit" else self._pipeline(model, how, device)

    def times(self, rounds: int) -> list[float]:
        """One a round, after two that warm up."""
        seconds = []
        for number in range(rounds + 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._step()
            torch.cuda.synchronize()
            if number >= 2:
                seconds.append(time.perf_counter() - start)
        self._close()
        return seconds

    def _plain(self, model: torch.nn.Module) -> Callable[[], object]:
        def step() -> None:
            parts = zip(self._x.chunk(MICROBATCHES), self._y.chunk(MICROBATCHES), strict=True)
            total = torch.zeros((), device=self._x.device)
            for x, y in parts:
                loss = loss_fn(model(x), y) / MICROBATCHES
                loss.backward()
                total += loss.detach()
            total.item()
            model.zero_grad()

        return step

    def _pipeline(self, model: torch.nn.Module, how: str, device: torch.device) -> Callable[[], object]:
        options: dict[str, Any] = {"transport": "local", "ranks": 2} if how == "one process" else {"transport": "cuda"}
        pipe = pk.Pipeline(model, loss_fn=loss_fn, microbatches=MICROBATCHES, devices=[device], **options)
        self._close = pipe._parts.transport.close

        def step() -> None:
            pipe.train_step(self._x, self._y).item()
            for parameter in pipe.parameters():
                parameter.grad = None

        return step
