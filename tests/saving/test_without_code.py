"""A graph is loaded where neither the model's class nor the package it came from exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODULE = """
import torch
from torch import nn

class Secret(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
"""
WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file, save_file
from secret_package import Secret
from inc_graph.quantization import StaticQuantConfig, quantize
torch.manual_seed(0)
x = load_file(sys.argv[2] + "/x.safetensors")["x"]
q = quantize(Secret().eval(), StaticQuantConfig(), lambda p: p(x), example_inputs=x)
q.save(sys.argv[2] + "/model")
save_file({"y": q(x)}, sys.argv[2] + "/y.safetensors")
"""
READ = """
import importlib.util, pickle, sys
import torch
from safetensors.torch import load_file, save_file
assert importlib.util.find_spec("secret_package") is None
def never(*a, **k): raise AssertionError("unpickled")
pickle.load = pickle.loads = torch.load = never
from inc_graph.quantization import load
q = load(sys.argv[1] + "/model")
save_file({"y": q(load_file(sys.argv[1] + "/x.safetensors")["x"])}, sys.argv[1] + "/z.safetensors")
assert "secret_package" not in sys.modules
print(q.report.count("conv2d"), q.report.count("linear"), len(str(q.graph.graph)) > 100)
"""


def test_without_the_code_of_the_model(tmp_path: Path) -> None:
    package = tmp_path / "code"
    package.mkdir()
    (package / "secret_package.py").write_text(MODULE)
    save_file({"x": torch.randn(2, 3, 8, 8)}, tmp_path / "x.safetensors")
    for script, args in ((WRITE, [package, tmp_path]), (READ, [tmp_path])):
        command = [sys.executable, "-c", script, *map(os.fspath, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["1", "1", "True"]
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], load_file(tmp_path / "z.safetensors")["y"])
