"""From logits to the next token: the largest, or a drawn one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TypeGuard

import torch

from pipekern.errors import ConfigError, NumericsError
from pipekern.stage.random import mix


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: ``temperature`` 0 takes the largest logit, the first of equal ones.

    Above 0 a token is drawn from softmax(logits / temperature), cut to the ``top_k`` most likely tokens and to the
    fewest of them whose probabilities sum to ``top_p`` (Holtzman et al., arXiv 1904.09751). The random number of a
    token is a hash of (seed, prompt, number of the token), so that it does not depend on who draws it, or when.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int

    def check(self) -> None:
        """Raise ``ConfigError`` for what is out of range."""
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature!r}; give 0 for the most likely token each time, or a finite number "
                "above 0 to draw"
            )
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise ConfigError(f"top_k={self.top_k!r}; a whole number of at least 1, or None for all tokens")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ConfigError(f"top_p={self.top_p!r}; a probability above 0 and at most 1, or None for all tokens")
        if not is_whole(self.seed):
            raise ConfigError(f"seed={self.seed!r}; give a whole number")
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.temperature == 0:
                raise ConfigError(f"{name}={value} with temperature=0, which draws nothing; set temperature above 0")

    def numbers(self) -> list[float]:
        """The four options, None as -1: what ranks compare."""
        return [-1.0 if value is None else float(value) for value in astuple(self)]

    def pick(self, logits: torch.Tensor, prompts: Sequence[int], number: int) -> torch.Tensor:
        """The next token of each row of ``logits`` (prompts, vocabulary): (prompts,), int64, on the CPU.

        ``prompts`` are the rows' places in the user's list, ``number`` counts new tokens from 0. Raises
        ``NumericsError`` for logits that are NaN or plus infinity, or all minus infinity.
        """
        self._refuse_nonfinite(logits, prompts, number)
        if self.temperature == 0:
            return logits.argmax(-1).cpu()
        ordered, tokens = (logits.double() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered, tokens = ordered[:, : self.top_k], tokens[:, : self.top_k]
        probabilities = ordered.softmax(-1)
        if self.top_p is not None:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        sums = probabilities.cumsum(-1)
        uniform = [(mix(self.seed, 4, prompt, number) >> 10) * 2.0**-53 for prompt in prompts]
        drawn = torch.tensor(uniform, dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
        place = (sums <= drawn).sum(-1, keepdim=True)  # rounding: a product may be as large as the sum itself
        last = (probabilities > 0).sum(-1, keepdim=True) - 1
        return tokens.gather(-1, place.minimum(last))[:, 0].cpu()

    def _refuse_nonfinite(self, logits: torch.Tensor, prompts: Sequence[int], number: int) -> None:
        largest = logits.max(-1).values  # NaN where one is NaN
        if not torch.isfinite(largest).all():
            row = int((~torch.isfinite(largest)).nonzero()[0])
            raise NumericsError(
                f"the largest logit of prompt {prompts[row]} at its new token {number} is {float(largest[row])}; look "
                "at that prompt and at the weights"
            )


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
