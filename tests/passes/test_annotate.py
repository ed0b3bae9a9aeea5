"""Who is quantized, in which format, sharing whose scale; and why everything else is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.graph import peek_meta
from inc_graph.oppattern import pattern_of
from inc_graph.recipe import OpQuant, set_recipe
from inc_graph.spec import PerChannel, QSpec
from tests.golden_check import check_golden
from tests.passes.annotate_models import IMAGE, ROWS, SEQUENCE, SIGNED, Do, annotated, aten, groups, layers, quant
from tests.passes.pipelines import (
    INT8,
    U8,
    WEIGHT_ONLY,
    annotate,
    captured,
    find,
    find_one,
    kind,
    name,
    reads,
    recipe,
    run,
    text,
    why_float,
)

KERNELS = ("conv2d", "linear", "add", "embedding")


def placeholder(gm: fx.GraphModule) -> fx.Node:
    return next(iter(gm.graph.find_nodes(op="placeholder")))


# ------------------------------------------------------------------------------------------------------------ golden
class Positive(nn.Module):
    """A stem, a residual block, a pooled branch, concatenation, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Hardswish(), nn.Conv2d(4, 4, 1))
        self.branch = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(x) + x
        x = torch.cat([F.max_pool2d(x, 2), F.max_pool2d(self.branch(x), 2)], 1)
        return self.head(x.flatten(1))


class Rejected(nn.Module):
    """Operators that stay float, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.keep, self.up = nn.Linear(4, 4), nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.mixed, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("state", torch.eye(4))
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        nn.init.constant_(self.last.weight, float("nan"))

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.keep(x)
        x = torch.softmax(mask.float() @ x, -1)
        x = F.linear(x, self.state) + self.mixed(x)
        self.state.add_(1)
        x = F.linear(x, self.mixed.weight * 2)
        x = self.last(self.lstm(x)[0])
        return x * x, self.up(image)


def rejected_inputs() -> tuple[Tensor, ...]:
    return SEQUENCE, torch.ones(2, 5, 5, dtype=torch.bool), IMAGE


def test_golden() -> None:
    torch.manual_seed(0)
    plan = recipe(name("head", SIGNED), supported=KERNELS)
    check_golden("annotate/positive.txt", text(annotate(Positive(), torch.randn(1, 3, 6, 6), plan=plan)))


def test_golden_rejected() -> None:
    torch.manual_seed(0)
    plan = recipe(name("keep"))
    seen = text(annotate(Rejected(), *rejected_inputs(), plan=plan))
    seen = seen.replace("f32[1, 1, 2, 4]", "f32[1, 2, 4]")  # torch 2.8 gives the states of an LSTM a dimension too many
    check_golden("annotate/rejected.txt", seen)


# ----------------------------------------------------------------------------------------------------------- anchors
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("form", "axis", "more"),
    [
        ("Conv", 0, {}),
        ("Conv", 0, {"groups": 4}),
        ("Conv", 0, {"groups": 2, "dilation": 2}),
        ("Conv", 0, {"padding": "same"}),
        ("ConvTranspose", 1, {"stride": 2, "output_padding": 1}),
    ],
)
def test_convolutions(dims: int, form: str, axis: int, more: dict[str, Any]) -> None:
    layer = getattr(nn, f"{form}{dims}d")(4, 4, 3, **more)
    gm = annotated(lambda m, x: m.layer(x), torch.randn(1, 4, *[6] * dims), layer=layer)
    op = f"conv{dims}d" if form == "Conv" else f"conv_transpose{dims}d"
    note = peek_meta(find_one(gm, op))
    assert note["op"] == op and reads(gm, op) == 1
    assert note["weight"]["spec"]["granularity"] == PerChannel(axis).to_json()


def test_asymmetric_padding_is_carried() -> None:
    gm = annotated(lambda m, x: m.b(F.pad(m.a(x), (0, 1, 2, 0))), IMAGE, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 3))
    pad, first = find_one(gm, "pad"), find(gm, "conv2d")[0]
    assert quant(pad)["0"]["group"] == quant(first)["0"]["group"] == first.name


@pytest.mark.parametrize(
    ("op", "f"),
    [
        ("matmul", lambda m, x: x @ x.transpose(1, 2)),
        ("bmm", lambda m, x: torch.bmm(x, x.transpose(1, 2))),
        ("baddbmm", lambda m, x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2))),
        ("addmm", lambda m, x: torch.addmm(x[0, :, :1], x[0], x[1].t())),
    ],
)
def test_products(op: str, f: Callable[..., Tensor]) -> None:
    gm = annotated(f, SEQUENCE)
    note = peek_meta(find(gm, op)[-1])
    assert len(note["reads"]) == 2 and "weight" not in note


def test_a_product_with_a_parameter() -> None:
    """Three dimensions are no linear layer; the parameter is read like an activation."""
    gm = annotated(lambda m, x: torch.bmm(x, m.w), SEQUENCE, w=nn.Parameter(torch.randn(2, 4, 3)))
    assert reads(gm, "bmm") == 2


def test_embedding_is_quantized_by_rows() -> None:
    gm = annotated(lambda m, i: m.table(i), torch.tensor([[1, 2]]), table=nn.Embedding(5, 4))
    note = peek_meta(find_one(gm, "embedding"))
    assert note["weight"]["spec"]["granularity"] == PerChannel(0).to_json() and "reads" not in note


def test_attention_of_torch() -> None:
    """The fused form stays float, its four projections do not."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    gm = annotated(lambda m, x: m.layer(x), torch.randn(2, 5, 8), layer=layer)
    assert sum("rule" in peek_meta(n) for n in find(gm, "linear")) == 4
    assert "attention is computed whole in float" in why_float(gm, "scaled_dot_product_attention")


