"""The loss over micro-batches equals the loss of the whole batch, whatever it is a mean over."""

from __future__ import annotations

from functools import partial
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


def _nan_at(microbatch: int, output: Tensor, target: Tensor) -> Tensor:
    """A loss that is NaN where the micro-batch's first target says so."""
    loss = F.mse_loss(output, target[:, 1:])
    return loss * torch.where(target[0, 0] == microbatch, torch.nan, 1.0)


def _nonfinite(ranks: int, policy: str, seed: int) -> tuple[str, float, dict[str, Any], dict[str, Any], float]:
    """A step with NaN in micro-batch 2: error, loss, gradients, what weights changed; and the loss of a good step."""
    torch.manual_seed(seed)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, CLASSES, dtype=torch.float64)
    marks = torch.arange(4.0, dtype=torch.float64).repeat_interleave(2)[:, None]
    text = ""
    with pk.Pipeline(
        make_seeded(_classifier, seed), loss_fn=partial(_nan_at, 2), microbatches=4, ranks=ranks, on_nonfinite=policy
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=0.1)
        before = {name: p.detach().clone() for name, p in pipe.named_parameters()}
        loss = torch.tensor(0.0)
        try:
            loss = pipe.train_step(x, torch.cat([marks, y], 1))
            pipe.clip_grad_norm_(1.0)
            optimizer.step()
        except pk.NumericsError as error:
            text = str(error)
        grads = gradients(pipe)
        after = {name: p.detach().clone() for name, p in pipe.named_parameters()}
        changed = {name: not torch.equal(after[name], before[name]) for name in after}
        optimizer.zero_grad()
        good = pipe.train_step(x, torch.cat([marks + 9, y], 1)).item()
        return text, loss.item(), grads, changed, good


@PLACES
def test_nan_in_one_micro_batch_raises_on_every_rank(processes: bool, seed: int) -> None:
    """It names the micro-batch; the pipeline can go on afterwards."""
    for text, _, _, changed, good in run(processes, _nonfinite, 2, "raise", seed):
        assert "micro-batch 2" in text
        assert "on_nonfinite" in text
        assert not any(changed.values())
        assert good == good


@PLACES
def test_nan_in_one_micro_batch_skips_the_step_on_all_ranks(processes: bool, seed: int) -> None:
    for text, loss, grads, changed, good in run(processes, _nonfinite, 2, "skip", seed):
        assert text == ""
        assert loss != loss
        assert all(grad is None for grad in grads.values())
        assert not any(changed.values())
        assert good == good


@PLACES
def test_nan_in_one_micro_batch_is_let_through_on_request(processes: bool, seed: int) -> None:
    for text, loss, grads, changed, good in run(processes, _nonfinite, 2, "ignore", seed):
        assert text == ""
        assert loss != loss
        assert all(grad.isnan().any() for grad in grads.values())
        assert all(changed.values())
        assert good != good  # the weights are NaN now


def _nan_gradient(ranks: int, policy: str) -> tuple[str, list[bool]]:
    """The loss is finite, the gradient is not: sqrt at 0."""
    model = make_seeded(_classifier, 0)
    loss_fn = lambda output, target: (output * 0).sum(1).sqrt().mean()  # noqa: E731
    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=2, ranks=ranks, on_nonfinite=policy) as pipe:
        pipe.train_step(_x(), _targets())
        try:
            pipe.clip_grad_norm_(1.0)
        except pk.NumericsError as error:
            return str(error), []
        return "", [p.grad is None for p in pipe.parameters()]


@PLACES
def test_gradient_that_is_not_finite_is_seen_by_the_norm(processes: bool) -> None:
    """Every rank raises, naming a parameter, or drops its gradients."""
    assert all("gradient of 0.weight" in text for text, _ in run(processes, _nan_gradient, 2, "raise"))
    assert all(all(dropped) for _, dropped in run(processes, _nan_gradient, 2, "skip"))
