"""The report of a converted model: its table, its JSON form, its counts; and progress bars, which need a terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from inc_graph.quantization import StaticQuantConfig, convert, prepare, quantize
from inc_graph.report import OpLine, Report, attribute_bytes
from inc_graph.utils import progress
from tests.golden_check import check_golden


class Net(nn.Module):
    """Something for every kind of line: kernels, fused ones, the reference, and several reasons to stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.skip = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = self.skip(torch.relu(self.conv2(x) + x))
        x = self.norm(x).mean([2, 3])
        y = sum(head(x) for head in self.heads)
        return torch.softmax(torch.matmul(y, y.T), -1)


@pytest.fixture
def q() -> Any:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    fp32, int4 = StaticQuantConfig(w_dtype="fp32"), StaticQuantConfig(w_dtype="int4")
    config = StaticQuantConfig().set_local(r"heads\.[123]", fp32).set_local("heads.4", int4)
    return quantize(model, config, lambda m: m(x), example_inputs=x)


def test_the_table(q: Any) -> None:
    q.report.bytes_after = 1234  # what the packed weights take depends on the machine
    text = str(q.report)
    assert max(map(len, text.splitlines())) <= 120 and "\x1b" not in text
    check_golden("report/table.txt", text)


def test_the_table_of_layers() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    q = quantize(model, StaticQuantConfig(), lambda m: m(x))
    q.report.bytes_after = 1234
    check_golden("report/layers.txt", str(q.report))


def test_rich_prints_the_same_table_in_colour(q: Any) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard", legacy_windows=False)
    console.print(q.report)
    coloured = console.file.getvalue()  # type: ignore[attr-defined]
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert "\x1b[" in coloured and [s.rstrip() for s in plain.splitlines()] == str(q.report).splitlines()


def test_json(q: Any) -> None:
    data = json.loads(json.dumps(q.report.to_json()))
    assert set(data) == {
        "method", "backend", "kernels", "reference", "floats", "bytes_before", "bytes_after", "timings", "notes",
    }  # fmt: skip
    assert Report(
        **{**data, **{k: [OpLine(**x) for x in data[k]] for k in ("kernels", "reference", "floats")}}
    ).quantized
    assert {tuple(x) for x in data["kernels"]} == {("name", "module", "op", "detail")}


def test_counts_and_bytes(q: Any) -> None:
    report = q.report
    assert (report.count("conv2d"), report.count("linear"), report.count("softmax")) == (3, 1, 0)
    assert report.quantized == report.kernels + report.reference and len(report.reference) >= 1
    assert report.bytes_before == sum(4 * p.numel() for p in Net().parameters())
    assert report.bytes_after == attribute_bytes(q)
    shared = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    shared[1].weight = shared[0].weight
    assert attribute_bytes(shared) == 64
    shared.register_buffer("sparse", torch.eye(4).to_sparse())
    shared.register_buffer("empty", None)
    assert attribute_bytes(shared) == 64 + 16


def test_an_empty_report() -> None:
    report = Report()
    assert "bytes" in str(report) and json.dumps(report.to_json()) and report.count("linear") == 0


# ----------------------------------------------------------------------------------------------------------- progress
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(exported: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare(Net().eval(), StaticQuantConfig(), example_inputs=x if exported else None)
    prepared(x)
    convert(prepared)


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_progress_shows_on_a_terminal_only(
    exported: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    work(exported)
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    work(exported)
    shown = terminal.getvalue()
    steps = ("export", "prepare: insert-observers", "convert: lower to inductor")  # the last of each stays long enough
    assert all(step in shown for step in (steps if exported else ("prepare: heads.4", "convert: heads.4")))


def test_progress_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for total in (2, None):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress("work", total) as step:
            step("one")
            step("two")
        assert "work: two" in terminal.getvalue()
        with progress("work", total, show=False) as step:
            step("three")
        assert "three" not in terminal.getvalue()
    with pytest.raises(ZeroDivisionError), progress("work", show=True) as step:
        step(f"{1 / 0}")


# ------------------------------------------------------------------------------------------------------- import cost
def test_importing_is_cheap() -> None:
    """No detection, no registry filled, nothing heavy but torch."""
    code = """
import sys, time
import inc_graph
assert "torch" not in sys.modules and inc_graph.__version__
import torch
before, start = set(sys.modules), time.perf_counter()
from inc_graph.quantization import prepare, convert, quantize, StaticQuantConfig
from inc_graph.export import export
seconds = time.perf_counter() - start
StaticQuantConfig
new = {m.partition(".")[0] for m in set(sys.modules) - before}
heavy = {"rich", "sympy", "networkx", "transformers", "torchao"} & new
heavy |= {m for m in ("torch._dynamo", "torch._inductor", "inc_graph.passes", "inc_graph.lowering") if m in sys.modules}
print(sorted(heavy), seconds)
"""
    best = 9.0
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        ).stdout
        heavy, _, seconds = out.strip().rpartition(" ")
        assert heavy == "[]", heavy
        best = min(best, float(seconds))
        if best < 0.3:
            break
    assert best < 0.3
