"""Helpers of inc_graph.utils: modules by name, batches elsewhere, what is installed."""

from __future__ import annotations

import ast
import collections
import logging
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from inc_graph import utils
from inc_graph.errors import IncError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.experts = nn.ModuleList([nn.Linear(2, 2)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList([nn.Linear(1, 1)])
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = self.layers[0].fc
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("empty", None, persistent=False)
        self.layers[1].register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(x) * scale


@pytest.fixture
def net() -> Net:
    return Net()


def test_fetch(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    assert utils.fetch_module(net, "layers.1.fc") is net.layers[1].fc
    assert utils.get_attr(net, "layers.1.fc.weight") is net.layers[1].fc.weight
    log = logging.getLogger("inc_graph")
    log.addHandler(caplog.handler)
    try:
        assert utils.get_module(net, "layers.7.fc") is None and not caplog.text
        assert utils.fetch_module(net, "layer.1.fc") is None
    finally:
        log.removeHandler(caplog.handler)
    assert "no layer.1.fc" in caplog.text and "did you mean 'layers.1.fc'" in caplog.text


def test_set(net: Net) -> None:
    new = nn.Linear(2, 3)
    utils.set_module(net, "layers.1.fc", new)
    assert net.layers[1].fc is new
    utils.set_attr(net, "extra", new)
    assert net.extra is new
    with pytest.raises(IncError, match=r"cannot set 'layer.1.fc': the model has no 'layer.1'; did you mean 'layers.1'"):
        utils.set_module(net, "layer.1.fc", new)


def test_listing(net: Net) -> None:
    names = ["small.0", "layers.0.fc", "layers.0.experts.0", "layers.1.fc", "layers.1.experts.0"]
    assert utils.get_model_info(net, utils.WHITE_MODULE_LIST) == [(n, "Linear") for n in names]
    assert utils.get_block_names(net) == [["layers.0", "layers.1"]]
    assert utils.get_block_names(net.layers) == [["0", "1"]]
    assert utils.get_block_names(nn.Linear(1, 1)) == []
    assert utils.get_model_device(net) == "cpu"
    assert utils.get_model_device(net.to("meta")) == "meta"
    assert utils.get_model_device(nn.ReLU()) is None


def test_buffers_that_are_not_saved(net: Net) -> None:
    found = utils.get_non_persistent_buffers(net)
    assert set(found) == {"mask", "layers.1.positions"} and not set(found) & set(net.state_dict())
    other = Net().to("meta")
    utils.load_non_persistent_buffers(other, found)
    assert other.mask is net.mask and other.layers[1].positions is net.layers[1].positions
    assert "mask" not in other.state_dict()
    with pytest.raises(IncError, match=r"'layers\.9'"):
        utils.load_non_persistent_buffers(other, {"layers.9.positions": net.mask})


class Pair(NamedTuple):
    ids: Tensor
    x: Tensor


def test_batches() -> None:
    batch: dict[str, Any] = {"a": [torch.ones(2), Pair(torch.arange(2), torch.ones(2))], "b": (None, "text", 3)}
    half = utils.to_dtype(batch, torch.float16)
    assert half["a"][0].dtype == half["a"][1].x.dtype == torch.float16
    assert half["a"][1].ids.dtype == torch.int64 and half["b"] == (None, "text", 3)
    assert batch["a"][0].dtype == torch.float32
    there = utils.move_input_device(collections.OrderedDict(batch), "meta")
    assert type(there) is collections.OrderedDict and there["a"][1].ids.device.type == "meta"
    assert isinstance(there["a"][1], Pair)


def test_forward(net: Net) -> None:
    x, scale = torch.ones(1, 2), torch.tensor(2.0)
    want = net(x, scale)
    for batch in ((x, scale), [x, scale], {"x": x, "scale": scale}):
        assert torch.equal(utils.forward_wrapper(net, batch), want)
    assert torch.equal(utils.forward_wrapper(net.head, x), net.head(x))


def test_installed() -> None:
    assert utils.is_package_available("torch") and utils.is_package_available("torch.nn")
    assert not utils.is_package_available("no_such_package") and not utils.is_package_available("no_such_package.part")
    assert utils.get_torch_version() >= "2.8.0" and "+" not in str(utils.get_torch_version())
    assert utils.is_transformers_imported() == ("transformers" in sys.modules)
    assert (utils.get_ipex_version() is not None) == utils.is_ipex_available()
    assert utils.can_pack_with_numba() == (utils.is_numba_available() and utils.is_tbb_available())
    assert isinstance(utils.is_optimum_available(), bool) and utils.is_optimum_habana_available() in (True, False)
    if not utils.is_hpex_available():
        assert utils.is_hpex_support_g_idx() is False
        assert not utils.is_hpu_available() and utils.get_used_hpu_mem_MB() == 0


def test_ipex_is_looked_for_and_not_taken_for_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """neural_compressor tests the function itself in prepare and convert, which is always true."""
    assert callable(utils.is_ipex_available) and isinstance(utils.is_ipex_available(), bool)
    faults = []
    for path in Path(utils.__file__).parents[1].rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        tests = [n.test for n in ast.walk(tree) if isinstance(n, ast.If | ast.IfExp | ast.While)]
        parts = [v for t in tests for v in (t.values if isinstance(t, ast.BoolOp) else [t])]
        faults += [f"{path.name}:{n.lineno}" for n in parts
                   if isinstance(n, ast.Name) and n.id.startswith("is_") and id(n) not in called
                   and not _is_local(tree, n.id)]  # fmt: skip
    assert not faults


def _is_local(tree: ast.Module, name: str) -> bool:
    """Whether the module gives the name a value of its own, as a variable or parameter."""
    stores = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return name in stores | {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}


def test_what_gaudi_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    habana = types.ModuleType("habana_frameworks")
    habana.__path__ = []  # type: ignore[attr-defined]
    torch_part = types.ModuleType("habana_frameworks.torch")
    monkeypatch.setitem(sys.modules, "habana_frameworks", habana)
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch", torch_part)
    assert utils.is_hpex_available() and not utils.is_hpex_support_g_idx()
    monkeypatch.setattr(
        torch._C, "_get_schema", lambda name, overload: f"{name}(Tensor x, Tensor? group_index) -> Tensor"
    )
    assert utils.is_hpex_support_g_idx()
    hpu = types.SimpleNamespace(is_available=lambda: True, memory_allocated=lambda: 3 * 2**20)
    monkeypatch.setattr(torch, "hpu", hpu, raising=False)
    assert utils.is_hpu_available() and utils.get_used_hpu_mem_MB() == 3


def test_memory() -> None:
    before = utils.get_used_cpu_mem_MB()
    held = torch.ones(64 * 1024 * 1024 // 4)
    assert 50 < utils.get_used_cpu_mem_MB() - before < 100
    del held


def test_inputs_of_other_mappings_keep_their_kind() -> None:
    from collections import OrderedDict, UserDict, defaultdict

    x = torch.ones(2)
    for value in (defaultdict(list, a=[x]), OrderedDict(a=[x]), UserDict(a=[x])):
        moved = utils.to_dtype(value, torch.float64)
        assert type(moved) is type(value) and moved["a"][0].dtype == torch.float64 and value["a"][0].dtype == x.dtype
    assert utils.to_dtype(defaultdict(list, a=[x]))["missing"] == []


def test_classes_by_name_and_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for kinds in ([nn.Linear], nn.Linear, "Linear", ["Linear"]):
        assert utils.get_model_info(model, kinds) == [("0", "Linear")]
    with pytest.raises(IncError, match="names no part of the model"):
        utils.set_module(model, "", nn.ReLU())
    assert len(model) == 2
