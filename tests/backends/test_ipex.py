"""The IPEX backend: int8 groups of oneDNN Graph, counted in what was executed. Needs torch 2.8, IPEX: `make test-ipex`.

What needs no IPEX (how functions are written, which backend is chosen) is in test_torchscript.py and test_device.py.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import real_models as rm
from inc_graph.errors import IncError, IncWarning
from inc_graph.export import export
from inc_graph.lowering import ipex as backend
from inc_graph.quantization import DynamicQuantConfig, RTNConfig, StaticQuantConfig, convert, load, prepare, quantize
from inc_graph.registry import BACKENDS
from inc_graph.text import to_text
from inc_graph.utils import choose_backend
from tests.graph_generator import RandomModel

pytestmark = pytest.mark.ipex


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[Any]:
    try:
        yield importlib.import_module("intel_extension_for_pytorch")
    except Exception as e:  # it raises whatever its parts raise
        pytest.skip(f"IPEX cannot be imported: {type(e).__name__}: {e}")


def both(model: nn.Module, *x: Tensor, config: Any = None, **options: Any) -> tuple[Any, Any]:
    """The model on IPEX and on the reference."""
    prepared = prepare(export(model.eval(), x, **options), config or StaticQuantConfig())
    prepared(*x)
    return convert(prepared, backend="ipex"), convert(prepared, backend="eager")


def executed(model: Any, *x: Tensor) -> int:
    """int8 groups in what IPEX has executed."""
    model(*x)
    groups = [n for n in torch.jit.last_executed_optimized_graph().nodes() if n.kind() == "ipex::LlgaFusionGroup"]
    return sum(
        any(i.node().kind() == "aten::dequantize" for n in g.g("Subgraph").nodes() for i in n.inputs()) for g in groups
    )


def assert_near(got: Tensor, want: Tensor, db: float = 60.0) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert rm.sqnr_db(want, got) > db


class Net(nn.Module):
    """A residual network with padding that differs from side to side, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.left, self.right, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = F.relu6(self.deep(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(self.left(x) + self.right(x))
        return self.head(x.mean((2, 3)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))


def test_int8_groups_are_what_the_report_says() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 64)
    q, e = both(mlp(), x)
    assert q.backend == "ipex" and q.report.count("linear") == 3 == executed(q, x)
    assert not q.report.reference and not q.report.floats
    assert q.lowered.script.groups == 3 and len(q.lowered.script.operators) == 3
    assert_near(q(x), e(x))
    assert q.report.bytes_after < 0.3 * q.report.bytes_before
    assert to_text(q.graph, tensors=True) == to_text(e.graph, tensors=True)  # codes come back as they were


def test_a_network_of_convolutions() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 17, 17)
    q, e = both(Net(), x)
    assert q.report.count("conv2d") == 4 and q.report.count("linear") == 1 and not q.report.reference
    assert "pad" not in str(q.lowered.script._function.graph)  # taken into the weights
    assert executed(q, x) == 5
    assert_near(q(x), e(x))
    assert_near(q(x.to(memory_format=torch.channels_last)), e(x))
    assert to_text(q.graph, tensors=True) == to_text(e.graph, tensors=True)


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d if dims == 1 else nn.Conv3d
    x = torch.randn(2, 4, *[7] * dims)
    q, e = both(nn.Sequential(conv(4, 8, 3, padding=1), nn.ReLU(), conv(8, 4, 1)), x)
    assert q.report.count(f"conv{dims}d") + len(q.report.reference) == 2
    assert q.report.count(f"conv{dims}d") == executed(q, x)  # whether IPEX takes them or not, what is said is so
    assert_near(q(x), e(x))


