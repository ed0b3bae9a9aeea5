"""A batch norm beside a layer goes into it, in every form the exporter leaves, and the user's tensors stay his."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph import graph as g
from inc_graph.text import to_text
from tests.golden_check import check_golden
from tests.passes.pipelines import bits, calls, captured, find, find_one, run, text

aten = torch.ops.aten
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = {1: (2, 4, 7), 2: (2, 4, 6, 5), 3: (2, 4, 4, 5, 3)}


def trained(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as no initialisation leaves them."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.3, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def fold(model: nn.Module, *args: Tensor) -> tuple[torch.fx.GraphModule, str]:
    """(graph, report); checks the outputs, the user's tensors, and that a second application does nothing."""
    trained(model)
    unchanged = bits(model)
    with torch.no_grad():
        gm = captured(model, *args)
        report = run(gm, "fold-conv-bn").reports[0]
        torch.testing.assert_close(gm(*args), model(*args), rtol=1e-4, atol=1e-4)
    before = to_text(gm, tensors=True)
    assert not run(gm, "fold-conv-bn").reports[0].matched and to_text(gm, tensors=True) == before
    assert unchanged()
    return gm, str(report)


class Block(nn.Module):
    """Norms before, behind and between."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, groups=1, bias=bias)
        self.norm = nn.BatchNorm2d(4)
        self.next = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.norm(self.conv(x)).relu())


class Refused(nn.Module):
    """Every norm stands beside something that cannot take it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)])
        self.linear, self.norm1d = nn.Linear(6, 5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        z = self.more(self.norms[0](y) * y)
        z = self.norms[2](self.more(self.norms[1](z.relu())))
        return z, self.norm1d(self.linear(z.select(2, 0)))


def test_golden() -> None:
    gm = captured(trained(Block()), torch.randn(2, 3, 6, 6))
    check_golden("fold-conv-bn/positive.txt", text(run(gm, "fold-conv-bn")))


def test_golden_rejected() -> None:
    gm = captured(trained(Refused()), torch.randn(2, 3, 6, 6))
    check_golden("fold-conv-bn/rejected.txt", text(run(gm, "fold-conv-bn")))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("groups", [1, 2])
def test_norm_behind_a_convolution(kind: str, dims: int, groups: int, affine: bool, bias: bool) -> None:
    extra: dict[str, Any] = {"padding": 1, "dilation": 2} if kind == "Conv" else {"stride": 2, "output_padding": 1}
    conv = getattr(nn, f"{kind}{dims}d")(4, 6, 3, groups=groups, bias=bias, **extra)
    gm, _ = fold(nn.Sequential(conv, NORMS[dims + 2](6, affine=affine)), torch.randn(*SHAPES[dims]))
    assert len(calls(gm)) == 1
    assert g.get_tensor(gm, find_one(gm, calls(gm)[0]).args[2]).dtype == torch.float32


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_said_in_words(padding: str) -> None:
    gm, _ = fold(nn.Sequential(nn.Conv2d(4, 4, 2, padding=padding), nn.BatchNorm2d(4)), torch.randn(*SHAPES[2]))
    assert calls(gm) == ["conv2d"]


@pytest.mark.parametrize(("groups", "dims"), [(1, 1), (1, 2), (2, 2), (4, 2), (2, 3)])
def test_norm_before_a_convolution(groups: int, dims: int) -> None:
    conv = getattr(nn, f"Conv{dims}d")(4, 8, 2, groups=groups, stride=2)
    gm, _ = fold(nn.Sequential(NORMS[dims + 2](4), conv), torch.randn(*SHAPES[dims]))
    assert calls(gm) == [f"conv{dims}d"]


def test_linear_on_both_sides() -> None:
    gm, _ = fold(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(3, 4))
    assert calls(gm) == ["linear"]
    gm, _ = fold(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), torch.randn(3, 4))
    assert calls(gm) == ["linear"]


