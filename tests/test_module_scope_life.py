"""Models with quantized layers in their places: hooks, copies, moves, failures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CaptureError, ConfigError, IncError, IncWarning
from inc_graph.quantization import StaticQuantConfig, convert, prepare, quantize
from tests.model_state import same, snapshot
from tests.module_scope_models import CONFIG, LAYERS, Net, close, ids, modules


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------- hooks, copies, modes
def test_hooks_of_the_user_go_on_working() -> None:
    model, x, seen = Net().eval(), ids(), []
    model.head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model.head.register_forward_pre_hook(lambda m, args: (args[0] * 1.0,))
    model.register_forward_hook(lambda m, args, out: out * 2)
    want = model(x)
    prepared = prepare(model, CONFIG)
    assert seen == [(4, 7, 16)], "a hook ran while the layer was captured"
    prepared(x)
    q = convert(prepared)
    assert close(want, q(x)) and seen == [(4, 7, 16)] * 3


@pytest.mark.parametrize("stage", ["float", "prepared", "converted"])
def test_copies_at_every_stage(stage: str) -> None:
    model, x = Net().eval(), ids()
    model.head.register_forward_hook(lambda m, args, out: None)
    if stage == "float":
        model = copy.deepcopy(model)
    model = prepare(model, CONFIG, inplace=False)
    model(x)
    if stage == "prepared":
        model = copy.deepcopy(model)
    q = convert(model, inplace=False)
    if stage == "converted":
        twin = copy.deepcopy(q)
        assert torch.equal(twin(x), q(x)) and str(twin.report) == str(q.report)
    assert modules(q) == LAYERS


def test_a_model_that_cannot_be_copied() -> None:
    model = Net().eval()
    with torch.enable_grad():
        model.cached = model.head.weight * 2  # no leaf of autograd: deepcopy refuses it
    before = snapshot(model)
    with pytest.raises(CaptureError, match=r"cannot be copied: RuntimeError(.|\n)*hint: use inplace=True"):
        prepare(model, CONFIG, inplace=False)
    assert same(before, snapshot(model))
    assert prepare(model, CONFIG, inplace=True) is model


def test_modes_and_moves_of_the_converted_model() -> None:
    model, x = Net().eval(), ids()
    q = quantize(model, CONFIG, lambda m: m(x))
    assert not any(m.training for m in q.modules()) and q.eval() is q and q.to("cpu") is q
    for bad in (q.train, q.half, lambda: q.to("meta")):
        with pytest.raises(IncError, match="a converted model cannot"):
            bad()


class Mixed(nn.Module):
    """Float modules before and beside quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.part = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.norm(x))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", ["double", "half", "train", "bfloat16"])
def test_a_refused_move_changes_nothing(change: str, copied: bool) -> None:
    x = torch.randn(4, 8)
    q = quantize(Mixed().eval(), CONFIG, lambda m: m(x))
    q = copy.deepcopy(q) if copied else q
    want, before = q(x), snapshot(q)
    for part in (q, q.part):
        with pytest.raises(IncError, match="a converted model cannot"):
            getattr(part, change)()
        assert same(before, snapshot(q)) and not any(m.training for m in q.modules())
        assert torch.equal(q(x), want)
    assert q.to("cpu") is q and q.float() is q and q.eval() is q and q.train(False) is q


class Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.a(y), lambda y: y + 1, (self.b(x),))


@pytest.mark.parametrize("copied", [False, True])
def test_layers_in_a_branch_of_torch_cond_stay_float(copied: bool) -> None:
    model, x = Cond().eval(), torch.randn(4, 8).abs()
    want = model(x), model(-x)
    p = prepare(model, CONFIG, inplace=not copied)
    p = copy.deepcopy(p) if copied else p
    p.a(x)  # also used outside: data alone does not make it fit for a branch
    p(x), p(-x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncWarning)
        q = convert(p)
    assert [(line.module, "inside torch.cond" in line.detail) for line in q.report.floats] == [("a", True)]
    assert modules(q) == {"b"} and type(q.a) is nn.Linear
    assert close(want[0], q(x)) and close(want[1], q(-x))


def test_autocast_around_the_model() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(x)
        prepared = prepare(model, CONFIG)
        assert prepared(x).dtype == torch.bfloat16
        q = convert(prepared)
        got = q(x)
    assert got.dtype == want.dtype == torch.bfloat16 and close(want.float(), got.float(), 25)
    assert q(x).dtype == torch.float32


# ------------------------------------------------------------------------------------------------- all or nothing
def test_failures_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import inc_graph.quantization.module_scope as scope

    model, x = Net().eval(), ids()
    before, calls = snapshot(model), 0

    def fails_third(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("by design")
        return real(*args, **kwargs)

    real: Any = scope.read_graph
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="by design"):
        m.setattr(scope, "read_graph", fails_third)
        prepare(model, CONFIG)
    assert same(before, snapshot(model))
    with pytest.raises(ConfigError, match=r"nothing .*kept float by (all|set_local)"):
        prepare(model, StaticQuantConfig(w_dtype="fp32"))
    assert same(before, snapshot(model))

    prepared, calls, real = prepare(model, CONFIG), 0, scope.finish
    prepared(x)
    halfway = snapshot(prepared)
    for inplace in (True, False):
        with monkeypatch.context() as m, pytest.raises(RuntimeError, match="by design"):
            calls = 0
            m.setattr(scope, "finish", fails_third)
            convert(prepared, inplace=inplace)
        assert same(halfway, snapshot(prepared))
    assert modules(convert(prepared)) == LAYERS
