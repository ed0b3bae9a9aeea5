"""Bad input gets an error that names the place and says what to do; and whatever fails leaves the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.calibrate import run_calibration
from inc_graph.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    IncError,
    IncWarning,
    LoweringError,
    UnknownNameError,
    UnusedRuleWarning,
)
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare, quantize
from inc_graph.registry import BACKENDS
from tests.model_state import same, snapshot

CONFIG = StaticQuantConfig()
FLOAT = StaticQuantConfig(w_dtype="fp32")
SCOPES = pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
nan, inf = float("nan"), float("inf")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def net() -> Net:
    return Net().eval()


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8)))


def prepared(exported: bool, data: Tensor | None = None, model: nn.Module | None = None) -> nn.Module:
    p = prepare(model or net(), CONFIG, example_inputs=x() if exported else None)
    if data is not None:
        p(data)
    return p


def refused(model: nn.Module, kind: type[IncError], match: str, call: Callable[[nn.Module], Any]) -> IncError:
    """The error of `call(model)`, which must be of `kind` itself and leave the model as it was."""
    before = snapshot(model)
    with pytest.raises(kind, match=match) as e:
        call(model)
    assert same(before, snapshot(model)), "the model was changed"
    return e.value


# ----------------------------------------------------------------------------------------------------- not a model
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (3, "expected a torch.nn.Module, got int"),
        (None, "expected a torch.nn.Module, got NoneType"),
        (torch.relu, "expected a torch.nn.Module, got builtin"),
        ({"weight": torch.ones(2)}, "expected a torch.nn.Module, got dict"),
        (nn.Linear, r"got the class Linear\n  hint: make one: Linear\(...\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_not_a_module(model: Any, match: str) -> None:
    for call in (lambda: prepare(model, CONFIG), lambda: export(model, x()), lambda: quantize(model, CONFIG, print)):
        with pytest.raises(CaptureError, match=match):
            call()
    with pytest.raises(CaptureError, match="expected a prepared model"):
        convert(model)


@pytest.mark.parametrize("options", [{}, {"example_inputs": torch.randn(2, 8)}], ids=["layers", "graph"])
def test_torchscript(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(net()), torch.jit.trace(net(), x())
    for model in (scripted, traced):
        with pytest.raises(CaptureError, match=r"TorchScript.*\n  hint: give the Python model"):
            prepare(model, CONFIG, **options)


@SCOPES
def test_training_mode_names_the_module(exported: bool) -> None:
    options = {"example_inputs": x()} if exported else {}
    refused(
        net().train(), CaptureError, "training mode\n  hint: call model.eval", lambda m: prepare(m, CONFIG, **options)
    )
    model = net()
    model.body.append(nn.Dropout())  # new modules are in training mode
    error = refused(model, CaptureError, "training mode", lambda m: prepare(m, CONFIG, **options))
    assert error.module == "body.2"
    refused(model, CaptureError, "training mode", lambda m: export(m, x()))


@SCOPES
def test_weights_without_values(exported: bool) -> None:
    options = {"example_inputs": x()} if exported else {}
    model = net()
    model.head.to("meta")
    match = "'head.weight' is on the meta device and has no values\n  hint: load the weights"
    refused(model, CaptureError, match, lambda m: prepare(m, CONFIG, **options))
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4)).eval()
    with pytest.raises(CaptureError, match=r"'1.weight' has no shape yet\n  hint: run the model once"):
        prepare(model, CONFIG, **options)
    refused(net(), CaptureError, "example input is on the meta device", lambda m: export(m, x().to("meta")))


@SCOPES
def test_nothing_to_quantize(exported: bool) -> None:
    class Integers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).clamp(0, 5)

    ints = {"example_inputs": torch.ones(3, dtype=torch.int64)} if exported else {}
    match = "nothing in this model can be quantized " + (
        r"\(it computes on integers only\)" if exported else r"\(it has no"
    )
    refused(Integers().eval(), ConfigError, match, lambda m: prepare(m, CONFIG, **ints))
    floats = {"example_inputs": x()} if exported else {}
    for model in (nn.ReLU().eval(), nn.Sequential().eval(), nn.LayerNorm(8).eval()):  # no weights, or none to quantize
        refused(model, ConfigError, "nothing in this model can be quantized", lambda m: prepare(m, CONFIG, **floats))
    refused(
        net(),
        ConfigError,
        "linear: kept float by",
        lambda m: prepare(m, StaticQuantConfig(w_dtype="fp32").set_local("body", FLOAT), **floats),
    )


# ------------------------------------------------------------------------------------------------- arguments, configs
def test_bad_arguments_of_prepare() -> None:
    model, shapes = net(), ({0: torch.export.Dim.DYNAMIC},)
    for config in (None, "int8", StaticQuantConfig):
        refused(
            model, ConfigError, "quant_config must be a config", lambda m, c=config: prepare(m, c, example_inputs=x())
        )
    fields = {"w_dtype": "int8"}  # a dictionary of fields lacks the name of the algorithm
    refused(model, UnknownNameError, "unknown config 'w_dtype'", lambda m: prepare(m, fields, example_inputs=x()))
    refused(
        model, CaptureError, "must be a tuple, a tensor or a dict, not str", lambda m: prepare(m, CONFIG, True, "abc")
    )
    takes = r"hint: example_inputs must be what model\(...\) takes: Net.forward\(x\)"
    for inputs, why in (
        ((x(), x()), "too many positional"),
        ((), "missing a required"),
        ({"y": x()}, "missing|unexpected"),
    ):
        refused(model, CaptureError, f"{why}(.|\n)*{takes}", lambda m, i=inputs: prepare(m, CONFIG, example_inputs=i))
    refused(model, ConfigError, "they need example_inputs", lambda m: prepare(m, CONFIG, dynamic_shapes=shapes))
    graph = export(model, x())
    refused(graph, ConfigError, "has its shapes already", lambda m: prepare(m, CONFIG, dynamic_shapes=shapes))


@SCOPES
def test_bad_backends(exported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"example_inputs": x()} if exported else {}
    refused(
        net(), UnknownNameError, "'inductr'; did you mean 'inductor'", lambda m: prepare(m, CONFIG, backend="inductr")
    )
    p = prepared(exported, x())
    refused(p, UnknownNameError, "unknown backend 'tensorrt'", lambda m: convert(m, backend="tensorrt"))
    monkeypatch.setattr(type(BACKENDS.get("inductor")), "available", lambda self: "no such CPU")
    for call in (
        lambda m: prepare(net(), CONFIG, backend="inductor", **options),
        lambda m: convert(m, backend="inductor"),
    ):
        refused(p, LoweringError, "'inductor' is not available: no such CPU\n  hint: backend='eager'", call)
    with pytest.warns(IncWarning, match="'inductor' is not available: no such CPU; using 'eager'"):
        assert quantize(net(), CONFIG, lambda m: m(x()), **options).report.backend == "eager"


@SCOPES
def test_a_rule_that_matches_nothing_is_warned_about_by_name(exported: bool) -> None:
    options = {"example_inputs": x()} if exported else {}
    config = (
        StaticQuantConfig().set_local("haed", FLOAT).set_local([nn.Conv2d, "body"], CONFIG).set_local("body.0", CONFIG)
    )
    with pytest.warns(UnusedRuleWarning) as caught:
        prepare(net(), config, **options)
    assert sorted(str(w.message) for w in caught if issubclass(w.category, UnusedRuleWarning)) == [
        "set_local('haed') matched no operator of the model",
        "set_local(Conv2d) matched no operator of the model",
    ]


# -------------------------------------------------------------------------------------------------------- calibration
@SCOPES
def test_convert_without_data(exported: bool) -> None:
    match = "has seen no calibration data\n  hint: call it on representative inputs first"
    refused(prepared(exported), CalibrationError, match, convert)
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},), "example_inputs": x()} if exported else {}
    p = prepare(net(), CONFIG, **dynamic)
    assert p(x(0, 8)).shape == (0, 4)
    refused(p, CalibrationError, match, convert)  # an empty batch is no data
    p(x())
    assert convert(p)(x(0, 8)).shape == (0, 4)


def test_convert_without_data_for_weights_only() -> None:
    """A table has no activation to observe, so it must not count as calibrated."""
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4)).eval()
    for options in ({"example_inputs": torch.zeros(3, dtype=torch.int64)}, {}):
        with pytest.raises(CalibrationError, match="no calibration data"):
            convert(prepare(model, CONFIG, inplace=False, **options))


@SCOPES
@pytest.mark.parametrize(
    ("bad", "graph", "layers"),
    [
        (
            torch.randn(2, 9),
            r"'x' has shape \[2, 9\].*captured for \[2, 8\]",
            r"shape \[2, 9\], it takes 8 in the last",
        ),
        (torch.randn(8), r"'x' has shape \[8\]", None),
        (torch.tensor(2.0), r"'x' has shape \[\]", r"shape \[\], it takes 8"),
        (
            torch.randn(2, 8).double(),
            "'x' is float64 strided, the model was captured for float32",
            "torch.float64, its weight",
        ),
        (torch.ones(2, 8, dtype=torch.int64), "'x' is int64 strided", "its input is torch.int64"),
        (torch.randn(2, 8).to_sparse(), "'x' is float32 sparse_coo", "its input is sparse_coo: only dense"),
        (torch.randn(2, 8).to_mkldnn(), "'x' is float32 _mkldnn", "its input is _mkldnn: only dense"),
    ],
    ids=["size", "rank", "scalar", "double", "integer", "sparse", "mkldnn"],
)
def test_calibration_with_other_inputs(exported: bool, bad: Tensor, graph: str, layers: str | None) -> None:
    match = graph if exported else layers
    for model in (prepared(exported, x()), convert(prepared(exported, x()))):
        if match is None:  # a linear layer takes any rank
            assert model(bad).shape == (4,)
            continue
        error = refused(model, CaptureError, match, lambda m: m(bad))
        assert error.hint and (exported or error.module == "body.0")


def test_calibration_with_other_structure() -> None:
    p = prepared(True)
    for bad in ([1.0, 2.0], 3.0, "text"):
        with pytest.raises(IncError):
            p(bad)


@SCOPES
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("algo", ["minmax", "kl"])
def test_nan_and_infinity_name_the_node(exported: bool, value: float, algo: str) -> None:
    model, good = net(), x()
    p = prepare(model, StaticQuantConfig(act_algo=algo), example_inputs=x() if exported else None, inplace=False)
    p(good)
    want = convert(p, inplace=False)(good)
    bad = x()
    bad[1, 2] = value
    number = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    with pytest.raises(CalibrationError, match=f"calibration batch 2: {number} values of 16") as e:
        run_calibration(p, [bad])
    assert e.value.node and (exported or e.value.module == "body.0") and "check that batch" in str(e.value.hint)
    assert torch.equal(convert(p, inplace=False)(good), want)  # that batch left no trace


@SCOPES
def test_nan_that_the_model_makes_names_the_operator(exported: bool) -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.log(self.a(x)))

    with pytest.raises(CalibrationError, match="NaN") as e:
        prepared(exported, x(), Bad().eval())
    assert e.value.node == "log" if exported else e.value.module == "b"


@SCOPES
def test_weights_that_are_not_numbers_stay_float(exported: bool) -> None:
    model = net()
    model.head.weight.data[0, 0] = nan
    q = convert(prepared(exported, x(), model))
    assert [(line.module, line.detail) for line in q.report.floats if line.op == "linear"] == [
        ("head", next(x.detail for x in q.report.floats))
    ]
    assert "holds NaN or infinity" in q.report.floats[0].detail


# ------------------------------------------------------------------------------------------- programs of training mode
def trained() -> dict[str, nn.Module]:
    first = nn.Linear(8, 8)
    return {
        "dropout": nn.Sequential(first, nn.Dropout(0.5)),
        "alpha_dropout": nn.Sequential(first, nn.AlphaDropout(0.5)),
        "feature_dropout": nn.Sequential(first, nn.Unflatten(1, (4, 2)), nn.Dropout1d(0.5)),
        "batch_norm": nn.Sequential(first, nn.BatchNorm1d(8)),
        "instance_norm": nn.Sequential(first, nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True)),
        "rrelu": nn.Sequential(first, nn.RReLU()),
        "lstm": nn.Sequential(first, nn.LSTM(8, 8, 2, dropout=0.5)),
    }


@pytest.mark.parametrize("kind", trained())
@pytest.mark.filterwarnings("ignore:.*_flat_weights.*")
def test_a_program_of_a_model_in_training_mode(kind: str) -> None:
    model, x = trained()[kind], torch.randn(4, 8)
    program = torch.export.export(model.train(), (x,))
    calls: list[Callable[[], Any]] = [
        lambda: export(program),
        lambda: export(program, (x,)),
        lambda: prepare(program, CONFIG),
        lambda: prepare(program.module(), CONFIG, example_inputs=x),
    ]
    for call in calls:
        with pytest.raises(CaptureError, match=f"in training mode: aten.*{kind}(.|\n)*hint: call model.eval()") as e:
            call()
        assert e.value.node is not None
    assert export(torch.export.export(model.eval(), (x,))) is not None


def test_what_is_the_same_in_both_modes_is_no_training() -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    for model in (nn.Sequential(nn.Linear(8, 8), norm, nn.Dropout(0.0)), nn.LSTM(8, 8)):
        assert export(torch.export.export(model.train(), (torch.randn(4, 8),))) is not None


# ------------------------------------------------------------------------------------------------ wrong example inputs
class Stateful(nn.Module):
    """Cannot be exported; writes to a buffer, rebinds another, keeps a list and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen, self.count = nn.Linear(8, 8), [], 0
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.add_(x.mean())
        self.last = self.last + torch.rand(8)
        self.count += 1
        self.seen.append(self.count)
        x.mul_(2)
        return self.fc(x) if x.sum().item() > 0 else self.fc(x) + 1


