"""Whole training steps of a GPT on one device, optimizer included: plain torch, torch's pipelining, and ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

import pipekern as pk
from examples.gpt.model import GPT, Size, loss_fn

MAX_NORM = 1.0
OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
PEAK = {"NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12}  # dense bfloat16 FLOP/s, by NVIDIA's data sheets (SXM)


@dataclass(frozen=True)
class Task:
    """``samples`` a micro-batch. The model comes in float32, always with the same weights."""

    size: Size
    microbatches: int
    samples: int
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.microbatches * self.samples * self.size.length

    @property
    def flops(self) -> float:
        """Of a step: six a weight and token in products, and causal attention's (half a square), nothing run again."""
        width, depth = self.size.width, self.size.depth
        weights = 12 * width * width * depth + self.size.vocabulary * width
        return 6.0 * self.tokens * (weights + depth * width * self.size.length)

    def model(self) -> GPT:
        torch.manual_seed(0)
        with self.device:
            return GPT(self.size)

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (self.microbatches * self.samples, self.size.length + 1)
        tokens = torch.randint(self.size.vocabulary, shape, generator=generator).to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def large(device: torch.device) -> Task:
    """1.41 G parameters, 0.1 of them an embedding; 65536 tokens a step."""
    size = Size(vocabulary=50304, width=2048, depth=24, heads=16, length=2048)
    return Task(size, microbatches=8, samples=4, device=device)


def small(device: torch.device) -> Task:
    return Task(Size(vocabulary=256, width=64, depth=6, heads=2, length=32), 4, 2, device)


class Running(NamedTuple):
    """``step`` takes a whole step and returns its loss; ``close`` frees what outlives the object."""

    step: Callable[[], Tensor]
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Result:
    """``rounds``: seconds a step. ``peak``: bytes allocated on the device, 0 on a CPU."""

    task: Task
    rounds: list[float]
    losses: list[float]
    peak: int

    @property
    def seconds(self) -> float:
        return median(self.rounds)

    @property
    def utilisation(self) -> float | None:
        """Of the device's bfloat16 peak; None where that is not known."""
        name = torch.cuda.get_device_name(self.task.device) if self.task.device.type == "cuda" else ""
        peak = next((value for key, value in PEAK.items() if name.startswith(key)), None)
        return None if peak is None else self.task.flops / self.seconds / peak


def measure(task: Task, start: Callable[[Task], Running], rounds: int) -> Result:
    """Three steps that warm up, then ``rounds`` that count."""
    cuda = task.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(task.device)
    running = start(task)
    seconds, losses = [], []
    for number in range(rounds + 3):
        begin = time.perf_counter()
        losses.append(running.step().item())
        if cuda:
            torch.cuda.synchronize(task.device)
        if number >= 3:
            seconds.append(time.perf_counter() - begin)
    running.close()
    return Result(task, seconds, losses, torch.cuda.max_memory_allocated(task.device) if cuda else 0)


def plain(task: Task, *, masters: bool, compiled: bool) -> Running:
    """torch's own loop: float32 weights under autocast, or all in bfloat16; forward and loss compiled as one."""
    model = task.model() if masters else task.model().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)
    x, y = task.batch()
    m = task.microbatches

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(model(x), y)

    run = torch.compile(forward) if compiled else forward

    def step() -> Tensor:
        total = torch.zeros((), device=task.device)
        for part, targets in zip(x.chunk(m), y.chunk(m), strict=True):
            with torch.autocast(task.device.type, torch.bfloat16, enabled=masters):
                loss = run(part, targets) / m
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return Running(step, torch.compiler.reset if compiled else lambda: None)


def torch_pipelining(task: Task, *, stages: int) -> Running:
    """Interleaved 1F1B with all stages on this rank, float32 weights under autocast."""
    model = task.model()
    units: list[nn.Module] = [model.embed, *model.layers, model.norm, model.head]
    size = task.size
    costs = [1.0, *(12.0 * size.width,) * size.depth, 1.0, float(size.vocabulary)]
    bounds = pk.plan.partition(costs, stages).bounds
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    parts = [nn.Sequential(*units[start:end]) for start, end in pairwise(bounds)]
    built = [pipelining.PipelineStage(part, i, stages, task.device, group=alone) for i, part in enumerate(parts)]
    schedule: Any = pipelining.ScheduleInterleaved1F1B(list(built), task.microbatches, loss_fn=loss_fn)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)
    x, y = task.batch()

    def step() -> Tensor:
        losses: list[Tensor] = []
        with torch.autocast(task.device.type, torch.bfloat16):
            schedule.step(x, target=y, losses=losses, return_outputs=False)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).detach().mean()

    return Running(step, lambda: dist.destroy_process_group(alone))


def ours(task: Task, *, stages: int, transport: str) -> Running:
    """A rank a stage, all in this process (``transport`` "local") or one each; modules over pipekern's kernels."""
    model = task.model()
    pk.nn.fuse(model)
    pipe = pk.Pipeline(
        model, loss_fn=loss_fn, microbatches=task.microbatches, ranks=stages, devices=[task.device],
        transport=transport, precision="bf16",
    )  # fmt: skip
    del model
    optimizer = pipe.optimizer(pk.optim.AdamW, max_norm=MAX_NORM, **OPTIONS)
    x, y = task.batch()

    def step() -> Tensor:
        loss = pipe.train_step(x, y)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Running(step, pipe.close)


def contenders() -> dict[str, Callable[[Task], Running]]:
    """Those of one process, by name."""
    return {
        "torch eager, float32 weights": partial(plain, masters=True, compiled=False),
        "torch eager, all bfloat16": partial(plain, masters=False, compiled=False),
        "torch.compile, float32 weights": partial(plain, masters=True, compiled=True),
        "torch.compile, all bfloat16": partial(plain, masters=False, compiled=True),
        "torch pipelining, 2 stages": partial(torch_pipelining, stages=2),
        "torch pipelining, 4 stages": partial(torch_pipelining, stages=4),
        "pipekern, 1 stage": partial(ours, stages=1, transport="local"),
        "pipekern, 2 stages": partial(ours, stages=2, transport="local"),
        "pipekern, 4 stages": partial(ours, stages=4, transport="local"),
    }
