"""The Q-DQ graph: one pair between neighbours, shared scales, one carrier for a tied weight, and one meaning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.capture import capture
from inc_graph.errors import CalibrationError
from inc_graph.graph import clone, get_level, get_tensor, is_float
from inc_graph.numerics import fake_quantize
from inc_graph.oppattern import pattern_of
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.recipe import OpQuant
from inc_graph.spec import PerChannel, PerGroup, PerTensor, QSpec
from inc_graph.verify import verify
from tests.golden_check import check_golden
from tests.passes.pipelines import (
    CORRECTED,
    INT8,
    S8,
    WEIGHT_ONLY,
    bits,
    calls,
    check_pairs,
    find,
    find_one,
    float_twin,
    kind,
    name,
    observe,
    pairs,
    qparams,
    quantize,
    recipe,
    run,
    same_bits,
    sqnr,
    text,
)

SIGNED = OpQuant(S8, INT8.weight)


class Net(nn.Module):
    """Convolution, residual sum, concatenation, pooling, views, two layers that share a weight, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Hardswish(), nn.Conv2d(4, 4, 1))
        self.table = nn.Embedding(7, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        y = F.max_pool2d(torch.cat([self.block(x) + x, x], 1), 2)
        z = y.flatten(2).permute(0, 2, 1) + self.table(index)[:, None]
        z = self.b(F.gelu(self.a(z)))
        return {"z": z, "pieces": torch.stack([torch.softmax(p, 1) for p in z.chunk(2, 2)])}


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 6, 6, generator=generator), torch.randint(0, 7, (2,), generator=generator)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def qdq() -> fx.GraphModule:
    return quantize(net(), *inputs(), plan=recipe(everything=CORRECTED), data=[inputs(0), inputs(1)])


# ------------------------------------------------------------------------------------------------------------ golden
def test_golden(qdq: fx.GraphModule) -> None:
    check_golden("convert-qdq/positive.txt", text(qdq))


def test_golden_rejected() -> None:
    """Without data there is no scale: nothing is converted, and the message says what to do."""
    gm = observe(net(), *inputs())
    with pytest.raises(CalibrationError) as nothing:
        run(gm, "convert-qdq")
    some = next(m for m in gm.modules() if getattr(m, "elements", None) == 0)
    some(torch.ones(1, 3, 6, 6))
    with pytest.raises(CalibrationError) as part:
        run(gm, "convert-qdq")
    check_golden("convert-qdq/rejected.txt", f"{nothing.value}\n\n{part.value}\n")
    assert get_level(gm) == "observed"


# -------------------------------------------------------------------------------------------------------------- pairs
def test_pairs(qdq: fx.GraphModule) -> None:
    verify(qdq, "qdq")
    check_pairs(qdq)
    assert not list(qdq.graph.find_nodes(op="call_module")) and not any("observer" in n for n, _ in qdq.named_modules())


def test_one_pair_between_neighbours() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    gm = quantize(model, torch.randn(3, 4))
    assert [c for c in calls(gm) if c != "linear"] == ["relu", "gelu"] and len(list(pairs(gm))) == 3
    for act in ("relu", "gelu"):
        (q,) = find_one(gm, act).users
        (dq,) = q.users
        (reader,) = dq.users
        assert is_quantize(q) and is_dequantize(dq) and reader in find(gm, "linear")
        assert find_one(gm, act).args[0] in find(gm, "linear")  # nothing between the layer and its activation


