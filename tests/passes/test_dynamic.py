"""Dynamic quantization in the graph: where scales are chosen at run time, and what is left alone."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.calibrate import Observer
from inc_graph.graph import peek_meta
from inc_graph.numerics import choose_qparams, fake_quantize
from inc_graph.ops import is_choose_qparams, is_dequantize, is_quantize
from inc_graph.recipe import OpQuant
from inc_graph.spec import PerChannel, PerTensor, PerToken, QSpec
from inc_graph.verify import verify
from tests.golden_check import check_golden
from tests.passes.pipelines import INT8, find, kind, name, observe, recipe, run, text

TOKENS = OpQuant(QSpec("uint8", "asymmetric", PerToken(), dynamic=True), QSpec("int8", "symmetric", PerChannel(0)))
TENSOR = replace(TOKENS, activation=QSpec("int8", "symmetric", PerTensor(), dynamic=True))


class Block(nn.Module):
    """Three readers of one value, a product of two activations, views and sums between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        scores = torch.matmul(heads[0], heads[1].transpose(-1, -2)) + mask
        y = torch.matmul(torch.softmax(scores, -1), heads[2]).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(x)))


def block() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Block().eval(), (torch.randn(2, 3, 8), torch.randn(3, 3))


def convert(model: nn.Module, *args: Tensor, plan: OpQuant = TOKENS, **kwargs: object) -> fx.GraphModule:
    observed = observe(model, *args, plan=recipe(everything=plan), **kwargs)
    assert not any(isinstance(m, Observer) for m in observed.modules())  # nothing to calibrate
    gm = run(observed, "convert-qdq").graph
    verify(gm, "qdq")
    return gm


def test_golden() -> None:
    model, inputs = block()
    check_golden("dynamic/positive.txt", text(convert(model, *inputs)))


def test_golden_rejected() -> None:
    """Masks, positions, integers, mutated buffers and layers left float."""

    class Rejected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("state", torch.ones(4, 4))

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            self.state.add_(1)
            positions = torch.arange(4, dtype=torch.float32)[:, None].expand(4, 4)
            mask = (index > 0).float()[:, None].expand(4, 4)
            y = self.a(torch.matmul(x, positions)) + torch.matmul(x, mask)
            return self.b(y) + torch.matmul(x, self.state) + torch.matmul(index[None], index[:, None])

    gm = observe(
        Rejected(), torch.randn(4, 4), torch.arange(4), plan=recipe(name("b", None), everything=TOKENS)
    )  # fmt: skip
    gm = run(gm, "convert-qdq").graph
    verify(gm, "qdq")
    assert sum(map(is_choose_qparams, gm.graph.nodes)) == 1
    check_golden("dynamic/rejected.txt", text(gm))


def test_readers_of_one_value_share_its_range() -> None:
    model, inputs = block()
    gm = convert(model, *inputs)
    q, k, v = find(gm, "linear")[:3]
    assert q.args[0] is k.args[0] is v.args[0] and is_dequantize(q.args[0])
    assert sum(map(is_choose_qparams, gm.graph.nodes)) == sum(map(is_quantize, gm.graph.nodes)) == 4 + 4


def test_it_means_what_the_numerics_say() -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    for plan in (TOKENS, TENSOR):
        gm = convert(layer, x, plan=plan)
        spec = plan.activation
        assert spec is not None
        block = spec.block(2)
        values = fake_quantize(x, *choose_qparams(x, block, spec.qtype, spec.scheme), block, spec.qtype)
        (linear,) = find(gm, "linear")
        weight = next(t for n, t in gm.named_buffers() if n.endswith("_q")).float()
        weight = weight * next(t for n, t in gm.named_buffers() if n.endswith("scale"))
        assert torch.equal(gm(x), F.linear(values, weight, layer.bias)) and linear is not None


def test_a_symmetric_signed_format_has_no_zero_point() -> None:
    gm = convert(nn.Linear(4, 4), torch.randn(2, 4), plan=TENSOR)
    (q,) = (n for n in gm.graph.nodes if is_quantize(n))
    assert q.args[2] is None and sum(n.target is operator.getitem for n in gm.graph.nodes) == 1


def test_nothing_travels_through_views_and_sums() -> None:
    model, inputs = block()
    gm = convert(model, *inputs)
    for node in gm.graph.nodes:
        if is_dequantize(node) and is_quantize(node.args[0]):
            assert all(u.target._schema.name in ("aten::linear", "aten::matmul") for u in node.users)
    assert peek_meta(find(gm, "add")[-1]).get("rule") is None


def test_beside_static_layers() -> None:
    """A value that one layer reads dynamically and another one statically is quantized in both ways."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(4, 4, 1), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.fc(x)

    x, model = torch.randn(2, 4, 5), Two().eval()
    observed = observe(model, x, plan=recipe(kind("linear", TOKENS), everything=INT8))
    assert sum(isinstance(m, Observer) for m in observed.modules()) == 1
    observed(x)
    gm = run(observed, "correct-bias,convert-qdq").graph
    verify(gm, "qdq")
    assert sum(map(is_choose_qparams, gm.graph.nodes)) == 1 and sum(map(is_quantize, gm.graph.nodes)) == 2
    assert (gm(x) - model(x)).norm() < 0.05 * gm(x).norm()


def test_any_number_of_rows() -> None:
    gm = convert(nn.Linear(8, 4), torch.randn(6, 8), dynamic=({0: torch.export.Dim("rows", min=2, max=100)},))
    for rows in (2, 7, 50):
        assert gm(torch.randn(rows, 8)).shape == (rows, 4)
