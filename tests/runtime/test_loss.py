"""The loss over micro-batches equals the loss of the whole batch, whatever it is a mean over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime import reference
from tests.runtime.step import PLACES, check, gradients, make_seeded, run, union

CLASSES = 5
WEIGHTS = torch.tensor([0.1, 2.0, 0.0, 1.0, 0.7], dtype=torch.float64)


def _classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, CLASSES))


def _x() -> Tensor:
    return torch.randn(10, 4, dtype=torch.float64)


def _targets(ignored: int = -100) -> Tensor:
    """Ten classes; in four micro-batches of 3, 3, 2, 2 the second has nothing but ignored ones."""
    targets = torch.randint(0, CLASSES, (10,))
    targets[3:6] = ignored
    targets[8] = ignored
    return targets


class _LogSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log_softmax(-1)


def _log_classifier() -> nn.Sequential:
    return nn.Sequential(*_classifier(), _LogSoftmax())


@PLACES
@pytest.mark.parametrize(
    ("loss_fn", "ignored"),
    [
        (nn.CrossEntropyLoss(), -100),
        (nn.CrossEntropyLoss(ignore_index=2), 2),
        (nn.CrossEntropyLoss(weight=WEIGHTS), -100),
        (nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1, label_smoothing=0.1), 1),
        (nn.CrossEntropyLoss(label_smoothing=0.2), -100),
        (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), -100),
    ],
    ids=str,
)
def test_cross_entropy_with_weights_and_ignored_targets(
    processes: bool, loss_fn: nn.Module, ignored: int, seed: int
) -> None:
    """Even where a whole micro-batch is ignored."""
    check(_classifier, loss_fn, _x(), _targets(ignored), processes=processes, seed=seed)


@PLACES
@pytest.mark.parametrize("loss_fn", [nn.NLLLoss(weight=WEIGHTS), nn.NLLLoss(ignore_index=0)], ids=str)
def test_negative_log_likelihood(processes: bool, loss_fn: nn.NLLLoss, seed: int) -> None:
    check(_log_classifier, loss_fn, _x(), _targets(loss_fn.ignore_index), processes=processes, seed=seed)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1)], ids=str)
def test_cross_entropy_with_probabilities(loss_fn: nn.Module, seed: int) -> None:
    targets = torch.rand(10, CLASSES, dtype=torch.float64).softmax(-1)
    check(_classifier, loss_fn, _x(), targets, processes=False, seed=seed)


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _sequence_classifier() -> nn.Sequential:
    return nn.Sequential(*_classifier(), _Transposed())


def test_cross_entropy_over_sequences(seed: int) -> None:
    """Targets (samples, time), of which some are padding: it is the tokens that count, not the samples."""
    x, targets = torch.randn(10, 7, 4, dtype=torch.float64), torch.randint(0, CLASSES, (10, 7))
    for row in range(10):
        targets[row, row % 7 :] = -100
    check(_sequence_classifier, nn.CrossEntropyLoss(), x, targets, processes=False, seed=seed)


def _sum_and_count(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    kept = target != -100
    return F.cross_entropy(output, target, reduction="sum"), kept.sum()


def _sum_and_number(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(output, target, reduction="sum"), int((target != -100).sum())


@PLACES
@pytest.mark.parametrize("loss_fn", [_sum_and_count, _sum_and_number])
def test_loss_that_returns_sum_and_count(processes: bool, loss_fn: Any, seed: int) -> None:
    check(_classifier, loss_fn, _x(), _targets(), processes=processes, seed=seed, reference_loss=F.cross_entropy)


def _add_up(ranks: int, seed: int, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    with pk.Pipeline(make_seeded(_classifier, seed), loss_fn=_sum_and_count, microbatches=4, ranks=ranks) as pipe:
        for batch in batches:
            pipe.train_step(*batch)
        return gradients(pipe)


@PLACES
def test_steps_with_sum_and_count_add_up(processes: bool, seed: int) -> None:
    """Each step is divided by its own count, not by the other's."""
    batches = [(_x(), _targets()), (_x(), torch.randint(0, CLASSES, (10,)))]
    got = union(run(processes, _add_up, 2, seed, batches))
    model = make_seeded(_classifier, seed)
    for batch in batches:
        reference.step(model, F.cross_entropy, *batch)
    assert reference.distance(got, reference.gradients(model)) <= 1e-12


@pytest.mark.parametrize(
    "loss_fn", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.MSELoss(reduction="sum")], ids=str
)
def test_means_and_sums_over_samples(loss_fn: nn.Module, seed: int) -> None:
    check(_classifier, loss_fn, _x(), torch.randn(10, CLASSES, dtype=torch.float64), processes=False, seed=seed)


def _vector(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(-1)


def _number(output: Tensor, target: Tensor) -> float:
    return float((output - target).square().mean())


def _triple(output: Tensor, target: Tensor) -> tuple[Tensor, int, int]:
    return (output - target).square().sum(), 1, 2


@pytest.mark.parametrize(
    ("loss_fn", "value"),
    [(_vector, r"\(3,\)"), (_number, "float"), (_triple, "3 values")],
    ids=["vector", "float", "triple"],
)
def test_loss_that_is_not_a_scalar(loss_fn: Any, value: str) -> None:
    """Refused naming what it returned, and the mend."""
    pipe = pk.Pipeline(_classifier(), loss_fn=loss_fn, microbatches=2, ranks=2)
    with pipe, pytest.raises(pk.ConfigError, match=rf"{value}.*one number.*\(sum, count\)"):
        pipe.train_step(torch.randn(6, 4), torch.randn(6, CLASSES))
