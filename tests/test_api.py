"""`export`, `prepare`, `convert`, `quantize`, `finalize_calibration`: every way to call them, what they leave alone."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from inc_graph.calibrate import Observer, run_calibration
from inc_graph.errors import CalibrationError, ConfigError, IncError, IncWarning, PassError
from inc_graph.export import export, export_model_for_pt2e_quant
from inc_graph.graph import get_level
from inc_graph.input_mean import MeanObserver
from inc_graph.passmanager import Pass, PassResult
from inc_graph.quantization import (
    INT8StaticQuantConfig,
    QuantizedModel,
    StaticQuantConfig,
    convert,
    finalize_calibration,
    get_default_static_config,
    prepare,
    quantize,
)
from inc_graph.registry import PASSES
from inc_graph.text import to_text
from tests import api_models
from tests.api_models import DYNAMIC, Net, calibrated, close, kinds
from tests.model_state import same, snapshot

FLOAT = StaticQuantConfig(w_dtype="fp32")


model, data, no_grad = api_models.model, api_models.data, api_models.no_grad  # fixtures


# ---------------------------------------------------------------------------------------------------- the call forms
def test_the_example_of_the_readme(model: nn.Module, data: list[Tensor]) -> None:
    example_inputs = (data[0],)
    exported = export(model, example_inputs, dynamic_shapes=None)
    prepared = prepare(exported, StaticQuantConfig())
    for x in data:
        prepared(x)
    q_model = convert(prepared)
    assert prepared is exported and isinstance(q_model, QuantizedModel)
    assert close(model(data[0]), q_model(data[0])) and q_model.report.count("linear") == 3


def test_signatures_users_know() -> None:
    known = {
        export: ["model", "example_inputs", "dynamic_shapes"],
        prepare: ["model", "quant_config", "inplace", "example_inputs"],
        convert: ["model", "quant_config", "inplace"],
        quantize: ["model", "quant_config", "run_fn", "run_args", "inplace", "example_inputs"],
        finalize_calibration: ["model"],
    }
    for function, names in known.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters)[: len(names)] == names
        assert all(parameters[n].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for n in names)
        assert all(p.default is True for n, p in parameters.items() if n == "inplace")
    assert export_model_for_pt2e_quant is export


@pytest.mark.parametrize("form", ["tuple", "list", "tensor", "dict", "positional", "default"])
def test_forms_of_example_inputs(model: nn.Module, data: list[Tensor], form: str) -> None:
    x, config = data[0], get_default_static_config()
    prepared = {
        "tuple": lambda: prepare(model, config, example_inputs=(x,)),
        "list": lambda: prepare(model=model, quant_config=config, example_inputs=[x, 2.0]),
        "tensor": lambda: prepare(model, config, example_inputs=x),
        "dict": lambda: prepare(model, config, example_inputs={"x": x, "scale": 2.0}),
        "positional": lambda: prepare(model, config, False, (x,)),
        "default": lambda: prepare(export(model, {"x": x}), config, True),
    }[form]()
    inputs = (x, 2.0) if form == "list" else (x,)
    named = {"x": x, "scale": 2.0} if form == "dict" else None
    call = (lambda m: m(**named)) if named else (lambda m: m(*inputs))
    call(prepared)
    assert isinstance(prepared, fx.GraphModule) and close(call(model), call(convert(prepared)))


def test_keyword_inputs_beside_positional_ones(model: nn.Module, data: list[Tensor]) -> None:
    graph = export(model, data[0], kwargs={"scale": 3.0})
    assert torch.equal(graph(data[0], scale=3.0), model(data[0], scale=3.0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_is_taken_as_it_is(model: nn.Module, data: list[Tensor], dynamic: bool) -> None:
    program = torch.export.export(model, (data[0],), dynamic_shapes=({0: DYNAMIC},) if dynamic else None)
    prepared = prepare(program, StaticQuantConfig().set_local("fc2", FLOAT))
    for x in data:
        prepared(x)
    q = convert(prepared)
    assert q.report.count("linear") == 2 and close(model(data[0]), q(data[0]))
    more = torch.cat(data)
    if dynamic:
        assert q(more).shape == (12, 4)
    else:
        with pytest.raises(IncError, match=r"has shape \[12, 8\]"):
            q(more)
    assert torch.equal(export(program)(data[0]), model(data[0]))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "parallel"])
@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_wrapped_models_stand_for_what_they_wrap(
    model: nn.Module, data: list[Tensor], wrap: Any, exported: bool
) -> None:
    want = model(data[0])
    options = {"example_inputs": data[0]} if exported else {}
    prepared = prepare(wrap(model), StaticQuantConfig(), inplace=False, **options)
    prepared(data[0])
    q = convert(prepared)
    assert type(q) is (QuantizedModel if exported else Net) and close(want, q(data[0]))


def test_graphs_that_others_made(model: nn.Module, data: list[Tensor]) -> None:
    traced, module = fx.symbolic_trace(model), torch.export.export(model, (data[0],)).module()
    for graph in (traced, module):
        before = snapshot(traced) if graph is traced else None
        q = quantize(graph, StaticQuantConfig(), lambda m: m(data[0]), example_inputs=data[0])
        assert q.report.count("linear") == 3 and close(model(data[0]), q(data[0]))
        assert {x.module for x in q.report.kernels} >= {"fc1", "fc10", "fc2"}
        assert before is None or same(before, snapshot(traced))
    layers = prepare(fx.symbolic_trace(model), StaticQuantConfig())  # a traced graph still calls its layers
    layers(data[0])
    assert convert(layers).report.count("linear") == 3


# ------------------------------------------------------------------------------------------------- what is left alone
def test_inplace_true_turns_the_graph_into_the_prepared_one(model: nn.Module, data: list[Tensor]) -> None:
    before, graph = snapshot(model), export(model, data[0])
    assert prepare(graph, StaticQuantConfig(), inplace=True) is graph and get_level(graph) == "observed"
    graph(data[0])
    assert same(before, snapshot(model))


def test_inplace_false_leaves_the_graph_bit_identical(model: nn.Module, data: list[Tensor]) -> None:
    graph = export(model, data[0])
    before, user = snapshot(graph), snapshot(model)
    prepared = prepare(graph, StaticQuantConfig(), inplace=False)
    for x in data:
        prepared(x)
    q = convert(prepared)
    assert prepared is not graph and get_level(graph) == "float"
    assert same(before, snapshot(graph)) and same(user, snapshot(model))
    assert torch.equal(graph(data[0]), model(data[0])) and close(graph(data[0]), q(data[0]))


@pytest.mark.parametrize("inplace", [True, False])
def test_an_eager_model_that_is_exported_is_never_changed(model: nn.Module, data: list[Tensor], inplace: bool) -> None:
    before = snapshot(model)
    prepared = prepare(model, StaticQuantConfig(), inplace=inplace, example_inputs=data[0])
    prepared(data[0])
    convert(prepared, inplace=inplace)
    assert same(before, snapshot(model))


def test_a_failing_pass_leaves_the_graph_as_it_was(
    model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    @PASSES.register("fails-late")
    @dataclasses.dataclass(frozen=True)
    class Fails(Pass):
        name = "fails-late"

        def run(self, gm: fx.GraphModule) -> PassResult:
            raise ZeroDivisionError("by design")

    class Bad(INT8StaticQuantConfig):
        def recipe(self, backend: str, supported: Any) -> Any:
            recipe = super().recipe(backend, supported)
            return dataclasses.replace(recipe, **{self.where: getattr(recipe, self.where) + ",fails-late"})

    try:
        for where in ("prepare", "convert"):
            monkeypatch.setattr(Bad, "where", where, raising=False)
            for target in (export(model, data[0]), model):
                before, user = snapshot(target), snapshot(model)
                with pytest.raises(
                    PassError, match=r"'fails-late' failed after \[.*: ZeroDivisionError\('by design'\)"
                ):
                    prepared = prepare(target, Bad(), inplace=where == "prepare")
                    for x in data:
                        prepared(x)
                    seen = snapshot(prepared)
                    convert(prepared)
                assert same(before, snapshot(target)) and same(user, snapshot(model))
                if where == "convert":
                    assert same(seen, snapshot(prepared))
    finally:
        PASSES.remove("fails-late")


def test_convert_leaves_the_prepared_graph_as_it_was(model: nn.Module, data: list[Tensor]) -> None:
    prepared = calibrated(model, data)
    before = snapshot(prepared)
    first, second = convert(prepared), convert(prepared)
    assert same(before, snapshot(prepared))
    assert torch.equal(first(data[0]), second(data[0]))
    assert first is not second and first.lowered is not second.lowered
    wide = [10 * x for x in data]  # more data, other ranges
    for x in wide:
        prepared(x)
    third = convert(prepared)
    assert close(model(wide[0]), third(wide[0]), 30) and not close(model(wide[0]), first(wide[0]), 10)
    assert torch.equal(first(data[0]), second(data[0]))


def test_a_batch_that_fails_leaves_the_statistics_whole(model: nn.Module, data: list[Tensor]) -> None:
    prepared, other = calibrated(model, data), calibrated(model, data)
    for bad in (data[0] * float("nan"), data[0] / 0, torch.randn(3, 9), data[0].double()):
        with pytest.raises(IncError):
            prepared(bad)
    assert torch.equal(convert(prepared)(data[0]), convert(other)(data[0]))


def test_copies(model: nn.Module, data: list[Tensor]) -> None:
    graph = copy.deepcopy(export(model, data[0]))
    prepared = prepare(graph, StaticQuantConfig())
    prepared(data[0])
    twin = copy.deepcopy(prepared)
    twin(10 * data[0])
    q, other = convert(prepared), convert(twin)
    assert not torch.equal(q(data[0]), other(data[0]))
    again = copy.deepcopy(q)
    assert torch.equal(again(data[0]), q(data[0])) and str(again.report) == str(q.report)
    assert torch.equal(again.graph(data[0]), q.graph(data[0]))


# ------------------------------------------------------------------------------------------------------------ quantize
def test_quantize_in_one_call(model: nn.Module, data: list[Tensor]) -> None:
    calls: list[Any] = []

    def run(prepared: nn.Module, *args: Any) -> None:
        calls.append(args)
        for x in data:
            prepared(x)

    config, graph = StaticQuantConfig(), export(model, data[0])
    before = snapshot(graph)
    for inplace in (True, False):
        q = quantize(graph, config, run, inplace=inplace)
        assert isinstance(q, QuantizedModel) and same(before, snapshot(graph))
    quantize(model, config, run, (1, 2), False, (data[0],))
    quantize(model, config, run, run_args=[3], example_inputs=data[0], backend="eager")
    quantize(model, quant_config=config, run_fn=run, run_args=4, example_inputs={"x": data[0]})
    assert calls == [(), (), (1, 2), (3,), (4,)]
    for bad in (None, 3):
        with pytest.raises(ConfigError, match=r"run_fn|calibration data"):
            quantize(model, config, bad, example_inputs=data[0])


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None], ids=["fails", "interrupted", "runs nothing"])
def test_quantize_leaves_the_model_as_it_was(
    model: nn.Module, data: list[Tensor], exported: bool, error: type[BaseException] | None
) -> None:
    def run(prepared: nn.Module) -> None:
        if error is not None:
            prepared(data[0])
            raise error("stop")

    target = export(model, data[0]) if exported else model
    before = snapshot(target)
    with pytest.raises(error or CalibrationError):
        quantize(target, StaticQuantConfig(), run)
    assert same(before, snapshot(target))


# ------------------------------------------------------------------------------------------------ end of calibration
@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_finalize_calibration(model: nn.Module, data: list[Tensor], exported: bool) -> None:
    options = {"example_inputs": data[0]} if exported else {}
    prepared = prepare(model, StaticQuantConfig(), inplace=False, **options)
    with pytest.raises(CalibrationError, match="no calibration data"):
        finalize_calibration(prepared)
    for x in data:
        prepared(x)
    want = convert(prepared, inplace=False)(data[0])
    assert finalize_calibration(prepared) is None
    prepared(100 * data[0])
    assert all(not m.enabled for m in prepared.modules() if isinstance(m, Observer | MeanObserver))
    assert torch.equal(convert(prepared)(data[0]), want)
    for other in (model, 3):
        with pytest.raises(ConfigError, match="not prepared"):
            finalize_calibration(other)


def test_run_calibration_feeds_a_prepared_model(model: nn.Module, data: list[Tensor]) -> None:
    prepared = prepare(model, StaticQuantConfig(), example_inputs=data[0])
    assert run_calibration(prepared, data) == 4
    assert close(model(data[0]), convert(prepared)(data[0]))


# -------------------------------------------------------------------------------------------------------- set_local
@pytest.mark.parametrize(
    ("where", "what", "expected"),
    [
        (r"fc1$", FLOAT, {"fc1": "floats", "fc10": "kernels", "fc2": "kernels"}),
        (["fc10", "fc2"], FLOAT, {"fc1": "kernels", "fc10": "floats", "fc2": "floats"}),
        ("fc", FLOAT, None),
        (nn.Linear, FLOAT, None),
        (torch.nn.functional.linear, FLOAT, None),
        (torch.ops.aten.linear.default, FLOAT, None),
        (torch.matmul, StaticQuantConfig(), {"fc1": "kernels", "matmul": "reference", "matmul_1": "reference"}),
        ("matmul_1", StaticQuantConfig(), {"fc1": "kernels", "matmul": "floats", "matmul_1": "reference"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_set_local_is_obeyed(model: nn.Module, data: list[Tensor], where: Any, what: Any, expected: Any) -> None:
    config = StaticQuantConfig().set_local(where, what)
    if expected is None:
        with pytest.raises(ConfigError, match=r"nothing in this model can be quantized .*kept float by set_local\("):
            prepare(model, config, example_inputs=data[0])
        return
    found = kinds(convert(calibrated(model, data, config)))
    assert {k: found[k] for k in expected} == expected


def test_the_most_specific_setting_wins_and_among_equals_the_last(model: nn.Module, data: list[Tensor]) -> None:
    config = StaticQuantConfig().set_local("fc2", StaticQuantConfig()).set_local(nn.Linear, FLOAT)
    assert kinds(convert(calibrated(model, data, config))) | {"matmul": "", "matmul_1": ""} == {
        "fc1": "floats", "fc10": "floats", "fc2": "kernels", "matmul": "", "matmul_1": "",
    }  # fmt: skip
    config = StaticQuantConfig(white_list=["fc2"])
    assert [k for k, v in kinds(convert(calibrated(model, data, config))).items() if v == "kernels"] == ["fc2"]
    kl = StaticQuantConfig(act_algo="kl")
    config = StaticQuantConfig().set_local("fc2", FLOAT).set_local("fc", kl)  # the whole path before its start
    assert kinds(convert(calibrated(model, data, config)))["fc2"] == "floats"
    config = StaticQuantConfig().set_local("f", FLOAT).set_local("fc", kl)
    prepared = calibrated(model, data, config)
    assert kinds(convert(prepared))["fc2"] == "kernels"
    assert {m.estimator.name for m in prepared.modules() if isinstance(m, Observer)} == {"kl"}


def test_local_formats_and_estimators_reach_the_graph(model: nn.Module, data: list[Tensor]) -> None:
    config = StaticQuantConfig(act_algo="percentile{percent=99}", reduce_range=False).set_local(
        "fc2",
        StaticQuantConfig(w_dtype="int4", act_dtype="int8", act_sym=True, bias_correction=False, reduce_range=False),
    )
    q = convert(calibrated(model, data, config))
    text = to_text(q.graph)
    assert "int4" in text and q.report.reference[0].module == "fc2" and "int4" in q.report.reference[0].detail
    assert close(model(data[0]), q(data[0]), 15)


def test_a_name_that_is_the_start_of_another_is_warned_about(model: nn.Module, data: list[Tensor]) -> None:
    with pytest.warns(IncWarning) as caught:
        prepare(model, StaticQuantConfig().set_local("fc1", FLOAT), example_inputs=data[0])
    (warning,) = [w for w in caught if issubclass(w.category, IncWarning)]
    assert str(warning.message) == (
        r"set_local('fc1') also takes fc10: names are matched at their start; write fc1(\.|$) for fc1 alone"
    )
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncWarning)
        for name in (r"fc1(\.|$)", "fc10", "fc", "fc1.*"):  # names one module, or says that it means more
            config = StaticQuantConfig().set_local(name, StaticQuantConfig(act_algo="kl"))
            prepare(model, config, example_inputs=data[0])


def test_a_name_means_modules_before_operators(data: list[Tensor]) -> None:
    """A module called `linear` is not the operator `linear`, which is the first linear layer of the graph."""

    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.linear = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.fc(x)))

    config = StaticQuantConfig().set_local("linear", FLOAT)
    assert kinds(convert(calibrated(Names().eval(), data, config))) == {"fc": "kernels", "linear": "floats"}


def test_configs_are_never_changed(model: nn.Module, data: list[Tensor]) -> None:
    config = StaticQuantConfig(act_algo="kl").set_local("fc2", FLOAT).set_local(torch.matmul, StaticQuantConfig())
    before = copy.deepcopy(config)
    convert(calibrated(model, data, config))
    prepared = prepare(model, config, inplace=False)
    prepared(data[0])
    convert(prepared)
    assert config == before and vars(config).keys() == vars(before).keys()
