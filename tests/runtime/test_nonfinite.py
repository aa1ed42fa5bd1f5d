"""Steps that are not finite: every rank agrees before the optimizer does anything, and knows where it arose."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from pipekern.runtime.nonfinite import finite
from tests.runtime.breaking import BACKWARD, FORWARD, MICROBATCHES, WIDTH, Case, loss_fn, net
from tests.runtime.parity import same_bits
from tests.runtime.step import PLACES, chunks, gradients, make_seeded, run

SCHEDULES = pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
RANKS = 2


def _cases(stages: int) -> list[Case]:
    """Each kind at each stage, the micro-batches in turn; a weight breaks every micro-batch."""
    kinds = [(kind, stage) for kind in ("forward", "backward") for stage in range(stages)]
    kinds += [("x", 0), ("y", stages - 1), ("good", 0)]
    cases = [Case(kind, stage, (3 * i + 1) % MICROBATCHES) for i, (kind, stage) in enumerate(kinds)]
    return [*cases, *(Case("weight", stage, 0) for stage in range(stages)), Case("good", 0, 0)]


class Seen(NamedTuple):
    """What a process has seen of one case."""

    text: str
    loss: float
    gradients: dict[str, Any]


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _try_all(ranks: int, schedule: str, policy: str, seed: int, stages: int) -> list[Seen]:
    """All cases, one after the other, in one pipeline."""
    options: dict[str, Any] = {"schedule": schedule, "on_nonfinite": policy, "microbatches": MICROBATCHES}
    seen = []
    model = make_seeded(lambda: net(stages), seed)
    with pk.Pipeline(model, loss_fn=loss_fn, ranks=ranks, timeout=20.0, **options) as pipe:
        for case in _cases(stages):
            seen.append(_try(pipe, case))
    return seen


def _try(pipe: pk.Pipeline, case: Case) -> Seen:
    log, loss, text = Log(), torch.tensor(0.0), ""
    logging.getLogger("pipekern").addHandler(log)
    kept = {name: p.detach().clone() for name, p in pipe.named_parameters()}
    broken = dict(pipe.named_parameters()).get(f"{case.where}.inner.weight") if case.kind == "weight" else None
    if broken is not None:
        broken.data[1, 2] = math.inf
    for parameter in pipe.parameters():
        parameter.grad = None
    try:
        loss = pipe.train_step(*case.batch())
    except pk.NumericsError as error:
        text = str(error)
    finally:
        logging.getLogger("pipekern").removeHandler(log)
    for name, parameter in pipe.named_parameters():
        parameter.data.copy_(kept[name])
    return Seen(text or "".join(log.texts), loss.item(), gradients(pipe))


def test_golden() -> None:
    """A NaN in the second of two micro-batches."""
    x, y = torch.tensor([[1.0], [math.nan]]), torch.zeros(2, 1)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with (
        pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=2) as pipe,
        pytest.raises(pk.NumericsError) as seen,
    ):
        pipe.train_step(x, y)
    assert str(seen.value) == (
        "step 0 is not finite (loss nan), first at micro-batch 1: the output of stage 0 (rank 0) is not finite, for x "
        "is not; look at that data, lower the learning rate, or set on_nonfinite='skip'"
    )


@PLACES
@SCHEDULES
@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_every_stage_forward_and_backward(processes: bool, schedule: str, policy: str, seed: int) -> None:
    """All ranks say the same and name the place; with "skip" no gradient is left, with "ignore" it is not finite."""
    home = pk.schedule.build(schedule, ranks=RANKS, microbatches=MICROBATCHES).stage_rank
    columns = run(processes, _try_all, RANKS, schedule, policy, seed, RANKS * chunks(schedule))
    for case, *ranks in zip(_cases(len(home)), *columns, strict=True):
        grads = [grad for one in ranks for grad in one.gradients.values()]
        sound = [grad is not None and bool(grad.isfinite().all()) for grad in grads]
        assert len({one.text for one in ranks}) == 1, ranks
        if case.kind == "good" or policy == "ignore":
            assert ranks[0].text == ""
            assert (all(sound) and math.isfinite(ranks[0].loss)) == (case.kind == "good"), case
        else:
            assert case.text(list(home)) in ranks[0].text, (case, ranks[0].text)
            assert ("dropped" in ranks[0].text) == (policy == "skip")
            assert all(grad is None for grad in grads) == (policy == "skip"), case


def test_the_first_micro_batch_is_named_of_several(seed: int) -> None:
    """In the order of the unsplit model: micro-batches before stages, forwards before backwards."""
    x, y = Case("good", 0, 0).batch()
    x[[2, 4, 6], 0] = torch.tensor([BACKWARD + 3.0, FORWARD + 1.0, FORWARD + 0.0], dtype=x.dtype)
    model = make_seeded(lambda: net(4), seed)
    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=4, ranks=2, schedule="zb-v") as pipe:
        with pytest.raises(pk.NumericsError, match="micro-batch 2: the output of stage 1 "):
            pipe.train_step(x, y)
        x[[4, 6], 0] = BACKWARD + torch.tensor([1.0, 3.0], dtype=x.dtype)
        with pytest.raises(pk.NumericsError, match="micro-batch 1: the gradient of its input at stage 3 "):
            pipe.train_step(x, y)


def test_a_parameter_that_breaks_the_backward_alone() -> None:
    """An infinity that a bounded function hides."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.zero_(), first.bias.fill_(1.0), second.weight.fill_(math.inf)
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 2, "ranks": 2, "split": [1, 2]}
    text = r"the gradient of its input at stage 1 \(rank 1\) .* for the parameter 1.weight is not;"
    pipe = pk.Pipeline(nn.Sequential(first, second, nn.Tanh()), **options)
    with pipe, pytest.raises(pk.NumericsError, match=text):
        pipe.train_step(torch.ones(2, 2), torch.zeros(2, 2))