# -------------------------------------------------------------------------------------- what belongs to its producer
@pytest.mark.parametrize(
    "function",
    [
        F.relu, F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu, torch.sigmoid, F.hardsigmoid, torch.tanh, F.elu,
        F.leaky_relu, F.mish, F.softplus, F.selu, lambda x: x.clamp(0, 6), lambda x: x.clamp(min=0),
        lambda x: x.clamp_max(2), lambda x: x * x.sigmoid(),
    ],
)  # fmt: skip
def test_an_activation_function_is_part_of_its_producer(function: Callable[[Tensor], Tensor]) -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    gm = annotated(lambda m, x: m.b(function(m.a(x))), ROWS, a=a, b=b)
    first, second = find(gm, "linear")
    assert not quant(first) and second.args[0] is next(iter(first.users)) and quant(second.args[0])
    assert pattern_of(second.args[0]).role == "activation"


def test_a_residual_add_takes_the_accumulator() -> None:
    gm = annotated(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + x)), ROWS, **layers("abc"))
    add, (_, b, c) = find_one(gm, "add"), find(gm, "linear")
    assert list(peek_meta(add)["reads"]) == ["args_0"] and not quant(b) and not quant(add)
    assert quant(c.args[0]) and c.args[0].target is aten.relu.default


def test_of_two_layers_the_later_one_keeps_its_sum() -> None:
    gm = annotated(lambda m, x: m.c(m.a(x) + m.b(x)), ROWS, **layers("abc"))
    add, (a, b, _) = find_one(gm, "add"), find(gm, "linear")
    assert list(peek_meta(add)["reads"]) == [a.name] and quant(a) and not quant(b)


def test_a_layer_that_others_read_is_not_absorbed() -> None:
    gm = annotated(lambda m, x: m.c((y := m.a(x)) + x) + m.b(y), ROWS, **layers("abc"))
    assert len(peek_meta(find(gm, "add")[0])["reads"]) == 2


def test_a_weight_only_layer_has_no_accumulator() -> None:
    gm = annotated(lambda m, x: m.c(m.a(x) + x), ROWS, plan=recipe(name("a", WEIGHT_ONLY)), **layers("ac"))
    assert len(peek_meta(find_one(gm, "add"))["reads"]) == 2


