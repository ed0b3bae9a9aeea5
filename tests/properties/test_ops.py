"""The ``inc::`` operators: registration, fake results, gradients, and life through export, compilation and copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ALL, INTS, MX, Case, cases, same, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

from inc_graph import numerics as N
from inc_graph import ops
from inc_graph.errors import SpecError
from inc_graph.qtypes import get_qtype

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
few = settings(max_examples=8)  # opcheck traces four times an example


def calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """A call of each operator on the case's tensor, with and without a zero point."""
    block, name = list(case.block), case.qtype.name
    scale, zero_point = N.choose_qparams(case.x, block, name, case.method)
    q = N.quantize(case.x, scale, zero_point, block, name)
    return [
        (ops.CHOOSE_QPARAMS, (case.x, block, name, case.method)),
        (ops.QUANTIZE, (case.x, scale, zero_point, block, name)),
        (ops.QUANTIZE, (case.x, scale, None, block, name)),
        (ops.DEQUANTIZE, (q, scale, zero_point, block, name, torch.float32)),
        (ops.DEQUANTIZE, (q, scale, None, block, name, torch.bfloat16)),
        (ops.FAKE_QUANTIZE, (case.x, scale, zero_point, block, name)),
        (ops.FAKE_QUANTIZE, (case.x, scale, None, block, name)),
        (ops.UNPACK, (N.pack(q, name), name, list(q.shape))),
    ]


@few
@given(cases(ALL, FLOAT_DTYPES, max_dims=3), st.integers(0, 7))
def test_opcheck(case: Case, which: int) -> None:
    op, args = calls(case)[which]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(a, torch.Tensor) and a.dtype.itemsize == 1 and a.is_floating_point() for a in args):
        del tests[0]  # its own bookkeeping multiplies the arguments, which float8 tensors cannot do
    torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize("which", range(8))
def test_opcheck_each(which: int) -> None:
    """Every operator at least once, on groups with a ragged rest."""
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    op, args = calls(Case(x, (1, 3), get_qtype("int4"), "asymmetric"))[which]
    torch.library.opcheck(op, args)


@few
@given(cases(INTS, (torch.float32,), max_dims=2), st.booleans())
def test_opcheck_with_gradient(case: Case, scale_too: bool) -> None:
    op, (x, scale, *rest) = calls(case)[5]
    torch.library.opcheck(op, (x.detach().clone().requires_grad_(), scale.requires_grad_(scale_too), *rest))


def strides(x: torch.Tensor) -> list[int]:
    """The strides that mean something: dimensions of one entry have any, and empty tensors too."""
    return [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1] if x.numel() else []


@settings(max_examples=40)
@given(cases(ALL, FLOAT_DTYPES, min_side=0))
def test_fake_result_is_like_the_real_one(case: Case) -> None:
    mode = FakeTensorMode()
    for op, args in calls(case):
        real = op(*args)
        with mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]:
            assert (r.shape, r.dtype, r.device) == (f.shape, f.dtype, f.device)
            assert strides(r) == strides(f), op


@settings(max_examples=50)
@given(cases(ALL, FLOAT_DTYPES))
def test_operators_compute_the_reference(case: Case) -> None:
    for op, args in calls(case):
        name = op.name().removeprefix("inc::").removesuffix(".default")
        expected, got = getattr(N, name)(*args), op(*args)
        pairs = zip(expected, got, strict=True) if isinstance(got, tuple) else [(expected, got)]
        assert all(same(a, b) for a, b in pairs)


def test_schemas() -> None:
    assert [str(op._schema) for op in ops.OPS] == [
        "inc::quantize(Tensor x, Tensor scale, Tensor? zero_point, SymInt[] block, str qtype) -> Tensor",
        "inc::dequantize(Tensor q, Tensor scale, Tensor? zero_point, SymInt[] block, str qtype, ScalarType out_dtype)"
        " -> Tensor",
        "inc::fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, SymInt[] block, str qtype) -> Tensor",
        "inc::choose_qparams(Tensor x, SymInt[] block, str qtype, str method) -> (Tensor, Tensor)",
        "inc::unpack(Tensor packed, str qtype, SymInt[] shape) -> Tensor",
    ]


def test_predicates() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_function(op, (x,)) for op in ops.OPS]
    predicates = [ops.is_quantize, ops.is_dequantize, ops.is_fake_quantize, ops.is_choose_qparams, ops.is_unpack]
    assert [[p(n) for n in nodes] for p in predicates] == [[i == j for j in range(5)] for i in range(5)]
    assert all(ops.is_inc(n) for n in nodes) and not ops.is_inc(x) and not ops.is_quantize(None)


