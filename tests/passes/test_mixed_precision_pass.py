"""Half precision in a graph: what gets it, what does not and why, and that no cheaper set of casts exists."""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from inc_graph.errors import PassError
from inc_graph.graph import clone, get_tensor, peek_meta, storage_key, val
from inc_graph.passes._cut import minimum_cut
from inc_graph.passes._halves import _NO, _nets, _State, cast_of, decide_halves
from inc_graph.passes._precision import FLOAT, FOLLOW, HALF, class_of, limits
from inc_graph.passmanager import Pipeline
from inc_graph.recipe import OpQuant, set_recipe
from inc_graph.verify import verify
from tests.golden_check import check_golden
from tests.graph_generator import KINDS, RandomModel
from tests.passes.pipelines import captured, find, find_one, float_twin, kind, name, recipe, run, text

BF16 = OpQuant(half="bf16")
SMOOTH_KINDS = tuple(k for k in KINDS if k not in ("embed", "autocast"))  # argmax of rounded values jumps


def half(model: nn.Module, *args: Any, dtype: str = "bf16", **kwargs: Any) -> fx.GraphModule:
    gm = run(float_twin(model, *args, **kwargs), f"mixed-precision{{dtype={dtype}}}").graph
    verify(gm, "float")
    return gm


def casts(gm: fx.GraphModule) -> list[fx.Node]:
    """Casts between floating point dtypes."""
    return [n for n in gm.graph.nodes if cast_of(n) is not None]


def dtype_of(node: fx.Node) -> torch.dtype:
    return val(node).dtype


