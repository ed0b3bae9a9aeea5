"""Who takes a scale in: every pair of producer and layer is found, and where there is none, it is said why."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.errors import ConfigError
from inc_graph.passes._absorb import classes
from inc_graph.passes._bare import forget_decisions, remove_observers
from inc_graph.passes._index_layers import _letters
from inc_graph.passes._index_views import reshaped
from inc_graph.passes._smooth_sites import find_sites, grouped
from inc_graph.smooth_report import SmoothLine
from inc_graph.smoothing import Smoothing
from tests.smooth_models import Attention, Gated, Packed, RMSNorm, Written, outliers, plan, smoothed, watched

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * outliers(16)
STRONG = Smoothing(alpha=0.7)


class Chain(nn.Module):
    """Layers in a row, with a function between the two."""

    def __init__(self, between: Any, first: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last, self.between = first or nn.Linear(16, 8), last or nn.Linear(8, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def lines(model: nn.Module, *args: Any, how: Smoothing = STRONG) -> dict[str, SmoothLine]:
    """{path of a layer: its line}; the smoothed graph computes what the model does."""
    torch.manual_seed(0)
    gm = watched(model, *args, recipe=plan(how))
    done, report = smoothed(gm, *args)
    with torch.no_grad():
        want, got = model(*args), done(*args)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    return {name: line for line in report for name in line.layers}


def test_linear_to_linear() -> None:
    found = lines(Chain(F.relu), X)
    assert found["last"].by == "absorbed" and found["last"].takers == ("first",)
    assert found["first"].by == "multiplied" and found["first"].detail == "x is an input of the model"


COMMUTE = {
    "relu": F.relu, "leaky relu": F.leaky_relu, "dropout": lambda x: F.dropout(x, 0.5, False), "neg": torch.neg,
    "view": lambda x: x.reshape(10, 2, 4).transpose(0, 1).transpose(0, 1).reshape(2, 5, 8),
    "times two": lambda x: 2 * x,
    "double": lambda x: x.double().float(), "mean over rows": lambda x: x.mean(1), "rows": lambda x: x[:, 1:3],
    "one row": lambda x: x[:, 0], "halved": lambda x: x / 2, "flat": lambda x: x.flatten(0, 1),
    "stacked": lambda x: torch.cat([x, x.relu()], 1), "padded": lambda x: F.pad(x, (0, 0, 1, 0)),
    "clamped at zero": lambda x: x.clamp(min=0), "other rows": lambda x: x.repeat(1, 2, 1),
    "sum": lambda x: x + x.relu(),
    "half of the channels twice": lambda x: torch.cat([x[..., :4], x[..., :4]], -1),
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1), "summed rows": lambda x: x.sum(1, keepdim=True),
    "einsum of one": lambda x: torch.einsum("bnc->bnc", x),
    "einsum over rows": lambda x: torch.einsum("mn,bnc->bmc", torch.ones(5, 5), x),
    "einsum of any rank": lambda x: torch.einsum("mn,...nc->...mc", torch.ones(3, 5), x),
    "einsum of a row": lambda x: torch.einsum("bnc,b->bnc", x, torch.tensor([2.0, 3.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMUTE)
def test_what_commutes(name: str) -> None:
    found = lines(Chain(COMMUTE[name]), X)["last"]
    assert found.by == "absorbed" and found.takers == ("first",)


REFUSED = {
    "gelu": (F.gelu, "gelu .*does not commute"), "silu": (F.silu, "silu .*does not commute"),
    "plus one": (lambda x: x + 1, "adds a number"), "relu6": (F.relu6, "does not commute|cuts off"),
    "softmax": (lambda x: x.softmax(-1), "does not commute"), "square": (lambda x: x * x, "is a square"),
    "gated by itself": (lambda x: x * x.sigmoid().relu(), "is read by|does not commute"),
    "padded": (lambda x: F.pad(x, (0, 0, 1, 0), value=1.0), "pads"),
    "clamped": (lambda x: x.clamp(min=-1), "cuts off"),
    "mean over channels": (lambda x: x - x.mean(-1, keepdim=True), "all channels would need one scale"),
    "no weight": (lambda x: F.layer_norm(x, (8,)), "has no weight that could take the scale"),
    "einsum over channels": (lambda x: torch.einsum("bnc,cd->bnd", x, (x + 1).mean((0, 1))[:, None].expand(8, 8)), "."),
    "einsum with itself": (lambda x: torch.einsum("bnc,bnc->bnc", x, x), "einsum.* multiplies a value by itself"),
    "einsum of a diagonal": (lambda x: torch.einsum("mmnc->mnc", x.expand(2, 2, 5, 8)), "not understood"),
    "glu over rows": (lambda x: F.glu(torch.cat([x, x], 1), 1), "is read by|scaled|share"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not(name: str) -> None:
    between, reason = REFUSED[name]
    found = lines(Chain(between), X)["last"]
    assert found.by == "multiplied"
    assert re.search(reason, found.detail), found.detail
    folding = Smoothing(alpha=0.7, folding=True)
    if name == "no weight":  # could never be folded
        with pytest.raises(ConfigError, match=reason):
            lines(Chain(between), X, how=folding)
        return
    kept = lines(Chain(between), X, how=folding)["last"]
    assert kept.by == "left" and kept.detail == found.detail and kept.alpha is None


TWICE = {  # what reads one value in several places: whether the place before takes the scale in nonetheless
    "cat": (lambda y: torch.cat([y, y], -1), True), "stack": (lambda y: torch.stack([y, y], -1).flatten(-2), True),
    "stack of rows": (lambda y: torch.stack([y, y], 1).sum(1), True),
    "cat of three": (lambda y: torch.cat([y, y[..., :4], y], -1), True),
    "attention": (lambda y: F.scaled_dot_product_attention(y, y, y), False),
    "matmul": (lambda y: (y[:, :4, :4] @ y[:, :4, :4]), False),
    "square": (lambda y: (z := y.reshape(-1, 8, 8)) @ z, False),
    "bmm": (lambda y: torch.bmm(z := y.reshape(-1, 8, 8), z), False), "quotient": (lambda y: y / y, False),
    "gate": (lambda y: F.glu(torch.cat([y, y], -1)), False),
    "gate of half": (lambda y: F.glu(y) + y[..., 4:], False), "other half": (lambda y: F.glu(y) + y[..., :4], True),
    "half of a half": (lambda y: (z := y.relu())[..., :4] + y[..., 4:] * z[..., 4:].sigmoid(), False),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("folding", [False, True])
def test_an_operator_that_reads_one_value_in_several_places(name: str, folding: bool) -> None:
    between, taken = TWICE[name]
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)) * outliers(16)
    torch.manual_seed(0)
    first = nn.Linear(16, 8)
    with torch.no_grad():
        first.weight[:3] *= 8
        width = between(first(x)).shape[-1]
    model = Chain(between, first, nn.Linear(width, 4))
    line = lines(model, x, how=Smoothing(alpha=0.7, folding=folding))["last"]  # which checks the function
    assert line.by == ("absorbed" if taken else "left" if folding else "multiplied")
    assert taken or re.search("in several places|scaled for others|is read by", line.detail), line.detail


@pytest.mark.parametrize(("places", "taken"), [("qkk", False), ("kqk", False), ("qqk", True)])
def test_attention_over_values_that_are_keys_or_queries(places: str, taken: bool) -> None:
    class Shared(Attention):
        def forward(self, x: Tensor) -> Tensor:
            found = {"q": self.split(self.q(x), self.heads), "k": self.split(self.k(x), self.kv)}
            y = F.scaled_dot_product_attention(*(found[place] for place in places))
            return self.o(y.transpose(1, 2).reshape(x.shape))

    model = Shared(kv=4)
    with torch.no_grad():
        for layer in (model.q, model.k):
            layer.weight[:3] *= 8
    line = lines(model, X)["o"]
    assert line.by == ("absorbed" if taken else "multiplied")
    assert taken or "reads one value in several places" in line.detail


@pytest.mark.parametrize("dim", [1, -1])
def test_a_convolution_that_is_put_together_with_itself(dim: int) -> None:
    class Dense(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([y := F.relu(self.first(x)), y], dim))

    x = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 5, 20]).view(1, 3, 1, 1)
    model = Dense(None, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16 if dim == 1 else 8, 8, 1))
    assert lines(model, x)["last"].takers == ("first",)


@pytest.mark.parametrize("kind", [Attention, Written, lambda: Attention(kv=4), lambda: Attention(kv=1)])
def test_values_to_output_through_attention(kind: Any) -> None:
    found = lines(kind(), X)
    assert found["o"].by == "absorbed" and found["o"].takers == ("v",)
    assert found["q"].layers == ("q",)  # each by its own scale, as nobody takes one in


@pytest.mark.parametrize("how", ["chunk", "split", "slice", "heads"])
def test_values_of_a_packed_layer(how: str) -> None:
    found = lines(Packed(how), X)
    assert found["o"].by == "absorbed" and found["o"].takers == ("qkv",)


class Einsum(Attention):
    """The same in einsum, of heads that are not moved to the front."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.width) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class Grouped(Attention):
    """Grouped heads in einsum: keys and values have no dimension for those that share them."""

    def forward(self, x: Tensor) -> Tensor:
        k, v = (layer(x).view(*x.shape[:2], self.kv, self.width) for layer in (self.k, self.v))
        q = self.q(x).view(*x.shape[:2], self.kv, -1, self.width)
        weights = torch.einsum("...qgrd, ...kgd -> ...grqk", q, k).softmax(-1)
        return self.o(torch.einsum("...grqk, ...kgd -> ...qgrd", weights, v).reshape(x.shape))


