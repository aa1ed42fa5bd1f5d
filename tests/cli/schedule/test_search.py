from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekern.cli import main
from pipekern.schedule import Costs, Schedule, search, torch_csv

pytest.importorskip("pipekern._C")

SIZES = ["schedule", "search", "--ranks", "4", "--microbatches", "8", "--memory", "3"]


def test_golden_output_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*SIZES, "--placement", "single"]) == 0
    out = capsys.readouterr().out
    best = search(4, 8, Costs(1, 1, 1), memory=3, placement="single")
    assert Schedule.parse(out).actions == best.actions
    assert "# makespan 31 µs" in out  # a bubble of 7, the optimum
    peaks = best.simulate(Costs(1, 1, 1)).peak_activations
    assert f"# peak activations a rank: {' '.join(map(str, peaks))}\n" in out
    assert f"# lower bound of the span {best.lower_bound:g} µs: this is {best.gap:.2%} above it" in out
    (tmp_path / "found.txt").write_text(out)
    assert main(["schedule", "check", str(tmp_path / "found.txt")]) == 0


def test_json_files_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("found.csv", "found.png")]
    costs = ["--forward", "18522", "--backward", "18086", "--weight", "9337", "--comm", "601", "--kept", "0.5"]
    arguments = ["-o", str(files[0]), "--plot", str(files[1]), "--objective", "makespan", "--json"]
    assert main([*SIZES, *costs, *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    best = search(4, 8, Costs(18522, 18086, 9337, comm=601, kept=0.5), memory=3, objective="makespan")
    assert (data["objective"], data["lower_bound"], data["gap"]) == ("makespan", best.lower_bound, best.gap)
    assert data["makespan"] == best.simulate(Costs(18522, 18086, 9337, comm=601)).makespan >= data["lower_bound"]
    assert max(data["peak_activations"]) <= 3
    assert data["actions"] == [[str(action) for action in row] for row in best.actions]
    assert torch_csv.loads(files[0].read_text()).actions == best.actions
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "search", "--ranks", "1", "--microbatches", "2"]) == 0
    assert "# lower bound of the span 6 µs: none is better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "0.5"], "memory=0.5 is below 1 activation"),
        (["--ranks", "0"], "ranks=0: there is no device"),
        (["--weight", "-1"], "weight=-1.0 is not a finite number"),
        (["--effort", "0"], "effort=0"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([*SIZES, *arguments]) == 2
    assert message in capsys.readouterr().err
