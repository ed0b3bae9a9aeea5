"""The text form: golden files, and that it depends on the graph only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from inc_graph import graph as g
from inc_graph.capture import capture
from inc_graph.ops import DEQUANTIZE, QUANTIZE
from inc_graph.text import diff, dtype_name, to_text
from tests.golden_check import check_golden
from tests.graph_generator import RandomModel

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(11))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, image: torch.Tensor, *, gain: torch.Tensor) -> dict[str, Any]:
        x = self.features(image).mean((2, 3))
        for layer in (self.head[0], self.head[2], self.head[10]):
            x = layer(x)
        first, second = x.chunk(2, 1)
        self.seen.mul_(0.5)
        self.seen.add_(x[0])
        y = torch.cat([second, first], 1).to(torch.float16) * gain
        return {"y": y, "top": x.argmax(1), "view": x.view(x.shape[0] * 2, 2)}


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    batch = torch.export.Dim("batch")
    model = Net()
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    shapes = {"image": {0: batch}, "gain": None}
    return capture(model, (torch.ones(3, 3, 6, 6),), {"gain": torch.ones(1)}, shapes)


def test_float_graph() -> None:
    check_golden("text/float.txt", to_text(net()))


def test_tensor_digests() -> None:
    gm = net()
    check_golden("text/digests.txt", to_text(gm, tensors=True))
    before = to_text(gm, tensors=True)
    with torch.no_grad():
        gm.get_parameter("head.2.weight")[0, 0] += 1e-3
    changed = [line for line in diff(before, to_text(gm, tensors=True)).splitlines() if line[0] in "+-"]
    assert len(changed) == 4 and "@head.2.weight" in changed[2]


def test_control_flow() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos() + 1, (x,))

    check_golden("text/cond.txt", to_text(capture(Branch(), (torch.ones(2, 3),))))


def quantized() -> Any:
    gm = capture(nn.Sequential(nn.Linear(4, 2)), (torch.ones(2, 4),))
    linear = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    x = linear.args[0]
    g.inc_meta(linear)["output"] = {"scheme": "symmetric", "qtype": "int8"}
    with g.editing("convert"):
        scale = g.insert_get_attr(gm, linear, g.set_tensor(gm, "0.input_scale", torch.ones(1, 1)))
        q = g.insert_call(gm, QUANTIZE, (x, scale, None, [-1, -1], "int8"), before=linear)
        dq = g.insert_call(gm, DEQUANTIZE, (q, scale, None, [-1, -1], "int8", torch.float32), before=linear)
        watch = g.insert_module(gm, "watch", nn.Identity(), linear, after=linear)
    g.replace_uses(x, dq, only=[linear])
    g.replace_uses(linear, watch)
    g.set_level(gm, "qdq")
    return gm


def test_our_operators_annotations_and_modules() -> None:
    check_golden("text/qdq.txt", to_text(quantized()))
    check_golden("text/provenance.txt", to_text(quantized(), provenance=True))


def test_diff_is_golden_and_empty_for_equal_graphs() -> None:
    gm = capture(nn.Sequential(nn.Linear(4, 2)), (torch.ones(2, 4),))
    check_golden("text/qdq.diff", diff(gm, quantized()))
    assert diff(gm, g.clone(gm)) == "" and diff("a\n", "a\n") == ""


@pytest.mark.parametrize("seed", range(4))
def test_text_does_not_depend_on_history(seed: int) -> None:
    model = RandomModel(seed, 10)
    args, kwargs = model.inputs()
    gm = capture(model, args, kwargs)
    text = to_text(gm, tensors=True)
    assert text == to_text(g.clone(gm), tensors=True)
    twin = g.clone(gm)
    for node in twin.graph.find_nodes(op="get_attr"):  # a read may stand anywhere before its users
        for user in list(node.users):
            again = g.insert_get_attr(twin, user, node.target)
            g.replace_uses(node, again, only=[user])
    g.erase_dead(twin)
    assert to_text(twin, tensors=True) == text
    for node in twin.graph.nodes:
        node._rename(f"other_{node.name}") if node.op not in ("placeholder", "output") else None
    assert to_text(twin, tensors=True) == text


def test_text_is_the_same_in_the_next_capture() -> None:
    assert to_text(net(1)) == to_text(net(2))  # symbols and names are numbered afresh


def test_dtype_names() -> None:
    assert dtype_name(torch.bfloat16) == "bf16" and dtype_name(torch.float8_e4m3fn) == "f8e4m3"
    assert dtype_name(torch.quint8) == "quint8"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_tensors_without_entries_have_a_digest(dtype: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("nothing", torch.zeros(0, 3, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.nothing.to(x.dtype)])

    assert "nothing" in to_text(capture(Model(), (torch.randn(2, 3),)), tensors=True)