@pytest.mark.parametrize("kind", [lambda: Einsum(kv=4), Grouped])
def test_values_to_output_through_einsum(kind: Any) -> None:
    found = lines(kind(), X)
    assert found["o"].by == "absorbed" and found["o"].takers == ("v",)


class Multihead(nn.Module):
    """A norm, and torch's own attention, whose three layers are one parameter."""

    def __init__(self, batch_first: bool, weights: bool, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.weights = nn.LayerNorm(16), weights
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=bias)
        with torch.no_grad():
            self.norm.weight.copy_(outliers(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=self.weights)[0]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_values_to_output_in_multihead_attention(batch_first: bool, weights: bool, known: bool) -> None:
    model = Multihead(batch_first, weights).eval()
    dims = {0: torch.export.Dim("b", min=2, max=9), 1: torch.export.Dim("n", min=2, max=9)}
    gm = watched(model, X, recipe=plan(STRONG), dynamic=None if known else (dims,))
    done, report = smoothed(gm, X)
    takers = [line.takers for line in report]
    assert [line.by for line in report] == ["absorbed"] * 2 and takers == [("norm",), ("attention",)]
    x = X if known else torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1)) * outliers(16)
    with torch.no_grad():
        want, got = model(x), done(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


class Interleaved(Packed):
    """Queries, keys and values head by head, and products of three dimensions, as Bloom has them."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, size = x.shape
        fused = self.qkv(x).view(b, n, 4, 3, size // 4)
        q, k, v = (fused[..., i, :].transpose(1, 2).reshape(-1, n, size // 4) for i in range(3))
        y = torch.bmm((q @ k.transpose(-1, -2)).softmax(-1), v).view(b, 4, n, size // 4)
        return self.o(y.permute(0, 2, 1, 3).reshape(b, n, size))


@pytest.mark.parametrize("known", [True, False])
def test_values_of_heads_and_batch_in_one_dimension(known: bool) -> None:
    torch.manual_seed(0)
    model = Interleaved("").eval()
    dims = {0: torch.export.Dim("b", min=2, max=9), 1: torch.export.Dim("n", min=2, max=9)}
    gm = watched(model, X, recipe=plan(STRONG), dynamic=None if known else (dims,))
    done, report = smoothed(gm, X)
    assert (report[1].layers, report[1].by, report[1].takers) == (("o",), "absorbed", ("qkv",))
    x = X if known else X.repeat(2, 1, 1)[:3, :4]
    with torch.no_grad():
        want, got = model(x), done(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


class Glu(nn.Module):
    """a sigmoid(b) between two layers; `gate` is read once more where it is asked for."""

    def __init__(self, dim: int = -1, again: bool = False) -> None:
        super().__init__()
        conv = dim == 1
        self.first = nn.Conv1d(16, 24, 1) if conv else nn.Linear(16, 24)
        self.last = nn.Conv1d(12, 8, 3) if conv else nn.Linear(12, 8)
        self.dim, self.again = dim, again

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(1, 2) if self.dim == 1 else x)
        y = self.last(F.glu(x, self.dim))
        return y + x[..., :8] if self.again else y


@pytest.mark.parametrize("dim", [-1, 1])
def test_values_of_a_gated_unit(dim: int) -> None:
    model = Glu(dim)
    found = lines(model, X)
    assert found["last"].by == "absorbed" and found["last"].takers == ("first",)
    again = lines(Glu(again=True), X)["last"]
    assert again.by == "multiplied" and "is read by slice" in again.detail


def test_the_dimensions_of_an_einsum() -> None:
    assert _letters("ij,jk", [2, 2]) == [["i", "j"], ["j", "k"], ["i", "k"]]
    assert _letters("...i -> i...", [3]) == [["0", "1", "i"], ["i", "0", "1"]]
    assert _letters("...i, ...", [3, 1]) == [["0", "1", "i"], ["1"], ["0", "1", "i"]]
    assert _letters("ii->i", [2]) is None and _letters("i,j->ij", [1]) is None


def test_rms_norm_and_up_to_down() -> None:
    found = lines(Gated(), X[..., :8])
    assert found["gate"].layers == ("gate", "up") and found["gate"].takers == ("norm",)
    assert found["down"].takers == ("up",)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine: bool) -> None:
    norm = nn.LayerNorm(16, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    found = lines(Chain(lambda x: x, norm, nn.Linear(16, 4)), X)["last"]
    assert found.by == ("absorbed" if affine else "multiplied")


class Residual(nn.Module):
    """A norm whose result goes on besides, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.b(F.relu(self.a(x)))


class Times(nn.Module):
    """A norm, times a constant of some dtype and shape."""

    def __init__(self, factor: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(16).to(dtype), nn.Linear(16, 4).to(dtype)
        self.register_buffer("factor", factor)
        with torch.no_grad():
            self.norm.weight.copy_(outliers(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x) * self.factor)


SIXTEEN = torch.linspace(0.5, 2, 16)


@pytest.mark.parametrize(
    ("factor", "taker"),
    [(torch.tensor(0.5), "mul"), (torch.tensor([0.5]), "mul"), (SIXTEEN, "mul"), (SIXTEEN[None].clone(), "mul"),
     (torch.tensor(0.5).bfloat16(), "norm"), (torch.tensor(0.5).half(), "norm"), (torch.tensor(0.5).double(), "norm"),
     (torch.tensor([0.5]).bfloat16(), "norm"), (SIXTEEN.bfloat16(), "norm")],
)  # fmt: skip
def test_a_constant_takes_a_scale_in_its_own_dtype(factor: Tensor, taker: str) -> None:
    model = Times(factor)
    gm = watched(model, X, recipe=plan(STRONG))
    done, (line,) = smoothed(gm, X)
    with torch.no_grad():
        want, got = model(X), done(X)
    assert got.dtype == want.dtype and (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert line.by == "absorbed" and line.takers == (taker,)


@pytest.mark.parametrize(("dtype", "taker"), [(torch.float32, "norm"), (torch.bfloat16, "mul")])
def test_a_number_in_a_model_of_less_precision(dtype: torch.dtype, taker: str) -> None:
    """A float32 number leaves a bfloat16 value what it is; a float32 vector would not."""
    x, model = X.bfloat16(), Times(torch.tensor(0.5, dtype=dtype), torch.bfloat16)
    done, (line,) = smoothed(watched(model, x, recipe=plan(STRONG)), x)
    with torch.no_grad():
        want, got = model(x), done(x)
    assert got.dtype == want.dtype and (got - want).abs().max() <= 0.05 * want.abs().max()
    assert line.by == "absorbed" and line.takers == (taker,)


def test_a_norm_that_is_read_elsewhere_is_copied() -> None:
    found = lines(Residual(), X)
    assert found["a"].by == "absorbed" and found["a"].takers == ("norm",) and "layer_norm" in found["a"].detail
    assert found["b"].takers == ("a",)


def test_a_layer_that_is_read_elsewhere_is_not() -> None:
    class Both(Chain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x)
            return self.last(F.relu(x)).sum() + x

    found = lines(Both(F.relu), X)["last"]
    assert found.by == "multiplied" and found.detail == "linear is read by add too"


def test_embeddings_and_sums_of_them() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.fc = nn.Embedding(9, 8), nn.Embedding(5, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.words(ids) + self.places(torch.arange(5)))

    ids = torch.arange(10).view(2, 5) % 9
    found = lines(Lookup(), ids)["fc"]
    assert found.by == "absorbed" and set(found.takers) == {"words", "places"}


def test_a_batch_norm_before_a_convolution() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(outliers(4))  # type: ignore[arg-type]
    found = lines(model, torch.randn(2, 4, 7, 7))
    assert found["2"].by == "absorbed" and found["2"].takers == ("0",)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups: int) -> None:
    class Convs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8)
            self.b, self.c = nn.Conv2d(8, 6, 3, padding=1, groups=groups), nn.ConvTranspose2d(6, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.max_pool2d(F.relu(self.b(self.norm(self.a(x)))), 2))

    x = torch.randn(2, 4, 9, 9) * outliers(4).view(1, 4, 1, 1)
    found = lines(Convs(), x)
    assert (found["b"].takers, found["c"].takers) == (("norm",), ("b",))


def test_sizes_that_are_not_known() -> None:
    class Views(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x.view(-1, 16))
            return self.last(y.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).transpose(1, 2).flatten(2))

    dims = {0: torch.export.Dim("b", min=2, max=9), 1: torch.export.Dim("n", min=2, max=9)}
    gm = watched(Views(None), X, recipe=plan(), dynamic=({0: dims[0], 1: dims[1]},))
    _, report = smoothed(gm, X)
    assert [line.by for line in report] == ["multiplied", "absorbed"]


