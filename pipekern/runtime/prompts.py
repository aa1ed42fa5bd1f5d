"""Prompts: read and checked, put into groups of one length, and joined with their new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from pipekern.errors import ConfigError
from pipekern.runtime.sampling import Sampling, is_whole

Ids = TypeVar("Ids", torch.Tensor, list[torch.Tensor])


def read(ids: object) -> list[torch.Tensor]:
    """Each prompt, int64, 1-d, on the CPU. Raises ``ConfigError`` for what is no list of prompts, or an empty one."""
    if isinstance(ids, torch.Tensor) and ids.ndim != 2:
        raise ConfigError(f"ids has shape {tuple(ids.shape)}; give (prompts, length), or a list of 1-d tensors")
    if not isinstance(ids, torch.Tensor | list):
        raise ConfigError(f"ids is a {type(ids).__name__}; give a tensor (prompts, length), or a list of 1-d tensors")
    if len(ids) == 0:
        raise ConfigError("ids has no prompts; give at least one")
    for index, prompt in enumerate(ids):
        if not isinstance(prompt, torch.Tensor) or prompt.ndim != 1:
            what = f"shape {tuple(prompt.shape)}" if isinstance(prompt, torch.Tensor) else type(prompt).__name__
            raise ConfigError(f"prompt {index} of ids is a {what}; give a list of 1-d tensors, one a prompt")
        if prompt.dtype != torch.int64:
            raise ConfigError(f"prompt {index} of ids has dtype {prompt.dtype}; tokens are torch.int64: use .long()")
        if len(prompt) == 0:
            raise ConfigError(f"prompt {index} of ids is empty; a model needs at least one token to go on from")
    return [prompt.detach().cpu() for prompt in ids]


def divide(lengths: Sequence[int], wanted: int) -> list[list[int]]:
    """The prompts of each group: all of one length, ``wanted`` groups or more, as far as there are prompts.

    Prompts of different lengths are never together, so that no padding is needed, which a model might see. The largest
    group is halved until there are enough, so that as many follow each other as there are ranks.
    """
    same: dict[int, list[int]] = {}
    for prompt, length in enumerate(lengths):
        same.setdefault(length, []).append(prompt)
    groups = list(same.values())
    while len(groups) < min(wanted, len(lengths)):
        largest = max(groups, key=len)
        half = (len(largest) + 1) // 2
        place = groups.index(largest)
        groups[place : place + 1] = [largest[:half], largest[half:]]
    return groups


def prepare(ids: object, new: object, sampling: Sampling, end: object, ranks: int) -> list[Group]:
    """Everything checked, and the prompts in groups: at least ``ranks`` where there are so many prompts.

    ``new``: the most new tokens a prompt; ``end``: the token that ends one, or None. Raises ``ConfigError``.
    """
    if not is_whole(new) or new < 1:
        raise ConfigError(f"max_new_tokens={new!r}; a whole number of at least 1")
    if end is not None and (not is_whole(end) or end < 0):
        raise ConfigError(f"eos_token_id={end!r}; the number of a token, or None to go on to max_new_tokens")
    sampling.check()
    prompts = read(ids)
    groups = divide([len(prompt) for prompt in prompts], ranks)
    return [Group(i, group, [prompts[p] for p in group], new, end) for i, group in enumerate(groups)]


class Group:
    """Prompts of one length that go through the stages together, with their new tokens.

    ``tokens`` (prompts, ``capacity``), int64: the first ``length`` columns are known. ``end`` is the token that ends a
    prompt, or -1; after it a row is filled with it until the whole group has ended.
    """

    def __init__(self, index: int, prompts: Sequence[int], rows: Sequence[torch.Tensor], new: int, end: int | None):
        self.index, self.prompts = index, list(prompts)
        self.given = self.length = len(rows[0])
        self.capacity = self.given + new
        self.tokens = torch.zeros(len(rows), self.capacity, dtype=torch.int64)
        self.tokens[:, : self.given] = torch.stack(list(rows))
        self.end = -1 if end is None else end
        self._lengths = [self.capacity] * len(rows)
        self.finished = False

    @property
    def new(self) -> int:
        """New tokens a prompt, so far."""
        return self.length - self.given

    def add(self, tokens: torch.Tensor) -> None:
        """The next token of each prompt, (prompts,), int64."""
        for row, token in enumerate(tokens.tolist()):
            if self._lengths[row] <= self.length:
                token = self.end
            elif token == self.end:
                self._lengths[row] = self.length + 1
            self.tokens[row, self.length] = token
        self.length += 1
        self.finished = max(self._lengths) <= self.length

    def texts(self) -> dict[int, torch.Tensor]:
        """Each prompt with its new tokens, its end included, by its place in the user's list."""
        return {p: row[:n].clone() for p, row, n in zip(self.prompts, self.tokens, self._lengths, strict=True)}


def join(groups: Sequence[Group], like: Ids, end: int | None) -> Ids:
    """All texts in the user's order: a list where ``like`` is one, else a tensor, filled up with ``end``."""
    by_prompt = {prompt: text for group in groups for prompt, text in group.texts().items()}
    texts = [by_prompt[prompt] for prompt in range(len(by_prompt))]
    if not isinstance(like, torch.Tensor):
        return texts
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0 if end is None else end)
