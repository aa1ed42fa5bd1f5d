"""A pipeline over two cores, one of which becomes slow in mid-run: the split follows, bit for bit the same training.

torchrun --standalone --nproc-per-node=2 -m examples.unequal [--slower 2] [--picture runs/unequal.png]

After a while rank 1 gets only a share of its core, as by a CPU quota, and later all of it again. The log names the slow
stage and what is moved; the picture has a step of each phase on one scale of time.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import pipekern as pk
from examples.gpt.model import Layer, Size, loss_fn
from examples.quota import Quota
from pipekern.trace.figure import check_format, new_figure, save, time_unit
from pipekern.trace.gantt import legend, paint
from pipekern.trace.timeline import Timeline

SIZE = Size(vocabulary=256, width=128, depth=12, heads=2, length=64)
SAMPLES, MICROBATCHES = 4, 8
LEARNING, FOLLOWING = 40, 40  # steps in which usual times are learnt, and those of each phase after it
SLOW = 1  # the rank that is slowed


class Step(NamedTuple):
    """A step of training: seconds with the optimizer's, units a stage, and what every rank did."""

    seconds: float
    split: tuple[int, ...]
    timeline: Timeline


def main() -> None:
    """Three phases, what came of them, and their picture."""
    options = arguments()
    take_core()
    dist.init_process_group("gloo")
    logging.basicConfig(format="  %(message)s", level=logging.WARNING)
    logging.getLogger("pipekern").setLevel(logging.INFO)
    torch.manual_seed(0)
    with pk.Pipeline(net(), loss_fn=loss_fn, microbatches=MICROBATCHES, rebalance="auto") as pipe:
        step = trainer(pipe)
        say(f"two ranks alike, layers {shown(pipe.split)}")
        alike = [step() for _ in range(LEARNING)]
        say(f"rank {SLOW} gets 1/{options.slower:g} of its core")
        with Quota(options.slower) if dist.get_rank() == SLOW else nullcontext():
            slow = [step() for _ in range(FOLLOWING)]
        say(f"rank {SLOW} gets all of it again")
        again = [step() for _ in range(FOLLOWING)]
    if dist.get_rank() == 0:
        report(phases(alike, slow, again, options.slower), options.picture)
    dist.barrier()
    dist.destroy_process_group()


def net() -> nn.Sequential:
    """A GPT on bytes."""
    layers = [Layer(SIZE) for _ in range(SIZE.depth)]
    return nn.Sequential(nn.Embedding(SIZE.vocabulary, SIZE.width), *layers, nn.Linear(SIZE.width, SIZE.vocabulary))


def trainer(pipe: pk.Pipeline) -> Callable[[], Step]:
    """What takes one step, always on the same batch; collective."""
    optimizer = pipe.optimizer(pk.optim.AdamW, lr=1e-3)
    tokens = torch.randint(SIZE.vocabulary, (SAMPLES * MICROBATCHES, SIZE.length + 1))
    dist.broadcast(tokens, src=0)

    def step() -> Step:
        start = time.perf_counter()
        pipe.train_step(tokens[:, :-1], tokens[:, 1:])
        optimizer.step()
        optimizer.zero_grad()
        took = time.perf_counter() - start
        return Step(took, pipe.split, pipe.timeline())

    return step


def phases(
    alike: Sequence[Step], slow: Sequence[Step], again: Sequence[Step], slower: float
) -> list[tuple[str, Sequence[Step]]]:
    """Titles with their steps: those of the slow phase before the first move and after the last."""
    before = [step for step in slow if step.split == slow[0].split]
    after = [step for step in slow if step.split == slow[-1].split]
    titled = [("alike", alike[-10:]), (f"rank {SLOW} {slower:g} × slower", before)]
    if slow[0].split != slow[-1].split:
        titled.append((f"moved after {len(slow) - len(after)} steps", after))
    return [*titled, ("alike again", again[-10:])]


def report(titled: Sequence[tuple[str, Sequence[Step]]], picture: Path) -> None:
    """The table and the picture: of each phase the step whose time is the median."""
    rows = [(title, sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]) for title, steps in titled]
    first = rows[0][1].seconds
    print(f"\n{'':24}{'layers':>10}{'ms a step':>12}{'':>10}")
    for (title, step), (_, steps) in zip(rows, titled, strict=True):
        ms = median(one.seconds for one in steps) * 1e3
        print(f"{title:24}{shown(step.split):>10}{ms:12.1f}{ms / first / 1e3:8.2f} ×")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(rows[:-1], picture)
    print(f"\n{picture}")


def draw(rows: Sequence[tuple[str, Step]], path: Path) -> None:
    """A timeline a row, all on one scale of time."""
    figure = new_figure(12, 0.9 + 1.35 * len(rows))
    longest = max(step.timeline.makespan for _, step in rows)
    unit, name = time_unit(longest)
    columns = figure.subplots(len(rows), 1, sharex=True)
    for axes, (title, step) in zip(columns, rows, strict=True):
        paint(axes, step.timeline)
        axes.set_xlim(0, longest / unit)
        axes.set_title(f"{title}: layers {shown(step.split)}, {step.seconds * 1e3:.0f} ms", loc="left", fontsize=10)
    columns[-1].set_xlabel(name)
    patches = legend(rows[0][1].timeline)
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    save(figure, path)


def shown(split: Sequence[int]) -> str:
    return " + ".join(map(str, split))


def say(text: str) -> None:
    """Once for all ranks."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def take_core() -> None:
    """A core and a thread a rank."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    torch.set_num_threads(1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slower", type=float, default=2.0, help="how many times, above 1")
    parser.add_argument("--picture", type=check_format, default=Path("runs/unequal.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
