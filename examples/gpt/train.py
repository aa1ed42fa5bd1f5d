"""Trains a small GPT over all ranks of a launcher, and leaves what a stranger wants to see in a run folder.

torchrun --standalone --nproc-per-node=2 -m examples.gpt.train --data FILE_OR_FOLDER
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import pipekern as pk
from examples.gpt.measure import measure
from examples.gpt.model import GPT, Size, loss_fn
from examples.gpt.report import Report, open_run, prompts, save_weights
from examples.gpt.text import Text, load
from pipekern.runtime.stats import Stats

WARMUP = 0.1  # share of the steps in which the learning rate rises
REVIEW = 20  # steps between looks at the time that is left
CLIP = 1.0
TEMPERATURE = 0.6


@dataclass
class Plan:
    """How many steps, and the learning rate on the way: a linear rise, then half a cosine down to 5 %."""

    steps: int

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at ``step``, from 0."""
        rise = WARMUP * self.steps
        fall = min(1.0, max(0.0, (step - rise) / (self.steps - rise)))
        return min(1.0, (step + 1) / rise) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fall)))

    def fit(self, taken: float, done: int, seconds: float) -> None:
        """Keep only the steps that ``seconds`` allow, when the first ``done`` of them have ``taken`` so long."""
        self.steps = max(done, min(self.steps, int(done * seconds / taken)))


class Training:
    """The pipeline with its optimizer and its data; every rank takes the same batches."""

    def __init__(self, pipe: pk.Pipeline, text: Text, options: argparse.Namespace):
        self.pipe = pipe
        self.text = text
        self.options = options
        self.plan = Plan(options.steps)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.optimizer = pipe.optimizer(torch.optim.AdamW, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.plan.rate)
        self._generator = torch.Generator().manual_seed(options.seed)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text.batch(self.options.samples, self.options.length, self._generator)

    def step(self) -> float:
        """One step; the loss before it."""
        x, y = self.batch()
        loss = self.pipe.train_step(x, y)
        self.pipe.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    def run(self) -> None:
        """All steps of the plan, with a progress bar on rank 0."""
        tokens = self.options.samples * self.options.length
        start = time.perf_counter()
        with _bar(self.plan.steps) as bar:
            while len(self.losses) < self.plan.steps:
                self.losses.append(self.step())
                self._scheduler.step()
                done = len(self.losses)
                if done % REVIEW == 0:
                    self.plan.fit(_slowest(time.perf_counter() - start), done, self.options.seconds)
                    bar.total = self.plan.steps
                if done % 10 == 0 or done == self.plan.steps:
                    bubble = self.pipe.timeline().bubble_ratio
                    speed = done * tokens / (time.perf_counter() - start)
                    bar.set_postfix_str(
                        f"loss {self.losses[-1]:.2f}, {speed:,.0f} tokens/s, bubble {bubble:.0%}, "
                        f"{_balance(self.pipe.stats())}",
                        refresh=False,
                    )
                bar.update()
        self.seconds = time.perf_counter() - start

    def sample(self) -> torch.Tensor:
        """Texts as long as the model sees at once, drawn from words that were held out; (texts, tokens)."""
        length = self.options.length
        given = prompts(self.text, length)
        return self.pipe.generate(given, length - given.shape[1], temperature=TEMPERATURE, seed=self.options.seed)

    def heldout_loss(self) -> float:
        """Mean loss over the held-out text, in nats a token."""
        x, y = self.text.heldout_batch(32 * self.options.microbatches, self.options.length)
        return float(self.pipe.eval_step(x, y))


def _bar(steps: int) -> tqdm:
    terminal = sys.stderr.isatty()
    form = "{percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"
    return tqdm(total=steps, bar_format=form, mininterval=0.2 if terminal else 10.0, disable=dist.get_rank() > 0)


def _balance(stats: Stats) -> str:
    """How far the busiest rank is above the mean, and why: a stage that has become slow, else the longest."""
    for (rank, stage), factor in stats.slow.items():
        return f"imbalance {stats.imbalance:.2f}, stage {stage} (rank {rank}) {factor:.1f} × slower than before"
    return f"imbalance {stats.imbalance:.2f} (stage {stats.slowest[1]})"


def _slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


class Unsplit:
    """The whole model on one core, trained as the pipeline is: what the speed-up is measured against."""

    def __init__(self, net: GPT, training: Training):
        self._net = net
        self._microbatches = training.options.microbatches
        self._batch = training.batch()  # every rank draws one: their samplers stay alike
        self._optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self) -> None:
        """One step, micro-batch by micro-batch."""
        m = self._microbatches
        x, y = self._batch
        for inputs, targets in zip(x.chunk(m), y.chunk(m), strict=True):
            (loss_fn(self._net(inputs), targets) / m).backward()
        torch.nn.utils.clip_grad_norm_(self._net.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="a file or a folder of text (default: Python's standard library)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=100.0, help="take fewer steps where all would take longer")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16, help="windows of text a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a window")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--rounds", type=int, default=11, help="steps that the speed is measured over, at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where tokenised text is kept")
    return parser.parse_args()


def main() -> None:
    """Train, measure, verify, report."""
    chosen = options()
    dist.init_process_group("gloo")
    text = shared_text(chosen)
    torch.manual_seed(chosen.seed)
    net = GPT(Size(vocabulary=text.tokenizer.get_vocab_size(), length=chosen.length))
    unsplit = copy.deepcopy(net)
    schedule = pk.schedule.build(chosen.schedule, ranks=dist.get_world_size(), microbatches=chosen.microbatches)
    with pk.Pipeline(net, loss_fn=loss_fn, microbatches=chosen.microbatches, schedule=schedule) as pipe:
        training = Training(pipe, text, chosen)
        training.run()
        heldout, sample = training.heldout_loss(), training.sample()
        folder = open_run(chosen.runs)
        save_weights(folder, pipe.state_dict())
        verified = pk.verify(pipe, *training.batch())
        speed = measure(pipe, schedule, training.step, Unsplit(unsplit, training).step, chosen.rounds)
    if dist.get_rank() == 0:
        weights, tokens = sum(p.numel() for p in unsplit.parameters()), chosen.samples * chosen.length
        report = Report(
            folder,
            text,
            schedule,
            training.losses,
            heldout,
            verified,
            speed,
            sample,
            weights,
            tokens,
            training.seconds,
        )
        report.write()
        report.show()
    dist.destroy_process_group()


def shared_text(chosen: argparse.Namespace) -> Text:
    """The text, tokenised once by rank 0; a bad ``--data`` ends the program with its reason."""
    try:
        if dist.get_rank() == 0:
            load(chosen.data, chosen.cache, Size.vocabulary, chosen.length)
        dist.barrier()
        return load(chosen.data, chosen.cache, Size.vocabulary, chosen.length)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
