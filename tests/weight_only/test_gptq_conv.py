"""GPTQ on convolutions: their inputs as rows, codes of their kernels, and models in both scopes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import inc_graph.quantization as c
from inc_graph.errors import CalibrationError, ConfigError
from inc_graph.gram import GramObserver
from inc_graph.ops import is_dequantize
from inc_graph.passes._codes import codes_of_weight
from inc_graph.passes._unfold import Patches
from inc_graph.passes.qparams.gptq import GPTQ
from inc_graph.passes.qparams.rtn import RTN
from inc_graph.quantization import convert, prepare, quantize
from inc_graph.quantization.model import QuantizedModel
from inc_graph.spec import PerBlock, PerTensor, QSpec
from inc_graph.weights import Gram

SCOPES = pytest.mark.parametrize("scope", ["graph", "layers"])
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems as small as these take longer with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, Tensor]:
    """A convolution without bias, and an input that it takes."""
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    padding: Any = draw(st.sampled_from(["same", "valid", None])) or each(0, 2)
    if padding == "same":
        stride = (1,) * dims
    size = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, each(0, 3), strict=True))
    torch.manual_seed(draw(st.integers(0, 99)))
    inside, outside = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    made = CONVS[dims](inside, outside, kernel, stride, padding, dilation, groups, bias=False).eval()
    x = torch.randn(draw(st.integers(1, 3)), inside, *size)
    return made, x.to(memory_format=torch.channels_last) if dims == 2 and draw(st.booleans()) else x


def named(model: nn.Module, **options: Any) -> Any:
    """A config of GPTQ for every convolution."""
    config = c.GPTQConfig(**options)
    for kind in (*CONVS.values(), nn.ConvTranspose2d):
        if any(isinstance(m, kind) for m in model.modules()):
            config.set_local(kind, c.GPTQConfig(**options))
    return config


def observed(model: nn.Module, x: Tensor, scope: str) -> list[GramObserver]:
    """The observers of the prepared model, which has seen `x`."""
    example = {"example_inputs": (x,)} if scope == "graph" else {}
    prepared: Any = prepare(copy.deepcopy(model), named(model, group_size=-1), **example)
    with torch.no_grad():
        if scope == "graph":  # a call of it may only keep its arguments
            fx.Interpreter(prepared).run(x)
        else:
            prepared(x)
    return [m for m in prepared.modules() if isinstance(m, GramObserver)]


def done(model: nn.Module, x: Tensor, scope: str, config: Any) -> Any:
    example = {"example_inputs": (x,)} if scope == "graph" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows of calibration data
        return quantize(copy.deepcopy(model), config, lambda m: m(x), **example)


def blocks(q: Any) -> list[tuple[str, tuple[int, ...]]]:
    graphs = [m.graph for m in q.modules() if isinstance(m, QuantizedModel)]
    return [(n.args[4], tuple(n.args[3])) for gm in graphs for n in gm.graph.nodes if is_dequantize(n)]


# ------------------------------------------------------------------------------------------------------------ unfolding
def patches(conv: Any, elements: int = 1 << 22) -> Patches:
    """Those of a convolution, worked out from the padding that it does itself."""
    pads = conv._reversed_padding_repeated_twice
    pairs = tuple(zip(pads[::2], pads[1::2], strict=True))[::-1]
    return Patches(conv.kernel_size, conv.stride, pairs, conv.dilation, conv.groups, elements)


@settings(max_examples=100, deadline=None)
@given(convolutions())
def test_rows_times_the_flat_weight_are_the_convolution(case: tuple[Any, Tensor]) -> None:
    conv, x = case
    with torch.no_grad():
        (rows,) = patches(conv)(x)
        y = conv(x)
        flat = torch.stack(conv.weight.flatten(1).chunk(conv.groups)) @ rows.mT  # [groups, out / groups, positions]
        found = flat.reshape(y.shape[1], len(x), *y.shape[2:]).transpose(0, 1)
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 2000))
def test_chunks_are_all_rows_and_no_larger_than_asked_for(case: tuple[Any, Tensor], elements: int) -> None:
    conv, x = case
    (whole,) = patches(conv)(x)
    parts = list(patches(conv, elements)(x))
    rows = torch.cat(parts, 1)
    assert rows.shape == whole.shape
    torch.testing.assert_close(rows.mT @ rows, whole.mT @ whole, rtol=1e-4, atol=1e-3)
    line = whole[0].numel() * conv.groups // (len(x) * conv(x).shape[2])
    assert all(p.numel() <= max(elements, line) for p in parts)


def test_a_kernel_that_does_not_fit_has_no_rows() -> None:
    assert not list(patches(nn.Conv2d(2, 2, 5))(torch.randn(1, 2, 4, 9)))


@SCOPES
@pytest.mark.parametrize("conv", [
    nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 4, 3, padding=(0, 1), groups=2, padding_mode="circular"),
    nn.Conv2d(4, 8, 3, stride=(1, 2), groups=4, padding="valid"),
    nn.Conv1d(4, 6, 4, padding="same", padding_mode="replicate"),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv3d(4, 6, (1, 2, 3), stride=(2, 1, 1), padding=(0, 1, 2)),
    nn.Conv3d(4, 4, 2, groups=4, padding_mode="circular", padding=1),
], ids=str)  # fmt: skip
def test_what_is_collected_gives_the_products_of_the_outputs(conv: Any, scope: str) -> None:
    """``y y^T = W G W^T`` holds for what the layer really reads, whoever pads it."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, *[7, 8, 6][: conv.weight.ndim - 2])
    (observer,) = observed(nn.Sequential(conv).eval(), x, scope)
    gram = observer.gram()
    with torch.no_grad():
        y = (conv(x) - conv.bias.view(-1, *[1] * (x.ndim - 2))).transpose(0, 1).flatten(1)
        w, y = torch.stack(conv.weight.flatten(1).chunk(conv.groups)), torch.stack(y.chunk(conv.groups))
        torch.testing.assert_close(w @ gram.matrix @ w.mT, y @ y.mT, rtol=1e-4, atol=1e-3)
    assert gram.count == y.shape[2] and torch.equal(gram.matrix, gram.matrix.mT)


