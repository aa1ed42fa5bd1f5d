"""Cases of the proof over replicas: trained by several pipelines, and by the unsplit model over all their batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import reference
from tests.runtime.models import Batch, Gpt, normalised, perceptron, token_loss, tokens, vectors
from tests.runtime.parity import same_bits
from tests.runtime.step import make_seeded, union

TOLERANCE = 1e-12
MICROBATCHES, CLASSES = 4, 5


class Unused(nn.Module):
    """Eight layers, of which the first is frozen, and parameters that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        layers = list(perceptron())[:8]
        layers[0].requires_grad_(False)
        layers[2].bias.requires_grad_(False)
        layers[4].spare = nn.Parameter(torch.ones(3))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def labels(samples: int) -> Batch:
    """About half of them ignored, and all of the first micro-batch's in some batches."""
    y = torch.randint(0, CLASSES, (samples,)).masked_fill(torch.rand(samples) < 0.5, -100)
    y[: int(torch.randint(0, 3, ()))], y[-1] = -100, 1
    return Batch(torch.randn(samples, 5, dtype=torch.float64), y)


def to_nine(samples: int) -> Batch:
    return Batch(torch.randn(samples, 5, dtype=torch.float64), torch.randn(samples, 9, dtype=torch.float64))


def pair(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over targets above -1, and how many they are."""
    kept = target > -1
    return ((output - target).square() * kept).sum(), kept.sum()


def of_samples(loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], tuple[Tensor, float]]:
    """A mean over samples as a sum and a count."""
    return lambda output, y: (loss_fn(output, y) * len(y), len(y))


def of_labels(output: Tensor, y: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(output, y, reduction="sum"), int((y != -100).sum())


class Kind(NamedTuple):
    """A model, its loss, that loss as (sum, count), and its batches. ``coupled``: see ``models.py``."""

    build: Callable[[], nn.Module]
    loss_fn: Any
    counted: Callable[[Any, Any], tuple[Tensor, Any]]
    batch: Callable[[int], Batch]
    coupled: bool = False


KINDS: dict[str, Kind] = {
    "mean": Kind(perceptron, F.mse_loss, of_samples(F.mse_loss), vectors),
    "cross entropy": Kind(classifier, nn.CrossEntropyLoss(), of_labels, labels),
    "pair": Kind(perceptron, pair, pair, vectors),
    "tied": Kind(lambda: Gpt(tied=True), token_loss, of_samples(token_loss), tokens),
    "unused": Kind(Unused, F.mse_loss, of_samples(F.mse_loss), to_nine),
    "batchnorm": Kind(normalised, F.mse_loss, of_samples(F.mse_loss), vectors, coupled=True),
}


class Case(NamedTuple):
    """What is trained, and how."""

    kind: str
    schedule: str
    pp: int
    dp: int
    zero: int
    optimizer: str = "adamw"
    steps: int = 3

    def make_optimizer(self, make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return make(torch.optim.SGD, lr=1e-2, momentum=0.9)
        return make(torch.optim.AdamW, lr=1e-3)

    def data(self, seed: int) -> list[list[Batch]]:
        """Of each step the batch of each replica; sizes differ."""
        torch.manual_seed(seed + 1)
        sizes = torch.randint(2 * MICROBATCHES, 2 * MICROBATCHES + 5, (self.steps + 2, self.dp)).tolist()
        return [[KINDS[self.kind].batch(size) for size in row] for row in sizes]


class Trained(NamedTuple):
    """What a run leaves; of a process, what it has."""

    loss: Tensor
    gradients: dict[str, Any]  # after one step
    summed: dict[str, Any]  # after a second one, and clipped to half of their norm
    norm: Tensor
    evaluated: Tensor
    outputs: Any  # of this replica, where its last stage is
    final: dict[str, Any]  # parameters after the optimizer's steps
    state: dict[str, Any]  # of the same, with buffers


def train(case: Case, seed: int) -> Trained:
    """By this process's part of the pipelines."""
    kind, rank = KINDS[case.kind], int(os.environ.get("RANK", "0"))
    inside = {"pp": case.pp, "dp": case.dp} if case.zero % 2 else {"dp": case.dp, "pp": case.pp}
    replica = rank % case.dp if case.zero % 2 else rank // case.pp
    data = [row[replica] for row in case.data(seed)]
    with pk.Pipeline(
        make_seeded(kind.build, seed), loss_fn=kind.loss_fn, microbatches=MICROBATCHES, ranks=case.pp,
        schedule=case.schedule, mesh=inside, zero=case.zero, timeout=30.0,
    ) as pipe:  # fmt: skip
        loss = pipe.train_step(*data[0])
        gradients = _grads(pipe)
        pipe.train_step(*data[1])
        norm = pipe.clip_grad_norm_(float("inf"))
        assert same_bits(pipe.clip_grad_norm_(float(norm) / 2), norm)
        summed = _grads(pipe)
        evaluated, outputs = pipe.eval_step(*data[1]), pipe.eval_step(data[1].x)
        assert same_bits(summed, _grads(pipe)), "eval_step wrote"
        optimizer = case.make_optimizer(pipe.optimizer)
        for batch in data[2:]:
            optimizer.zero_grad()
            pipe.train_step(*batch)
            optimizer.step()
        final = {name: p.detach().clone() for name, p in pipe.named_parameters()}
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        return Trained(loss, gradients, summed, norm, evaluated, outputs, final, state)


def _grads(pipe: pk.Pipeline) -> dict[str, Any]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in pipe.named_parameters()}