def test_norms_in_a_row() -> None:
    gm, _ = fold(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), torch.randn(*SHAPES[2]))
    assert calls(gm) == ["conv2d"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    gm = captured(model, torch.randn(*SHAPES[2], dtype=dtype))
    run(gm, "fold-conv-bn")
    assert calls(gm) == ["conv2d"] and {b.dtype for b in gm.buffers()} == {dtype}


@pytest.mark.parametrize(
    "target", [aten.batch_norm.default, aten.cudnn_batch_norm.default, aten.native_batch_norm.default]
)
@pytest.mark.parametrize("training", [False, True])
def test_other_operators(target: Any, training: bool) -> None:
    """Exporters of other versions leave the norm in other forms."""
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(*SHAPES[2])
    gm = captured(model, x)
    norm = find_one(gm, "_native_batch_norm_legit_no_training")
    old = next(iter(norm.users))
    more = (True,) if target is aten.batch_norm.default else ()
    with gm.graph.inserting_before(old):
        new = gm.graph.call_function(target, (*norm.args[:5], training, 0.1, 1e-5, *more))
        new.meta["val"] = norm.meta["val"][0] if more else norm.meta["val"]
        first = new if more else gm.graph.call_function(operator.getitem, (new, 0))
        first.meta["val"] = norm.meta["val"][0]
    old.replace_all_uses_with(first)
    g.erase_dead(gm)
    report = run(gm, "fold-conv-bn").reports[0]
    if training:
        assert "the batch norm is in training mode" in str(report) and not report.matched
    else:
        assert calls(gm) == ["conv2d"]
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_layer_and_norm_that_are_called_twice_stay_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    gm, _ = fold(Twice(), torch.randn(*SHAPES[2]))
    first, second = find(gm, "conv2d")
    assert first.args[1].target == second.args[1].target and first.args[2].target == second.args[2].target


def test_tied_weights_under_two_norms_become_two() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
            self.b.weight = self.a.weight
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[1](self.b(self.norms[0](self.a(x)).relu())) + self.a(x)

    gm, _ = fold(Tied(), torch.randn(*SHAPES[2]))
    weights = [n.args[1].target for n in find(gm, "conv2d")]
    assert len(set(weights)) == 3 and calls(gm).count("_native_batch_norm_legit_no_training") == 0


@pytest.mark.parametrize("keep", ["conv", "saved"])
def test_other_users(keep: str) -> None:
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return self.norm(y), y if keep == "conv" else None

    gm = captured(trained(Used()), torch.randn(*SHAPES[2]))
    if keep == "saved":
        norm = find_one(gm, "_native_batch_norm_legit_no_training")
        value = next(iter(norm.users))
        with gm.graph.inserting_after(value):
            stat = gm.graph.call_function(value.target, (norm, 1))
            stat.meta["val"] = norm.meta["val"][1]
        output = next(n for n in gm.graph.nodes if n.op == "output")
        output.args = ((value, stat),)
    report = str(run(gm, "fold-conv-bn").reports[0])
    assert ("conv2d has other users" if keep == "conv" else "its saved statistics are used") in report


def test_statistics_that_are_written_stay() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    inner = model[1]

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.model(x)
            inner.running_mean.add_(1)
            return y

    report = str(run(captured(Writes(), torch.randn(*SHAPES[2])), "fold-conv-bn").reports[0])
    assert "a statistic of the batch norm is not a constant" in report


def test_unbatched_input_is_refused() -> None:
    """The norm then counts another dimension as its channels."""

    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))  # [C, H, W] read as [N, C, L]

    _, report = fold(Unbatched(), torch.randn(4, 5, 6))
    assert "the layer's input has no batch dimension" in report


def test_fuel(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = captured(trained(Block()), torch.randn(2, 3, 6, 6))
    monkeypatch.setenv("INC_FUEL", "1")
    run(gm, "fold-conv-bn")
    assert calls(gm).count("_native_batch_norm_legit_no_training") == 2
