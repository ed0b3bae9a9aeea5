"""The comparison itself: failures become rows, what does not apply gets none, and ours runs in it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers, static_int8
from benchmarks.peers import CONTESTANTS, OURS, NotApplicable, Peer, Task


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


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("model", list(static_int8.RACES))
def test_ours_takes_part(model: str) -> None:
    race = static_int8.RACES[model]()
    (row,) = static_int8.measure(race, [OURS], rounds=1)
    assert set(row.ms) == set(race.timed), row.note