class Block(nn.Module):
    """A transformer block with a table that is its output head as well."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(a)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return torch.softmax(self.head(x), -1)


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


IDS = torch.arange(10).reshape(2, 5)


# ------------------------------------------------------------------------------------------------------------- golden
def test_golden() -> None:
    check_golden("mixed-precision/positive.txt", text(half(block(), IDS)))


def test_golden_rejected() -> None:
    """Operators of the table's other side, with their reasons."""

    class Net(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            weights = x.masked_fill(mask, torch.finfo(torch.float32).min).softmax(-1)
            positions = torch.arange(4, device=x.device).float()
            turned = x * positions.cos()
            return weights, turned, x.exp().cumsum(-1), x.double(), F.mse_loss(x, weights), torch.special.i0(x)

    gm = captured(Net(), torch.randn(3, 4), torch.eye(4, dtype=torch.bool)[:3])
    before = text(gm)
    result = run(gm, "mixed-precision{dtype=bf16}")
    assert text(result.graph) == before  # nothing there is worth a cast
    check_golden("mixed-precision/rejected.txt", "\n".join(map(str, result.reports)))


# ------------------------------------------------------------------------------------------------------ what gets what
def test_weights_are_cast_once() -> None:
    """A tied weight is one tensor, of half the size; the user's stays as it is."""
    model = block()
    gm = half(model, IDS)
    table, head = find_one(gm, "embedding").args[0], find(gm, "linear")[-1].args[1]
    tensors = [get_tensor(gm, n) for n in (table, head)]  # type: ignore[arg-type]
    assert storage_key(tensors[0]) == storage_key(tensors[1]) and tensors[0].dtype == torch.bfloat16
    assert torch.equal(tensors[0], model.table.weight.bfloat16()) and model.table.weight.dtype == torch.float32
    assert not any(n.op == "get_attr" for c in casts(gm) for n in c.all_input_nodes)


def test_inputs_outputs_and_buffers_keep_their_dtypes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            self.seen.copy_(y)
            return y

    gm = half(Net(), torch.randn(2, 4))
    y = gm(torch.randn(2, 4))
    assert y.dtype == torch.float32 and dtype_of(find_one(gm, "linear")) == torch.bfloat16
    assert dict(gm.named_buffers())["seen"].dtype == torch.float32
    assert len(casts(gm)) == 2  # in, and out once for both readers


def test_norms_are_float32_and_casts_are_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layers = nn.LayerNorm(4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return sum(layer(x).relu() for layer in self.layers)  # type: ignore[return-value]

    gm = half(Net(), torch.randn(2, 4))
    assert dtype_of(find_one(gm, "layer_norm")) == torch.float32
    assert len(casts(gm)) == 2


def test_a_chain_of_the_users_casts_is_shortened() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.a(x)
            return self.b(y.float())

    gm = run(captured(Net(), torch.randn(2, 4)), "fold-constants,mixed-precision{dtype=bf16}").graph
    verify(gm, "float")
    assert [dtype_of(n) for n in find(gm, "linear")] == [torch.bfloat16] * 2
    assert len(casts(gm)) == 2 and find(gm, "linear")[1].args[0] is find(gm, "linear")[0]


def test_large_constants_and_masks_stay_float32() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).transpose(-1, -2)
            mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
            return (scores + mask).softmax(-1) @ x

    keep = torch.ones(3, 3, dtype=torch.bool).tril()
    keep[0] = False  # a row in which all is masked: its softmax is uniform in float32, and would be NaN
    model, x = Net().eval(), torch.randn(2, 3, 4)
    gm = half(model, x, keep)
    assert dtype_of(find(gm, "add")[0]) == torch.float32
    torch.testing.assert_close(gm(x, keep), model(x, keep), atol=0.02, rtol=0.02)


def test_an_additive_mask_of_attention_saturates() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.q(x)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    model, x = Net().eval(), torch.randn(1, 2, 5, 8)
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    mask[..., 0, :] = torch.finfo(torch.float32).min
    gm = half(model, x, mask)
    assert dtype_of(find_one(gm, "scaled_dot_product_attention")) == torch.bfloat16
    torch.testing.assert_close(gm(x, mask), model(x, mask), atol=0.02, rtol=0.02)


def test_rules_keep_layers_float_and_mix_formats() -> None:
    def graph(*rules: Any) -> fx.GraphModule:
        gm = captured(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), X)
        set_recipe(gm, recipe(*rules, everything=BF16))
        gm = run(gm, "annotate,insert-observers,convert-qdq,mixed-precision").graph
        verify(gm, "qdq")
        return gm

    X = torch.randn(2, 4)
    by_name = graph(name("2$"))
    assert [dtype_of(n) for n in find(by_name, "linear")] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert "set_local('2$')" in peek_meta(find(by_name, "linear")[1])["float"]
    both = graph(name("2$", OpQuant(half="fp16")))
    assert [dtype_of(n) for n in find(both, "linear")] == [torch.bfloat16, torch.float16, torch.bfloat16]
    assert not any(cast_of(c.args[0]) for c in casts(both) if dtype_of(c.args[0]) == torch.float32)  # type: ignore[arg-type]
    none = graph(kind("torch.nn.modules.linear.Linear"))
    assert not casts(none) and "Linear" in peek_meta(find(none, "linear")[0])["float"]


def test_dtype_must_be_known() -> None:
    gm = captured(nn.Linear(2, 2), torch.randn(1, 2))
    before = text(gm)
    with pytest.raises(PassError, match="bf16, fp16"):
        run(gm, "mixed-precision{dtype=int8}")
    assert text(gm) == before


def test_fuel_stops_it() -> None:
    from inc_graph.graph import Fuel, editing

    gm = captured(nn.Linear(2, 2), torch.randn(1, 2))
    with editing("test", Fuel(0)):
        Pipeline.parse("mixed-precision{dtype=bf16}").run(gm)
    assert not casts(gm)


def test_classes_of_the_table() -> None:
    gm = half(block(), IDS)
    known = {
        str(n.target).removeprefix("aten.").split(".")[0]: class_of(n)[0]
        for n in gm.graph.nodes
        if n.op == "call_function"
    }
    assert known["linear"] == known["embedding"] == known["scaled_dot_product_attention"] == HALF
    assert known["gelu"] == known["transpose"] == known["add"] == FOLLOW
    assert known["layer_norm"] == known["softmax"] == FLOAT
    assert all(class_of(n)[1] for n in gm.graph.nodes if n.op == "call_function" and class_of(n)[0] == FLOAT)
    assert limits(find(gm, "add")[0], torch.bfloat16) is None