def test_errors_are_ours_in_the_fake_too() -> None:
    x, bad = torch.randn(4, 6), torch.ones(3, 1)
    for mode in (torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode:
            for call in (
                lambda: ops.QUANTIZE(x, bad, None, [1, -1], "int8"),
                lambda: ops.FAKE_QUANTIZE(x, bad, None, [1, -1], "int8"),
                lambda: ops.DEQUANTIZE(x, bad, None, [1, -1], "int8", torch.float32),
                lambda: ops.DEQUANTIZE(x.to(torch.int8), bad, None, [1, -1], "int8", torch.float32),
                lambda: ops.CHOOSE_QPARAMS(x.int(), [1, -1], "int8", "symmetric"),
                lambda: ops.CHOOSE_QPARAMS(x, [1, -1], "nf4", "asymmetric"),
                lambda: ops.UNPACK(torch.zeros(4, 2, dtype=torch.uint8), "int4", [4, 6]),
            ):
                with pytest.raises(SpecError):
                    call()


# -- gradient --------------------------------------------------------------------------------------


@given(cases(ALL, FLOAT_DTYPES))
def test_gradient_passes_inside_the_range_only(case: Case) -> None:
    scale, zero_point = N.choose_qparams(case.x, case.block, case.qtype, case.method)
    scale = scale / 2  # so that some values saturate
    x = case.x.detach().clone().requires_grad_()
    ops.FAKE_QUANTIZE(x, scale, zero_point, case.block, case.qtype.name).sum().backward()
    inside = N.in_range(case.x, scale, zero_point, case.block, case.qtype)
    assert x.grad is not None and torch.equal(x.grad, inside.to(x.dtype))


@pytest.mark.parametrize("name", ["int8", "uint8", "int4"])
def test_gradient_agrees_with_torch(name: str) -> None:
    limits = (int(get_qtype(name).qmin), int(get_qtype(name).qmax))
    x = (4 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))).requires_grad_()
    scale, zero_point = torch.tensor([[0.03]]), torch.tensor([[3]], dtype=torch.int32)
    upstream = torch.randn(8, 16)
    (ours,) = torch.autograd.grad(ops.FAKE_QUANTIZE(x, scale, zero_point, [-1, -1], name), x, upstream)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.view(()), zero_point.view(()), *limits)
    assert torch.equal(ours, torch.autograd.grad(theirs, x, upstream)[0])


def test_gradient_to_the_scale_agrees_with_torch() -> None:
    """The learned-step-size gradient of torch, whose own scaling factor is set to one."""
    x = (2 * torch.randn(6, 40, generator=torch.Generator().manual_seed(2))).requires_grad_()
    scale = torch.rand(6, 1, generator=torch.Generator().manual_seed(3)) * 0.02 + 0.005
    zero_point = torch.arange(-3, 3, dtype=torch.int32).view(6, 1)
    ours, theirs = scale.clone().requires_grad_(), scale.flatten().requires_grad_()
    upstream = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    y = ops.FAKE_QUANTIZE(x, ours, zero_point, [1, -1], "int8")
    args = (zero_point.flatten().float(), 0, -128, 127, 1.0)
    z = torch._fake_quantize_learnable_per_channel_affine(x, theirs, *args)
    assert torch.equal(y, z)
    got, want = (torch.autograd.grad(t, (x, s), upstream) for t, s in ((y, ours), (z, theirs)))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1].flatten(), want[1], rtol=1e-3, atol=1e-3)


def test_gradient_to_the_scale_by_finite_differences() -> None:
    """Where no rounding decision changes and all values saturate, fake quantization is linear in the scale."""
    x = torch.tensor([[5.0, -7.0, 9.0]])  # all saturate: y = bound * scale exactly
    for name, block in (("int4", (-1, -1)), ("int8", (1, 2)), ("nf4", (1, 1)), ("fp8_e4m3", (-1, -1))):
        base = torch.full((1, {2: 2, 1: 3, -1: 1}[block[1]]), 1e-3)
        scale = base.clone().requires_grad_()
        ops.FAKE_QUANTIZE(x, scale, None, block, name).sum().backward()
        rise = (N.fake_quantize(x, base * 1.5, None, block, name) - N.fake_quantize(x, base, None, block, name)).sum()
        assert scale.grad is not None
        torch.testing.assert_close((scale.grad * base * 0.5).sum(), rise, rtol=1e-4, atol=1e-6)


# -- life in graphs --------------------------------------------------------------------------------


