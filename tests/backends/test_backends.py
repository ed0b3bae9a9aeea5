"""What every backend promises: a bit-exact reference, a true capability table, nothing left out in silence."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from inc_graph.capture import capture
from inc_graph.errors import LoweringError, VerifyError
from inc_graph.export import export
from inc_graph.graph import get_level, insert_call, set_level
from inc_graph.lowering.base import Backend, Claim, Context
from inc_graph.oppattern import argument
from inc_graph.ops import DEQUANTIZE
from inc_graph.pattern import Any as Anything
from inc_graph.pattern import Match, P
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.recurrent import GRU_STEPS, LSTM_STEPS, PROJECTION
from inc_graph.registry import BACKENDS
from tests.backends.qdq import Builder, Params, calls, lower, run_both

aten = torch.ops.aten
ACT = Params(0.05, 100)
FORMATS = {
    "uint8": Params(0.05, 100),
    "int8": Params(0.05, -28, "int8"),
    "uint7": Params(0.1, 50, "uint7"),
    "int7": Params(0.1, -14, "int7"),
}


def network() -> tuple[fx.GraphModule, Tensor]:
    """conv -> relu -> act -> max_pool -> act -> flatten -> act -> linear, and an embedding."""
    b = Builder()
    x = ACT.values(2, 3, 8, 8)
    v = b.act(b.input(x), ACT)
    v = b.call(aten.conv2d.default, v, b.weight(torch.randn(4, 3, 3, 3)), None)
    v = b.act(b.call(aten.relu.default, v), ACT)
    v = b.act(b.call(aten.max_pool2d.default, v, [2, 2]), ACT)
    v = b.act(b.call(aten.flatten.using_ints, v, 1), ACT)
    v = b.call(aten.linear.default, v, b.weight(torch.randn(7, 36)), b.const(torch.randn(7)))
    rows = b.call(aten.embedding.default, b.weight(torch.randn(5, 7)), b.const(torch.tensor([1, 3])))
    return b.done(b.call(aten.add.Tensor, v, rows)), x


# --------------------------------------------------------------------------------------------------------- reference
def test_the_eager_backend_is_the_q_dq_graph_itself() -> None:
    gm, x = network()
    lowered = lower(gm, "eager")
    assert torch.equal(*run_both(gm, lowered, x)[0])
    assert get_level(lowered.graph) == "lowered" and get_level(gm) == "qdq"
    assert [n.target for n in lowered.graph.graph.nodes] == [n.target for n in gm.graph.nodes]
    assert not lowered.packed and not lowered.report.kernels
    reasons = {reason for _, reason in lowered.report.missed.values()}
    assert reasons == {"backend 'eager' computes it on the reference"}
    assert lowered.report.reference["inc.quantize.default"] == 4


def test_lowering_twice_gives_the_same() -> None:
    gm, x = network()
    first, second = lower(gm), lower(gm)
    assert str(first.report) == str(second.report) and calls(first) == calls(second)
    assert torch.equal(first.graph(x)[0], second.graph(x)[0])


def test_the_report_says_what_happened() -> None:
    gm, _ = network()
    report = lower(gm).report
    assert report.claimed == {"int8 convolution": 1, "int8 linear": 1, "int8 lookup": 1, "move": 2, "quantize": 1}
    assert set(report.kernels) == {"conv2d_default", "linear_default", "embedding_default"}
    assert not report.missed and not report.reference
    assert str(report) == "inductor: 1 int8 convolution, 1 int8 linear, 1 int8 lookup, 2 move, 1 quantize"


def test_an_operator_without_a_kernel_is_reported() -> None:
    b = Builder()
    x = ACT.values(2, 3, 4)
    v = b.act(b.input(x), ACT)
    gm = b.done(b.call(aten.bmm.default, v, b.act(b.call(aten.transpose.int, v, 1, 2), ACT)))
    report = lower(gm).report
    assert report.missed["bmm_default"] == ("", "backend 'inductor' has no quantized kernel for matmul")
    assert "bmm_default: backend 'inductor' has no quantized kernel for matmul" in str(report)


# ------------------------------------------------------------------------------------------------------ capabilities
def small(op: str, act: str | None, weight: str | None) -> tuple[fx.GraphModule, Tensor]:
    """One quantized operator of a type in the given formats."""
    b = Builder()
    if op == "embedding":
        scheme = "asymmetric" if weight and weight.startswith("u") else "symmetric"
        index = torch.tensor([0, 2])
        i = b.input(index)
        table = b.weight(torch.rand(3, 4), weight or "int8", scheme=scheme)
        return b.done(b.call(aten.embedding.default, table, i)), index
    if op == "projection":  # read by steps whose own weight is int8
        x = torch.randn(3, 2, 16)
        i = b.input(x)
        first = b.call(aten.select.int, i, 0, 0)
        h, c = (b.call(aten.slice.Tensor, first, 1, 0, n) for n in (2, 4))
        scheme = "asymmetric" if weight and weight.startswith("u") else "symmetric"
        steps, second = (
            b.weight(torch.randn(16, 2) / 4, "int8"),
            b.weight(torch.randn(2, 4), weight or "", scheme=scheme),
        )
        projection = b.call(PROJECTION, second)
        return b.done(b.call(LSTM_STEPS, i, h, c, steps, False, None, projection)), x
    if op in ("lstm_steps", "gru_steps"):
        x, gates = torch.randn(3, 2, 16 if op == "lstm_steps" else 12), 4 if op == "lstm_steps" else 3
        i = b.input(x)
        state = b.call(aten.slice.Tensor, b.call(aten.select.int, i, 0, 0), 1, 0, 4)
        scheme = "asymmetric" if weight and weight.startswith("u") else "symmetric"
        w = b.weight(torch.randn(4 * gates, 4) / 4, weight or "int8", scheme=scheme)
        if op == "lstm_steps":
            return b.done(b.call(LSTM_STEPS, i, state, state, w, False)), x
        return b.done(b.call(GRU_STEPS, i, state, w, None, False)), x
    p = FORMATS[act or "uint8"]
    dims = int(op[-2]) if op[-1] == "d" and op[-2].isdigit() else 0
    x = p.values(2, 4, *[5] * dims)
    v = b.act(b.input(x), p) if act or op == "add" else b.input(x)
    if op in ("linear", "add"):
        scheme = "asymmetric" if act is None and weight and weight.startswith("u") else "symmetric"
        y = b.call(aten.linear.default, v, b.weight(torch.randn(4, 4) / 4, weight or "int8", scheme=scheme), None)
        return b.done(b.act(b.call(aten.add.Tensor, y, v), p) if op == "add" else y), x
    block = [-1, 1] if "transpose" in op else [1, -1]
    w = b.weight(torch.randn(4, 4, *[3] * dims) / 9, weight or "int8", block + [-1] * dims)
    target = getattr(aten, op)
    target = target.input if "transpose" in op and dims > 1 else target.default
    return b.done(b.call(target, v, w, None)), x


TABLE = [(op, a, w) for op, pairs in BACKENDS.get("inductor").capabilities.items() for a, w in pairs]


@pytest.mark.parametrize("op, act, weight", TABLE)
def test_every_entry_of_the_capability_table_has_a_kernel(
    op: str, act: str | None, weight: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INC_COMPUTE_DTYPE", "float32")  # the tolerance below is that of float32
    gm, x = small(op, act, weight)
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert (expected - got).abs().max() <= (FORMATS[act].scale if act and op == "add" else 1e-4)
    wanted = {"embedding_default"} if op == "embedding" else {n for n in lowered.report.kernels if "add" not in n}
    assert wanted == set(lowered.report.kernels) and not lowered.report.missed.keys() - {"add_tensor"}
    assert len(wanted) == (2 if op == "projection" else 1)  # with the steps that it is for
    if op == "add" and act in ("uint8", "int8"):
        assert lowered.report.absorbed == {"add_tensor": next(iter(wanted))}


@pytest.mark.parametrize(
    "op, act, weight",
    [
        ("linear", "uint8", "int4"),
        ("conv2d", "uint8", "uint8"),
        ("conv_transpose1d", "int8", "int2"),
        ("embedding", None, "int16"),
    ],
)
def test_what_the_table_does_not_list_has_no_kernel(op: str, act: str | None, weight: str) -> None:
    assert (act, weight) not in BACKENDS.get("inductor").capabilities[op]
    gm, x = small(op, act, weight)
    lowered = lower(gm)
    assert not lowered.report.kernels and len(lowered.report.missed) == 1
    assert torch.equal(*run_both(gm, lowered, x)[0])


def test_supported_operators_come_from_the_table() -> None:
    backend = BACKENDS.get("inductor")
    assert backend.supported() == tuple(sorted(backend.capabilities))
    assert BACKENDS.get("eager").supported() is None


# ------------------------------------------------------------------------------------------------------ availability
def test_a_backend_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = network()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(LoweringError, match="need an x86 CPU, this is riscv64") as caught:
        BACKENDS.get("inductor").lower(gm)
    assert "available here: 'eager'" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert BACKENDS.get("inductor").available() == "this torch was built without oneDNN"
    assert BACKENDS.get("eager").available() is None


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_only_a_q_dq_graph_is_lowered(backend: str) -> None:
    gm = capture(nn.Linear(2, 2).eval(), (torch.randn(1, 2),))
    with pytest.raises(LoweringError, match="this one is at level 'float'"):
        BACKENDS.get(backend).lower(gm)
    lowered = lower(network()[0], backend).graph
    with pytest.raises(LoweringError, match="this one is at level 'lowered'"):
        BACKENDS.get(backend).lower(lowered)


# ------------------------------------------------------------------------------------------------------- own backends
class Doubling(Backend):
    """A backend of tests: its linear layer is `linear` on dequantized inputs, by a kernel that may be wrong."""

    name = "doubling"
    capabilities: ClassVar = {"linear": (("uint8", "int8"),)}
    broken = False

    def available(self) -> str | None:
        return None

    def claims(self) -> tuple[Claim, ...]:
        pattern = P(aten.linear.default, P(DEQUANTIZE, Anything("codes"), name="x"), P(DEQUANTIZE), Anything())
        return (Claim("linear of ours", pattern, self.rewrite, self.check),)

    def check(self, context: Context, found: Match) -> str | None:
        return None if argument(found["x"], 4) == "uint8" else f"activations of type {argument(found['x'], 4)}"

    def rewrite(self, context: Context, found: Match) -> None:
        node = found.root
        new = insert_call(context.gm, aten.linear.default, node.args, before=node)
        if self.broken:
            del new.meta["val"]
        node.replace_all_uses_with(new)


def one_linear(qtype: str, weight: bool = True) -> fx.GraphModule:
    b = Builder()
    v = b.act(b.input(torch.randn(2, 3)), FORMATS[qtype])
    w = torch.randn(3, 3)
    return b.done(b.call(aten.linear.default, v, b.weight(w) if weight else b.const(w), None))


def test_a_claim_is_a_pattern_a_check_and_a_rewrite() -> None:
    lowered = Doubling().lower(one_linear("uint8"))
    assert lowered.report.kernels == {"linear_default": ("linear of ours", "")} and not lowered.report.missed
    assert Doubling().lower(one_linear("int8")).report.missed == {"linear_default": ("", "activations of type int8")}
    ((_, reason),) = Doubling().lower(one_linear("uint8", weight=False)).report.missed.values()
    assert reason.endswith("get_attr is not inc.dequantize")  # what the pattern missed


def test_a_lowered_graph_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubling, "broken", True)
    with pytest.raises(VerifyError, match="fake value"):
        Doubling().lower(one_linear("uint8"))
    monkeypatch.setenv("INC_VERIFY", "0")
    Doubling().lower(one_linear("uint8"))


# ----------------------------------------------------------------------------------------------------------- gradients
def test_a_lowered_graph_asks_for_no_gradient_and_shares_the_parameters() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = Normed().eval()
    gm = capture(model, (torch.randn(2, 4),))
    set_level(gm, "qdq")
    for backend in ("eager", "inductor"):
        lowered = lower(gm, backend).graph
        assert not lowered(torch.randn(2, 4)).requires_grad
        assert lowered.norm.weight.data_ptr() == model.norm.weight.data_ptr() and model.norm.weight.requires_grad
        assert gm.norm.weight.requires_grad


def test_files_with_an_underscore_are_not_backends() -> None:
    assert {"eager", "inductor"} <= set(BACKENDS.names())
    assert not any(name.startswith("_") for name in BACKENDS.names())


# ----------------------------------------------------------------------------------------------------------- public API
def test_the_graph_of_a_model_is_its_eager_backend_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    ).eval()
    x, other = torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)
    exported = export(model, (x,), ({0: torch.export.Dim("n", min=1, max=9)},))
    prepared = prepare(exported, StaticQuantConfig())
    prepared(x)
    fast, eager = convert(prepared), convert(prepared, backend="eager")
    for z in (x, other):
        assert torch.equal(fast.graph(z), eager(z)) and torch.equal(eager.graph(z), eager(z))
        assert (fast(z) - eager(z)).abs().max() <= 0.05 * eager(z).abs().max()
    assert (len(fast.report.kernels), len(eager.report.kernels)) == (2, 0)
    assert eager.report.reference and all("reference" in line.detail for line in eager.report.reference)