# ------------------------------------------------------------------------------------------------------- random graphs
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_random_graphs_are_equal_within_rounding(seed: int) -> None:
    model = RandomModel(seed, kinds=SMOOTH_KINDS)
    args, kwargs = model.inputs()
    twin = float_twin(copy.deepcopy(model), *args, **kwargs)
    gm = run(clone(twin), "mixed-precision{dtype=bf16}").graph
    verify(gm, "float")
    check_casts(gm)
    with torch.no_grad():
        for key, want in copy.deepcopy(twin)(*args, **kwargs).items():
            have = copy.deepcopy(gm)(*args, **kwargs)[key]
            assert have.dtype == want.dtype
            scale = want.abs().max().clamp(min=1e-3)
            assert float((have - want).abs().max() / scale) < 0.15  # 2**-9 an operator, some of them differences
            error = (have - want).square().mean().sqrt() / scale
            assert float(error) < 0.04


def check_casts(gm: fx.GraphModule) -> None:
    """No value is cast twice to one dtype, no cast is cast back or on, no constant is cast, each cast is needed."""
    seen = set()
    for node in casts(gm):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        made = peek_meta(node).get("cast") is not None
        if made:
            assert source.op != "get_attr" or source.target in {str(n.target) for n in gm.graph.nodes}
            assert (source, dtype_of(node)) not in seen and cast_of(source) is None
        seen.add((source, dtype_of(node)))
        assert node.users and dtype_of(node) != dtype_of(source)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_cut_is_as_cheap_as_any(seed: int) -> None:
    """Against all labellings of a random hypergraph; and of the cheapest it has the fewest pins that are True."""
    rng = random.Random(seed)
    pins = list(range(rng.randint(2, 8)))
    fixed = {p: rng.random() < 0.5 for p in pins if rng.random() < 0.4}
    nets = [(rng.randint(0, 5), rng.sample(pins, rng.randint(1, min(4, len(pins))))) for _ in range(rng.randint(1, 9))]

    def cost(chosen: set[int]) -> int:
        return sum(w for w, members in nets if 0 < len(chosen & set(members)) < len(set(members)))

    free = [p for p in pins if p not in fixed]
    given_ = {p for p, label in fixed.items() if label}
    all_ = [
        given_ | {p for p, on in zip(free, bits, strict=True) if on}
        for bits in itertools.product((False, True), repeat=len(free))
    ]
    found = set(minimum_cut(nets, fixed)) | given_
    least = min(map(cost, all_))
    assert cost(found) == least
    assert len(found) == min(len(c) for c in all_ if cost(c) == least)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_casts_of_random_graphs_are_minimal(seed: int) -> None:
    """The elements that are cast, counted in the graph that comes out, against every choice for the free operators."""
    model = RandomModel(seed, size=6, kinds=SMOOTH_KINDS)
    args, kwargs = model.inputs()
    gm = float_twin(model, *args, **kwargs)
    state = _State(gm, None, torch.bfloat16)
    for node in gm.graph.nodes:
        state.look_at(node)
    nets = list(_nets(state, torch.bfloat16))
    free = [n for n in state.wishes if any(n in members for _, members in nets)]
    if len(free) > 12:
        return
    fixed = {_NO: False, **dict.fromkeys(state.fixed, True)}
    best = math.inf
    for bits in itertools.product((False, True), repeat=len(free)):
        labels = {**dict.fromkeys(state.tails, False), **fixed, **dict(zip(free, bits, strict=True))}
        best = min(best, sum(w for w, members in nets if len({labels[m] for m in members}) > 1))
    before = {n.name for n in casts(gm)}
    assert decide_halves(gm, None, torch.bfloat16).dtypes.keys() >= state.fixed.keys()
    made = run(gm, "mixed-precision{dtype=bf16}").graph
    new = [n for n in casts(made) if n.name not in before]
    assert sum(val(n).numel() for n in new) == best
