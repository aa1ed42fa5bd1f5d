"""The run folder and the last words of a training run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from examples.gpt.measure import Speed
from examples.gpt.text import Text
from pipekern.runtime.verify import Verification
from pipekern.schedule import Schedule
from pipekern.trace.chrome import to_chrome
from pipekern.trace.gantt import draw

PROMPTS, PROMPT = 2, 24  # how many, and their tokens
INDEX = "model.safetensors.index.json"


def open_run(runs: Path) -> Path:
    """A new folder named by date and time, the same on every rank; collective."""
    now = torch.tensor(time.time(), dtype=torch.float64)
    dist.broadcast(now, src=0)
    folder = runs / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(float(now)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file a rank, names as in the unsplit model, and the index of Hugging Face loaders; collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / _shard(rank, ranks))
    dist.barrier()
    if rank == 0:
        files = [_shard(r, ranks) for r in range(ranks)]
        shards = {file: load_file(folder / file) for file in files}
        size = sum(t.nbytes for shard in shards.values() for t in shard.values())
        names = {name: file for file, shard in shards.items() for name in shard}
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=1) + "\n"
        )


def _shard(rank: int, ranks: int) -> str:
    return f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The whole model's weights, from the files of all ranks."""
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    return {name: t for file in sorted(set(names.values())) for name, t in load_file(folder / file).items()}


def prompts(text: Text, length: int) -> torch.Tensor:
    """Evenly spaced beginnings of texts of ``length`` tokens: (prompts, tokens), held out."""
    return text.heldout_batch(PROMPTS, min(PROMPT, length // 2))[0]


@dataclass(frozen=True)
class Report:
    """What rank 0 knows at the end.

    ``sample``: texts drawn, from :func:`prompts` on, (texts, tokens). ``weights`` is the number of all parameters, and
    ``tokens`` that of one step.
    """

    folder: Path
    text: Text
    schedule: Schedule
    losses: Sequence[float]
    heldout: float
    verified: Verification
    speed: Speed
    sample: torch.Tensor
    weights: int
    tokens: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: seconds, nats a token, ratios."""
        return {
            "ranks": self.schedule.ranks,
            "schedule": self.schedule.name,
            "microbatches": self.schedule.microbatches,
            "steps": len(self.losses),
            "training_seconds": self.seconds,
            "step_seconds": self.speed.pipeline,
            "simulated_step_seconds": self.speed.simulated,
            "bubble_ratio": self.speed.bubble_ratio,
            "simulated_bubble_ratio": self.speed.simulated_bubble_ratio,
            "tokens_per_second": self.tokens / self.speed.pipeline,
            "unsplit_step_seconds": self.speed.unsplit,
            "speedup_over_one_core": self.speed.speedup,
            "loss_first": self.losses[0],
            "loss_heldout": self.heldout,
            "verify_max_error": self.verified.max_error,
        }

    def write(self) -> None:
        """Fill the run folder."""
        (self.folder / "summary.json").write_text(json.dumps(self.summary(), indent=1) + "\n")
        self.text.tokenizer.save(str(self.folder / "tokenizer.json"))
        (self.folder / "trace.json").write_text(json.dumps(to_chrome(self.speed.timeline)))
        title = (
            f"A step of {self.schedule.name} on {self.schedule.ranks} ranks, {self.schedule.microbatches} micro-batches"
        )
        draw(self.speed.timeline, self.folder / "timeline.png", title)
        plot_losses(self.losses, self.heldout, self.folder / "loss.png")

    def show(self) -> None:
        """Print the result, and the texts."""
        given = prompts(self.text, self.sample.shape[1]).shape[1]
        decode = self.text.tokenizer.decode
        texts = [decode(row[:given]) + " ▸ " + decode(row[given:]) for row in self.sample.tolist()]
        title = "Words of the text held out, and after ▸ how the model goes on:"
        shown = [line for text in texts for line in (_indented(text), "")]
        print("\n".join([*self._lines(), "", title, "", *shown, *self._files()]))

    def _lines(self) -> list[str]:
        speed, order = self.speed, self.schedule
        exactness = "bit for bit" if self.verified.max_error == 0 else str(self.verified)
        return [
            "",
            f"A GPT of {self.weights / 1e6:.1f} million weights, {len(self.losses)} steps of {self.tokens:,} tokens "
            f"over {order.ranks} ranks ({order.name}, {order.microbatches} micro-batches) in {self.seconds:.0f} s",
            "",
            f"  loss       {self.losses[0]:.2f} at the start, {self.heldout:.2f} nats a token on text held out "
            f"({len(self.text.heldout):,} tokens)",
            f"  step       {speed.pipeline * 1e3:.1f} ms measured, {speed.simulated * 1e3:.1f} ms simulated from the "
            f"measured costs of the stages ({speed.rest * 1e3:.1f} ms of both are clipping and the optimizer)",
            f"  bubble     {speed.bubble_ratio:.1%} measured, {speed.simulated_bubble_ratio:.1%} simulated",
            f"  speed      {self.tokens / speed.pipeline:,.0f} tokens/s, {speed.speedup:.2f} × the unsplit model on "
            f"one core ({speed.unsplit * 1e3:.1f} ms a step), measured in turn",
            f"  gradients  those of the unsplit model, {exactness}",
        ]

    def _files(self) -> list[str]:
        return [
            f"{self.folder}/",
            "  loss.png, timeline.png   the loss; what every rank did in a step",
            "  trace.json               the same step for https://ui.perfetto.dev",
            "  summary.json             the numbers above",
            "  model-*.safetensors      the weights, under their names in the unsplit model",
        ]


def _indented(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())


def plot_losses(losses: Sequence[float], heldout: float, path: Path) -> None:
    """The training loss of every step, its running mean, and the held-out loss at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="#0072B2", alpha=0.35, linewidth=1, label="each step")
    axes.plot(_running_mean(losses), color="#0072B2", linewidth=2, label="running mean")
    axes.axhline(heldout, color="#D55E00", linestyle="--", label=f"held out, at the end: {heldout:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _running_mean(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + 1 - share
        means.append(total / weight)
    return means
