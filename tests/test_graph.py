"""Editing: each edit keeps fake values, provenance and meaning, and costs the same whatever the size of the graph."""

from __future__ import annotations

import time

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from inc_graph import graph as g
from inc_graph.capture import capture
from inc_graph.errors import IncError
from inc_graph.text import to_text
from inc_graph.verify import verify

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.ModuleList([nn.Linear(4, 4)])
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("extra", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.b[0](torch.relu(self.a(x))) + bias + self.extra
        self.total.add_(y.sum(0))
        return {"y": y, "index": y.argmax(1)}


@pytest.fixture(scope="module")
def captured() -> fx.GraphModule:
    return capture(Small(), (torch.randn(2, 4),), {"bias": torch.randn(4)})


@pytest.fixture
def gm(captured: fx.GraphModule) -> fx.GraphModule:
    return g.clone(captured)


def call(gm: fx.GraphModule, target: object, index: int = 0) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[index]


def test_module_path_and_type(gm: fx.GraphModule) -> None:
    second = call(gm, aten.linear.default, 1)
    assert g.module_path(second) == "b.0"
    assert g.module_type(second) == "torch.nn.modules.linear.Linear"
    assert g.module_path(call(gm, aten.relu.default)) == ""
    assert g.module_type(gm.graph.find_nodes(op="placeholder")[0]) is None


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        ({"a": ("L['self']", nn.Module), "b": ("L['self'].layers[0].fc", nn.Linear)}, "layers.0.fc"),
        ({"b": ("L['self']._modules['layers']._modules['3']", nn.Linear)}, "layers.3"),
        ({"b": ("L__self__.fc", nn.Linear)}, "fc"),
        ({"b": ("layers.1.fc@2", "torch.nn.modules.linear.Linear")}, "layers.1.fc"),
        ({"b": ("_empty_nn_module_stack_from_metadata_hook", "_empty")}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_module_path_of_other_exporters(stack: object, path: str) -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = stack
    assert g.module_path(node) == path


def test_values(gm: fx.GraphModule) -> None:
    linear, index = call(gm, aten.linear.default), call(gm, aten.argmax.default)
    assert g.shape(linear) == (2, 4) and g.dtype(linear) == torch.float32 and g.is_float(linear)
    assert not g.is_float(index) and g.dtype(index) == torch.int64
    output = next(iter(gm.graph.find_nodes(op="output")))
    assert g.val(output) is None and g.shape(output) is None and not g.is_float(output)


def test_level(gm: fx.GraphModule) -> None:
    assert g.get_level(gm) == "float"
    g.set_level(gm, "qdq")
    assert g.get_level(gm) == "qdq"
    with pytest.raises(IncError, match="unknown level 'nonsense'"):
        g.set_level(gm, "nonsense")
    assert g.get_level(fx.symbolic_trace(nn.ReLU())) == "float"


def test_annotations_are_created_on_writing_only(gm: fx.GraphModule) -> None:
    node = call(gm, aten.relu.default)
    assert g.peek_meta(node) == {} and "custom" not in node.meta
    g.inc_meta(node)["share"] = 1
    assert g.peek_meta(node) == {"share": 1}
    assert node.meta["custom"] == {"inc": {"share": 1}}


def test_get_tensor(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.find_nodes(op="get_attr") if n.target == "b.0.weight")
    assert g.get_tensor(gm, node) is g.get_tensor(gm, "b.0.weight")
    with pytest.raises(IncError, match="has no attribute"):
        g.get_tensor(gm, "b.7.weight")
    with pytest.raises(IncError, match="expected a get_attr node"):
        g.get_tensor(gm, call(gm, aten.relu.default))
    with pytest.raises(IncError, match="not a tensor"):
        g.get_tensor(gm, "b.0")


def test_set_tensor_names(gm: fx.GraphModule) -> None:
    names = [g.set_tensor(gm, hint, torch.ones(1)) for hint in ("a.weight_scale", "a.weight_scale", "a", "0", "a")]
    assert names == ["a_weight_scale", "a_weight_scale_1", "a_1", "_0", "a_2"]
    assert names[0] in dict(gm.named_buffers())
    name = g.set_tensor(gm, "w", torch.ones(2), buffer=False)
    assert isinstance(g.get_tensor(gm, name), nn.Parameter) and g.get_tensor(gm, name).requires_grad
    assert not g.get_tensor(gm, g.set_tensor(gm, "codes", torch.ones(2, dtype=torch.int8), buffer=False)).requires_grad


def test_names_stay_unique_in_clones(gm: fx.GraphModule) -> None:
    first = g.set_tensor(gm, "scale", torch.ones(1))
    copy = g.clone(gm)
    assert g.set_tensor(copy, "scale", torch.ones(1)) == g.set_tensor(gm, "scale", torch.ones(1)) == first + "_1"


def test_insert_call(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    linear = call(gm, aten.linear.default)
    with g.editing("my-pass"):
        new = g.insert_call(gm, aten.to.dtype, (relu, torch.float64), after=relu, like=linear, name="wide")
    assert new.name == "wide" and new.prev is relu
    assert isinstance(g.val(new), FakeTensor) and g.dtype(new) == torch.float64
    assert g.module_path(new) == "a" and new.meta["stack_trace"] == linear.meta["stack_trace"]
    assert g.peek_meta(new) == {"provenance": ["my-pass"]}
    back = g.insert_call(gm, aten.to.dtype, (new,), {"dtype": torch.float32}, before=new.next)
    assert g.replace_uses(relu, back) == 2  # the next operator, and `new`
    verify_order = [n.name for n in gm.graph.nodes]
    assert verify_order.index("wide") < verify_order.index(back.name)


def test_replace_uses_keeps_the_new_node(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    new = g.insert_call(gm, aten.neg.default, (relu,), after=relu)
    assert g.replace_uses(relu, new) == 1
    assert new.args == (relu,) and list(relu.users) == [new]
    assert g.replace_uses(relu, new, only=list(new.users)) == 0  # those do not use it
    x = gm.graph.find_nodes(op="placeholder")[0]
    assert g.users_of(x) == list(x.users)


def test_insert_call_errors_insert_nothing(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    count = len(gm.graph.nodes)
    with pytest.raises(RuntimeError):
        g.insert_call(gm, aten.mm.default, (relu, relu), after=relu)  # 2x4 @ 2x4
    with pytest.raises(IncError, match="exactly one"):
        g.insert_call(gm, aten.neg.default, (relu,))
    del relu.meta["val"]
    with pytest.raises(IncError, match="without a fake value"):
        g.insert_call(gm, aten.neg.default, (relu,), after=relu)
    assert len(gm.graph.nodes) == count


def test_insert_get_attr_and_module(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    name = g.set_tensor(gm, "scale", torch.full((4,), 2.0))
    read = g.insert_get_attr(gm, relu.next, name)
    scaled = g.insert_call(gm, aten.mul.Tensor, (relu, read), before=relu.next.next)
    g.replace_uses(relu, scaled)
    watch = g.insert_module(gm, "watch", nn.Identity(), scaled, after=scaled)
    g.replace_uses(scaled, watch)
    g.erase_dead(gm)
    gm.graph.lint()
    assert g.shape(read) == (4,) and g.shape(watch) == (2, 4)
    model = Small()
    model.load_state_dict(gm.state_dict(), strict=False)
    x, bias = torch.randn(2, 4), torch.randn(4)
    want = model.b[0](torch.relu(model.a(x)) * 2) + bias + 1
    torch.testing.assert_close(gm(x, bias=bias)["y"], want)
    with pytest.raises(IncError, match="no attribute 'nothing'"):
        g.insert_get_attr(gm, relu, "nothing")


def test_erase_dead_prunes_attributes(gm: fx.GraphModule) -> None:
    linear = call(gm, aten.linear.default)
    x = gm.graph.find_nodes(op="placeholder")[0]
    linear.replace_all_uses_with(x)
    unused = g.set_tensor(gm, "unused", torch.ones(1))
    g.set_module(gm, "observer", nn.Identity())
    assert g.erase_dead(gm)
    assert set(gm.state_dict()) == {"b.0.weight", "b.0.bias", "total"}
    assert not hasattr(gm, "a") and not hasattr(gm, unused) and not hasattr(gm, "observer")
    assert [n for n in gm.graph.nodes if n.target is aten.copy_.default]  # writes are not dead
    assert not g.erase_dead(gm)
    gm(torch.randn(2, 4), bias=torch.randn(4))


def test_mutated_attrs_and_aliases(gm: fx.GraphModule) -> None:
    assert g.mutated_attrs(gm) == {"total"}
    name = g.set_tensor(gm, "view_of_total", gm.total[:2])
    g.insert_get_attr(gm, next(iter(gm.graph.nodes)), name)
    assert g.mutated_attrs(gm) == {"total", name}


def test_clone_shares_tensors_only(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    g.inc_meta(relu)["a"] = {"b": [1]}
    copy = g.clone(gm)
    assert type(copy).__mro__[1] is fx.GraphModule
    for name, tensor in gm.named_parameters():
        assert copy.get_parameter(name) is tensor
    assert set(copy.state_dict()) == set(gm.state_dict())  # `extra` is still not persistent
    assert copy.extra is gm.extra
    before = to_text(gm, tensors=True)
    assert to_text(copy, tensors=True) == before

    twin = call(copy, aten.relu.default)
    g.inc_meta(twin)["a"]["b"].append(2)
    g.inc_meta(twin)["c"] = 1
    twin.meta["val"] = None
    copy.meta["inc"]["level"] = "qdq"
    g.set_tensor(copy, "new", torch.ones(1))
    copy.b.add_module("1", nn.Identity())
    del copy.b._modules["0"]._parameters["bias"]
    twin.replace_all_uses_with(twin.args[0])
    g.set_level(copy, "lowered")
    assert to_text(gm, tensors=True) == before
    assert g.get_level(gm) == "float" and not hasattr(gm, "new") and len(gm.b._modules) == 1


def test_clone_keeps_calling_convention_and_hooks(gm: fx.GraphModule) -> None:
    copy = g.clone(g.clone(gm))
    x, bias = torch.randn(2, 4), torch.randn(4)
    assert set(copy(x, bias=bias)) == {"y", "index"}
    with pytest.raises(IncError, match="captured for"):
        copy(torch.randn(3, 4), bias=bias)
    copy._forward_pre_hooks.clear()
    assert gm._forward_pre_hooks


def test_clone_copies_submodules_not_their_tensors(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    watch = nn.BatchNorm1d(4)
    watch.note = "x"
    g.replace_uses(relu, g.insert_module(gm, "watch", watch, relu, after=relu))
    copy = g.clone(gm)
    assert copy.watch is not watch and copy.watch.running_mean is watch.running_mean and copy.watch.note == "x"
    copy.watch.register_buffer("mine", torch.ones(1))
    assert "mine" not in dict(watch.named_buffers())


def test_adopt(gm: fx.GraphModule) -> None:
    other = capture(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
    text = to_text(other, tensors=True)
    assert g.adopt(gm, other) is gm
    assert to_text(gm, tensors=True) == text and gm.graph.owning_module is gm
    assert gm(torch.randn(1, 3)).shape == (1, 2)
    assert g.adopt(gm, gm) is gm


def test_fuel() -> None:
    assert g.take_fuel() and g.current_pass() is None
    with g.editing("p", g.Fuel(2)):
        assert [g.take_fuel() for _ in range(3)] == [True, True, False]
        assert g.current_pass() == "p" and g.current_fuel().left == 0
    assert g.take_fuel() and g.current_fuel() is None


def chain(length: int) -> fx.GraphModule:
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        value = torch.empty(2, 4)
    node = graph.placeholder("x")
    node.meta["val"] = value
    for _ in range(length):
        node = graph.call_function(aten.relu.default, (node,))
        node.meta.update(val=value, custom={"inc": {"note": [1]}})
    graph.output((node,))
    return fx.GraphModule(nn.Module(), graph)


def edit_everywhere(gm: fx.GraphModule) -> float:
    start = time.perf_counter()
    gm = g.clone(gm)
    for node in gm.graph.find_nodes(op="call_function", target=aten.relu.default):
        read = g.insert_get_attr(gm, node, g.set_tensor(gm, "scale", torch.ones(4)))
        g.replace_uses(node, g.insert_call(gm, aten.mul.Tensor, (node, read), after=node))
    g.erase_dead(gm)
    to_text(gm)
    verify(gm)
    return time.perf_counter() - start


@pytest.mark.alone
@pytest.mark.slow
def test_edits_are_linear() -> None:
    edit_everywhere(chain(100))
    small, large = edit_everywhere(chain(2_000)), edit_everywhere(chain(20_000))
    assert large < 15 * small