def _accumulate(ranks: int, policy: str, seed: int) -> list[dict[str, Any]]:
    """Gradients after a good step, after a bad one, and after a good one again; all without zero_grad."""
    model = make_seeded(lambda: net(2), seed)
    torch.manual_seed(seed)
    with pk.Pipeline(
        model, loss_fn=loss_fn, microbatches=4, ranks=ranks, on_nonfinite=policy, schedule="zb-h1"
    ) as pipe:
        rows = []
        for case in (Case("good", 0, 0), Case("backward", 1, 2), Case("good", 0, 0)):
            pipe.train_step(*case.batch())
            rows.append(gradients(pipe))
        return rows


@PLACES
def test_skip_drops_the_gradients_of_that_step_alone(processes: bool, seed: int) -> None:
    for first, second, third in run(processes, _accumulate, 2, "skip", seed):
        assert same_bits(first, second)
        assert all(grad.isfinite().all() and not torch.equal(grad, first[name]) for name, grad in third.items())


class Noisy(nn.Module):
    """Counts its forwards; batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.calls = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(self.norm(self.inner(x)), 0.3)


def _noisy() -> nn.Sequential:
    return nn.Sequential(Noisy(), Noisy())


def _two_steps(policy: str, seed: int, bad: bool) -> tuple[Any, ...]:
    model = make_seeded(_noisy, seed)
    torch.manual_seed(seed)
    x, y = torch.randn(8, WIDTH, dtype=torch.float64), torch.randn(8, WIDTH, dtype=torch.float64)
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=4, ranks=2, on_nonfinite=policy, seed=seed) as pipe:
        pipe.train_step(x, torch.where(y > 0, math.nan, y) if bad else y)
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        for parameter in pipe.parameters():
            parameter.grad = None
        loss = pipe.train_step(x, y)
        return state, loss, gradients(pipe), torch.get_rng_state(), tuple(layer.calls for layer in model.children())


def test_looking_for_the_place_changes_nothing_else(seed: int) -> None:
    """Buffers count each micro-batch once, later steps draw the same numbers; a good step runs once."""
    *skipped, calls = _two_steps("skip", seed, bad=True)
    *ignored, once = _two_steps("ignore", seed, bad=True)
    assert same_bits(tuple(skipped), tuple(ignored))
    assert (calls, once, _two_steps("raise", seed, bad=False)[-1]) == ((12, 12), (8, 8), (8, 8))


def test_a_batch_that_requires_a_gradient_gets_it_once(seed: int) -> None:
    grads = []
    for policy in ("skip", "ignore"):
        torch.manual_seed(seed)
        x, y = Case("y", 0, 2).batch()
        x.requires_grad_()
        model = make_seeded(lambda: net(2), seed)
        with pk.Pipeline(model, loss_fn=loss_fn, microbatches=4, ranks=2, on_nonfinite=policy) as pipe:
            pipe.train_step(x, y)
        assert x.grad is not None
        grads.append(x.grad.nan_to_num())
    assert torch.equal(*grads) and grads[0].any()


class Masked(nn.Module):
    """Hands on an attention mask of infinities, which is no fault."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), torch.full((3, WIDTH), -math.inf).tril().double()