# ---------------------------------------------------------------------------------------------------------- followers
@pytest.mark.parametrize(
    ("f", "op", "reason"),
    [
        (lambda m, x: m.a(x) + x, "add", "not every reader of its result is quantized"),
        (lambda m, x: ((y := m.a(x) + x), m.b(y))[0], "add", "not every reader of its result is quantized"),
        (lambda m, x: m.a(x) + 1, "add", "one operand is a number"),
        (lambda m, x: m.b(m.a(x) + torch.tensor(1.0)), "add", "one operand is a number"),
        (lambda m, x: m.b(m.a(x) + x.argmax(1, keepdim=True)), "add", "one operand is a number or an integer tensor"),
        (lambda m, x: m.b(torch.add(m.a(x), x, alpha=2)), "add", "alpha is not 1"),
        (lambda m, x: m.b((y := m.a(x)) + y), "add", "both operands are the same value"),
        (lambda m, x: m.b(m.a(x) + m.w), "add", "one operand is a parameter"),
        (lambda m, x: m.b(m.a(x) * m.w), "mul", "one operand is a parameter"),
        (lambda m, x: m.b(m.a(x) + m.table[:3]), "add", "slice_1 is a mask, a position or a constant"),
    ],
)
def test_sums_that_stay_float(f: Callable[..., Any], op: str, reason: str) -> None:
    gm = annotated(f, ROWS, **layers("ab"), w=nn.Parameter(torch.ones(4)), table=torch.ones(5, 4))
    assert reason in why_float(gm, op) and reads(gm, op) == 0


def test_pooling_follows() -> None:
    gm = annotated(lambda m, x: m.b(F.avg_pool2d(m.a(x), 2)), IMAGE, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    pool, (a, _) = find_one(gm, "avg_pool2d"), find(gm, "conv2d")
    assert quant(a)["0"]["group"] != quant(pool)["0"]["group"] and reads(gm, "avg_pool2d") == 1


def test_a_backend_takes_only_what_it_has_kernels_for() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.b(x @ x.transpose(1, 2) @ x) + m.c(m.a(x) * x)

    gm = annotated(f, SEQUENCE, plan=recipe(supported=KERNELS), **layers("abc"))
    assert "backend 'tiny' has no quantized kernel for matmul" in peek_meta(find(gm, "matmul")[0])["float"]
    assert "backend 'tiny' has no quantized kernel for mul" in why_float(gm, "mul")
    gm = annotated(
        f, SEQUENCE, plan=recipe(kind("matmul", INT8), kind("mul", INT8), supported=KERNELS), **layers("abc")
    )
    assert all(len(peek_meta(n)["reads"]) == 2 for n in find(gm, "matmul"))
    assert reads(gm, "mul") == 1


def test_a_backend_adds_only_what_a_layer_absorbs() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.relu(m.a(x)) + x)

    gm = annotated(f, ROWS, plan=recipe(supported=KERNELS), **layers("ab"))
    assert why_float(gm, "add") == "no operand comes straight from a quantized layer that could absorb it"
    assert reads(annotated(f, ROWS, **layers("ab")), "add") == 2


