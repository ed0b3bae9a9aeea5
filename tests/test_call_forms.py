"""Every documented way to call `prepare`, `convert` and `quantize`, line by line; with one result for all of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CaptureError, ConfigError, IncWarning, MissingError
from inc_graph.export import export
from inc_graph.quantization import (
    AutoRoundConfig,
    INT8StaticQuantConfig,
    QuantizedModel,
    StaticQuantConfig,
    convert,
    prepare,
    quantize,
)
from tests.model_state import same, snapshot


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)) * scale)


class WeightOnly(INT8StaticQuantConfig):
    """A method that takes no data."""

    needs_calibration: ClassVar[bool] = False


CONFIG = StaticQuantConfig(act_sym=True).set_local("fc2", StaticQuantConfig(w_dtype="fp32"))
AS_DICT = {"static_quant": {"global": {"act_sym": True}, "local": {"fc2": {"w_dtype": "fp32"}}}}
WEIGHTS = WeightOnly(act_dtype="fp32", bias_correction=False)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", IncWarning)
        yield


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 8), torch.tensor(0.5)


def run(model: nn.Module, *data: Any) -> None:
    model(*data)


FORMS: dict[str, Callable[..., nn.Module]] = {
    "positional": lambda m, a: quantize(m, CONFIG, run, a),
    "keywords": lambda m, a: quantize(model=m, quant_config=CONFIG, run_fn=run, run_args=a),
    "a dictionary": lambda m, a: quantize(m, AS_DICT, run, run_args=list(a)),
    "all positional": lambda m, a: quantize(m, CONFIG, run, a, True, None),
    "no run_args": lambda m, a: quantize(m, CONFIG, lambda p: p(*a)),
    "three calls": lambda m, a: convert(_run(prepare(m, CONFIG), a)),
    "keywords and a dictionary": lambda m, a: convert(model=_run(prepare(model=m, quant_config=AS_DICT), a)),
    "inplace": lambda m, a: convert(_run(prepare(m, CONFIG, True), a), None, True),
}
EXPORTED: dict[str, Callable[..., nn.Module]] = {
    "tuple": lambda m, a: quantize(m, CONFIG, run, a, example_inputs=a),
    "list": lambda m, a: quantize(m, CONFIG, run, a, True, list(a)),
    "dict": lambda m, a: quantize(m, AS_DICT, run, a, example_inputs={"x": a[0], "scale": a[1]}),
    "positional": lambda m, a: convert(_run(prepare(m, CONFIG, True, a), a)),
    "keywords": lambda m, a: convert(_run(prepare(m, AS_DICT, example_inputs=a, inplace=False), a), inplace=False),
    "a graph": lambda m, a: convert(_run(prepare(export(m, a), CONFIG), a)),
    "a graph at once": lambda m, a: quantize(export(m, a), AS_DICT, run, a),
    "a program": lambda m, a: convert(_run(prepare(torch.export.export(m, a), CONFIG), a)),
}


def _run(prepared: nn.Module, data: Any) -> nn.Module:
    prepared(*data)
    return prepared


@pytest.mark.parametrize("form", FORMS)
def test_layer_by_layer(model: Net, inputs: tuple[Tensor, Tensor], form: str) -> None:
    want = FORMS["positional"](copy.deepcopy(model), inputs)(*inputs)
    before = copy.deepcopy(CONFIG), copy.deepcopy(AS_DICT)
    q = FORMS[form](model, inputs)
    assert q is model and isinstance(q, Net) and torch.equal(q(*inputs), want)
    assert [line.module for line in q.report.quantized] == ["fc1"] and (CONFIG, AS_DICT) == before


@pytest.mark.parametrize("form", EXPORTED)
def test_as_a_graph(model: Net, inputs: tuple[Tensor, Tensor], form: str) -> None:
    want, before = EXPORTED["tuple"](model, inputs)(*inputs), snapshot(model)
    q = EXPORTED[form](model, inputs)
    assert isinstance(q, QuantizedModel) and torch.equal(q(*inputs), want) and same(before, snapshot(model))


@pytest.mark.parametrize("call", ["quantize", "prepare", "convert", "both"])
def test_not_in_place(model: Net, inputs: tuple[Tensor, Tensor], call: str) -> None:
    want = FORMS["positional"](copy.deepcopy(model), inputs)(*inputs)
    before = snapshot(model)
    if call == "quantize":
        q = quantize(model, CONFIG, run, inputs, inplace=False)
    else:
        prepared = prepare(model, CONFIG, inplace=call == "convert")
        prepared(*inputs)
        seen = snapshot(prepared)
        q = convert(prepared, inplace=call == "prepare")
        assert (q is prepared) is (call == "prepare") and same(seen, snapshot(prepared)) is (call != "prepare")
    assert torch.equal(q(*inputs), want) and same(before, snapshot(model)) is (call != "convert")


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("config", [WEIGHTS, {"weights": WEIGHTS.to_dict()}], ids=["config", "dictionary"])
def test_convert_without_prepare(model: Net, inputs: tuple[Tensor, Tensor], config: Any, inplace: bool) -> None:
    from inc_graph.quantization.base_config import register_config
    from inc_graph.registry import CONFIGS

    name = WeightOnly.name
    register_config(algo_name="weights")(WeightOnly)
    try:
        want, before, told = model(*inputs), snapshot(model), copy.deepcopy(config)
        graph = convert(export(model, inputs), config)
        also = quantize(model, config, inplace=False)  # no run_fn either
        q = convert(model, config, inplace)
        assert (q is model) is inplace and same(before, snapshot(model)) is not inplace and config == told
        for result in (graph, also, q):
            got = result(*inputs)
            assert 10 * torch.log10((want**2).sum() / ((want - got) ** 2).sum()) > 30
            assert [line.module for line in result.report.quantized] == ["fc1", "fc2"]
    finally:
        CONFIGS.remove("weights")
        WeightOnly.name = name


def test_convert_needs_what_prepare_would_have_given(model: Net, inputs: tuple[Tensor, Tensor]) -> None:
    before = snapshot(model)
    for config in (CONFIG, AS_DICT):
        with pytest.raises(ConfigError, match="needs calibration data, so the model must be prepared first"):
            convert(model, config)
    with pytest.raises(ConfigError, match="the model is not prepared"):
        convert(model)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("exported", [True, False])
def test_a_config_that_comes_too_late_is_not_ignored_in_silence(
    model: Net, inputs: tuple[Tensor, Tensor], exported: bool
) -> None:
    prepared = prepare(model, CONFIG, example_inputs=inputs if exported else None)
    prepared(*inputs)
    with pytest.warns(IncWarning, match="quant_config is not used: the model was prepared with a config") as caught:
        q = convert(prepared, StaticQuantConfig())
    assert caught[0].filename == __file__ and [line.module for line in q.report.quantized] == ["fc1"]


def test_the_module_of_the_entry_functions() -> None:
    """A script may name the module, which has the name of one of its functions."""
    import sys

    import inc_graph.quantization as package
    from inc_graph.quantization.quantize import autotune, convert, finalize_calibration, prepare, prepare_qat, quantize

    assert "inc_graph.quantization.quantize" in sys.modules and callable(package.quantize)
    for function in (autotune, convert, finalize_calibration, prepare, prepare_qat, quantize):
        assert getattr(package, function.__name__) is function
    model = nn.Linear(2, 2)
    assert type(prepare_qat(model, mapping={nn.Linear: "MXFP8"}, inplace=False)) is nn.Linear


def test_inputs_as_a_tokenizer_gives_them() -> None:
    from collections import UserDict

    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    q = quantize(model, StaticQuantConfig(), lambda p: p(x), inplace=False, example_inputs=UserDict(input=x))
    assert isinstance(q, QuantizedModel) and q(x).shape == (2, 4)


def test_convert_without_prepare_takes_example_inputs() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    config = StaticQuantConfig(act_dtype="fp32", bias_correction=False)
    assert isinstance(convert(model, config, inplace=False, example_inputs=x), QuantizedModel)
    assert isinstance(convert(model, config, inplace=False), nn.Sequential)


def test_the_name_of_a_model() -> None:
    with pytest.raises(MissingError, match="AutoRoundConfig: this version does not have the algorithm"):
        prepare("facebook/opt-125m", AutoRoundConfig())  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="'facebook/opt-125m' is the name of a model"):
        prepare("facebook/opt-125m", StaticQuantConfig())  # type: ignore[arg-type]