class Unsplit:
    """The whole model, micro-batch by micro-batch over the replicas in turn, each with buffers of its own."""

    def __init__(self, case: Case, seed: int):
        self.kind, self.model = KINDS[case.kind], make_seeded(KINDS[case.kind].build, seed)
        self._buffers = [{n: b.clone() for n, b in self.model.named_buffers()} for _ in range(case.dp)]

    def step(self, batches: Sequence[Batch]) -> Tensor:
        parts = []
        for replica, batch in enumerate(batches):
            self._swap(replica)
            m = MICROBATCHES if self.kind.coupled else 1
            for x, y in zip(reference.split(batch.x, m), reference.split(batch.y, m), strict=True):
                parts.append(self.kind.counted(self.model(x), y))
        loss = sum(total for total, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        return loss.detach()

    def evaluate(self, batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for replica, batch in enumerate(batches):
            self._swap(replica)
            outputs.append(reference.evaluate(self.model, batch.x))
        parts = [self.kind.counted(output, batch.y) for output, batch in zip(outputs, batches, strict=True)]
        return sum(total for total, _ in parts) / sum(count for _, count in parts), outputs

    def state(self, replica: int) -> dict[str, Tensor]:
        self._swap(replica)
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def _swap(self, replica: int) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.data = self._buffers[replica][name]


def wanted(case: Case, seed: int) -> tuple[Trained, list[dict[str, Tensor]]]:
    """By the unsplit model; and its state as each replica has it."""
    unsplit, data = Unsplit(case, seed), case.data(seed)
    model = unsplit.model
    loss = unsplit.step(data[0])
    gradients = reference.gradients(model)
    unsplit.step(data[1])
    before = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    nn.utils.clip_grad_norm_(model.parameters(), float(before) / 2)
    summed = reference.gradients(model)
    evaluated, outputs = unsplit.evaluate(data[1])
    optimizer = case.make_optimizer(lambda cls, **options: cls(model.parameters(), **options))
    for batches in data[2:]:
        optimizer.zero_grad()
        unsplit.step(batches)
        optimizer.step()
    final = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    states = [unsplit.state(replica) for replica in range(case.dp)]
    return Trained(loss, gradients, summed, before, evaluated, outputs, final, {}), states


def compare(case: Case, runs: Sequence[Trained], seed: int) -> None:
    """Fail unless the processes' runs together equal the unsplit model's."""
    want, states = wanted(case, seed)
    for name in ("loss", "norm", "evaluated"):
        assert all(same_bits(getattr(run, name), getattr(runs[0], name)) for run in runs), f"{case}: {name} differs"
        error = abs(float(getattr(runs[0], name)) - float(getattr(want, name)))
        assert error <= TOLERANCE, f"{case}: {name} is off by {error:.1e}"
    replicas = [runs[r :: case.dp] if case.zero % 2 else runs[r * case.pp : (r + 1) * case.pp] for r in range(case.dp)]
    for name in ("gradients", "summed", "final"):
        columns = [union([getattr(run, name) for run in replica]) for replica in replicas]
        got, wish = _whole(columns, getattr(want, name), case), getattr(want, name)
        error = reference.distance(got, wish)
        assert error <= TOLERANCE, f"{case}: {name} differ by {error:.1e}"
    for replica, output, state in zip(replicas, want.outputs, states, strict=True):
        (given,) = [run.outputs for run in replica if run.outputs is not None]
        assert (given - output).abs().max() <= TOLERANCE, f"{case}: outputs"
        error = reference.distance(union([run.state for run in replica]), state)
        assert error <= TOLERANCE, f"{case}: the state differs by {error:.1e}"


def _whole(columns: Sequence[dict[str, Any]], want: dict[str, Any], case: Case) -> dict[str, Any]:
    """Parameters, or their gradients, put together from what the replicas have."""
    found: dict[str, Any] = {}
    for name, wish in want.items():
        parts = [column[name] for column in columns if name in column]
        if wish is None or parts[0] is None:
            assert all(part is None for part in parts)
            found[name] = None
        elif case.dp == 1 or not case.zero or sum(part.numel() for part in parts) != wish.numel():
            assert all(same_bits(part, parts[0]) for part in parts), f"{case}: the replicas' {name} differ"
            found[name] = parts[0]
        else:
            found[name] = torch.cat([part.flatten() for part in parts]).view(wish.shape)
    return found