class Attend(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        h, mask = pair
        return (h[:, None] + mask).logsumexp(-1).sqrt()


def test_an_infinite_mask_is_no_fault(seed: int) -> None:
    model = make_seeded(lambda: nn.Sequential(Masked(), Attend()), seed)
    pipe = pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=2)
    with pipe, pytest.raises(pk.NumericsError, match=r"micro-batch 0: the loss of stage 1 \(rank 1\) is not finite;"):
        pipe.train_step(torch.randn(4, WIDTH, dtype=torch.float64) - 99, torch.zeros(4, 3, dtype=torch.float64))


def _count_nothing(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return (output * 0).sum(), 0


def test_a_loss_that_counts_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pipe = pk.Pipeline(model, loss_fn=_count_nothing, microbatches=2, ranks=2)
    with pipe, pytest.raises(pk.NumericsError, match=r"loss nan.*does not show.*nothing was counted"):
        pipe.train_step(torch.randn(2, 2), torch.randn(2, 2))


def _poisoned(ranks: int, policy: str) -> tuple[str, float, list[bool]]:
    """A gradient that goes bad between step and clipping, as a sum of steps may."""
    model = make_seeded(lambda: net(2), 0)
    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=4, ranks=ranks, on_nonfinite=policy) as pipe:
        pipe.train_step(*Case("good", 0, 0).batch())
        grad = dict(pipe.named_parameters()).get("0.inner.bias", nn.Parameter(torch.zeros(2))).grad
        if grad is not None:
            grad[0] = math.inf
        try:
            norm = pipe.clip_grad_norm_(1.0).item()
        except pk.NumericsError as error:
            return str(error), 0.0, []
        return "", norm, [p.grad is None for p in pipe.parameters()]


@PLACES
def test_a_norm_that_is_not_finite(processes: bool) -> None:
    """Every rank raises, naming a parameter, or drops its gradients, or goes on."""
    assert all("gradient of 0.inner.bias" in text for text, _, _ in run(processes, _poisoned, 2, "raise"))
    assert all(norm == math.inf and all(gone) for _, norm, gone in run(processes, _poisoned, 2, "skip"))
    assert all(norm == math.inf and not any(gone) for _, norm, gone in run(processes, _poisoned, 2, "ignore"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_one_entry_is_enough(bad: float, dtype: torch.dtype, seed: int) -> None:
    values = [torch.randn(5).to(dtype), torch.zeros(0, dtype=dtype), torch.full((2, 300), 6e4).to(dtype)]
    values.append(torch.eye(3).to_sparse())
    assert finite(values)
    assert finite([])
    for index in (0, 2):
        one = copy.deepcopy(values)
        one[index].view(-1)[int(torch.randint(5, ()))] = bad
        assert not finite(one)
    assert not finite([*values, (torch.eye(3) * bad).to_sparse()])


def test_finite_numbers_whose_sum_overflows() -> None:
    assert finite([torch.full((100,), 3e38), torch.full((100,), 1e308, dtype=torch.float64)])


@pytest.mark.parametrize(("policy", "precision"), [("skip", None), ("raise", "fp16")])
def test_running_statistics_outlive_a_step_that_is_left_out(policy: str, precision: str | None, seed: int) -> None:
    """A step whose forward is not finite would leave them so for ever."""
    torch.manual_seed(seed)
    norm: Any = nn.BatchNorm1d(WIDTH)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, WIDTH))
    x, y = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    options: dict[str, Any] = {"on_nonfinite": policy, "precision": precision}
    with pk.Pipeline(net, loss_fn=F.mse_loss, microbatches=2, ranks=2, **options) as pipe:
        pipe.train_step(x, y)
        before = norm.running_mean.clone(), norm.running_var.clone()
        pipe.train_step(torch.full_like(x, math.inf), y)
        assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
        assert pipe.train_step(x, y).isfinite()