@pytest.mark.parametrize("width", [3, 8])
def test_a_failed_export_asks_the_model_itself_and_leaves_no_trace(width: int) -> None:
    model = Stateful().eval()
    x = torch.randn(4, width)
    before, inputs, generator = snapshot(model), x.clone(), torch.get_rng_state()
    if width == 3:
        with pytest.raises(CaptureError, match="Stateful does not take the example inputs: RuntimeError: mat1") as e:
            prepare(model, CONFIG, example_inputs=(x,))
        assert "what the model is called with" in str(e.value.hint)
    else:
        with pytest.warns(IncWarning, match="layer by layer"):
            prepare(model, CONFIG, inplace=False, example_inputs=(x,))
    assert same(before, snapshot(model)), "the model was changed"
    assert model.seen == [] and model.count == 0 and type(model.fc) is nn.Linear
    assert torch.equal(x, inputs) and torch.equal(torch.get_rng_state(), generator)


@SCOPES
def test_calibration_without_values(exported: bool) -> None:
    p = prepare(nn.Sequential(nn.Linear(8, 8)).eval(), CONFIG, example_inputs=torch.randn(4, 8) if exported else None)
    with pytest.raises(CaptureError, match=r"input.* is on the meta device") as e:
        p(torch.randn(4, 8, device="meta"))
    assert exported or e.value.module == "0"