@pytest.mark.parametrize(
    "move",
    [
        lambda x, y: torch.cat([x, y], 1)[:, :4],
        lambda x, y: F.max_pool2d(x, 2),
        lambda x, y: x.reshape(2, 8, 3, 6).transpose(1, 2).reshape(2, 4, 6, 6),
        lambda x, y: F.pad(x, (0, 1, 2, 0)),
        lambda x, y: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
    ],
)
def test_what_moves_elements_keeps_them_exactly(move: Callable[..., Tensor]) -> None:
    """Both sides have the same scale, so the second rounding changes nothing: the codes could move instead."""

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(move(self.a(x), self.b(x)))

    torch.manual_seed(0)
    gm = quantize(Moves(), torch.randn(2, 3, 6, 6))
    check_pairs(gm)
    values: dict[str, Tensor] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Record(gm, garbage_collect_values=False).run(torch.randn(2, 3, 6, 6))
    carried = [(q, dq) for q, dq in pairs(gm) if (p := pattern_of(q.args[0])) is not None and p.role == "carrier"]
    assert carried and all(torch.equal(values[q.args[0].name], values[dq.name]) for q, dq in carried)
    assert len({str(qparams(gm, q)) for q, _ in pairs(gm)}) == 2  # the input's, and one for all the rest


def test_concatenation_has_one_scale_that_covers_all_parts() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.cat([x, y], 1))

    x, y = torch.rand(3, 4), torch.rand(3, 4) * -9
    gm = quantize(Cat(), x, y)
    found = [qparams(gm, q) for q, _ in pairs(gm)]
    assert len(found) == 3 and all(p == found[0] for p in found)
    assert found[0][0][0] == pytest.approx(float((x.max() - y.min()) / 255))


def test_residual_add_reads_the_accumulator(qdq: fx.GraphModule) -> None:
    add = find(qdq, "add")[0]
    assert add.args[0] in find(qdq, "conv2d") and is_dequantize(add.args[1])


def test_two_formats_of_one_value() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x).relu()
            return self.b(y), self.c(y), y

    gm = quantize(Both(), torch.randn(8, 4), plan=recipe(name("b", SIGNED)))
    relu = find_one(gm, "relu")
    types = {qparams(gm, u)[2] for u in relu.users if is_quantize(u)}
    assert types == {"uint8", "int8"} and any(u.op == "output" for u in relu.users)
    check_pairs(gm)


def test_float_readers_see_the_float_value() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), torch.softmax(x, 1)

    x = torch.randn(3, 4)
    gm = quantize(Reads(), x)
    assert torch.equal(gm(x)[1], torch.softmax(x, 1))
    assert find_one(gm, "softmax").args[0].op == "placeholder"


# ------------------------------------------------------------------------------------------------- weights, constants
def test_tied_weights_become_one_carrier(qdq: fx.GraphModule) -> None:
    a, b = find(qdq, "linear")
    assert a.args[1] is b.args[1] and is_dequantize(a.args[1])
    assert not {"a.weight", "b.weight", "a_weight"} & {n for n, _ in qdq.named_parameters()}


def test_a_table_tied_to_a_head_becomes_one_carrier() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(F.relu(self.table(i)))

    gm = quantize(Language(), torch.arange(9)[None])
    assert find_one(gm, "embedding").args[0] is find_one(gm, "linear").args[1]
    assert sum(b.dtype == torch.int8 for b in gm.buffers()) == 1 and not list(gm.parameters())
    gm = quantize(Language(), torch.arange(9)[None], plan=recipe(kind("embedding")))  # copied on write
    assert find_one(gm, "embedding").args[0].op == "get_attr" and is_dequantize(find_one(gm, "linear").args[1])


