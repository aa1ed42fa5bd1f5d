"""Stages that are not just layers with weights: frozen, unused, in place, keeping things, compiled."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import reference
from tests.runtime.models import Gpt, tokens
from tests.runtime.step import PLACES, SCHEDULES, check, chunks, gradients, make_seeded, run, union


def _batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4, dtype=torch.float64), torch.randn(samples, 4, dtype=torch.float64)


class Unused(nn.Module):
    """A layer with a parameter that nothing uses and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.frozen(x)


def _unused() -> nn.Sequential:
    return nn.Sequential(*(Unused() for _ in range(4)))


@PLACES
@SCHEDULES
def test_unused_and_frozen_parameters(processes: bool, schedule: str, seed: int) -> None:
    """Their ``.grad`` stays None, as without a pipeline."""
    step = check(_unused, F.mse_loss, *_batch(), processes=processes, seed=seed, schedule=schedule)
    assert step.gradients["0.unused.weight"] is None
    assert step.gradients["3.frozen.weight"] is None
    assert step.gradients["3.used.weight"] is not None


def _frozen_first() -> nn.Sequential:
    frozen = nn.Linear(4, 4).requires_grad_(False)
    return nn.Sequential(
        frozen, nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4).requires_grad_(False), nn.Tanh()
    )


@PLACES
@pytest.mark.parametrize("split", [[2, 2, 2], [1, 1, 4], [3, 1, 2], [1, 2, 3]])
def test_stages_without_trainable_parameters(processes: bool, split: list[int], seed: int) -> None:
    """First, in the middle or last: no gradient is sent where none is wanted, and it goes through where it is."""
    check(_frozen_first, F.mse_loss, *_batch(), processes=processes, seed=seed, ranks=3, split=split)


def _optimise(ranks: int, seed: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Five steps with a learning-rate scheduler and clipping; rank 0 has nothing to train."""
    with pk.Pipeline(
        make_seeded(_frozen_first, seed), loss_fn=F.mse_loss, microbatches=4, ranks=ranks, split=[2, 4]
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for _ in range(5):
            optimizer.zero_grad()
            pipe.train_step(x, y)
            pipe.clip_grad_norm_(0.1)
            optimizer.step()
            scheduler.step()
        return {name: value.clone() for name, value in pipe.state_dict().items()}


@PLACES
def test_optimizer_and_scheduler_where_a_stage_has_nothing_to_train(processes: bool, seed: int) -> None:
    x, y = _batch()
    got = union(run(processes, _optimise, 2, seed, x, y))
    model = make_seeded(_frozen_first, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(5):
        optimizer.zero_grad()
        reference.step(model, F.mse_loss, x, y)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
    assert reference.distance(got, dict(model.state_dict())) <= 1e-12


def _in_place() -> nn.Sequential:
    layers = [(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(4)]
    return nn.Sequential(nn.Linear(4, 4), *(layer for pair in layers for layer in pair))


@PLACES
@SCHEDULES
def test_in_place_relu_as_first_layer_of_a_stage(processes: bool, schedule: str, seed: int) -> None:
    stages = 2 * chunks(schedule)
    split = {2: [3, 6], 4: [1, 2, 2, 4]}[stages]
    check(_in_place, F.mse_loss, *_batch(), processes=processes, seed=seed, schedule=schedule, split=split)


def _batch_in_place() -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace=True), *(nn.Linear(4, 4) for _ in range(4)))


@PLACES
@SCHEDULES
def test_in_place_relu_on_the_batch(processes: bool, schedule: str, seed: int) -> None:
    """Micro-batches are views of one tensor: each takes a copy."""
    check(_batch_in_place, F.mse_loss, *_batch(), processes=processes, seed=seed, schedule=schedule)


class AddPosition(nn.Module):
    """Of one sample, autograd gives the parameter a view of the gradient that came in."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4))
        self.other = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position.view(1, 4) + self.other.view(1, 4)


def _positions() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 4), AddPosition(), nn.Tanh(), AddPosition(), nn.Tanh(), AddPosition(), nn.Linear(4, 4)
    )