# ---------------------------------------------------------------------------------------------------------- carriers
@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.flatten(2).unflatten(2, (6, 6)), lambda x: x.permute(0, 1, 3, 2), lambda x: x.transpose(2, 3),
        lambda x: x.unsqueeze(0).squeeze(0), lambda x: x[:, :, 1:], lambda x: x[:, :, :1].expand(-1, -1, 6, -1),
        lambda x: x[:, :, 0][:, :, None], lambda x: x.flip(2), lambda x: x.roll(1, 2), lambda x: x.repeat(1, 1, 2, 1),
        lambda x: x.repeat_interleave(2, 2), lambda x: x.tile(2), lambda x: x[:, :, [0, 2]],
        lambda x: x.reshape(2, 4, 3, 12), lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: F.max_pool2d(x, 2), lambda x: F.pad(x, (1, 0, 0, 2)), lambda x: F.pad(x, (1, 1, 0, 2), "reflect"),
        lambda x: F.interpolate(x, scale_factor=2), lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
        lambda x: F.channel_shuffle(x, 2), lambda x: torch.cat([x, x], 2), lambda x: torch.stack([x, x], 2)[:, :, 0],
        lambda x: torch.hstack([x, x])[:, :4],
    ],
)  # fmt: skip
def test_carriers_keep_the_scale(move: Callable[[Tensor], Tensor]) -> None:
    gm = annotated(lambda m, x: m.b(move(m.a(x))), IMAGE, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    a, b = find(gm, "conv2d")
    carriers = [n for n in gm.graph.nodes if (p := pattern_of(n)) is not None and p.role == "carrier"]
    assert carriers and all(quant(n)["0"]["group"] == a.name for n in [a, *carriers]) and b.args[0] in carriers
    assert groups(gm) == {a.name, "args_0"}


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=1.0)), "pad"),  # one is not on every grid
        (lambda m, x: (m.b(y := F.max_pool2d(m.a(x), 2)), y), "max_pool2d"),  # somebody reads it float
        (lambda m, x: m.b(torch.cat([m.a(x), m.table], 1)[:, :4]), "cat"),  # a constant takes part
    ],
)
def test_what_does_not_carry(f: Callable[..., Any], op: str) -> None:
    gm = annotated(f, IMAGE, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), table=torch.ones(2, 1, 6, 6))
    assert reads(gm, op) == 0 and not quant(find(gm, "conv2d")[0])


def test_concatenation_shares_one_scale() -> None:
    """Through views, nested, and also for a reader that takes one of the parts alone."""
    gm = annotated(
        lambda m, x, y: (m.c(torch.cat([m.a(x), torch.cat([y, x.view(3, 4)], 1)[:, :4]], 1)[:, :4]), m.b(y)),
        ROWS, ROWS + 1, **layers("abc"),
    )  # fmt: skip
    a, _, _ = find(gm, "linear")
    roots = {quant(n)["0"]["group"] for n in [a, *gm.graph.find_nodes(op="placeholder"), *find(gm, "cat")]}
    assert len(roots) == 1 and len(groups(gm)) == 1


def test_only_one_scale_for_a_whole_tensor_is_carried() -> None:
    per_channel = OpQuant(QSpec("int8", "symmetric", PerChannel(1)), QSpec("int8", "symmetric", PerChannel(0)))
    gm = annotated(lambda m, x: m.b(m.a(x).flip(0)), ROWS, plan=recipe(everything=per_channel), **layers("ab"))
    assert reads(gm, "flip") == 0 and quant(find_one(gm, "flip"))


# ------------------------------------------------------------------------------------------- several readers, formats
def test_pieces_of_a_split_have_scales_of_their_own() -> None:
    gm = annotated(lambda m, x: [m.b(p) for p in m.a(x).chunk(2, 1)], ROWS, a=nn.Linear(4, 8), b=nn.Linear(4, 4))
    pieces = [n for n in gm.graph.nodes if n.op == "call_function" and not hasattr(n.target, "_schema")]
    assert len(pieces) == 2 and [quant(p)["0"]["group"] for p in pieces] == [p.name for p in pieces]
    assert not quant(find(gm, "linear")[0])


def test_a_quantized_and_a_float_reader() -> None:
    gm = annotated(lambda m, x: (m.b(y := m.a(x)), torch.softmax(y, 1)), ROWS, **layers("ab"))
    a, b = find(gm, "linear")
    assert quant(a) and peek_meta(b)["reads"] == {a.name: "0"} and "reads" not in peek_meta(find_one(gm, "softmax"))


def test_two_formats_of_one_value() -> None:
    plan = recipe(name("b", SIGNED))
    gm = annotated(lambda m, x: (m.b(y := m.a(x).flip(1)), m.c(y), m.c(x)), ROWS, plan=plan, **layers("abc"))
    flip = find_one(gm, "flip")
    assert {q["spec"]["qtype"] for q in quant(flip).values()} == {"uint8", "int8"}
    assert "reads" not in peek_meta(flip)  # its readers disagree, so it carries neither format


