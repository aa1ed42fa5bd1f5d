"""A pipeline whose loss takes the input of the last linear layer: the same gradients, and no logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import pipekern as pk
from pipekern.kernels.linear_cross_entropy import linear_cross_entropy
from pipekern.runtime import head_loss
from tests.runtime.step import PLACES, check

HIDDEN, CLASSES = 6, 37


def classifier(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES, bias))


class Sequences(nn.Module):
    """Logits (samples, classes, time), as nn.CrossEntropyLoss wants them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.head(h).transpose(1, 2)


def tied() -> Sequences:
    return Sequences(tied=True)


def batch(samples: int = 10, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """In four micro-batches of 3, 3, 2, 2 the second has nothing but ignored targets."""
    target = torch.randint(0, CLASSES, (samples,))
    target[3:6] = ignored
    return torch.randn(samples, 4, dtype=torch.float64), target


def test_golden() -> None:
    """One token, x = 1, two classes of weight 0: the loss is log 2, its gradients are −½ and ½."""
    head = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(head.weight)
    model = nn.Sequential(nn.Identity(), head)
    with pk.Pipeline(model, loss_fn=nn.CrossEntropyLoss(), microbatches=1, ranks=2, fuse_loss=True) as pipe:
        assert pipe.loss_path == "linear_cross_entropy over 1, 1 → 2"
        loss = pipe.train_step(torch.ones(1, 1), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.6931472)
    assert head.weight.grad is not None and head.weight.grad.tolist() == [[-0.5], [0.5]]


LOSSES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(ignore_index=2),
    nn.CrossEntropyLoss(label_smoothing=0.2),
    nn.CrossEntropyLoss(reduction="sum"),
    pk.nn.CrossEntropyLoss(label_smoothing=0.1),
]


@PLACES
@pytest.mark.parametrize("loss_fn", LOSSES, ids=str)
def test_as_the_unsplit_model(processes: bool, loss_fn: nn.CrossEntropyLoss, seed: int) -> None:
    """In float64 to 1e-12, with a bias."""
    check(classifier, loss_fn, *batch(ignored=loss_fn.ignore_index), processes=processes, seed=seed, fuse_loss=True)


@pytest.mark.parametrize("build", [Sequences, tied])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "dualpipev"])
def test_sequences(build: Any, schedule: str, seed: int) -> None:
    """Also with a head that is the embedding, on another stage."""
    tokens, target = (torch.randint(0, CLASSES, (8, 5)) for _ in range(2))
    target[0] = -100
    check(build, nn.CrossEntropyLoss(), tokens, target, processes=False, seed=seed, schedule=schedule, fuse_loss=True)


def test_probabilities_as_targets(seed: int) -> None:
    target = torch.rand(10, CLASSES, dtype=torch.float64).softmax(-1)
    check(classifier, nn.CrossEntropyLoss(), batch()[0], target, processes=False, seed=seed, fuse_loss=True)


class Widest(TorchFunctionMode):
    """The most values of any result in here."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("fuse_loss", [True, False])
def test_no_logits(fuse_loss: bool) -> None:
    """Nothing that the stage makes is as large as the logits of a micro-batch; turned off, they are there."""
    model, (x, target) = classifier().double(), batch(64)
    with pk.Pipeline(model, loss_fn=nn.CrossEntropyLoss(), microbatches=1, ranks=1, fuse_loss=fuse_loss) as pipe:
        assert pipe.loss_path.startswith("linear_cross_entropy" if fuse_loss else "logits")
        for step in (pipe.train_step, pipe.eval_step):
            with Widest() as seen:
                step(x, target)
            assert (seen.most < 64 * CLASSES) == fuse_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, seed: int) -> None:
    """float32 goes straight into ``.grad``; in both the largest error is at most three times torch's own."""
    exact, (x, target) = classifier().double(), batch(24)
    wanted = dict(exact.named_parameters())
    F.cross_entropy(exact(x), target).backward()
    errors = {}
    for fuse_loss in (True, False):
        model = copy.deepcopy(exact).to(dtype)
        model.zero_grad()
        with pk.Pipeline(model, loss_fn=nn.CrossEntropyLoss(), microbatches=3, ranks=2, fuse_loss=fuse_loss) as pipe:
            pipe.train_step(x.to(dtype), target)
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.dtype is dtype
            own = wanted[name].grad
            assert own is not None
            errors[fuse_loss, name] = float((p.grad.double() - own).abs().max() / own.abs().max())
    for name in wanted:
        assert errors[True, name] <= 3 * max(errors[False, name], torch.finfo(dtype).eps)


def test_gradients_add_up_and_repeat(seed: int) -> None:
    """Two steps give twice the gradient; the same bits again after clearing."""
    model, (x, target) = classifier().float(), batch()
    with pk.Pipeline(
        model, loss_fn=nn.CrossEntropyLoss(), microbatches=4, ranks=2, schedule="gpipe", fuse_loss=True
    ) as pipe:
        found = []
        for _ in range(2):
            pipe.parameters()
            model.zero_grad()
            pipe.train_step(x.float(), target)
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(map(torch.equal, *found))
        pipe.train_step(x.float(), target)
    for p, once in zip(model.parameters(), found[0], strict=True):
        torch.testing.assert_close(p.grad, 2 * once)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="needs torch with Tensor.grad_dtype")
def test_a_main_gradient_is_added_to_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient of a bfloat16 head in float32 has no memory of its own."""
    given = []

    def spy(*args: Any, **named: Any) -> Tensor:
        given.append(named["main_grad"])
        return linear_cross_entropy(*args, **named)

    monkeypatch.setattr(head_loss, "linear_cross_entropy", spy)
    head = pk.nn.Linear(HIDDEN, CLASSES, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(4, HIDDEN, dtype=torch.bfloat16), nn.Tanh(), head)
    x, target = batch()
    with pk.Pipeline(model, loss_fn=nn.CrossEntropyLoss(), microbatches=2, ranks=2, fuse_loss=True) as pipe:
        pipe.train_step(x.bfloat16(), target)
    assert head.weight.grad is not None and head.weight.grad.dtype is torch.float32
    assert [one is head.weight.grad for one in given] == [True, True]


@pytest.mark.parametrize(
    ("model", "loss_fn", "why"),
    [
        (classifier(), nn.CrossEntropyLoss(weight=torch.ones(CLASSES)), "class weights"),
        (classifier(), F.cross_entropy, "no nn.CrossEntropyLoss"),
        (classifier().append(nn.Tanh()), nn.CrossEntropyLoss(), "is a Tanh"),
    ],
    ids=["weights", "function", "tanh"],
)
def test_reasons(model: nn.Module, loss_fn: Any, why: str) -> None:
    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=1, ranks=2, fuse_loss=True) as pipe:
        assert pipe.loss_path.startswith("logits of every micro-batch: ") and why in pipe.loss_path


def test_outputs_are_the_logits(seed: int) -> None:
    model, (x, _) = classifier().double(), batch()
    with pk.Pipeline(model, loss_fn=nn.CrossEntropyLoss(), microbatches=2, ranks=2, fuse_loss=True) as pipe:
        torch.testing.assert_close(pipe.eval_step(x), model(x), rtol=1e-12, atol=1e-12)