def test_layers_that_read_the_same_patches_share_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
            self.c, self.d = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)

    found = observed(Net().eval(), torch.randn(2, 4, 6, 6), "graph")
    assert sorted(o.gram().matrix.shape for o in found) == [(1, 4, 4), (1, 36, 36), (2, 18, 18)]


def test_maps_of_several_sizes_add_up_and_bad_ones_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2)).eval()
    prepared = prepare(copy.deepcopy(model), named(model, group_size=-1))
    first, second = torch.randn(2, 3, 9, 9), torch.randn(1, 3, 5, 13)
    prepared(first)
    prepared(second)
    (observer,) = [m for m in prepared.modules() if isinstance(m, GramObserver)]
    rows = [F.unfold(x, 3, stride=2).transpose(1, 2).reshape(-1, 27) for x in (first, second)]
    together = torch.cat(rows)
    torch.testing.assert_close(observer.gram().matrix[0], together.T @ together, rtol=1e-4, atol=1e-4)
    assert observer.count == len(together)
    before = observer.snapshot()
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        prepared(torch.full((1, 3, 9, 9), math.nan))
    assert observer.snapshot() is not None and torch.equal(observer.snapshot()[0], before[0])
    assert observer.snapshot()[1:] == before[1:]


# -------------------------------------------------------------------------------------------------------------- kernels
def grams(conv: Any, x: Tensor) -> Gram:
    (rows,) = patches(conv)(x)
    return Gram(rows.mT @ rows, rows.shape[1])


def cost(conv: Any, weight: Tensor, x: Tensor) -> Tensor:
    """Squared error of each output channel, if the convolution had that weight."""
    other = copy.deepcopy(conv).double()
    other.weight.data = weight.double() - conv.weight.double()
    return other(x.double()).square().transpose(0, 1).flatten(1).sum(1)