def test_a_sum_whose_readers_want_two_formats() -> None:
    gm = annotated(lambda m, x: (m.b(y := m.a(x) + x), m.c(y)), ROWS, plan=recipe(name("b", SIGNED)), **layers("abc"))
    assert reads(gm, "add") == 1 and len(quant(find_one(gm, "add"))) == 2


def test_one_format_found_in_two_ways_is_two() -> None:
    plan = recipe(name("b", OpQuant(U8, INT8.weight, act_algorithm="moving_average")))
    gm = annotated(lambda m, x: (m.b(x), m.c(x)), ROWS, plan=plan, **layers("bc"))
    assert {q["algorithm"] for q in quant(placeholder(gm)).values()} == {"minmax", "moving_average"}


# ----------------------------------------------------------------------------------- masks, positions, written buffers
NOT_DATA = "is a mask, a position or a constant, not data"


@pytest.mark.parametrize(
    ("f", "extra"),
    [
        (lambda m, x, e: e.float() @ x, torch.ones(2, 5, 5, dtype=torch.bool)),
        (lambda m, x, e: (1.0 - e.float()) * -1e9 @ x, torch.ones(2, 5, 5, dtype=torch.int64)),
        (lambda m, x, e: m.table.expand(2, 5, 5) @ x, None),  # a buffer
        (lambda m, x, e: torch.zeros_like(x) @ x.transpose(1, 2), None),
        (lambda m, x, e: (x > 0).float() @ x.transpose(1, 2), None),
        (lambda m, x, e: torch.full((2, 5, x.shape[1]), -1e9) @ x, None),
    ],
)
def test_masks_are_never_quantized(f: Callable[..., Tensor], extra: Tensor | None) -> None:
    gm = annotated(f, SEQUENCE, extra, table=torch.ones(5, 5))
    assert NOT_DATA in why_float(gm, "matmul") and not groups(gm)


def test_positions_are_never_quantized() -> None:
    """Rotary angles: positions times frequencies, and their sines beside data."""

    def rotary(m: Any, x: Tensor, at: Tensor) -> Tensor:
        angles = (m.frequency[None, :, None].expand(2, -1, 1) @ at[:, None, :].float()).transpose(1, 2)
        return m.a(m.a(x) * angles.cos())

    gm = annotated(rotary, SEQUENCE, torch.arange(5).expand(2, -1).contiguous(), frequency=torch.rand(4), **layers("a"))
    assert NOT_DATA in why_float(gm, "matmul") and NOT_DATA in why_float(gm, "mul")


def test_pixels_are_data() -> None:
    pixels = torch.zeros(1, 4, 6, 6, dtype=torch.uint8)
    gm = annotated(lambda m, x: m.a(x.float() / 255), pixels, a=nn.Conv2d(4, 4, 1))
    assert reads(gm, "conv2d") == 1


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda m, x: m.a(x.float() / 255), torch.randint(256, (3, 4))),
        (lambda m, x: m.a((x.float() / 255).view(-1, 4).flip(0)), torch.randint(256, (3, 2, 2))),  # moved
        (lambda m, x: m.a(F.one_hot(x, 4).float()), torch.randint(4, (3,))),
        (lambda m, x: m.a(x.float()), torch.ones(3, 4, dtype=torch.bool)),
        (lambda m, x: m.a((x > 0).float()), ROWS),
        (lambda m, x: m.a(torch.cat([(x / 9).cos(), (x / 9).sin()], -1)), torch.randint(99, (3, 2))),  # steps in time
        (lambda m, x: m.a(torch.fft.fft(x).real), ROWS),
    ],
)
def test_what_a_layer_with_a_weight_reads_is_data(f: Callable[..., Tensor], x: Tensor) -> None:
    assert reads(annotated(f, x, **layers("a")), "linear") == 1


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.a(torch.arange(4).float()[None] / 4 + torch.zeros_like(x)),
        lambda m, x: m.a(torch.arange(x.shape[0] * 4).view(-1, 4).float()),
        lambda m, x: m.a(m.table),
    ],
)
def test_constants_are_no_data_unless_the_reader_is_named(f: Callable[..., Tensor]) -> None:
    more: dict[str, Any] = {"table": torch.rand(3, 4), **layers("a")}
    assert NOT_DATA in why_float(annotated(f, ROWS, **more), "linear")
    assert NOT_DATA in why_float(annotated(f, ROWS, plan=recipe(kind("linear", INT8)), **more), "linear")
    assert reads(annotated(f, ROWS, plan=recipe(name("a", INT8)), **more), "linear") == 1