# -------------------------------------------------------------------------------------------------------- wrong order
@SCOPES
def test_export_of_what_is_quantized(exported: bool) -> None:
    p = prepared(exported, x())
    refused(p, ConfigError, "prepared already\n  hint: run calibration data", lambda m: export(m, x()))
    q = convert(p, inplace=False)
    refused(q, ConfigError, "converted already\n  hint: prepare the float", lambda m: export(m, x()))
    refused(nn.Sequential(q).eval(), ConfigError, "converted already", lambda m: export(m, x()))
    if exported:
        refused(q.graph, ConfigError, "at level 'qdq'", lambda m: export(m, x()))
        program = torch.export.export(convert(p, reference=True), (x(),))
        refused(program.module(), ConfigError, "converted already", lambda m: export(m, x()))
        with pytest.raises(ConfigError, match="converted already"):
            export(program)


@SCOPES
def test_twice(exported: bool) -> None:
    p = prepared(exported, x())
    refused(p, ConfigError, "prepared already\n  hint: run calibration data", lambda m: prepare(m, CONFIG))
    refused(p, ConfigError, "prepared already", lambda m: prepare(m, CONFIG, example_inputs=x()))
    q = convert(p)
    refused(q, ConfigError, "converted already\n  hint: give the float model, or the result of prepare", convert)
    for options in ({}, {"example_inputs": x()}):
        refused(
            q, ConfigError, "converted already\n  hint: prepare the float", lambda m, o=options: prepare(m, CONFIG, **o)
        )
        refused(nn.Sequential(q).eval(), ConfigError, "converted already", lambda m, o=options: prepare(m, CONFIG, **o))
    refused(q, ConfigError, "converted already", lambda m: quantize(m, CONFIG, lambda p: p(x())))
    if exported:
        for level, graph in (("qdq", q.graph), ("lowered", q.lowered)):
            refused(graph, ConfigError, "converted already", convert)
            refused(graph, ConfigError, f"at level '{level}'", lambda m: prepare(m, CONFIG))