def test_views_of_one_memory_are_not_one_weight() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            both = torch.randn(8, 4)
            self.a.weight, self.b.weight = nn.Parameter(both[:4]), nn.Parameter(both[4:])

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - self.b(x)

    x = torch.randn(16, 4)
    model = Halves()
    gm = quantize(model, x)
    assert sqnr(model(x), gm(x)) > 20


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv2d(4, 6, 3), (1, 4, 5, 5), 0),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), 0),
        (nn.ConvTranspose2d(4, 6, 3), (1, 4, 5, 5), 1),
        (nn.Linear(4, 6), (3, 4), 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights(layer: nn.Module, shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    """One scale an output channel, half the quantization step of error at most."""
    torch.manual_seed(0)
    model = copy.deepcopy(layer).to(dtype).eval()
    x = torch.randn(*shape, dtype=dtype)
    gm = quantize(model, x)
    node = find_one(gm, calls(gm)[0])
    codes, scale, zero, block, _, out = node.args[1].args
    w = get_tensor(gm, codes)
    assert w.dtype == torch.int8 and zero is None and out == dtype and gm(x).dtype == dtype
    assert [d for d, b in enumerate(block) if b == 1] == [axis] and get_tensor(gm, scale).numel() == w.shape[axis]
    weight: Any = model.weight
    error = (w.float() * get_tensor(gm, scale) - weight.detach().float()).abs()
    assert bool((error <= 0.51 * get_tensor(gm, scale)).all())


@pytest.mark.parametrize(
    "spec",
    [
        QSpec("int8", "symmetric", PerTensor()), QSpec("int4", "asymmetric", PerGroup(2)),
        QSpec("fp8_e4m3", "symmetric", PerChannel(0)), QSpec("nf4", "symmetric", PerGroup(4)),
        QSpec("uint8", "symmetric", PerChannel(0)),
    ],
)  # fmt: skip
def test_formats_of_weights(spec: QSpec) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(16, 8), nn.Linear(8, 8)
    gm = quantize(layer, x, plan=recipe(everything=OpQuant(None, spec)))
    assert find_one(gm, "linear").args[0].op == "placeholder" and sqnr(layer(x), gm(x)) > 15


@pytest.mark.parametrize("act", ["fp8_e4m3", "int16", "uint7"])
def test_formats_of_activations(act: str) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(16, 8), nn.Linear(8, 8)
    scheme = "asymmetric" if act.startswith("uint") else "symmetric"
    gm = quantize(layer, x, plan=recipe(everything=replace(INT8, activation=QSpec(act, scheme))))
    assert sqnr(layer(x), gm(x)) > 25


def test_activations_by_channel() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8) * torch.logspace(-3, 3, 8)
    layer = nn.Linear(8, 8)
    what = replace(INT8, activation=QSpec("int8", "symmetric", PerChannel(1)))
    gm = quantize(layer, x, plan=recipe(everything=what))
    q, _ = next(pairs(gm))
    assert len(qparams(gm, q)[0]) == 8 and sqnr(layer(x), gm(x)) > 30


def test_a_parameter_read_like_an_activation_is_quantized_once() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.w)

    torch.manual_seed(0)
    model, x = Experts(), torch.randn(2, 5, 4)
    gm = quantize(model, x)
    codes = find_one(gm, "bmm").args[1].args[0]
    assert codes.op == "get_attr" and get_tensor(gm, codes).dtype == torch.uint8 and not list(gm.parameters())
    assert sqnr(model(x), gm(x)) > 30


def test_an_empty_range() -> None:
    """A value that is always zero has scale 1 and stays zero."""
    gm = quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.zeros(2, 4))
    assert torch.isfinite(gm(torch.zeros(2, 4))).all()


# --------------------------------------------------------------------------------------------------------- activations
def test_activations_equal_fake_quantization() -> None:
    """What the layer reads is torch's own fake quantization of its input, bit for bit."""
    torch.manual_seed(0)
    x, layer = torch.randn(64, 8) * 3 + 1, nn.Linear(8, 8)
    gm = quantize(layer, x)
    _, dq = next(pairs(gm))
    (scale,), zero, _ = qparams(gm, dq)
    want = torch.fake_quantize_per_tensor_affine(x, scale, zero[0] if zero else 0, 0, 255)
    block = [-1, -1]
    s, z = (get_tensor(gm, p) for p in dq.args[1:3])
    assert torch.equal(fake_quantize(x, s, z, block, "uint8"), want)
    weight = get_tensor(gm, find_one(gm, "linear").args[1].args[0]).float() * get_tensor(
        gm, find_one(gm, "linear").args[1].args[1]
    )
    assert torch.equal(gm(x), F.linear(want, weight, layer.bias))


