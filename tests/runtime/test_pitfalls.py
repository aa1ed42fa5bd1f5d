"""What other pipelines get wrong, one row a test: gradients, shared weights, steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import reference
from tests.runtime.step import PLACES, SCHEDULES, check, gradients, make_seeded, run, union


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))


def _batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4, dtype=torch.float64), torch.randn(samples, 3, dtype=torch.float64)


def _two_steps(ranks: int, seed: int, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Gradients after two steps, with an evaluation and its check in between."""
    with pk.Pipeline(make_seeded(_net, seed), loss_fn=F.mse_loss, microbatches=4, ranks=ranks) as pipe:
        pipe.train_step(*batches[0])
        held = [p.grad for p in pipe.parameters()]
        before = gradients(pipe)
        pipe.eval_step(*batches[1])
        assert all(p.grad is grad for p, grad in zip(pipe.parameters(), held, strict=True)), "another .grad"
        assert all(torch.equal(g, before[n]) for n, g in gradients(pipe).items()), "evaluation changed a gradient"
        pipe.train_step(*batches[1])
        return gradients(pipe)


@PLACES
def test_gradients_of_two_steps_add_and_evaluation_between_leaves_them(processes: bool, seed: int) -> None:
    """And their scale is neither divided by nor multiplied with a count of anything: ratio 1 ± 1e-6."""
    batches = [_batch(), _batch()]
    got = union(run(processes, _two_steps, 2, seed, batches))
    model = make_seeded(_net, seed)
    for batch in batches:
        reference.step(model, F.mse_loss, *batch)
    want = reference.gradients(model)
    assert reference.distance(got, want) <= 1e-12
    ratios = [got[name].norm() / want[name].norm() for name in want]
    assert all(abs(ratio - 1) <= 1e-6 for ratio in ratios), ratios


def _counting(make: partial[nn.Module], calls: dict[str, int]) -> nn.Module:
    """The model with hooks on its layers that count what goes in."""
    model = make()
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(partial(_count, calls, name))
    return model


def _count(calls: dict[str, int], name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert torch.isfinite(inputs[0]).all(), f"{name} was given memory that nobody wrote"
    calls[name] = calls.get(name, 0) + 1


def _count_hooks(ranks: int, seed: int, x: Tensor, y: Tensor) -> list[dict[str, int]]:
    calls: dict[str, int] = {}
    model = _counting(partial(make_seeded, _net, seed), calls)
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=4, ranks=ranks) as pipe:
        counts = [dict(calls)]
        for _ in range(2):
            pipe.train_step(x, y)
            counts.append(dict(calls))
    return counts


@PLACES
def test_input_hooks_fire_once_a_micro_batch(processes: bool, seed: int) -> None:
    """No layer runs at construction, and each runs m times in the first step as in the second."""
    counts = [union(per_rank) for per_rank in zip(*run(processes, _count_hooks, 2, seed, *_batch()), strict=True)]
    names = [name for name, _ in _net().named_children()]
    assert counts == [{}, dict.fromkeys(names, 4), dict.fromkeys(names, 8)]


def _normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3))


@PLACES
def test_batchnorm_statistics_after_the_first_step_are_exact(processes: bool, seed: int) -> None:
    """No model code ran on memory that was not written: the statistics are those of the four micro-batches."""
    step = check(_normalised, F.mse_loss, *_batch(), processes=processes, seed=seed, coupled=True)
    assert step.state["1.num_batches_tracked"] == step.state["3.num_batches_tracked"] == 4


class Tied(nn.Module):
    """Embedding and head share a weight, and two of the layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 9, bias=False)
        self.embed = nn.Embedding(9, 6)
        self.embed.weight = self.head.weight
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.head(h)


def _train_tied(ranks: int, seed: int, chunks: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    name = "1f1b" if chunks == 1 else "looped-bfs"
    with pk.Pipeline(
        make_seeded(Tied, seed), loss_fn=F.cross_entropy, microbatches=2, ranks=ranks, schedule=name, chunks=chunks
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-2)
        norms = []
        for _ in range(50):
            optimizer.zero_grad()
            pipe.train_step(x, y)
            norms.append(pipe.clip_grad_norm_(0.1))
            optimizer.step()
        return {"norms": torch.stack(norms), **{n: p.detach().clone() for n, p in pipe.named_parameters()}}


@PLACES
@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_tied_weights(processes: bool, ranks: int, chunks: int, seed: int) -> None:
    """On one rank or several: gradients are sums, copies have the same bits after 50 steps, the norm counts once."""
    x, y = torch.randint(0, 9, (6,)), torch.randint(0, 9, (6,))
    got = union(run(processes, _train_tied, ranks, seed, chunks, x, y))  # where ranks share a name, the same bits
    model = make_seeded(Tied, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for _ in range(50):
        optimizer.zero_grad()
        reference.step(model, F.cross_entropy, x, y)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).detach())
        optimizer.step()
    assert torch.equal(got["embed.weight"], got["head.weight"])
    assert torch.equal(got["layers.0.weight"], got["layers.2.weight"])
    named = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    assert reference.distance(got, {"norms": torch.stack(norms), **named}) <= 1e-10


class Twice(nn.Module):
    """A layer that uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def _repeated() -> nn.Sequential:
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    return nn.Sequential(Twice(), relu, linear, relu, Twice(), relu, linear, nn.Linear(4, 3), relu)