class Heads(nn.Module):
    """Attention whose products are written out."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(*x.shape[:2], -1, 16).transpose(1, 2) for x in (q, k, v))
        return (torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v).transpose(1, 2).flatten(2)


class Product(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.left, self.right = form, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.form == "bmm":
            return torch.bmm(x, y.transpose(1, 2))
        if self.form == "mm":
            return torch.mm(x[0], y[0].t())
        if self.form == "four dimensions":
            return x[None] @ y[None].transpose(-1, -2)
        if self.form == "behind layers":
            return torch.relu(self.left(x) @ self.right(y).transpose(1, 2))
        if self.form == "squared":
            return x @ x
        return x @ y.transpose(-1, -2)


@pytest.mark.parametrize("form", ["bmm", "mm", "three dimensions", "four dimensions", "behind layers"])
def test_products_of_two_activations(form: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    q, e = both(Product(form), x, y)
    assert q.report.count("matmul") == 1 and not q.report.reference and "matmul" not in {f.op for f in q.report.floats}
    assert executed(q, x, y) == len(q.report.kernels)
    assert_near(q(x, y), e(x, y))


def test_a_product_of_a_value_with_itself_is_not_given_to_ipex() -> None:
    """Compiling it does not end."""
    torch.manual_seed(0)
    x = torch.randn(3, 16, 16)
    q, e = both(Product("squared"), x, x)
    assert [line.op for line in q.report.reference] == ["matmul"] and not q.report.kernels
    assert torch.equal(q(x, x), e(x, x))


def test_attention_whose_products_are_written_out() -> None:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    x = [torch.randn(2, 8, 48) for _ in range(3)]
    q, e = both(Heads(), *x, dynamic_shapes=({0: batch, 1: length},) * 3)
    assert q.report.count("matmul") == 2 == executed(q, *x) and not q.report.reference
    for shape in ((2, 8), (1, 2), (5, 33)):
        y = [torch.randn(*shape, 48) for _ in range(3)]
        assert_near(q(*y), e(*y))


def test_one_function_holds_for_all_shapes() -> None:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    x = torch.randn(2, 6, 32)
    q, e = both(layer, x, dynamic_shapes=({0: batch, 1: length},))
    assert q.report.count("linear") >= 3
    function = q.lowered.script._function
    for shape in ((1, 2), (5, 64), (64, 3), (2, 6)):
        y = torch.randn(*shape, 32)
        assert_near(q(y), e(y))
    assert q.lowered.script._function is function and executed(q, y) == q.lowered.script.groups


@pytest.mark.parametrize("float_first", [False, True])
def test_other_strides_and_sizes_of_one(float_first: bool) -> None:
    """IPEX compiles a group for the strides that it sees first, and does not look at them again."""
    torch.manual_seed(0)
    config = StaticQuantConfig()
    if float_first:
        config.set_local("stem", StaticQuantConfig(w_dtype="fp32"))
    batch, x = torch.export.Dim("batch", min=1, max=64), torch.randn(4, 3, 17, 17)
    q, e = both(Net(), x, config=config, dynamic_shapes=({0: batch},))
    for size in (4, 1, 7, 4):
        y = torch.randn(size, 3, 17, 17)
        for z in (y, y.to(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3)):
            assert_near(q(z), e(z))


def test_under_torch_compile_and_copied() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    q, _ = both(mlp(), x)
    want = q(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(q)(x), want)
    copied = copy.deepcopy(q)
    assert torch.equal(copied(x), want) and copied.backend == "ipex" and copied.graph is not q.graph
    assert copied.lowered.script is q.lowered.script  # immutable
    with pytest.raises(IncError, match="cannot go from"):
        q.half()
    z = x.clone().requires_grad_()
    y = q(z)
    assert torch.equal(y, want)
    with pytest.warns(IncWarning, match="no gradient passes"):
        y.sum().backward()
    assert z.grad is None
    with torch.inference_mode():
        assert torch.equal(q(x), want)


def test_autocast_around_a_call_changes_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    q, _ = both(mlp(), x)
    want = q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(x), want)
    assert executed(q, x) == 3


def test_what_cannot_be_compiled_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("\nno such operator\nand more")

    torch.manual_seed(0)
    x = torch.randn(8, 64)
    monkeypatch.setattr(backend, "Scripted", fails)
    with pytest.warns(IncWarning, match="IPEX cannot run .*: no such operator; it runs on the reference"):
        q, e = both(mlp(), x)
    assert not q.report.kernels and len(q.report.reference) == 3
    assert torch.equal(q(x), e(x))


def test_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 17, 17)
    q, e = both(Net(), x)
    q.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.backend == "ipex" and again.report.count("conv2d") == 4
    assert torch.equal(again(x), q(x))
    assert torch.equal(load(tmp_path / "model", backend="eager")(x), e(x))
    assert load(tmp_path / "model", backend="inductor").backend == "inductor"


def test_formats_of_seven_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 64)
    model = mlp()
    prepared = prepare(export(model.eval(), (x,)), StaticQuantConfig(reduce_range=True))
    prepared(x)
    q, e = convert(prepared), convert(prepared, backend="eager")
    assert q.report.count("linear") == 3
    assert_near(q(3 * x), e(3 * x))  # beyond the range: it saturates where the format does


def test_huge_values_saturate() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    q, e = both(mlp(), x)
    huge = torch.full((8, 64), 1e30)
    huge[:, ::2] = -float("inf")
    assert_near(q(huge), e(huge))


def test_layers_of_a_model_that_is_not_exported() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = mlp().eval()
    q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False)
    e = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, backend="eager")
    assert q.report.backend == "ipex" and q.report.count("linear") == 3
    assert_near(q(x), e(x))


def test_weight_only_layers_are_ours() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    q = quantize(mlp().eval(), RTNConfig(group_size=32), example_inputs=x)
    e = quantize(mlp().eval(), RTNConfig(group_size=32), example_inputs=x, backend="inductor")
    assert q.report.backend == "ipex" and {k.detail for k in q.report.kernels} == {k.detail for k in e.report.kernels}


def test_dynamic_layers_are_ours_and_products_stay_float() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    exported = export(Product("behind layers").eval(), (x, y))
    q, i = (quantize(exported, DynamicQuantConfig(), backend=name) for name in ("ipex", "inductor"))
    assert q.report.count("linear") == 2 and not q.report.reference
    assert {k.detail for k in q.report.kernels} == {k.detail for k in i.report.kernels}
    assert "matmul" in {line.op for line in q.report.floats}
    assert_near(q(x, y), i(x, y))


def test_layers_of_both_kinds_in_one_graph() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    config = StaticQuantConfig().set_local("2", RTNConfig(group_size=32))
    prepared = prepare(export(mlp().eval(), (x,)), config)
    prepared(x)
    q, e = convert(prepared, compute_dtype="float32"), convert(prepared, backend="eager")
    assert q.report.count("linear") == 3 and sum("group" in k.detail for k in q.report.kernels) == 2
    assert_near(q(x), e(x))


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed: int) -> None:
    """Any graph runs, whatever IPEX makes of it; tied weights, written buffers and several outputs included."""
    model = RandomModel(seed)
    args, kwargs = model.inputs(seed)
    prepared = prepare(export(model, args, kwargs=kwargs), StaticQuantConfig())
    prepared(*args, **kwargs)
    q, e = convert(prepared), convert(prepared, backend="eager")
    got, want = q(*args, **kwargs), e(*args, **kwargs)
    assert got.keys() == want.keys()
    for name in want:
        assert_near(got[name], want[name], 30.0)  # a value on a tie may be a code away
    again = q(*args, **kwargs)
    assert all(again[name].shape == want[name].shape for name in want)


def test_where_ipex_is_imported_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INC_TARGET_DEVICE", raising=False)
    assert choose_backend("auto", "cpu") == ("ipex", "") and BACKENDS.get("ipex").available() is None
    monkeypatch.setenv("INC_TARGET_DEVICE", "cpu")
    assert choose_backend() == ("ipex", "")
    assert choose_backend("inductor") == ("inductor", "") and choose_backend("eager") == ("eager", "")


def score(model: Any, batches: list[tuple[Tensor, ...]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(*batch) for batch in batches])


@pytest.mark.real_model
def test_efficientnet() -> None:
    """50 layers and 9 residual sums in groups; as accurate as the reference."""
    model, images, labels = rm.efficientnet_lite0()
    prepared = prepare(export(model, (images[:4],), dynamic_shapes=({0: torch.export.Dim("n", max=32)},)),
                       StaticQuantConfig())  # fmt: skip
    for batch in rm.calibration_images(16).split(4):
        prepared(batch)
    q, e = convert(prepared), convert(prepared, backend="eager")
    assert (q.report.count("conv2d"), q.report.count("linear"), q.report.count("add")) == (49, 1, 9)
    assert not q.report.reference
    x = [(images[:10],)]
    want, got, exact = score(model, x), score(q, x), score(e, x)
    assert abs(rm.sqnr_db(want, got) - rm.sqnr_db(want, exact)) < 0.6  # pixels lie on ties between two codes
    assert rm.top_k(got, labels[:10]) >= rm.top_k(exact, labels[:10]) - 1


@pytest.mark.real_model
def test_minilm() -> None:
    """36 layers in groups; as accurate as the reference."""
    model, tokenizer, documents, _ = rm.minilm()
    calibration = list(rm.batches(tokenizer, rm.calibration_documents(8), 4))
    batch = torch.export.Dim("batch", min=1, max=32)
    prepared = prepare(export(model, calibration[0], dynamic_shapes=({0: batch}, {0: batch})), StaticQuantConfig())
    for inputs in calibration:
        prepared(*inputs)
    q, e = convert(prepared), convert(prepared, backend="eager")
    assert q.report.count("linear") == 36 and q.report.count("embedding") == 3 and not q.report.reference
    x = list(rm.batches(tokenizer, documents[:6], 3))
    want, got, exact = score(model, x), score(q, x), score(e, x)
    assert abs(rm.sqnr_db(want, got) - rm.sqnr_db(want, exact)) < 0.3
