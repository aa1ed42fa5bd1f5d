"""A whole run of the training example, a few steps long: what it prints and what it leaves behind."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from examples.gpt.model import GPT, Size
from examples.gpt.report import load_weights

ROOT = Path(__file__).parents[3]
KEYS = {
    "ranks",
    "schedule",
    "step_seconds",
    "simulated_step_seconds",
    "bubble_ratio",
    "tokens_per_second",
    "speedup_over_one_core",
    "loss_first",
    "loss_heldout",
    "verify_max_error",
}


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    places = ["--runs", str(folder / "runs"), "--cache", str(folder / "cache")]
    command = [*launcher, "-m", "examples.gpt.train", *places, *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100, check=False)


def test_a_short_run_leaves_everything(tmp_path: Path) -> None:
    done = train(
        tmp_path, "--data", argparse.__file__, "--steps", "3", "--rounds", "2", "--samples", "8", "--length", "32"
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    left = {path.name for path in run.iterdir()}
    assert {"loss.png", "timeline.png", "trace.json", "summary.json", "model.safetensors.index.json"} <= left
    assert not [name for name in left if name.endswith((".pt", ".pkl", ".bin"))]

    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert (summary["ranks"], summary["schedule"], summary["steps"]) == (2, "1f1b", 3)
    assert abs(summary["loss_first"] - math.log(vocabulary(run))) < 0.3
    assert summary["verify_max_error"] < 1e-5
    assert all(summary[key] > 0 for key in KEYS - {"schedule", "bubble_ratio", "verify_max_error"})
    assert {event["ph"] for event in json.loads((run / "trace.json").read_text())["traceEvents"]} >= {"X"}

    weights = load_weights(run)
    net = GPT(Size(vocabulary=vocabulary(run), length=32))
    assert weights.keys() == net.state_dict().keys()
    net.load_state_dict(weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
    for word in ("bubble", "simulated", "unsplit model", "held out", str(run)):
        assert word in done.stdout
    assert done.stdout.count("▸") == 3, "the title, and two texts"


def vocabulary(run: Path) -> int:
    return len(json.loads((run / "tokenizer.json").read_text())["model"]["vocab"])


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = train(tmp_path, "--data", str(tmp_path / "missing"))
    assert done.returncode != 0
    assert f"{tmp_path / 'missing'}: there is no such file or folder" in done.stderr