def test_not_prepared() -> None:
    for model in (net(), export(net(), x())):
        refused(model, ConfigError, r"not prepared\n  hint: prepared = prepare\(model, config\)", convert)
        refused(
            model, ConfigError, "needs calibration data, so the model must be prepared", lambda m: convert(m, CONFIG)
        )


# ------------------------------------------------------------------------------------------- layouts, shapes, export
def test_weights_in_mkldnn_layout() -> None:
    from torch.utils import mkldnn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mkldnn.to_mkldnn(net())
    for options in ({}, {"example_inputs": x()}):
        with pytest.raises(CaptureError, match="in mkldnn layout\n  hint: give the model from before to_mkldnn"):
            prepare(model, CONFIG, **options)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@SCOPES
def test_a_layer_with_sparse_weights_stays_float(exported: bool) -> None:
    model = net()
    model.head.weight = nn.Parameter(model.head.weight.detach().to_sparse_csr(), requires_grad=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", IncWarning)
        q = convert(prepared(exported, x(), model))
    text = [str(w.message) for w in caught if issubclass(w.category, IncWarning)]
    assert len(text) == exported and all("so it is quantized layer by layer: torch.export cannot" in t for t in text)
    assert [(line.module, line.detail) for line in q.report.floats] == [
        ("head", "its weight is sparse_csr: only dense weights are quantized")
    ]
    assert [line.module for line in q.report.kernels] == ["body.0"]
    with pytest.raises(IncError, match="weight of a quantized layer cannot be replaced"):
        convert(prepared(False, x())).head.weight = model.head.weight


def test_a_sparse_input_that_the_model_takes() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return self.fc(torch.sparse.mm(adjacency, x))

    model, a, data = Graph().eval(), torch.eye(3).to_sparse(), x(3, 8)
    q = quantize(model, CONFIG, lambda m: m(a, data), example_inputs=(a, data))
    assert q.report.count("linear") == 1 and (model(a, data) - q(a, data)).abs().max() < 0.1


def test_data_dependent_shapes() -> None:
    class Select(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[x.sum(1) > 0])

    data = torch.cat([torch.ones(2, 8), -torch.ones(1, 8), torch.ones(1, 8)])
    q = quantize(model := Select().eval(), CONFIG, lambda m: m(data), example_inputs=data)
    assert q(data).shape == (3, 4) and q(-data).shape == (1, 4) and (model(data) - q(data)).abs().max() < 0.1

    class Deep(Select):
        def forward(self, x: Tensor) -> Tensor:
            y = x[x.sum(1) > 0]
            return self.fc(y) if y.shape[0] > 2 else self.fc(x)

    with pytest.raises(CaptureError) as e:
        export(Deep().eval(), data)
    assert (
        "data-dependent" in str(e.value) and "test_bad_input.py" in str(e.value) and "torch.cond" in str(e.value.hint)
    )


class Unexportable(nn.Module):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if x.mean() > 0:
                return self.fc(x)
            return self.fc(-x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def test_export_failure_says_why_where_and_what_to_do() -> None:
    error = refused(Unexportable().eval(), CaptureError, "cannot capture Unexportable", lambda m: export(m, x()))
    assert error.module == "inner" and "test_bad_input.py:" in error.message
    assert "data-dependent" in error.message and "layer by layer" in str(error.hint)
    assert error.__cause__ is not None


@pytest.mark.parametrize("inplace", [True, False])
def test_export_failure_goes_on_layer_by_layer_with_one_warning(inplace: bool) -> None:
    model = Unexportable().eval()
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        p = prepare(model, CONFIG, inplace=inplace, example_inputs=x())
    (warning,) = [w for w in caught if issubclass(w.category, IncWarning)]
    text = str(warning.message)
    assert text.startswith("the whole model cannot be exported, so it is quantized layer by layer: torch.export cannot")
    assert "data-dependent" in text and "[module 'inner']" in text and warning.filename == __file__
    assert (p is model) == inplace and (inplace or same(before, snapshot(model)))
    data = x()
    p(data)
    q = convert(p)
    assert type(q) is Unexportable and {line.module for line in q.report.kernels} == {"first", "inner.fc"}


def test_export_failure_without_a_layer_to_fall_back_to() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.T if x.mean() > 0 else x

    match = r"it has no Linear, Conv or Embedding\), and the whole model cannot be exported: torch.export cannot"
    refused(Product().eval(), ConfigError, match, lambda m: prepare(m, CONFIG, example_inputs=x()))


def test_dynamic_shapes_that_the_model_does_not_have() -> None:
    """The export would work without them, so they are the mistake; no falling back."""
    shapes = ({1: torch.export.Dim.DYNAMIC},)
    refused(
        net(), CaptureError, "cannot capture Net(.|\n)*hint: make dynamic_shapes agree",
        lambda m: prepare(m, CONFIG, example_inputs=x(), dynamic_shapes=shapes),
    )  # fmt: skip


def test_a_graph_of_another_maker_without_inputs() -> None:
    graph = torch.export.export(net(), (x(),)).module()
    match = "it has no Linear, Conv or Embedding(.|\n)*hint: give example_inputs, or the ExportedProgram itself"
    refused(graph, ConfigError, match, lambda m: prepare(m, CONFIG))


# ------------------------------------------------------------------------------------------------------ other dtypes
@SCOPES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_and_double_models(exported: bool, dtype: torch.dtype) -> None:
    model, data = net().to(dtype), x().to(dtype)
    want = model(data)
    got = convert(prepared_in(exported, model, data))(data)
    assert got.dtype == dtype and (want - got).abs().max() < 0.05


def prepared_in(exported: bool, model: nn.Module, data: Tensor) -> nn.Module:
    p = prepare(model, CONFIG, inplace=False, example_inputs=data if exported else None)
    p(data)
    return p


def test_0d_inputs() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x * scale) + scale

    model, args = Scaled().eval(), (x(), torch.tensor(2.0))
    q = quantize(model, CONFIG, lambda m: m(*args), example_inputs=args)
    assert q.report.count("linear") == 2 and (model(*args) - q(*args)).abs().max() < 0.1
