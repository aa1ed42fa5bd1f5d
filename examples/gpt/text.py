"""Text to tokens: reads files, trains a byte-pair encoding on them, keeps a part out of training."""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MOST = 16_000_000  # characters: more than a run of minutes can read
HELD_OUT = 20  # one piece of so many
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings"}


@dataclass(frozen=True)
class Text:
    """A tokenised text: int64 tokens to train on, and those held out."""

    tokenizer: Tokenizer
    train: torch.Tensor
    heldout: torch.Tensor

    def batch(self, samples: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows of the training part: inputs and targets, (samples, length) each."""
        starts = torch.randint(len(self.train) - length, (samples,), generator=generator)
        return _windows(self.train, starts, length)

    def heldout_batch(self, samples: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Evenly spaced windows of the held-out part, always the same."""
        starts = torch.linspace(0, len(self.heldout) - length - 1, samples).long()
        return _windows(self.heldout, starts, length)


def _windows(tokens: torch.Tensor, starts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = tokens[starts[:, None] + torch.arange(length + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def load(data: str, cache: Path, vocabulary: int, length: int) -> Text:
    """The text at ``data`` (a file, a folder, or "" for Python's standard library); ``cache`` keeps its tokens.

    Raises ``FileNotFoundError``, or ``ValueError`` for a text that is too short for windows of ``length`` tokens.
    """
    pieces = cut(list(documents(data)))
    digest = hashlib.sha256(f"{vocabulary}\n".encode() + "\0".join(pieces).encode()).hexdigest()[:16]
    folder = cache / f"text-{digest}"
    if not folder.exists():
        _tokenise(pieces, vocabulary, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = load_file(folder / "tokens.safetensors")
    text = Text(tokenizer, tokens["train"].long(), tokens["heldout"].long())
    if len(text.heldout) <= length:
        raise ValueError(
            f"{data}: {len(text.train)} tokens to train on and {len(text.heldout)} held out, and each part needs "
            f"more than {length}; give more text"
        )
    return text


def documents(data: str) -> Iterator[str]:
    """The texts of ``data`` in the order of their names, 16 million characters at most; only files in UTF-8."""
    if data and not Path(data).exists():
        raise FileNotFoundError(f"DATA={data}: there is no such file or folder")
    left = MOST
    for path in _files(data):
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(left)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            continue
        yield text
        left -= len(text)
        if left <= 0:
            return


def _files(data: str) -> list[Path]:
    if not data:
        root = Path(sysconfig.get_path("stdlib"))
        return sorted(p for p in root.rglob("*.py") if not _NOT_PROSE & set(p.relative_to(root).parts))
    root = Path(data)
    if root.is_file():
        return [root]
    return sorted(
        p for p in root.rglob("*") if p.is_file() and not any(part[0] == "." for part in p.relative_to(root).parts)
    )


def cut(texts: Sequence[str]) -> list[str]:
    """The pieces that are trained on or held out whole: the documents, or equal parts where there are few."""
    if len(texts) >= HELD_OUT:
        return list(texts)
    whole = "\n".join(texts)
    size = max(1, -(-len(whole) // HELD_OUT))
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def parts(pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is trained on, and every 20th piece, which is held out."""
    kept = [piece for i, piece in enumerate(pieces) if i % HELD_OUT != HELD_OUT // 2]
    return kept, list(pieces[HELD_OUT // 2 :: HELD_OUT])


def _tokenise(pieces: Sequence[str], vocabulary: int, folder: Path) -> None:
    """Fill ``folder`` in one step: it is there whole or not at all."""
    kept, heldout = parts(pieces)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        kept, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    tokens = {"train": _encode(tokenizer, kept), "heldout": _encode(tokenizer, heldout)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        staged = Path(scratch, "text")
        staged.mkdir()
        tokenizer.save(str(staged / "tokenizer.json"))
        save_file(tokens, staged / "tokens.safetensors")
        os.replace(staged, folder)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """int32 tokens of all texts, one after the other."""
    return torch.tensor([token for row in tokenizer.encode_batch(texts) for token in row.ids], dtype=torch.int32)
