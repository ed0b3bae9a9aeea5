"""The observer module and the loop that feeds it."""

from __future__ import annotations

import copy
import io
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

import inc_graph.calibrate as calibrate
from inc_graph.calibrate import Observer, RangeEstimator, State, estimator, run_calibration
from inc_graph.errors import CalibrationError, ConfigError, IncError
from inc_graph.spec import PerChannel, PerTensor, QSpec

U8 = QSpec("uint8", "asymmetric")
PER_CHANNEL = QSpec("int8", "symmetric", PerChannel(1))
NAMES = ["minmax", "moving_average", "percentile", "histogram_mse", "kl"]
nan, inf = float("nan"), float("inf")


def observer(name: str = "minmax", qspec: QSpec = U8, **options) -> Observer:
    return Observer(name, qspec, "relu_1", "layers.0.act", **options)


# ---------------------------------------------------------------------------------------------------------- Observer
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_identity_and_collects(name: str) -> None:
    o, e = observer(name), estimator(name)
    state = e.init(U8, 2)
    for i in range(3):
        x = torch.randn(4, 5, requires_grad=True) * (i + 1)
        assert o(x) is x
        state = e.collect(state, x.detach())
    assert (o.calls, o.elements) == (3, 60) and not (o.saw_nan or o.saw_inf)
    for got, want in zip(o.calculate_qparams(), e.solve(state, U8), strict=True):
        assert torch.equal(got, want) and got.shape == (1, 1)
    assert all(not v.requires_grad for v in o.buffers())
    assert {k for k, _ in o.named_buffers()} == {f"state_{k}" for k in state}


def test_disabled_and_reset() -> None:
    o = observer()
    o.enabled = False
    o(torch.tensor([nan]))
    o(torch.ones(2, dtype=torch.int64))
    assert o.calls == 0 and not o.state
    o.enabled = True
    o(torch.ones(2))
    o.reset()
    assert o.calls == 0 and not o.state
    o(torch.ones(2, 2))


def test_no_data_is_an_error_that_names_the_node() -> None:
    for o in (observer(), observer(channel_mean=True)):
        with pytest.raises(CalibrationError) as e:
            o.calculate_qparams()
        assert str(e.value) == (
            "saw no data [node 'relu_1' in module 'layers.0.act']\n"
            "  hint: run calibration data through the prepared model before converting it"
        )
    o(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="saw no data"):
        o.calculate_qparams()
    with pytest.raises(CalibrationError, match="saw no data"):
        o.mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_nan_and_infinity_name_the_node_and_the_batch(name: str, bad: float) -> None:
    o = observer(name)
    o(torch.ones(2, 2))
    before = o.calculate_qparams()
    with pytest.raises(CalibrationError) as e:
        o(torch.tensor([[1.0, bad]]))
    number = "1 NaN and 0 infinite" if bad != bad else "0 NaN and 1 infinite"
    assert str(e.value) == (
        f"calibration batch 2: {number} values of 2 [node 'relu_1' in module 'layers.0.act']\n"
        "  hint: check that batch, or keep this operator in float"
    )
    assert (e.value.node, e.value.module) == ("relu_1", "layers.0.act")
    assert (o.saw_nan, o.saw_inf, o.calls) == (bad != bad, bad == bad, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, o.calculate_qparams(), strict=True))


def test_other_bad_values_name_the_node() -> None:
    for bad in (
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.cfloat),
        3.0,
    ):
        with pytest.raises(CalibrationError, match=r"not floating point \[node 'relu_1'"):
            observer()(bad)
    o = observer(qspec=PER_CHANNEL)
    o(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match=r"batch 2: .*2 before(.|\n)*node 'relu_1'(.|\n)*layout"):
        o(torch.ones(2, 3, 4))
    with pytest.raises(CalibrationError, match=r"batch 2: .*\[1, 3\] before, and now \[1, 4\](.|\n)*node 'relu_1'"):
        o(torch.ones(2, 4))
    o(torch.ones(5, 3))
    assert o.calls == 2
    assert isinstance(CalibrationError(""), IncError)


def test_bad_construction() -> None:
    with pytest.raises(ConfigError, match="not a range estimator"):
        Observer(3, U8, "n")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dynamic"):
        Observer("minmax", QSpec("int8", "symmetric", PerTensor(), True), "n")