@PLACES
@SCHEDULES
def test_gradient_that_autograd_would_alias_to_a_received_slot(processes: bool, schedule: str, seed: int) -> None:
    """Sixteen micro-batches of one sample: the slot is written again long before the step ends."""
    stages = 2 * chunks(schedule)
    split = {2: [2, 5], 4: [2, 2, 2, 1]}[stages]
    batch = _batch(16)
    check(
        _positions, F.mse_loss, *batch, processes=processes, seed=seed, schedule=schedule, split=split, microbatches=16
    )


class Keeper(nn.Module):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return x * 1.0


def _keep(ranks: int) -> str:
    model = nn.Sequential(nn.Linear(4, 5), Keeper(), nn.Linear(5, 4))
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, split=[1, 2], timeout=5.0) as pipe:
        try:
            for _ in range(2):  # the other ranks learn it when they next wait for this one
                pipe.train_step(torch.ones(6, 4), torch.ones(6, 4))
        except pk.TransportError as error:
            return str(error)
    return ""


@PLACES
def test_module_that_keeps_its_input_is_told_the_shape(processes: bool) -> None:
    texts = run(processes, _keep, 2)
    assert "[3, 5]" in texts[-1], texts  # three samples, five features, on the rank that keeps it
    assert all("[3, 5]" in text for text in texts), "the other ranks do not say why they stopped"


def _names(ranks: int, seed: int, tied: bool) -> tuple[list[str], dict[str, Tensor]]:
    torch.manual_seed(seed)
    with pk.Pipeline(Gpt(tied), loss_fn=F.mse_loss, microbatches=2, ranks=ranks) as pipe:
        return [name for name, _ in pipe.named_parameters()], {n: v.clone() for n, v in pipe.state_dict().items()}


@PLACES
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_original_names(processes: bool, ranks: int, tied: bool, seed: int) -> None:
    """Over all ranks ``state_dict`` is the unsplit module's, buffers and tied names included."""
    results = run(processes, _names, ranks, seed, tied)
    torch.manual_seed(seed)
    model = Gpt(tied)
    assert {name for names, _ in results for name in names} == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    state = union([state for _, state in results])
    assert reference.distance(state, dict(model.state_dict())) == 0.0
    model.load_state_dict(state)


@PLACES
def test_positions_mask_and_head_of_a_gpt_in_float32(processes: bool, seed: int) -> None:
    """A user's model as it is: float32 stays float32, losses too."""
    torch.manual_seed(seed)
    x, y = tokens(8)
    for loss, dtypes in run(processes, _float32, 2, seed, x, y):
        assert loss.dtype is torch.float32
        assert dtypes == {torch.float32}


def _float32(ranks: int, seed: int, x: Tensor, y: Tensor) -> tuple[Tensor, set[torch.dtype]]:
    torch.manual_seed(seed)
    with pk.Pipeline(Gpt(tied=True), loss_fn=_sequence_loss, microbatches=4, ranks=ranks) as pipe:
        loss = pipe.train_step(x, y)
        return loss, {grad.dtype for grad in gradients(pipe).values()}


def _sequence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets)


_NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.full, _NEEDS_COMPILER])])
def test_compiled_layer(backend: str, seed: int) -> None:
    model, plain = make_seeded(_compilable, seed), make_seeded(_compilable, seed)
    model.get_submodule("2").compile(backend=backend)
    x, y = _batch()
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=4, ranks=2) as pipe:
        loss = pipe.train_step(x, y)
        grads = gradients(pipe)
    assert abs(loss - reference.step(plain, F.mse_loss, x, y)) <= 1e-12
    assert reference.distance(grads, reference.gradients(plain)) <= 1e-12


def _compilable() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))


class Placed(nn.Module):
    """A product with a position's vector added, whose gradient is the product's, seen without the batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.position = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + self.position.unsqueeze(0)
        return y.tanh()


def _placed() -> nn.Sequential:
    return nn.Sequential(*(Placed() for _ in range(4)))


@PLACES
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2"])
def test_gradients_that_share_memory_with_weight_work_to_come(processes: bool, schedule: str, seed: int) -> None:
    """Autograd keeps a view of it as the parameter's ``.grad`` where a micro-batch has one sample, and adds to it."""
    x, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.randn(4, 3, 4, dtype=torch.float64)
    check(_placed, F.mse_loss, x, y, processes=processes, seed=seed, schedule=schedule)
