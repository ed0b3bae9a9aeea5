"""The comparison itself: failures become rows, what does not apply gets none, and ours runs in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers, static_int8
from benchmarks.peers import CONTESTANTS, OURS, NotApplicable, Peer, Task

ROOT = Path(__file__).resolve().parents[1]


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(task: Task) -> Peer:
        raise ValueError("\nno such operator\nand more")

    def elsewhere(task: Task) -> Peer:
        raise NotApplicable

    monkeypatch.setitem(CONTESTANTS, "broken", broken)
    monkeypatch.setitem(CONTESTANTS, "elsewhere", elsewhere)
    model, x = torch.nn.Linear(4, 2).eval(), torch.ones(1, 4)
    task = Task("toy", model, [(x,)], ("x",))
    race = static_int8.Race(task, {"batch 1": (x,)}, lambda run: ({"y": run(x)}, "1/1"), ("y",), "top-1")
    rows = static_int8.measure(race, ["torch fp32 eager", "broken", "elsewhere"], rounds=1, say=lambda text: None)
    assert [row.contestant for row in rows] == ["torch fp32 eager", "broken"]
    assert rows[0].sqnr_db == {"y": float("inf")} and rows[0].ms["batch 1"] > 0
    assert rows[1].note == "failed: ValueError: no such operator" and not rows[1].ms
    assert static_int8.table(race, rows).row_count == 2


def test_reason_is_one_short_line() -> None:
    assert peers.reason(ValueError()) == "ValueError: "
    assert len(peers.reason(ValueError("x" * 1000))) == 160


def test_options_are_chosen_on_calibration_data() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    task = Task("toy", model, [(torch.randn(8, 8),) for _ in range(4)], ("x",), quick=True)
    peer = CONTESTANTS["inc_graph, best options"](task)
    assert "best of 2 on held-out calibration data" in peer.note and "act_algo=" in peer.note
    assert peer.run(torch.randn(3, 8)).shape == (3, 4)


@pytest.mark.slow
@pytest.mark.real_model
def test_quick(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = ["benchmarks.static_int8", "--quick", "--model", "efficientnet", "--only", "eager", "best"]
    command += ["--json", str(rows)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    eager, best = json.loads(rows.read_text())["EfficientNet-Lite0"]
    assert eager["score"] == "17/20" and "49 conv2d" in best["note"]
    assert best["sqnr_db"]["logits"] >= 20


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("model", list(static_int8.RACES))
def test_ours_takes_part(model: str) -> None:
    race = static_int8.RACES[model]()
    (row,) = static_int8.measure(race, [OURS], rounds=1)
    assert set(row.ms) == set(race.timed), row.note