def test_an_estimator_that_overrides_collect_is_still_protected() -> None:
    @dataclass(frozen=True)
    class Fixed(RangeEstimator):
        name = "fixed"

        def collect(self, state: State, x: torch.Tensor) -> State:
            return {**state, "min": torch.zeros(1), "max": torch.ones(1)}

        def update(self, state: State, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> State:
            raise AssertionError

        def limits(self, state: State, qspec: QSpec) -> tuple[torch.Tensor, torch.Tensor]:
            return state["min"], state["max"]

    o = Observer(Fixed(), U8, "n")
    o(torch.ones(3))
    assert float(o.calculate_qparams()[0]) == pytest.approx(1 / 255)
    with pytest.raises(CalibrationError, match=r"batch 2: NaN or infinite values \[node 'n'\]"):
        o(torch.tensor([nan]))


def test_the_mean_per_channel() -> None:
    o, data = observer(channel_mean=True), [torch.randn(3, 4, 5) + i for i in range(4)]
    for x in data:
        o(x)
    torch.testing.assert_close(o.mean(), torch.cat(data).mean((0, 2)))
    assert o.mean().shape == (4,) and o.mean().dtype == torch.float32
    last = observer(channel_mean=True, axis=-1)
    last(data[0])
    torch.testing.assert_close(last.mean(), data[0].mean((0, 1)))
    with pytest.raises(CalibrationError, match="4 channels before and has 6 now"):
        o(torch.ones(3, 6, 5))
    with pytest.raises(CalibrationError, match=r"axis 1 of a value of shape \[3\]"):
        observer(channel_mean=True)(torch.ones(3))
    plain = observer()
    plain(data[0])
    with pytest.raises(CalibrationError, match="channel_mean=True"):
        plain.mean()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.linear(x).relu() * scale


def prepared(name: str = "minmax") -> fx.GraphModule:
    gm = fx.symbolic_trace(Small().eval())
    gm.add_module("observer", observer(name))
    node = next(n for n in gm.graph.nodes if n.target == "relu")
    with gm.graph.inserting_after(node):
        new = gm.graph.call_module("observer", (node,))
    node.replace_all_uses_with(new)
    new.update_arg(0, node)
    gm.recompile()
    return gm


@pytest.mark.parametrize("name", NAMES)
def test_in_a_graph_module(name: str) -> None:
    gm, x = prepared(name), torch.randn(8, 3)
    empty = copy.deepcopy(gm)
    with torch.inference_mode():
        gm(x)
    gm(x)
    twin = copy.deepcopy(gm)
    assert twin.observer.calls == 2 and empty.observer.calls == 0
    twin(10 * x)
    assert gm.observer.calls == 2
    assert float(twin.observer.calculate_qparams()[0]) > float(gm.observer.calculate_qparams()[0])
    out = gm(x)
    out.sum().backward()  # the identity passes gradients
    assert gm.linear.weight.grad is not None


def test_fake_and_meta_values_pass_unseen() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    o = observer()
    with FakeTensorMode():
        o(torch.ones(2, 2))
    o(torch.ones(2, 2, device="meta"))
    assert o.calls == 0 and not o.state


def test_half_precision_values() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        o = observer(channel_mean=True)
        o(torch.tensor([[0.5, -2.0]], dtype=dtype))
        assert float(o.calculate_qparams()[0]) == pytest.approx(2.5 / 255)
        assert o.mean().tolist() == [0.5, -2.0]


def test_repr_tells_what_matters() -> None:
    o = observer("percentile")
    for part in ("'relu_1' in 'layers.0.act'", "Percentile(bins=2048, percent=99.99)", "uint8 asymmetric", "calls=0"):
        assert part in repr(o)
    o(torch.tensor([-1.0, 3.0]))
    o.enabled = False
    assert "calls=1, range=[-1, 3], disabled" in repr(o)


def test_an_interruption_leaves_the_observer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    o = observer("histogram_mse")
    o(torch.ones(4))
    before = {k: v.clone() for k, v in o.state.items()}

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(type(o.estimator), "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            o(torch.full((4,), 100.0))
    assert o.calls == 1 and all(torch.equal(v, before[k]) for k, v in o.state.items())
    o(torch.full((4,), 100.0))
    assert o.calls == 2


# --------------------------------------------------------------------------------------------------- run_calibration
def test_batches_of_every_form() -> None:
    gm, x = prepared(), torch.randn(8, 3)
    assert run_calibration(gm, [x, (x, 2.0), [x], {"x": x, "scale": 3.0}]) == 4
    assert gm.observer.calls == 4
    assert run_calibration(gm, (x for _ in range(3)), steps=2) == 2
    assert run_calibration(gm, [x], steps=5) == 1
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(8)), batch_size=4)
    assert run_calibration(gm, loader, forward=lambda model, batch: model(batch[0])) == 2
    assert gm.observer.calls == 9


def test_no_gradients_are_kept() -> None:
    seen = []
    run_calibration(prepared(), [torch.randn(2, 3)], forward=lambda model, x: seen.append(model(x)))
    assert not seen[0].requires_grad and torch.is_grad_enabled()


def test_steps_takes_no_batch_too_many() -> None:
    taken = []

    def source():
        for i in range(10):
            taken.append(i)
            yield torch.randn(2, 3)

    assert run_calibration(prepared(), source(), steps=3) == 3 and taken == [0, 1, 2]


def test_bad_calibration_data() -> None:
    gm, x = prepared(), torch.randn(8, 3)
    used = iter([x])
    run_calibration(gm, used)
    for empty in ([], used):
        with pytest.raises(CalibrationError, match=r"is empty(.|\n)*hint: a generator"):
            run_calibration(gm, empty)
    for wrong in (x, {"x": x}, 3, None, "data"):
        with pytest.raises(ConfigError, match=r"iterable of batches(.|\n)*\[batch\]"):
            run_calibration(gm, wrong)  # type: ignore[arg-type]
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="steps"):
            run_calibration(gm, [x], steps=steps)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"batch 3: 32 NaN.*relu_1"):
        run_calibration(prepared(), [x, x, x * nan])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_a_wrong_call_says_how_to_choose_the_inputs() -> None:
    with pytest.raises(TypeError) as e:
        run_calibration(prepared(), [(torch.ones(2, 3), 1.0, "label")])
    assert "calibration batch 1" in e.value.__notes__[0] and "forward=" in e.value.__notes__[0]


def test_an_interruption_keeps_what_was_seen() -> None:
    gm = prepared("histogram_mse")

    def source():
        yield torch.randn(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_calibration(gm, source(), progress=True)
    assert gm.observer.calls == 1
    gm.observer.calculate_qparams()


def test_progress_is_quiet_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    gm, x = prepared(), torch.randn(2, 3)
    run_calibration(gm, [x, x])
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for data, steps, want in (([x] * 3, None, "3/3"), ([x] * 3, 2, "2/2"), (iter([x] * 3), None, "3/?")):
        terminal = Terminal()
        monkeypatch.setattr(calibrate.sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        run_calibration(gm, data, steps=steps)
        assert "calibrating" in terminal.getvalue() and want in terminal.getvalue()
    run_calibration(gm, [x], progress=False)
