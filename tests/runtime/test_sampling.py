"""The next token: the largest, or drawn with the probabilities that were asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pipekern as pk
from pipekern.runtime.sampling import Sampling

DRAWS = 20_000


def test_golden() -> None:
    """The most likely token without a temperature, the first of equal ones; and with one where it is sure."""
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 4.0]])
    assert Sampling(0.0, None, None, 0).pick(logits, [0, 1], 0).tolist() == [1, 0]
    sure = torch.tensor([[0.0, 0.0, 1000.0]])
    assert Sampling(1.0, None, None, 0).pick(sure, [0], 0).tolist() == [2]
    assert Sampling(9.0, 1, None, 0).pick(logits, [0, 1], 0).tolist() == [1, 0]
    assert Sampling(9.0, None, 1e-9, 0).pick(logits, [0, 1], 0).tolist() == [1, 0]


def _wanted(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities, token by token."""
    chances = (logits.double() / sampling.temperature).softmax(-1)
    order = sorted(range(len(chances)), key=lambda token: -float(chances[token]))
    kept = order[: sampling.top_k]
    total, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        total += float(chances[token])
        if total >= (sampling.top_p or 1.0) * float(chances[kept].sum()):
            break
    wanted = torch.zeros_like(chances)
    wanted[nucleus] = chances[nucleus] / chances[nucleus].sum()
    return wanted


@pytest.mark.parametrize("top_p", [None, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 99])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies(temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """Within six standard deviations; a token that is cut off never comes."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    logits = torch.randn(7)
    logits[3] = -math.inf
    drawn = sampling.pick(logits.expand(DRAWS, 7), range(DRAWS), 5)
    wanted = _wanted(logits, sampling)
    counts = drawn.bincount(minlength=7).double() / DRAWS
    assert ((counts - wanted).abs() <= 6 * (wanted * (1 - wanted) / DRAWS).sqrt() + 1e-12).all(), (counts, wanted)


def test_a_draw_depends_on_seed_prompt_and_number_alone(seed: int) -> None:
    logits, sampling = torch.zeros(6, 1000), Sampling(1.0, None, None, seed)
    whole = sampling.pick(logits, range(6), 3)
    assert torch.equal(torch.cat([sampling.pick(logits[:2], [4, 1], 3)]), whole[[4, 1]])
    assert not torch.equal(sampling.pick(logits, range(6), 4), whole)
    assert not torch.equal(Sampling(1.0, None, None, seed + 1).pick(logits, range(6), 3), whole)
    assert len(set(whole.tolist())) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(temperature: float, value: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(pk.NumericsError, match=f"prompt 7 at its new token 2 is {value}"):
        Sampling(temperature, None, None, 0).pick(logits, [5, 7, 8], 2)
    with pytest.raises(pk.NumericsError, match="prompt 9 at its new token 0 is -inf"):
        Sampling(temperature, None, None, 0).pick(torch.full((1, 4), -math.inf), [9], 0)