def test_a_name_does_not_overrule_what_cannot_be() -> None:
    plan = recipe(name("matmul", INT8), name("linear", INT8))
    gm = annotated(lambda m, i: (i @ i, F.linear(i.float(), m.w)), torch.ones(4, 4, dtype=torch.int64), plan=plan,
                   w=nn.Parameter(torch.full((4, 4), float("nan"))))  # fmt: skip
    assert "not floating point" in why_float(gm, "matmul") and "NaN" in why_float(gm, "linear")
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    gm = annotated(lambda m, x, k: k.float() @ x, SEQUENCE, mask, plan=recipe(name("matmul", INT8)))
    assert reads(gm, "matmul") == 2


def test_positions_times_frequencies_are_no_layer() -> None:
    """Written as a product with a constant matrix, which becomes a linear layer."""
    at = torch.arange(5)[:, None]
    gm = annotated(lambda m, at: (at.float() @ m.frequency).cos(), at, frequency=torch.rand(1, 4))
    assert NOT_DATA in why_float(gm, "linear")


def test_integers_are_never_quantized() -> None:
    gm = annotated(lambda m, i: (i @ i, torch.cat([i, i]).view(-1)), torch.ones(2, 2, dtype=torch.int64))
    assert not groups(gm) and "not floating point" in why_float(gm, "matmul")


def test_written_buffers_are_never_quantized() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        y = F.linear(x, m.weight) + m.state @ x.t() @ x
        m.state.add_(1)
        m.weight.mul_(2)
        return y

    gm = annotated(f, torch.randn(4, 4), state=torch.randn(4, 4), weight=torch.randn(4, 4))
    assert "its weight is a buffer that the model writes to" in why_float(gm, "linear")
    assert "input state is a buffer that the model writes to" in peek_meta(find(gm, "matmul")[0])["float"]
    assert not any(quant(n) for n in gm.graph.find_nodes(op="get_attr"))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.full((4, 4), float("inf")), "holds NaN or infinity"),
        (torch.full((4, 4), float("nan")), "holds NaN or infinity"),
        (torch.empty(0, 4), "is empty"),
        (torch.ones(4, 4, device="meta"), "is on the meta device"),
    ],
)
def test_weights_that_cannot_be(weight: Tensor, reason: str) -> None:
    gm = captured(Do(lambda m, x: F.linear(x, m.w), w=nn.Parameter(torch.ones(4, 4))), ROWS)
    gm.w = nn.Parameter(weight)
    node = next(iter(gm.graph.find_nodes(op="get_attr")))
    node.meta["val"] = node.meta["val"].new_empty(weight.shape)
    (layer,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    layer.meta["val"] = layer.meta["val"].new_empty(*layer.meta["val"].shape[:-1], len(weight))
    set_recipe(gm, recipe())
    run(gm, "annotate")
    assert reason in why_float(gm, "linear")


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (lambda m, x: torch.baddbmm(y := x @ x.transpose(1, 2), y, y), "baddbmm"),
        (lambda m, x: F.linear(m.w, m.w) + x[0, :4, :4], "linear"),
    ],
)
def test_a_value_in_two_roles_of_one_operator(f: Callable[..., Tensor], op: str) -> None:
    gm = annotated(f, SEQUENCE, w=nn.Parameter(torch.ones(4, 4)))
    assert "in another place of the same operator" in why_float(gm, op)


def test_a_weight_that_is_computed() -> None:
    gm = annotated(lambda m, x: F.linear(x, m.w.abs()), ROWS, w=nn.Parameter(torch.ones(4, 4)))
    assert why_float(gm, "linear") == "its weight is computed at run time, not a parameter"
