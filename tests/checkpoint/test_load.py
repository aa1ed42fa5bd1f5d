"""What was saved comes back bit for bit, and what was damaged is named."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pipekern as pk
from pipekern.checkpoint.load import Checkpoint
from pipekern.checkpoint.manifest import DTYPES, NAME
from pipekern.checkpoint.save import save
from tests.checkpoint.sample import state, write


def test_golden_round_trip(tmp_path: Path) -> None:
    tensors = {"model/weight": torch.tensor([[1.5, -0.0], [float("nan"), 2.0]]), "step": torch.tensor(7)}
    save(tmp_path, [("one", lambda: tensors)], lambda: {"epoch": 2})
    checkpoint = Checkpoint(str(tmp_path))
    checkpoint.verify()
    assert checkpoint.values == [{"epoch": 2}]
    assert {key: str(entry) for key, entry in checkpoint.entries.items()} == {
        "model/weight": "float32 [2, 2]",
        "step": "int64 []",
    }
    assert checkpoint.tensor("model/weight").view(torch.int32).equal(tensors["model/weight"].view(torch.int32))
    assert checkpoint.tensor("step").item() == 7


@st.composite
def trees(draw: st.DrawFn) -> dict[str, dict[str, Tensor]]:
    """Files of tensors of every dtype, in any layout, with random bits: NaNs of every kind among them."""
    files: dict[str, dict[str, Tensor]] = {}
    keys = draw(st.lists(st.text(min_size=1, max_size=20), unique=True, max_size=8))
    for key in keys:
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = int(torch.tensor(shape).prod()) if shape else 1
        limit = 2 if dtype is torch.bool else 256
        data = torch.randint(limit, (count * dtype.itemsize,), dtype=torch.uint8)
        tensor = data.view(dtype).reshape(shape)
        if draw(st.booleans()) and tensor.dim() > 1:
            tensor = tensor.transpose(0, 1)
        files.setdefault(draw(st.sampled_from("abc")), {})[key] = tensor
    return files


@settings(max_examples=40)
@given(trees())
def test_random_trees_come_back_bit_for_bit(files: dict[str, dict[str, Tensor]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(folder, [(stem, tensors.copy) for stem, tensors in files.items()], dict)
        checkpoint = Checkpoint(folder)
        checkpoint.verify()
        assert checkpoint.entries.keys() == {key for tensors in files.values() for key in tensors}
        for stem, tensors in files.items():
            for key, tensor in tensors.items():
                back = checkpoint.tensor(key)
                assert checkpoint.entries[key].file == f"{stem}.safetensors"
                assert back.dtype == tensor.dtype
                assert back.shape == tensor.shape
                assert _bytes(back) == _bytes(tensor)


def _bytes(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_where_nothing_was_saved(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(pk.CheckpointError, match="no save into it was ever finished"):
            Checkpoint(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _refused(folder: Path, damaged: Path) -> None:
    """The checkpoint is refused, and the damaged file is the only one that is named."""
    with pytest.raises(pk.CheckpointError) as refusal:
        Checkpoint(folder).verify()
    text = str(refusal.value)
    assert [path for path in [*_files(folder), damaged] if str(path) in text and path != damaged] == []
    assert str(damaged) in text or (damaged.name == NAME and NAME in text)


@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.full)])
def test_flipped_bits_and_truncations_in_every_file(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    write(folder, 1)
    for path in _files(folder):
        good = path.read_bytes()
        for _ in range(count):
            bit = random.randrange(8 * len(good))
            flipped = bytearray(good)
            flipped[bit // 8] ^= 1 << bit % 8
            for bad in (bytes(flipped), good[: random.randrange(len(good))], good + bytes(1)):
                path.write_bytes(bad)
                _refused(folder, path)
        path.unlink()
        _refused(folder, path)
        path.write_bytes(good)
    assert state(folder) == 1


def test_every_fault_is_listed(tmp_path: Path) -> None:
    """A missing file, a short one and one of other bytes, at once; and only files that are asked for."""
    write(tmp_path, 1)
    one, two, three = (path for path in _files(tmp_path) if path.name != NAME)
    one.unlink()
    two.write_bytes(two.read_bytes()[:-1])
    three.write_bytes(three.read_bytes()[:-1] + b"\x77")
    with pytest.raises(pk.CheckpointError) as refusal:
        Checkpoint(tmp_path).verify()
    text = str(refusal.value)
    assert f"{one} cannot be read: No such file" in text
    assert f"{two} has {two.stat().st_size} bytes, {two.stat().st_size + 1} were written" in text
    assert f"{three} holds other bytes" in text
    assert "restore these files, or load another checkpoint" in text
    with pytest.raises(pk.CheckpointError) as refusal:
        Checkpoint(tmp_path).verify(["0/1/1"])
    assert str(two) in str(refusal.value)
    assert str(one) not in str(refusal.value)


def test_a_checkpoint_can_be_moved(tmp_path: Path) -> None:
    write(tmp_path / "here", 3)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert state(tmp_path / "there") == 3
