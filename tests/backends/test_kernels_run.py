"""The int8 kernels really run, as often as the report says; and no float copy of a weight is kept in memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import real_models as rm
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare

CONV = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def quantized(model: nn.Module, *calibration: tuple[Tensor, ...]) -> Any:
    prepared = prepare(export(model, calibration[0]), StaticQuantConfig())
    for batch in calibration:
        prepared(*batch)
    return convert(prepared)


def events(model: nn.Module, *inputs: Tensor) -> Counter[str]:
    """Operators that ran, by name; those that oneDNN's kernels called themselves (another number in each torch) not."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as prof:
        model(*inputs)
    return Counter(e.name for e in prof.events() if e.cpu_parent is None or "onednn::" not in e.cpu_parent.name)


def kernels(counts: Counter[str]) -> tuple[int, int]:
    """(convolutions, linear layers) that oneDNN's int8 kernels computed."""
    return counts["onednn::qconv_pointwise"] + counts["onednn::qconv2d_pointwise"], counts["onednn::qlinear_pointwise"]


def reported(model: Any) -> tuple[int, int]:
    return sum(model.report.count(op) for op in CONV), model.report.count("linear")


class Small(nn.Module):
    """One layer of every kind, and one that must not be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.again, self.three = nn.Conv2d(8, 8, 3, padding=1), nn.Conv3d(1, 3, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.plain = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))[:, :, None].expand(-1, -1, 4, -1)
        x = self.again(F.relu(x + self.two(x)))
        x = self.up(F.silu(x))
        x = self.three(x[:, None]).mean((1, 3, 4))
        return self.head(self.plain(x))


def test_a_small_network() -> None:
    torch.manual_seed(0)
    config = StaticQuantConfig().set_local("plain", StaticQuantConfig(w_dtype="fp32"))
    x = torch.randn(2, 4, 6)
    prepared = prepare(export(Small().eval(), (x,)), config)
    prepared(x)
    model = convert(prepared)
    counts = events(model, x)
    assert kernels(counts) == reported(model) == (5, 1)
    assert counts["aten::linear"] == 1 and counts["aten::convolution"] == 0  # the float layer, and no other
    reference = model.graph
    assert kernels(events(reference, x)) == (0, 0)
    assert (reference(x) - model(x)).norm() <= 0.05 * model(x).norm()


@pytest.mark.real_model
def test_efficientnet_lite0_runs_49_convolutions_and_a_linear_layer() -> None:
    model, images, labels = rm.efficientnet_lite0()
    q = quantized(model, (rm.calibration_images(8),))
    counts = events(q, images[:8])
    assert kernels(counts) == reported(q) == (49, 1)
    assert counts["onednn::qconv2d_pointwise"] == q.report.count("add") == 9  # residual sums, in the kernels
    assert not q.report.reference and counts["aten::clone"] == 1  # of the image
    assert q.report.bytes_after <= 0.27 * q.report.bytes_before
    with torch.no_grad():
        assert rm.top_k(q(images[:8]), labels[:8], 5) == 8


@pytest.mark.real_model
@pytest.mark.slow
def test_minilm_runs_36_linear_layers() -> None:
    model, tokenizer, documents, _ = rm.minilm()
    q = quantized(model, next(rm.batches(tokenizer, rm.calibration_documents(8))))
    counts = events(q, *next(rm.batches(tokenizer, documents)))
    assert kernels(counts) == reported(q) == (0, 36)
    assert q.report.count("embedding") == 3 and not q.report.reference
    assert counts["aten::quantize_per_tensor"] == 18  # three of four layers' inputs come as codes, or are shared
    assert q.report.bytes_after <= 0.27 * q.report.bytes_before


MEMORY = """
import copy, ctypes, gc, sys
import torch
from benchmarks import real_models as rm
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives freed memory back, so that what is resident is in use
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def build(name):
    if name == "minilm":
        model, tokenizer, documents, _ = rm.minilm()
        inputs = next(rm.batches(tokenizer, documents[:2]))
    else:
        model, images, _ = rm.efficientnet_lite0()
        inputs = (images[:2].clone(),)
    model = copy.deepcopy(model)  # out of the file that its loader has mapped
    prepared = prepare(export(model, inputs), StaticQuantConfig())
    prepared(*inputs)
    return convert(prepared), inputs, sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

left = []
for _ in range(2):
    q, inputs, size = build(sys.argv[1])
    with torch.no_grad():
        q(*inputs)
    before = resident()
    del q
    left.append(resident())
print(size, before - left[-1], left[1] - left[0])
"""


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["efficientnet", "minilm"])
def test_no_float_copy_stays_resident(name: str) -> None:
    """Resident memory falls by what the converted model held once it is dropped, the float model being gone already.

    Besides the weights that is its graphs, some kB an operator: 3 MB are allowed. A second model after the first one
    leaves no weights behind either (torch caches the code of every graph: 10 MB are allowed).
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", MEMORY, name]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    size, held, leaked = map(int, out.split())
    assert held <= 0.27 * size + 3e6, f"{held / size:.3f} x float"
    assert leaked <= 10e6