def annotation(qtype: str, group: int, ndim: int, algorithm: str = "gptq", scheme: str = "symmetric") -> dict[str, Any]:
    spec = QSpec(qtype, scheme, PerBlock((1, group, *[-1] * (ndim - 2))))
    return {"spec": spec.to_json(), "algorithm": algorithm}


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.sampled_from(["int4", "int2", "uint3"]), st.sampled_from([-1, 1, 2]), st.booleans())
@torch.no_grad()
def test_no_output_is_worse_than_by_plain_rounding(
    case: tuple[Any, Tensor], qtype: str, group: int, search: bool
) -> None:
    conv, x = case
    group = min(group, conv.weight.shape[1])
    scheme = "asymmetric" if qtype.startswith("u") else "symmetric"
    what = annotation(qtype, group, conv.weight.ndim, "gptq{search=true}" if search else "gptq", scheme)
    spec = QSpec.from_json(what["spec"])
    found = codes_of_weight(conv.weight, what, grams(conv, x))
    plain = RTN(search=search).solve(conv.weight, spec)
    assert found.carrier.shape == conv.weight.shape and found.carrier.dtype == plain.carrier.dtype
    assert found.spec == spec and found.params()[0].shape == plain.params()[0].shape
    ours, theirs = cost(conv, found.values(), x), cost(conv, plain.values(), x)
    energy = float(cost(conv, torch.zeros_like(conv.weight), x).sum())
    assert bool((ours <= theirs * 1.001 + 1e-8 * energy).all())
    if energy > 1e-6:
        assert found.notes["error"] == pytest.approx(math.sqrt(float(ours.sum()) / energy), rel=0.02, abs=1e-4)
        assert found.notes["rtn_error"] == pytest.approx(math.sqrt(float(theirs.sum()) / energy), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("qtype,group,algorithm", [
    ("int4", -1, "gptq{act_order=true}"), ("int4", 8, "gptq{act_order=true}"),
    ("int4", 1, "gptq{act_order=true,static_groups=true}"), ("int4", 1, "gptq{hybrid_order=true}"),
    ("int4", 1, "gptq{static_groups=true,search=true}"), ("nf4", 1, "gptq"), ("fp8_e4m3", 1, "gptq"),
    ("int8", -1, "gptq{block_size=5,refine=2}"),
])  # fmt: skip
@torch.no_grad()
def test_every_option_that_a_convolution_has(qtype: str, group: int, algorithm: str, groups: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(4, 8, 9, 9).cumsum(2).cumsum(3)
    group = min(group, conv.weight.shape[1])
    what = annotation(qtype, group, 4, algorithm)
    found = codes_of_weight(conv.weight, what, grams(conv, x))
    plain = RTN(search="search" in algorithm).solve(conv.weight, QSpec.from_json(what["spec"]))
    assert found.order is None and found.carrier.dtype == plain.carrier.dtype
    ours, theirs = (float(cost(conv, codes.values(), x).sum()) for codes in (found, plain))
    # scales in float16 are as coarse as these formats
    assert 0 < ours < (1.03 if qtype in ("int8", "fp8_e4m3") else 0.9) * theirs


@torch.no_grad()
def test_an_order_of_parts_of_kernels_is_refused() -> None:
    conv, x = nn.Conv2d(8, 8, 3), torch.randn(4, 8, 9, 9)
    with pytest.raises(ConfigError, match="another order"):
        codes_of_weight(conv.weight, annotation("int4", 1, 4, "gptq{act_order=true}"), grams(conv, x))


@torch.no_grad()
def test_each_group_is_solved_with_its_own_inputs() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, groups=2)
    x = torch.randn(4, 8, 9, 9) * torch.logspace(-1, 1, 8).view(1, 8, 1, 1)
    gram = grams(conv, x)
    found = codes_of_weight(conv.weight, annotation("uint4", 2, 4, scheme="asymmetric"), gram)
    flat = QSpec("uint4", "asymmetric", PerBlock((1, 18)))  # two input channels of nine weights
    for i in range(2):
        part = slice(3 * i, 3 * i + 3)
        want = GPTQ().solve(conv.weight[part].flatten(1), flat, Gram(gram.matrix[i], gram.count))
        assert torch.equal(found.carrier[part].flatten(1), want.carrier)
        for have, expected in zip(found.params(), want.params(), strict=True):
            assert have is not None and torch.equal(have[part].flatten(1), expected)
    other = codes_of_weight(conv.weight, annotation("uint4", 2, 4, scheme="asymmetric"), Gram(gram.matrix.flip(0), 9))
    assert not torch.equal(other.carrier, found.carrier)


@torch.no_grad()
def test_kernels_that_cannot_be_rounded_so() -> None:
    conv, x = nn.Conv2d(4, 4, 3, groups=2), torch.randn(2, 4, 6, 6)
    gram = grams(conv, x)
    tensor = {"spec": QSpec("int4", "symmetric", PerTensor()).to_json(), "algorithm": "gptq"}
    split = {"spec": QSpec("int4", "symmetric", PerBlock((1, 1, 1, -1))).to_json(), "algorithm": "gptq"}
    for what in (tensor, split):
        with pytest.raises(ConfigError, match="by whole kernels"):
            codes_of_weight(conv.weight, what, gram)
    good = annotation("int4", -1, 4)
    with pytest.raises(CalibrationError, match="not those of a convolution"):
        codes_of_weight(conv.weight, good, Gram(gram.matrix[0], gram.count))
    with pytest.raises(CalibrationError, match="were collected for a weight with 18 inputs"):
        codes_of_weight(conv.weight, good, Gram(gram.matrix[:, :9, :9], gram.count))
    with pytest.raises(CalibrationError, match="has seen no inputs"):
        codes_of_weight(conv.weight, good)
    scales = annotation("int4", 1, 4, "gptq{scale_type=int8}")
    with pytest.raises(ConfigError, match="scales of a convolution with groups"):
        codes_of_weight(conv.weight, scales, gram)


# --------------------------------------------------------------------------------------------------------------- models
class Small(nn.Module):
    """Convolutions of several kinds, with a norm that is folded in graphs, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 1)
        self.deep = nn.Conv2d(32, 32, 3, padding="same", groups=32)
        self.grouped = nn.Conv2d(32, 16, 3, padding=1, groups=2, padding_mode="circular")
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        z = self.grouped(torch.relu(self.deep(torch.relu(self.wide(y)))))
        return self.head((y + z).mean((2, 3)))


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(16, 3, 16, 16).cumsum(2).cumsum(3) / 8  # neighbours are alike, as in images
    model(x)  # statistics of the norm
    return model.eval(), x


@SCOPES
@pytest.mark.parametrize("options", [{"group_size": -1}, {"group_size": 9, "use_sym": False, "bits": 3}], ids=str)
@torch.no_grad()
def test_a_network_is_closer_to_float_than_by_plain_rounding(options: dict[str, Any], scope: str) -> None:
    model, x = small()
    q = done(model, x, scope, named(model, **options))
    lines = {line.name: line for line in q.report.weights}
    assert set(lines) == {"stem", "wide", "deep", "grouped", "head"}
    assert all(line.error <= line.rounded * 1.001 for line in lines.values())
    assert sum(line.error < line.rounded * 0.98 for line in lines.values()) >= 3
    by_rtn = c.RTNConfig(**options).set_local(nn.Conv2d, c.RTNConfig(**options))
    want, ours, theirs = model(x), q(x), done(model, x, scope, by_rtn)(x)
    assert float((ours - want).norm()) < float((theirs - want).norm())


@SCOPES
def test_groups_count_input_channels_and_kernels_stay_whole(scope: str) -> None:
    model, x = small()
    q = done(model, x, scope, named(model, group_size=9))
    assert sorted(set(blocks(q))) == [("int4", (1, 1, -1, -1)), ("int4", (1, 9)), ("int4", (1, 9, -1, -1))]


@SCOPES
def test_a_transposed_convolution_is_refused_by_name(scope: str) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 1)).eval()
    example = {"example_inputs": (torch.randn(4, 4, 4, 4),)} if scope == "graph" else {}
    why = "other parts of its kernels; give it a config of rtn"
    with pytest.raises(ConfigError, match=rf"(?s){why}.*'0'"):
        prepare(copy.deepcopy(model), c.GPTQConfig().set_local("0", c.GPTQConfig(group_size=-1)), **example)
    all_of_a_type = named(model, group_size=-1)
    prepared = prepare(model, all_of_a_type, **example)
    prepared(torch.randn(4, 4, 4, 4))
    (line,) = [line for line in convert(prepared).report.floats if line.op == "conv_transpose2d"]
    assert why in line.detail


@SCOPES
@pytest.mark.parametrize("options,text", [
    ({"group_size": 18, "act_order": True}, r"act_order puts .*static_groups=True"),
    ({"group_size": -1, "use_double_quant": True}, r"use_double_quant looks at all scales .*use_double_quant=False"),
    ({"group_size": -1, "fp8_aware": True}, r"fp8_aware looks at all scales .*fp8_aware=False"),
], ids=str)  # fmt: skip
def test_options_that_a_convolution_has_no_use_for(options: dict[str, Any], text: str, scope: str) -> None:
    """Said when the model is prepared, not after its calibration."""
    model, x = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)).eval(), torch.randn(1, 8, 5, 5)
    example = {"example_inputs": (x,)} if scope == "graph" else {}
    with pytest.raises(ConfigError, match=f"(?s){text}"):
        prepare(model, named(model, **options), **example)


@SCOPES
def test_scales_may_be_quantized_where_there_are_no_groups(scope: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 16, 3)).eval(), torch.randn(8, 8, 7, 7)
    config = named(model, group_size=18, use_double_quant=True, double_quant_bits=6, double_quant_group_size=8)
    q = done(model, x, scope, config)
    assert len(blocks(q)) == 2
    with torch.no_grad():
        assert 0 < float((q(x) - model(x)).norm() / model(x).norm()) < 0.2


@SCOPES
def test_without_data_it_says_so(scope: str) -> None:
    model, x = small()
    example = {"example_inputs": (x,)} if scope == "graph" else {}
    with pytest.raises(CalibrationError, match="no calibration data"):
        convert(prepare(model, named(model, group_size=-1), **example))


@SCOPES
def test_few_positions_are_a_warning_that_names_the_rank(scope: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 4, 3)).eval(), torch.randn(2, 8, 5, 5)
    example = {"example_inputs": (x,)} if scope == "graph" else {}
    with pytest.warns(Warning, match=r"0 \(rank 18\)"):
        quantize(model, named(model, group_size=-1), lambda m: m(x), **example)
