"""Models with quantized weights only are as free as float ones: they move, train, compile, export and copy."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inc_graph.errors import CaptureError, ConfigError, IncError
from inc_graph.quantization import RTNConfig, StaticQuantConfig, prepare, quantize
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.read_only import ReadOnly
from inc_graph.verify import verify
from tests.weight_only_models import CONFIGS, SCOPES, Words, everything, ids, quantized, tensors

pytestmark = pytest.mark.slow

scoped = pytest.mark.parametrize("scope", SCOPES)


def close(a: Tensor, b: Tensor, limit: float = 0.02) -> None:
    assert float((a.float() - b.float()).norm() / b.float().norm()) < limit


# ---------------------------------------------------------------------------------------------------------- moves
@scoped
@pytest.mark.parametrize("name", CONFIGS)
def test_another_dtype(scope: str, name: str) -> None:
    q, x = quantized(scope, CONFIGS[name]), ids()
    want, before = q(x), tensors(copy.deepcopy(q))
    assert q.to(torch.bfloat16) is q
    y = q(x)
    assert y.dtype == torch.bfloat16
    close(y, want, 0.05)
    after = tensors(q)
    assert set(after) == set(before)
    for key, old in before.items():
        if any(part in key for part in ("_q", "_scale", "_zero_point")):
            assert after[key].dtype == old.dtype and torch.equal(after[key], old), key
        elif old.is_floating_point() and "rates" not in key:
            assert after[key].dtype == torch.bfloat16, key
    assert q.half()(x).dtype == torch.float16
    back = q.double()(x)
    assert back.dtype == torch.float64
    close(back, want, 0.01)  # norms and biases were rounded, no code was


@scoped
def test_every_form_of_weights_moves(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with everything(monkeypatch) as config:
        q = quantized(scope, config)
        want = q(ids())
        close(copy.deepcopy(q).to(torch.bfloat16)(ids()), want)
        assert torch.equal(q.to(torch.bfloat16).float().state_dict()["head.bias"], Words().head.bias.bfloat16().float())


@scoped
def test_the_graph_moves_along(scope: str) -> None:
    q = quantized(scope).to(torch.bfloat16)
    parts = [q] if scope == "graph" else [m.inner for m in q.modules() if isinstance(m, Leaf)]
    for part in parts:
        verify(part.graph)
        own = {k: t.data_ptr() for k, t in part.lowered.named_buffers()}
        shared = {k: t.data_ptr() for k, t in part.parts()[0].named_buffers()}
        assert own.items() <= shared.items() or shared.items() <= own.items()
        assert not part.fixed and len(part.parts()[1]) == 0
    if scope == "graph":
        assert torch.equal(q.graph(ids()), q(ids()))


def test_positions_are_counted_in_full_precision() -> None:
    """bfloat16 has no 257: angles made of such a position would be those of 256."""
    float_model, x = Words().eval(), ids(300)
    q = quantize(float_model, RTNConfig(bits=8), example_inputs=(x,), inplace=False).to(torch.bfloat16)
    layers = quantized("layers", RTNConfig(bits=8)).to(torch.bfloat16)
    want = float_model(x)
    close(q(x)[:, 250:], want[:, 250:], 0.05)
    close(layers(x)[:, 250:], want[:, 250:], 0.05)


def test_what_is_fixed_to_float32_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x).float()
            return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).to(x.dtype)

    model, x = Norm().eval().to(torch.bfloat16), torch.randn(4, 32, dtype=torch.bfloat16)
    q = quantize(model, CONFIGS["int4"], example_inputs=(x,), inplace=False).half()
    rsqrt = next(n for n in q.graph.graph.nodes if "rsqrt" in n.name)
    assert rsqrt.meta["val"].dtype == torch.float32
    assert q(x.half()).dtype == torch.float16
    with pytest.raises(CaptureError, match="bfloat16"):
        q(x)


@scoped
def test_another_device(scope: str) -> None:
    q = quantized(scope)
    want, state = q(ids()), q.state_dict()
    q.to("meta")
    assert {t.device.type for t in tensors(q).values()} == {"meta"} and q.report.backend == "eager"
    if scope == "graph":
        assert all(n.meta["val"].device.type == "meta" for n in q.graph.graph.nodes if n.op == "call_function")
    q.to_empty(device="cpu")
    for name, tensor in Words().named_buffers():  # in no state_dict
        found = dict(q.named_buffers())[f"lowered.{name}" if scope == "graph" else name]
        found.copy_(tensor)
    q.load_state_dict(state)
    assert torch.equal(q(ids()), want) and q.report.backend != "eager"


@scoped
def test_no_move_changes_nothing(scope: str) -> None:
    q = quantized(scope)
    before = tensors(q)
    assert q.to("cpu") is q and q.float() is q and q.cpu() is q and q.to(torch.float32) is q
    assert all(t is before[k] for k, t in tensors(q).items())


def test_a_part_alone_may_move() -> None:
    q = quantized("layers")
    q.head.to(torch.bfloat16)
    with pytest.raises(CaptureError, match=r"float32, its weight torch\.bfloat16"):
        q(ids())
    q.head.float()
    assert q(ids()).dtype == torch.float32


def test_where_kernels_hold_packed_weights_it_stays_refused() -> None:
    x = ids()
    mixed = StaticQuantConfig(bias_correction=False).set_local(
        "head", StaticQuantConfig(w_dtype="int4", act_dtype="fp32")
    )
    for given in ({}, {"example_inputs": (x,)}):
        q = quantize(Words().eval(), mixed, lambda m: m(x), inplace=False, **given)
        before = tensors(q)
        for bad in (q.half, q.train, lambda q=q: q.to("meta")):
            with pytest.raises(IncError, match="a converted model cannot"):
                bad()
        assert all(t is before[k] for k, t in tensors(q).items()) and not q.training


# ------------------------------------------------------------------------------------------------------- training
@scoped
def test_modes_and_gradients(scope: str) -> None:
    q = quantized(scope)
    want = q(ids())
    assert q.train() is q and q.training and torch.equal(q(ids()), want)
    assert q.eval() is q and not any(m.training for m in q.modules())
    q.train().requires_grad_(True)
    assert all(not t.requires_grad for k, t in tensors(q).items() if not t.is_floating_point() or "_scale" in k)
    q.requires_grad_(False)
    assert not q(ids()).requires_grad


@pytest.mark.parametrize("name", ["int4", "double"])
@scoped
def test_gradients_flow_to_inputs(scope: str, name: str) -> None:
    layer = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)).eval()
    x = torch.randn(5, 32, requires_grad=True)
    given = {"example_inputs": (x.detach(),)} if scope == "graph" else {}
    q = quantize(layer, CONFIGS[name], inplace=False, **given).train()
    (got,) = torch.autograd.grad(q(x).square().sum(), x)
    reference = quantize(layer, CONFIGS[name], inplace=False, example_inputs=(x.detach(),)).graph
    (want,) = torch.autograd.grad(reference(x).square().sum(), x)
    close(got, want)
    again = checkpoint(q, x, use_reentrant=False).square().sum()
    assert torch.equal(torch.autograd.grad(again, x)[0], got)


# ------------------------------------------------------------------------------------------- compile, export, copy
@scoped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(scope: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = torch.randn(4, 32, dtype=dtype)
    given = {"example_inputs": (x.float(),)} if scope == "graph" else {}
    q = quantize(layer, CONFIGS["int4"], inplace=False, **given).to(dtype)
    with torch.no_grad():
        close(torch.compile(q, fullgraph=True)(x), q(x), 1e-5 if dtype == torch.float32 else 0.02)


@scoped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strict", [False, True])
def test_exported(scope: str, dtype: torch.dtype, strict: bool) -> None:
    q = quantized(scope).to(dtype)
    program = torch.export.export(q, (ids(),), strict=strict)
    assert torch.equal(program.module()(ids()), q(ids()))
    held = sum(t.nbytes for t in program.state_dict.values())
    assert held < sum(t.nbytes for t in Words().state_dict().values()) / 2  # no float copy of a weight


@scoped
def test_copies_are_their_own(scope: str) -> None:
    q = quantized(scope)
    want, twin = q(ids()), copy.deepcopy(q)
    twin.to(torch.bfloat16)
    assert torch.equal(q(ids()), want) and q(ids()).dtype == torch.float32
    third = copy.deepcopy(q)
    with torch.no_grad():
        for tensor in third.state_dict().values():
            tensor.zero_()
    assert torch.equal(q(ids()), want) and not torch.equal(third(ids()), want)
    with pytest.raises(pickle.PicklingError, match="cannot be pickled"):
        pickle.dumps(q)


# ------------------------------------------------------------------------------------------------------ state_dict
@scoped
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(scope: str, assign: bool) -> None:
    q, other = quantized(scope), Words().eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    target = quantized(scope, model=other)
    state = {k: v.clone() for k, v in q.state_dict().items()}
    assert not any("inner" in k or "lowered" in k for k in state)
    if scope == "layers":
        assert {"head.weight_q", "head.weight_scale", "head.bias", "blocks.0.norm.weight"} <= set(state)
        assert "blocks.0.v_proj.bias" not in state
    result = target.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(target(ids()), q(ids()))
    if scope == "graph":
        assert torch.equal(target.graph(ids()), q.graph(ids()))
    assert target.to(torch.bfloat16)(ids()).dtype == torch.bfloat16


@scoped
def test_state_dict_that_does_not_fit(scope: str) -> None:
    q = quantized(scope)
    want, state = q(ids()), dict(q.state_dict())
    codes = next(k for k in state if k.endswith("weight_q"))
    for change, said in (
        ({codes: None}, "Missing key"),
        ({"more": torch.zeros(1)}, "Unexpected key"),
        ({codes: state[codes][:1]}, "size mismatch"),
        ({codes: state[codes].float()}, r"torch\.float32, the model has torch\.uint8"),
    ):
        bad = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(RuntimeError, match=said):
            q.load_state_dict(bad)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        q.load_state_dict(Words().state_dict())
    assert torch.equal(q(ids()), want)


def test_loading_a_state_does_not_touch_the_float_model() -> None:
    model = Words().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    q = quantize(model, CONFIGS["int4"], example_inputs=(ids(),), inplace=False)
    q.load_state_dict({k: torch.zeros_like(v) for k, v in q.state_dict().items()})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not q(ids()).any()


# ------------------------------------------------------------------------------------------------- as other layers
def test_a_layer_is_still_one_of_its_kind() -> None:
    q = quantized("layers", RTNConfig(quant_lm_head=True))
    layer = q.blocks[0].q_proj
    assert isinstance(layer, nn.Linear) and isinstance(layer, Leaf) and not isinstance(layer, nn.Embedding)
    assert (layer.in_features, layer.out_features, layer.weight.shape, layer.bias.shape) == (32, 32, (32, 32), (32,))
    assert q.blocks[0].v_proj.bias is None
    close(nn.functional.linear(torch.eye(32), layer.weight, layer.bias), layer(torch.eye(32)), 1e-2)
    assert type(layer.weight + 0) is Tensor and not layer.weight.requires_grad
    for write in (
        lambda: layer.weight.data.__class__ and setattr(layer.weight, "data", torch.zeros(32, 32)),
        lambda: layer.weight.add_(1),
        lambda: layer.weight.copy_(torch.zeros(32, 32)),
        lambda: layer.weight.__setitem__(0, 0.0),
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(32, 32))),
        layer.reset_parameters,
    ):
        with pytest.raises(IncError, match="quantized layer cannot be"):
            write()


def test_the_weight_of_a_layer_is_what_it_multiplies_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_COMPUTE_DTYPE", "float32")
    with everything(monkeypatch) as config:
        layer = quantized("layers", config).head  # its input channels are in another order
    x = torch.randn(5, 32)
    close(nn.functional.linear(x, layer.weight, layer.bias), layer(x), 1e-5)


def test_asking_for_the_dtype_of_a_weight_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantized("layers").head
    monkeypatch.setattr(ReadOnly, "of", lambda like, values, of=ReadOnly.of: of(like, lambda: pytest.fail("computed")))
    weight = layer.weight
    assert isinstance(weight, Tensor) and (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert weight.shape == (24, 32) and weight.size(1) == 32 and not weight.requires_grad and weight.ndim == 2
    with pytest.raises(pytest.fail.Exception, match="computed"):
        weight.sum()


class AsksForDtype(nn.Module):
    """As T5 does, before each call of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype))


def test_a_model_that_asks_for_the_dtype_of_a_weight() -> None:
    torch._dynamo.reset()
    q, x = quantize(AsksForDtype().eval(), CONFIGS["int4"]), torch.randn(4, 32)
    q.to(torch.bfloat16)
    with torch.no_grad():
        want = q(x)
        assert want.dtype == torch.bfloat16 and torch.equal(torch.export.export(q, (x,)).module()(x), want)
        close(torch.compile(q)(x), want)


def test_a_quantized_model_is_not_quantized_again() -> None:
    q = quantized("layers")
    for again in (lambda: prepare(q, RTNConfig()), lambda: quantize(q, StaticQuantConfig(), lambda m: m(ids()))):
        with pytest.raises(ConfigError, match="converted already"):
            again()