@PLACES
@SCHEDULES
def test_weight_used_twice_and_layer_in_two_places(processes: bool, schedule: str, seed: int) -> None:
    check(_repeated, F.mse_loss, *_batch(), processes=processes, seed=seed, schedule=schedule)


class Deep(nn.Module):
    """Thirty layers and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@PLACES
def test_every_one_of_30_layers_runs_on_4_stages(processes: bool, seed: int) -> None:
    x = torch.randn(4, 4, dtype=torch.float64)
    step = check(Deep, F.mse_loss, x, x.flip(0), processes=processes, seed=seed, ranks=4)
    assert len([name for name, grad in step.gradients.items() if grad is not None]) == 60


def _changing(ranks: int, seed: int, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], dict[str, Any]]:
    with pk.Pipeline(make_seeded(_net, seed), loss_fn=F.mse_loss, microbatches=4, ranks=ranks) as pipe:
        losses = [pipe.train_step(*batch) for batch in batches]
        return losses, gradients(pipe)


@PLACES
def test_batch_size_and_sequence_length_change_between_steps_and_micro_batches(processes: bool, seed: int) -> None:
    """Ten samples in four micro-batches are 3, 3, 2, 2; the loss is the mean over the whole batch."""
    torch.manual_seed(seed)
    shapes = [(10, 3), (4, 9), (17, 1), (10, 3), (8, 64)]
    batches = [
        (torch.randn(*shape, 4, dtype=torch.float64), torch.randn(*shape, 3, dtype=torch.float64)) for shape in shapes
    ]
    results = run(processes, _changing, 2, seed, batches)
    model = make_seeded(_net, seed)
    for step, batch in enumerate(batches):
        loss = reference.step(model, F.mse_loss, *batch)
        assert all(abs(losses[step] - loss) <= 1e-12 for losses, _ in results)
    assert reference.distance(union([grads for _, grads in results]), reference.gradients(model)) <= 1e-12


def _norms(ranks: int, seed: int, x: Tensor, y: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    with pk.Pipeline(make_seeded(_net, seed), loss_fn=F.mse_loss, microbatches=4, ranks=ranks) as pipe:
        pipe.train_step(x, y)
        norms = [pipe.clip_grad_norm_(float("inf"), kind) for kind in (2.0, 1.0, 3.0, float("inf"))]
        norms.append(pipe.clip_grad_norm_(0.01))
        return norms, gradients(pipe)


def test_a_bfloat16_value_into_a_float32_stage_names_stage_and_dtypes() -> None:
    """Nothing is cast on the way or taken for what it is not."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
    with (
        pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=2) as pipe,
        pytest.raises(RuntimeError, match="BFloat16 and Float") as error,
    ):
        pipe.train_step(torch.randn(4, 4, dtype=torch.bfloat16), torch.randn(4, 4))
    if hasattr(error.value, "__notes__"):  # Python 3.10 has none
        assert "stage 1, micro-batch 0" in " ".join(error.value.__notes__)


@PLACES
def test_one_norm_over_all_stages(processes: bool, seed: int) -> None:
    """Equal to torch's over the whole model, on every rank, in the same bits for any number of stages."""
    x, y = _batch()
    model = make_seeded(_net, seed)
    reference.step(model, F.mse_loss, x, y)
    whole = list(model.parameters())
    grads = list(reference.gradients(model).values())
    want = [nn.utils.get_total_norm(grads, kind) for kind in (2.0, 1.0, 3.0, float("inf"))]
    want.append(nn.utils.clip_grad_norm_(whole, 0.01))
    seen = []
    for ranks in (1, 2, 3):
        results = run(processes, _norms, ranks, seed, x, y)
        for norms, _ in results:
            assert all(abs(a - b) <= 1e-12 for a, b in zip(norms, want, strict=True))
            seen.append([norm.item() for norm in norms])
        assert reference.distance(union([grads for _, grads in results]), reference.gradients(model)) <= 1e-12
    assert all(norms == seen[0] for norms in seen), "the norm depends on the split"