class QDQ(torch.nn.Module):
    """Static and run-time activation scales, MX, a trainable part and a packed weight: all five operators."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
        scale, zero_point = N.choose_qparams(weight, (1, 3), "int4", "asymmetric")
        self.register_buffer("packed", N.pack(N.quantize(weight, scale, zero_point, (1, 3), "int4"), "int4"))
        self.register_buffer("w_scale", scale)
        self.register_buffer("w_zero_point", zero_point)
        self.register_buffer("x_scale", torch.tensor([[0.05]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        op = torch.ops.inc
        x = op.fake_quantize(x, self.x_scale, None, [-1, -1], "int8")
        q = op.quantize(x, self.x_scale, None, [-1, -1], "int8")
        x = op.dequantize(q, self.x_scale, None, [-1, -1], "int8", x.dtype)
        scale, zero_point = op.choose_qparams(x, [1, -1], "uint8", "asymmetric")
        q = op.quantize(x, scale, zero_point, [1, -1], "uint8")
        x = op.dequantize(q, scale, zero_point, [1, -1], "uint8", torch.float32)
        shared, _ = op.choose_qparams(x, [4, 2], "mxfp4", "symmetric")
        x = op.dequantize(op.quantize(x, shared, None, [4, 2], "mxfp4"), shared, None, [4, 2], "mxfp4", torch.float32)
        codes = op.unpack(self.packed, "int4", [6, 7])
        weight = op.dequantize(codes, self.w_scale, self.w_zero_point, [1, 3], "int4", torch.float32)
        return torch.nn.functional.linear(x, weight)


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    # At least two groups of four: torch specializes sizes of one, here the number of groups.
    dynamic = {"x": {0: torch.export.Dim("rows", min=5, max=64)}}
    return torch.export.export(QDQ(), (torch.randn(9, 7),), dynamic_shapes=dynamic)


def inc_calls(program: torch.export.ExportedProgram) -> list[str]:
    return sorted(n.target.name() for n in program.graph.nodes if ops.is_inc(n))


@pytest.mark.parametrize("table", ["default", "empty"])
def test_export_and_decompositions_keep_them(exported: torch.export.ExportedProgram, table: str) -> None:
    kept = inc_calls(exported)
    assert len(kept) == 11 and len(set(kept)) == 5
    program = exported.run_decompositions() if table == "default" else exported.run_decompositions({})
    assert inc_calls(program) == kept
    module = program.module()
    for rows in (5, 8, 17):
        x = torch.randn(rows, 7)
        assert same(module(x), QDQ()(x))
    node = next(n for n in program.graph.nodes if ops.is_choose_qparams(n))
    assert not isinstance(node.meta["val"][0].shape[0], int)  # still symbolic


def test_copies_and_files_keep_them(exported: torch.export.ExportedProgram, tmp_path: Any) -> None:
    x = torch.randn(6, 7)
    assert same(copy.deepcopy(exported.module())(x), QDQ()(x))
    torch.export.save(exported, tmp_path / "model.pt2")
    assert same(torch.export.load(tmp_path / "model.pt2").module()(x), QDQ()(x))


def test_aot_eager() -> None:
    torch._dynamo.reset()
    model = torch.compile(QDQ(), backend="aot_eager", fullgraph=True)
    for rows in (5, 6, 9):
        x = torch.randn(rows, 7)
        assert same(model(x), QDQ()(x))


def test_inductor() -> None:
    torch._dynamo.reset()
    x = torch.randn(5, 7)
    torch.testing.assert_close(torch.compile(QDQ(), fullgraph=True)(x), QDQ()(x))


def test_compiled_training_step() -> None:
    torch._dynamo.reset()

    def loss(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.ops.inc.fake_quantize(x, scale, None, [1, 3], "int4").square().sum()

    x, scale = torch.randn(4, 7), torch.rand(4, 3) / 4 + 0.01
    grads = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)):
        leaves = (x.clone().requires_grad_(), scale.clone().requires_grad_())
        f(*leaves).backward()
        grads.append([t.grad for t in leaves])
    torch.testing.assert_close(*grads)


def test_dead_calls_are_removed() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(ops.CHOOSE_QPARAMS, (x, [-1], "int8", "symmetric"))
    graph.output(x)
    graph.eliminate_dead_code()
    assert not any(ops.is_inc(n) for n in graph.nodes)


@settings(max_examples=25)
@given(shapes(1, 3), st.sampled_from(ALL))
def test_symbolic_shapes_leave_few_guards(shape: tuple[int, ...], name: str) -> None:
    """choose_qparams -> quantize -> dequantize must not pin a dynamic dimension, whatever the block."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    shape = tuple(n + 4 for n in shape)
    x = mode.from_tensor(torch.empty(shape), static_shapes=False)
    method = "asymmetric" if name in INTS and name not in MX else "symmetric"
    with mode:
        for g in (-1, 1, 3):
            block = [g] * len(shape)
            scale, zero_point = ops.CHOOSE_QPARAMS(x, block, name, method)
            q = ops.QUANTIZE(x, scale, zero_point, block, name)
            assert ops.DEQUANTIZE(q, scale, zero_point, block, name, x.dtype).shape == x.shape
    assert not any(isinstance(n, int) for n in x.shape)
    assert all("Eq" not in str(guard.expr) or "Mod" in str(guard.expr) for guard in env.guards), env.guards