def test_heads_that_are_repeated_share_their_scales() -> None:
    model = Attention()
    gm = watched(model, X)

    sites = find_sites(gm)
    remove_observers(gm), forget_decisions(gm)
    (group,) = (
        g for g in grouped(gm, sites) if g.sites[0].layers[0].meta["nn_module_stack"] and len(set(g.same.tolist())) < 16
    )
    want = torch.arange(16).view(4, 4)
    want[1], want[3] = want[0].clone(), want[2].clone()  # heads 0 and 1 read the first values, 2 and 3 the others
    assert torch.equal(group.same.view(4, 4), want)


def test_classes_of_ties() -> None:
    ties = [(torch.tensor([0, 1]), torch.tensor([2, 3])), (torch.tensor([3]), torch.tensor([4]))]
    found = classes(ties, 6)
    assert isinstance(found, Tensor) and found.tolist() == [0, 1, 0, 1, 1, 5]
    assert isinstance(classes([(torch.tensor([0]), torch.tensor([-1]))], 2), str)


def test_an_index_is_reshaped_as_the_value_is() -> None:
    sizes = ([6, 4], [2, 3, 4], [3, 2, 2, 2], [24], [2, 12], [1, 6, 1, 4])
    whole = torch.arange(24)
    for inner in sizes:
        for outer in sizes:
            found = reshaped(whole.view(outer), inner, outer)
            assert found is not None and torch.equal(found.expand(inner).flatten(), whole)
    assert reshaped(torch.arange(4).view(1, 1, 4), [2, "s0", 4], [2, "s0", 4]) is not None
    assert reshaped(torch.arange(4).view(1, 4), ["s0 * 4"], ["s0", 4]) is None  # nothing is known of that text


def test_an_index_has_a_period_where_sizes_are_not_known() -> None:
    sizes = []

    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(x.shape[0])
            return x + 1

    torch.export.export(Sizes(), (X,), dynamic_shapes=({0: torch.export.Dim("b", min=2, max=9)},), strict=False)
    (b,) = sizes
    heads = torch.arange(8).view(1, 2, 1, 4)
    flat = reshaped(heads, [b * 2, 5, 4], [b, 2, 5, 4])
    assert flat is not None and torch.equal(flat, heads[0])
    back = reshaped(flat.movedim(0, 1), [5, b, 8], [5, b * 2, 4])
    assert back is not None and torch.equal(back, torch.arange(8).view(1, 1, 8))
    assert reshaped(torch.arange(4).view(1, 4), [b * 2], [b, 2 * 2]) is None  # 4 need not divide 2 b


def test_rms_norm_alone_is_a_taker() -> None:
    assert lines(Chain(lambda x: x, RMSNorm(16), nn.Linear(16, 4)), X)["last"].takers == ("first",)
