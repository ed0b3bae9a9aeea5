"""Each rule of each level: a graph that keeps it, and one edit that breaks it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from inc_graph import graph as g
from inc_graph.calibrate import Observer
from inc_graph.capture import capture
from inc_graph.errors import VerifyError
from inc_graph.ops import CHOOSE_QPARAMS, DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, UNPACK
from inc_graph.spec import PerChannel, QSpec
from inc_graph.verify import verify, violations

aten = torch.ops.aten
SPEC = QSpec("int8").to_json()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> Any:
        y = self.fc(x)
        self.seen.add_(y.sum(0))
        return y.relu(), ids + 1


@pytest.fixture(scope="module")
def captured() -> fx.GraphModule:
    return capture(Net(), (torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)))


@pytest.fixture
def gm(captured: fx.GraphModule) -> fx.GraphModule:
    return g.clone(captured)


def call(gm: fx.GraphModule, target: Any, index: int = 0) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[index]


def add_qdq(gm: fx.GraphModule) -> fx.GraphModule:
    """Quantize the weight per channel (stored), the input (static, asymmetric) and the result (dynamic)."""
    linear = call(gm, aten.linear.default)
    x, weight, _ = linear.args

    def const(name: str, tensor: torch.Tensor) -> fx.Node:
        return g.insert_get_attr(gm, linear, g.set_tensor(gm, name, tensor))

    codes = const("fc.codes", torch.zeros(3, 4, dtype=torch.int8))
    wscale = const("fc.scale", torch.ones(3, 1))
    wdq = g.insert_call(gm, DEQUANTIZE, (codes, wscale, None, [1, -1], "int8", torch.float32), before=linear)
    scale = const("x.scale", torch.ones(1, 1))
    zero = const("x.zero_point", torch.zeros(1, 1, dtype=torch.int32))
    q = g.insert_call(gm, QUANTIZE, (x, scale, zero, [-1, -1], "uint8"), before=linear)
    dq = g.insert_call(gm, DEQUANTIZE, (q, scale, zero, [-1, -1], "uint8", torch.float32), before=linear)
    g.replace_uses(x, dq, only=[linear])
    g.replace_uses(weight, wdq, only=[linear])
    relu = call(gm, aten.relu.default)
    both = g.insert_call(gm, CHOOSE_QPARAMS, (relu, [1, -1], "int8", "symmetric"), after=relu)
    dscale = g.insert_call(gm, operator.getitem, (both, 0), after=both)
    dzero = g.insert_call(gm, operator.getitem, (both, 1), after=dscale)
    fake = g.insert_call(gm, FAKE_QUANTIZE, (relu, dscale, dzero, [1, -1], "int8"), after=dzero)
    g.replace_uses(relu, fake, only=[u for u in relu.users if u not in (both, fake)])
    g.set_level(gm, "qdq")
    g.erase_dead(gm)
    return gm


def broken(gm: fx.GraphModule, text: str, level: str | None = None, node: str | None = None) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(gm, level)
    assert text in str(caught.value), str(caught.value)
    if node is not None:
        assert caught.value.node == node


def test_good_graphs(gm: fx.GraphModule) -> None:
    for level in ("float", "annotated", "observed", "qdq", "lowered"):
        verify(gm, level)
    verify(add_qdq(gm))
    verify(gm, "lowered")


def test_unknown_level(gm: fx.GraphModule) -> None:
    broken(gm, "unknown level 'fluid'", "fluid")


def test_ill_formed(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    relu.prev.append(relu) or relu.prev.prepend(relu)  # before what it reads
    call(gm, aten.linear.default).prev.prepend(relu)
    broken(gm, "not a well-formed graph")


def test_missing_attribute(gm: fx.GraphModule) -> None:
    read = next(n for n in gm.graph.find_nodes(op="get_attr") if n.target == "fc.bias")
    read.target = "fc.nothing"
    assert [v.rule for v in violations(gm)] == ["attributes exist"]


def drop_val(gm: fx.GraphModule) -> None:
    del call(gm, aten.relu.default).meta["val"]


def wrong_val(gm: fx.GraphModule) -> None:
    gm.fc.bias = nn.Parameter(torch.zeros(4))


def wrong_shape(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"].new_empty(2, 5)


def wrong_dtype(gm: fx.GraphModule) -> None:
    linear = call(gm, aten.linear.default)
    linear.meta["val"] = linear.meta["val"].double()


def method(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    with gm.graph.inserting_after(relu):
        gm.graph.call_method("relu", (relu,)).meta["val"] = None


def python_function(gm: fx.GraphModule) -> None:
    call(gm, aten.relu.default).target = torch.nn.functional.relu


def region(gm: fx.GraphModule) -> None:
    node = call(gm, aten.relu.default)
    node.target = torch.ops.higher_order.wrap_with_set_grad_enabled


def in_place(gm: fx.GraphModule) -> None:
    call(gm, aten.relu.default).target = aten.relu_.default


def copy_to_value(gm: fx.GraphModule) -> None:
    copy, relu = call(gm, aten.copy_.default), call(gm, aten.relu.default)
    copy.args = (relu, copy.args[1])


def tuple_annotation(gm: fx.GraphModule) -> None:
    g.inc_meta(call(gm, aten.relu.default))["a"] = (1, 2)


def object_annotation(gm: fx.GraphModule) -> None:
    g.inc_meta(call(gm, aten.relu.default))["a"] = torch.float32


@pytest.mark.parametrize("level", ["float", "annotated", "observed", "qdq"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop_val, "no meta['val']"),
        (wrong_val, "the tensor is torch.float32 (4,)"),
        (wrong_shape, "says torch.float32 (2, 5), aten.relu.default gives torch.float32 (2, 3)"),
        (wrong_dtype, "says torch.float64 (2, 3), aten.linear.default gives torch.float32 (2, 3)"),
        (method, "methods are not part"),
        (python_function, "not an operator overload"),
        (region, "regions must be written out"),
        (in_place, "writes to its argument"),
        (copy_to_value, "writes to its argument"),
        (tuple_annotation, "changes when written as JSON"),
        (object_annotation, "is not JSON"),
    ],
)
def test_rules_of_all_levels(gm: fx.GraphModule, change: Callable, text: str, level: str) -> None:
    change(gm)
    broken(gm, text, level)


def test_errors_name_node_module_and_count(gm: fx.GraphModule) -> None:
    linear = call(gm, aten.linear.default)
    del linear.meta["val"]
    drop_val(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm)
    assert (caught.value.node, caught.value.module) == (linear.name, "fc")
    assert str(caught.value).startswith(
        "not a graph of level 'float': every node has a fake value: no meta['val'] (and 1 more)"
    )


def test_float_has_none_of_our_operators(gm: fx.GraphModule) -> None:
    broken(add_qdq(gm), "inc.dequantize.default before conversion", "float")


@pytest.mark.parametrize("level", ["float", "annotated", "qdq"])
def test_submodules_only_when_observed(gm: fx.GraphModule, level: str) -> None:
    relu = call(gm, aten.relu.default)
    g.insert_module(gm, "watch", Observer("minmax", QSpec("int8")), relu, after=relu)
    broken(gm, "call of submodule watch", level, "watch")


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({"weight": {"spec": {**SPEC, "qtype": "int99"}}}, "annotation 'weight.spec'"),
        ({"weight": {"spec": {**SPEC, "scheme": "sideways"}}}, "scheme must be one of"),
        ({"op": "relu", "note": [1, {"x": None}]}, None),
    ],
)
def test_annotations_are_specs(gm: fx.GraphModule, where: dict, text: str | None) -> None:
    g.inc_meta(call(gm, aten.relu.default)).update(where)
    broken(gm, text, "annotated") if text else verify(gm, "annotated")


def annotate(value: fx.Node, reader: fx.Node) -> None:
    g.inc_meta(value)["quant"] = {"0": {"spec": SPEC, "algorithm": "minmax", "group": value.name}}
    g.inc_meta(reader)["reads"] = {value.name: "0"}


@pytest.mark.parametrize("level", ["annotated", "observed"])
def test_quantized_values_are_floats(gm: fx.GraphModule, level: str) -> None:
    add = next(n for n in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor) if not g.is_float(n))
    annotate(add, next(iter(add.users)))
    broken(gm, "quantized value is torch.int64", level, add.name)


def test_quantized_values_are_read(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    annotate(relu, next(iter(relu.users)))
    verify(gm, "annotated")
    g.inc_meta(relu)["quant"]["1"] = g.inc_meta(relu)["quant"]["0"]
    broken(gm, "no reader wants it in format 1", "annotated", relu.name)


def test_reads_name_inputs_that_are_quantized(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    reader = next(iter(relu.users))
    g.inc_meta(reader)["reads"] = {"nobody": "0"}
    broken(gm, "reads 'nobody', which is not an input", "annotated", reader.name)
    g.inc_meta(reader)["reads"] = {relu.name: "0"}
    broken(gm, "which it is not annotated with", "annotated", reader.name)


def test_readers_behind_an_observer(gm: fx.GraphModule) -> None:
    relu = call(gm, aten.relu.default)
    users = list(relu.users)
    annotate(relu, users[0])
    watch = observe(gm, relu)
    g.replace_uses(relu, watch, only=users)
    verify(gm, "observed")


def test_written_buffers_are_not_quantized(gm: fx.GraphModule) -> None:
    add = next(n for n in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor) if g.is_float(n))
    seen = next(n for n in add.all_input_nodes if n.op == "get_attr")
    annotate(seen, add)
    broken(gm, "seen is a buffer that the graph writes to", "annotated", seen.name)


def test_weights_are_constants(gm: fx.GraphModule) -> None:
    linear, relu = call(gm, aten.linear.default), call(gm, aten.relu.default)
    g.inc_meta(linear)["weight"] = {"spec": SPEC, "algorithm": "minmax"}
    verify(gm, "annotated")
    g.inc_meta(relu)["weight"] = {"spec": SPEC, "algorithm": "minmax"}
    broken(gm, "reads no float attribute", "annotated", relu.name)


def observe(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    return g.insert_module(gm, "watch", Observer("minmax", QSpec("int8")), node, after=node)


def test_observers(gm: fx.GraphModule) -> None:
    watch = observe(gm, call(gm, aten.relu.default))
    verify(gm, "observed")
    broken(gm, "observer watch is still there", "lowered")
    watch.meta["val"] = g.val(call(gm, aten.linear.default)).double()
    broken(gm, "the values differ", "observed", "watch")


def test_observers_of_other_things(gm: fx.GraphModule) -> None:
    ids = observe(gm, gm.graph.find_nodes(op="placeholder")[1])
    broken(gm, "observes ids, which is torch.int64", "observed")
    gm.graph.erase_node(ids)
    seen = next(n for n in gm.graph.find_nodes(op="get_attr") if n.target == "seen")
    watch = observe(gm, seen)
    broken(gm, "observes seen, which the graph writes to", "observed")
    watch.args = (seen, seen)
    broken(gm, "an observer takes one tensor", "observed")


def qdq_edit(change: Callable[[fx.GraphModule], Any], text: str) -> Any:
    return pytest.param(change, text, id=text)


def set_arg(target: Any, position: int, value: Any, index: int = 0) -> Callable[[fx.GraphModule], None]:
    def change(gm: fx.GraphModule) -> None:
        node = call(gm, target, index)
        node.update_arg(position, value(gm) if callable(value) else value)

    return change


def attr(name: str) -> Callable[[fx.GraphModule], fx.Node]:
    return lambda gm: next(n for n in gm.graph.find_nodes(op="get_attr") if n.target == name)


def codes_as_zero_point(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.find_nodes(op="get_attr") if "codes" in str(n.target))


def ids(gm: fx.GraphModule) -> fx.Node:
    return gm.graph.find_nodes(op="placeholder")[1]


def quantize_seen(gm: fx.GraphModule) -> None:
    read, scale = attr("seen")(gm), torch.ones(1)
    scale = g.insert_get_attr(gm, read.next, g.set_tensor(gm, "s", scale))
    g.insert_call(gm, QUANTIZE, (read, scale, None, [-1], "int8"), after=scale)


def codes_through_view(gm: fx.GraphModule) -> None:
    q = call(gm, QUANTIZE)
    view = g.insert_call(gm, aten.permute.default, (q, [0, 1]), after=q)
    g.replace_uses(q, view)


def codes_from_arithmetic(gm: fx.GraphModule) -> None:
    q = call(gm, QUANTIZE)
    other = g.insert_call(gm, aten.ge.Scalar, (q, 0), after=q)
    cast = g.insert_call(gm, aten._to_copy.default, (other,), {"dtype": torch.uint8}, after=other)
    g.replace_uses(q, cast, only=[u for u in q.users if u is not other])


def packed(qtype: str) -> Callable[[fx.GraphModule], None]:
    def change(gm: fx.GraphModule) -> None:
        node = call(gm, DEQUANTIZE)
        read = g.insert_get_attr(gm, node, g.set_tensor(gm, "packed", torch.zeros(6, dtype=torch.uint8).view(3, 2)))
        codes = g.insert_call(gm, UNPACK, (read, "int4", [3, 4]), before=node)
        node.update_arg(0, codes)
        node.update_arg(4, qtype)

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        qdq_edit(set_arg(QUANTIZE, 0, attr("fc.bias")), "block [-1, -1] for a tensor of shape (3,)"),
        qdq_edit(set_arg(QUANTIZE, 0, ids), "only floats are quantized"),
        qdq_edit(quantize_seen, "input seen is written to by the graph"),
        qdq_edit(set_arg(DEQUANTIZE, 4, "uint8"), "codes of uint8 are torch.uint8"),
        qdq_edit(set_arg(DEQUANTIZE, 4, "uint7", 1), "codes were made as uint8 and are read as uint7"),
        qdq_edit(set_arg(DEQUANTIZE, 4, "int88"), "unknown qtype 'int88'"),
        qdq_edit(set_arg(QUANTIZE, 2, None), "made without a zero point and are read with one"),
        qdq_edit(set_arg(DEQUANTIZE, 2, None, 1), "made with a zero point and are read without one"),
        qdq_edit(codes_from_arithmetic, "not from quantize or an attribute"),
        qdq_edit(packed("int3"), "codes were packed as int4 and are read as int3"),
        qdq_edit(set_arg(QUANTIZE, 3, [1, -1]), "block [1, -1] of [2, 4] needs [2, 1]"),
        qdq_edit(set_arg(QUANTIZE, 1, attr("x_zero_point")), "scale is torch.int32"),
        qdq_edit(set_arg(QUANTIZE, 2, codes_as_zero_point), "zero point has shape [3, 4], must be [1, 1]"),
    ],
)
def test_qdq_rules(gm: fx.GraphModule, change: Callable, text: str) -> None:
    add_qdq(gm)
    change(gm)
    broken(gm, text, "qdq")
    broken(gm, text, "lowered")


@pytest.mark.parametrize("change", [codes_through_view, packed("int4")])
def test_codes_may_be_moved_and_unpacked(gm: fx.GraphModule, change: Callable) -> None:
    add_qdq(gm)
    change(gm)
    verify(gm)


def test_arguments_by_name(gm: fx.GraphModule) -> None:
    """Our operators may be called with keywords; the rules see the same arguments."""
    add_qdq(gm)
    for target in (QUANTIZE, DEQUANTIZE):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            names = [a.name for a in target._schema.arguments]
            node.kwargs = {**dict(zip(names[1:], node.args[1:], strict=False)), **node.kwargs}
            node.args = node.args[:1]
    verify(gm)
    node = call(gm, QUANTIZE)
    node.kwargs = {**node.kwargs, "block": [1, -1]}
    broken(gm, "block [1, -1] of [2, 4] needs [2, 1]", "qdq")


def test_formats_without_zero_point(gm: fx.GraphModule) -> None:
    linear = call(gm, aten.linear.default)
    scale = g.insert_get_attr(gm, linear, g.set_tensor(gm, "s", torch.ones(1, 1)))
    q = g.insert_call(gm, QUANTIZE, (linear.args[0], scale, None, [-1, -1], "fp8_e4m3"), before=linear)
    verify(gm, "qdq")
    zero = g.insert_get_attr(gm, scale, g.set_tensor(gm, "z", torch.zeros(1, 1, dtype=torch.int32)))
    q.update_arg(2, zero)
    broken(gm, "fp8_e4m3 has no zero point", "qdq")


def test_bodies_of_control_flow_are_checked() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))

    gm = capture(Branch(), (torch.ones(2),))
    body = next(m for m in gm.children() if isinstance(m, fx.GraphModule))
    for node in body.graph.nodes:
        node.meta.pop("val", None)
    broken(gm, "no meta['val']")


def test_per_channel_specs_parse(gm: fx.GraphModule) -> None:
    spec = QSpec("int4", granularity=PerChannel(0)).to_json()
    g.inc_meta(call(gm, aten.linear.default))["weight"] = {"spec": spec, "algorithm": "minmax"}
    verify(gm, "annotated")
