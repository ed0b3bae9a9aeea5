"""A calibration batch counts whole or not at all: whatever fails in a model call leaves no trace in the observers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.calibrate import Observer, run_calibration
from inc_graph.errors import CalibrationError
from inc_graph.export import export
from inc_graph.input_mean import MeanObserver
from inc_graph.quantization import StaticQuantConfig, convert, prepare

SCOPES = ("graph", "layers")


class Log(nn.Module):
    """NaN behind the first layer for inputs far from zero: the first observers have seen the batch by then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.log(self.first(x) + 5))


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def prepared(scope: str, act_algo: str = "minmax") -> tuple[nn.Module, Tensor]:
    model, x = Log().eval(), torch.randn(4, 16)
    config = StaticQuantConfig(act_algo=act_algo)
    return (prepare(export(model, (x,)), config) if scope == "graph" else prepare(model, config)), x


def collected(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for m in model.modules():
        if isinstance(m, Observer):
            found.append(({k: v.clone() for k, v in m.state.items()}, m.calls, m.elements))
        elif isinstance(m, MeanObserver):
            found.append((None if m.total is None else m.total.clone(), m.count))
    return found


def same(a: Any, b: Any) -> bool:
    return str(a) == str(b) and len(a) > 0


@pytest.mark.parametrize("act_algo", ["minmax", "moving_average", "histogram_mse"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_refused_batch_leaves_no_trace(scope: str, act_algo: str) -> None:
    torch.set_printoptions(profile="full", precision=9)
    try:
        model, x = prepared(scope, act_algo)
        with pytest.raises(CalibrationError, match="NaN"):
            model(x * 1000)
        assert not any(o.elements for o in model.modules() if isinstance(o, Observer))
        model(x)
        before = collected(model)
        for _ in range(2):
            with pytest.raises(CalibrationError, match="NaN"):
                model(x * 1000)
            assert same(collected(model), before)
        model(x * 0.5)
        assert not same(collected(model), before)
    finally:
        torch.set_printoptions(profile="default")


@pytest.mark.parametrize("scope", SCOPES)
def test_accuracy_is_that_of_the_good_batches(scope: str) -> None:
    model, x = prepared(scope)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        m(x)
    with pytest.raises(CalibrationError):
        model(x * 1000)
    assert torch.equal(convert(model)(x), convert(twin)(x))


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bad = nn.Linear(4, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.bad:
            raise KeyError("the user's own")
        return self.second(y)


def test_a_failure_of_the_model_itself_is_taken_back_too() -> None:
    model = prepare(Fails().eval(), StaticQuantConfig())
    model(torch.ones(2, 4))
    before = collected(model)
    model.bad = True
    with pytest.raises(KeyError):
        model(torch.ones(2, 4) * 9)
    assert same(collected(model), before)


def test_an_interrupted_batch_is_taken_back_with_the_next() -> None:
    model = prepare(Fails().eval(), StaticQuantConfig())
    model(torch.ones(2, 4))
    before = collected(model)

    class Stop(Fails):
        def forward(self, x: Tensor) -> Tensor:
            self.first(x)
            raise KeyboardInterrupt

    good, model.__class__ = model.__class__, Stop
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 4) * 9)
    model.__class__ = good
    model.bad = True
    with pytest.raises(KeyError):
        model(torch.ones(2, 4) * 9)
    assert same(collected(model), before)


@pytest.mark.parametrize("scope", SCOPES)
def test_copies_have_their_own_batches(scope: str) -> None:
    model, x = prepared(scope)
    model(x)
    twin = copy.deepcopy(copy.deepcopy(model))
    before = collected(model)
    with pytest.raises(CalibrationError):
        twin(x * 1000)
    assert same(collected(twin), before) and same(collected(model), before)
    twin(x * 2)
    assert same(collected(model), before) and not same(collected(twin), before)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_converted_model_is_not_watched(scope: str) -> None:
    model, x = prepared(scope)
    model(x)
    for inplace in (False, True):
        q = convert(model, inplace=inplace)
        watched = [m for m in q.modules() if any("batches" in str(h) for h in m._forward_pre_hooks.values())]
        graphs = [q.lowered, q.graph] if scope == "graph" else []
        hooks = [
            h for m in (*q.modules(), *graphs) for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        ]
        assert not watched and not any(getattr(h, "__module__", "") == "inc_graph.batches" for h in hooks)


@pytest.mark.parametrize("scope", SCOPES)
def test_run_calibration_can_go_on_after_a_bad_batch(scope: str) -> None:
    model, x = prepared(scope)
    with pytest.raises(CalibrationError):
        run_calibration(model, [x, x * 1000, x])
    assert max(o.calls for o in model.modules() if isinstance(o, Observer)) == 1
    assert run_calibration(model, [x]) == 1
