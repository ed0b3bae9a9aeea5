"""Saved models whose weights alone are quantized: codes packed in the file and in memory, in every form of weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from inc_graph.errors import IncError, SavedModelError
from inc_graph.quantization import RTNConfig, load, quantize, save
from tests.weight_only_models import CONFIGS, SCOPES, Words, everything, ids, quantized, tensors

pytestmark = pytest.mark.slow

scoped = pytest.mark.parametrize("scope", SCOPES)


def loaded(folder: Path, scope: str, **options: Any) -> nn.Module:
    return load(folder, None if scope == "graph" else Words().eval(), **options)


def same(a: nn.Module, b: nn.Module) -> None:
    """Outputs, tensors and state, bit for bit."""
    assert torch.equal(a(ids()), b(ids()))
    left, right = tensors(a), tensors(b)
    assert set(left) == set(right) and set(a.state_dict()) == set(b.state_dict())
    assert all(t.dtype == right[k].dtype and torch.equal(t, right[k]) for k, t in left.items())


@scoped
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(scope: str, name: str, tmp_path: Path) -> None:
    q = quantized(scope, CONFIGS[name])
    save(q, tmp_path / "a")
    back = loaded(tmp_path / "a", scope)
    same(q, back)
    old, new = q.report.to_json(), back.report.to_json()
    assert new["kernels"] == old["kernels"] and new["reference"] == old["reference"]
    assert new["bytes_after"] == old["bytes_after"]
    assert old["weights"] and new["weights"] == old["weights"] and new["notes"] == old["notes"]
    save(back, tmp_path / "b")  # and again
    same(q, loaded(tmp_path / "b", scope))


@scoped
def test_orders_real_zero_points_and_scales_of_scales(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with everything(monkeypatch) as config:
        q = quantized(scope, config)
        save(q, tmp_path)
    graph = q.graph if scope == "graph" else q.head.inner.graph  # type: ignore[union-attr, operator]
    names = {str(n.target) for n in graph.graph.nodes}
    assert {"aten.index_select.default", "aten.reshape.default", "inc.unpack.default"} <= names
    same(q, loaded(tmp_path, scope))


@scoped
def test_a_model_that_has_moved(scope: str, tmp_path: Path) -> None:
    q = quantized(scope).to(torch.bfloat16)
    save(q, tmp_path)
    back = loaded(tmp_path, scope)
    assert back(ids()).dtype == torch.bfloat16
    same(q, back)
    same(q.float(), back.float())


@scoped
def test_what_is_loaded_moves_and_trains(scope: str, tmp_path: Path) -> None:
    q = quantized(scope)
    save(q, tmp_path)
    back = loaded(tmp_path, scope)
    same(copy.deepcopy(q).to(torch.bfloat16), copy.deepcopy(back).to(torch.bfloat16))
    back.load_state_dict(quantized(scope).state_dict())
    assert back.train().training
    same(q, back)
    same(q, loaded(tmp_path, scope))  # nothing of that was written to the files


@scoped
def test_half_a_byte_a_weight(scope: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)).eval()
    count = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    given = {"example_inputs": (torch.randn(4, 256),)} if scope == "graph" else {}
    q = quantize(model, RTNConfig(group_size=32), inplace=False, **given)
    save(q, tmp_path)
    biases = 4 * (512 + 256)
    stored: dict[str, int] = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            stored.update({k: f.get_tensor(k).nbytes for k in f.keys()})
    assert sum(stored.values()) == count * 4.5 / 8 + biases  # four bits, and 16 of a scale for 32 of them
    back = load(tmp_path, None if scope == "graph" else model)
    assert sum(t.nbytes for t in tensors(back).values()) == sum(stored.values())
    back(torch.randn(4, 256))  # no float copy is kept after a call either
    held = {id(t): t.nbytes for t in tensors(back).values()}
    for m in back.modules():  # nor as an attribute that is neither parameter nor buffer
        held.update({id(v): v.nbytes for v in vars(m).values() if isinstance(v, torch.Tensor)})
    assert sum(held.values()) == sum(stored.values())


@scoped
def test_codes_are_mapped(scope: str, tmp_path: Path) -> None:
    """The tensor lies in the mapping of the file, which starts at a page, not in memory of its own."""
    model = nn.Sequential(nn.Linear(1024, 1024)).eval()
    given = {"example_inputs": (torch.randn(4, 1024),)} if scope == "graph" else {}
    save(quantize(model, RTNConfig(), inplace=False, **given), tmp_path)
    back = load(tmp_path, None if scope == "graph" else model)
    codes = next(t for k, t in tensors(back).items() if k.endswith("weight_q"))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    line = next(
        text for text in maps.read_text().splitlines()
        if int(text.split("-")[0], 16) <= codes.data_ptr() < int(text.split(" ")[0].split("-")[1], 16)
    )  # fmt: skip
    assert line.endswith(".safetensors"), line


@scoped
def test_what_cannot_be_saved_or_loaded(scope: str, tmp_path: Path) -> None:
    q = quantized(scope)
    save(q, tmp_path)
    with pytest.raises(SavedModelError, match="meta device"):
        save(copy.deepcopy(q).to("meta"), tmp_path / "empty")
    if scope == "layers":
        with pytest.raises(IncError, match="original_model"):
            load(tmp_path)
        with pytest.raises(IncError, match="quantized already"):
            load(tmp_path, q)
    same(q, loaded(tmp_path, scope))


@scoped
def test_damaged_codes(scope: str, tmp_path: Path) -> None:
    """A graph whose codes are packed for another shape or another format is refused, not run."""
    save(quantized(scope), tmp_path)
    files = [f for f in tmp_path.iterdir() if f.suffix == ".json" and "int4" in f.read_text(encoding="utf-8")]
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
        file.write_text(text.replace('"int4"', '"int3"'), encoding="utf-8")
    with pytest.raises(SavedModelError):
        loaded(tmp_path, scope)