def test_rank_changes_keep_one_scale_tensor_a_rank(qdq: fx.GraphModule) -> None:
    for node in qdq.graph.nodes:
        if is_quantize(node):
            scale = get_tensor(qdq, node.args[1])
            assert scale.ndim == node.meta["val"].ndim == len(node.args[3]) and is_float(node.args[0])


# ------------------------------------------------------------------------------------------------------------- meaning
def outputs(run_it: Callable[..., Any]) -> list[Any]:
    with torch.no_grad():
        return [run_it(*inputs(seed)) for seed in (0, 1, 5)]


@pytest.fixture(scope="module")
def dynamic_qdq() -> fx.GraphModule:
    sizes = ({0: torch.export.Dim("batch", min=2, max=8)}, {0: torch.export.Dim("batch", min=2, max=8)})
    return quantize(net(), *inputs(), plan=recipe(everything=CORRECTED), data=[inputs(0), inputs(1)], dynamic=sizes)


def test_meaning_after_a_copy(qdq: fx.GraphModule) -> None:
    assert same_bits(outputs(copy.deepcopy(qdq)), outputs(qdq))


def test_meaning_after_export(qdq: fx.GraphModule) -> None:
    program = torch.export.export(qdq, inputs())
    assert same_bits(outputs(program.module()), outputs(qdq))
    program = program.run_decompositions()  # to core aten
    assert same_bits(outputs(program.module()), outputs(qdq))


def test_meaning_after_capture(qdq: fx.GraphModule) -> None:
    again = capture(qdq, inputs())
    assert same_bits(outputs(again), outputs(qdq))
    assert sum(is_quantize(n) for n in again.graph.nodes) == sum(is_quantize(n) for n in qdq.graph.nodes)


def test_meaning_under_torch_compile(qdq: fx.GraphModule) -> None:
    torch._dynamo.reset()
    assert same_bits(outputs(torch.compile(qdq, backend="aot_eager", fullgraph=True)), outputs(qdq))


def test_meaning_with_a_dynamic_batch(dynamic_qdq: fx.GraphModule) -> None:
    x, index = torch.randn(5, 3, 6, 6), torch.randint(0, 7, (5,))
    with torch.no_grad():
        want = dynamic_qdq(x, index)
        dims = ({0: torch.export.Dim("batch", min=2, max=8)},) * 2
        again = torch.export.export(dynamic_qdq, inputs(), dynamic_shapes={"x": dims[0], "index": dims[1]}).module()
        assert same_bits(again(x, index), want)
        torch._dynamo.reset()
        assert same_bits(torch.compile(dynamic_qdq, backend="aot_eager", dynamic=True)(x, index), want)


def test_annotations_survive_export(qdq: fx.GraphModule) -> None:
    program = torch.export.export(qdq, inputs())
    notes = [
        n.meta.get("custom", {}).get("inc", {}).get("op") for n in program.graph.nodes if "linear" in str(n.target)
    ]
    assert notes == ["linear", "linear"]


def test_the_users_model_and_the_observed_graph_stay() -> None:
    model = net()
    unchanged = bits(model)
    observed = observe(model, *inputs())
    observed(*inputs())
    before = text(observed)
    run(clone(observed), "correct-bias,convert-qdq")
    assert unchanged() and text(observed) == before
    assert not any(p is q for p in quantize(model, *inputs()).parameters() for q in model.stem[0].parameters())


def test_weight_only_needs_no_data() -> None:
    gm = run(observe(net(), *inputs(), plan=recipe(everything=WEIGHT_ONLY)), "convert-qdq").graph
    assert not list(pairs(gm)) and all(is_dequantize(n.args[1]) for n in find(gm, "linear"))


def test_close_to_float(qdq: fx.GraphModule) -> None:
    twin = float_twin(net(), *inputs())
    assert min(sqnr(twin(*inputs(s)), qdq(*inputs(s))) for s in (0, 1)) > 30
