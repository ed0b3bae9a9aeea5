"""Loading takes the memory of what is used: tensors are mapped, and those that a backend packs are let go of."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from inc_graph.quantization import StaticQuantConfig, quantize

READ = """
import sys, torch
from inc_graph.quantization import load
torch.set_num_threads(1)

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

small = load(sys.argv[1] + "/small")
small(torch.arange(4))
before = resident()
model = load(sys.argv[1] + "/large")
print(resident() - before)
rows = torch.arange(int(sys.argv[2]))
for part in rows.split(1000):
    model(part)
print(resident() - before)
"""


def large(rows: int, columns: int) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Embedding(rows, columns), nn.Linear(columns, 8)).eval()
    x = torch.arange(8)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return quantize(model, StaticQuantConfig(), lambda p: p(x), example_inputs=x, dynamic_shapes=dynamic), x


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_resident_memory(tmp_path: Path) -> None:
    rows, columns = 100_000, 1024  # 100 MB of codes
    for name, count in (("small", 100), ("large", rows)):
        large(count, columns)[0].save(tmp_path / name)
    assert sum(f.stat().st_size for f in (tmp_path / "large").iterdir()) > rows * columns
    command = [sys.executable, "-c", READ, str(tmp_path), str(rows // 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    loaded, used = map(int, done.stdout.split())
    assert loaded < 0.1 * rows * columns, "the table was read"
    assert 0.3 * rows * columns < used < 1.2 * 0.5 * rows * columns + 16e6, "half of the table is used"


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    large(100, 8)[0].save(tmp_path)
    (tmp_path / "other").write_text("")
    usual = stat.S_IMODE(os.stat(tmp_path / "other").st_mode)
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {usual}
