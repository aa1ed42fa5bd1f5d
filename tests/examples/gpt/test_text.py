"""Text of the training example: which files, which part is held out, what the cache holds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from examples.gpt.text import HELD_OUT, Text, cut, documents, load, parts


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["grad", "stage", "send", "receive", "batch", "é"]) for _ in range(count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "b" / "c.txt").write_text("second")
    (folder / "d.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "e.bin").write_bytes(b"with\0zero")
    (folder / ".hidden").write_text("never")
    return folder


def test_a_folder_gives_its_text_files_in_the_order_of_their_names(folder: Path) -> None:
    assert list(documents(str(folder))) == ["first", "second"]


def test_a_file_is_one_document(folder: Path) -> None:
    assert list(documents(str(folder / "a.txt"))) == ["first"]


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    texts = list(documents(""))
    assert len(texts) > 100
    assert any("class OrderedDict" in text for text in texts)
    assert texts == list(documents(""))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        list(documents(str(tmp_path / "missing")))


@pytest.mark.parametrize("count", [1, 2, HELD_OUT - 1, HELD_OUT, 57])
def test_every_piece_is_either_trained_on_or_held_out(count: int) -> None:
    texts = [words(i, 50 + i) for i in range(count)]
    pieces = cut(texts)
    assert "".join(pieces) == ("" if count >= HELD_OUT else "\n").join(texts)
    kept, heldout = parts(pieces)
    assert sorted([*kept, *heldout]) == sorted(pieces)
    assert len(heldout) == (len(pieces) + HELD_OUT // 2 - 1) // HELD_OUT
    assert heldout


def test_tokens_decode_to_the_text_and_come_from_the_cache_the_second_time(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text(words(0, 4000))
    text = load(str(source), tmp_path / "cache", vocabulary=300, length=16)
    assert text.tokenizer.decode(text.train.tolist()) == "".join(parts(cut([source.read_text()]))[0])
    (written,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    again = load(str(source), tmp_path / "cache", vocabulary=300, length=16)
    assert torch.equal(again.train, text.train)
    assert before == {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    source.write_text(words(1, 4000))
    load(str(source), tmp_path / "cache", vocabulary=300, length=16)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("only a few words")
    with pytest.raises(ValueError, match="give more text"):
        load(str(source), tmp_path / "cache", vocabulary=300, length=128)


def test_windows_stay_inside_and_targets_are_the_next_tokens() -> None:
    text = Text(None, torch.arange(50), torch.arange(100, 140))  # type: ignore[arg-type]
    x, y = text.batch(200, 16, torch.Generator().manual_seed(1))
    assert x.shape == y.shape == (200, 16)
    assert torch.equal(x + 1, y)
    assert int(x.min()) == 0 and int(y.max()) == 49  # 200 draws of 34 starts: both ends come up
    x, y = text.heldout_batch(3, 16)
    assert x[:, 0].tolist() == [100, 111, 123]
    assert int(y.max()) == 139
