"""`compute_dtype`: of all weight-only layers or of single ones, in both scopes, after load, after a move; what is no
dtype, what matches nothing, and where there is nothing that it could mean."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from inc_graph.algorithms import algos_mapping
from inc_graph.common.base_config import BaseConfig, register_config
from inc_graph.errors import ConfigError, IncWarning, UnusedRuleWarning
from inc_graph.fast import fast_dtype
from inc_graph.quantization import RTNConfig, StaticQuantConfig, convert, load, prepare, quantize
from inc_graph.quantization.fields import Field
from inc_graph.registry import CONFIGS
from inc_graph.text import to_text

CONFIG = RTNConfig(group_size=32)
AUTO = str(fast_dtype()).removeprefix("torch.")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc10 = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc10(self.fc2(self.fc1(x).relu()).relu())


def made() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("INC_COMPUTE_DTYPE", raising=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", IncWarning)
        yield


@pytest.fixture(params=["graph", "layers"])
def scope(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def quantized(scope: str, compute_dtype: Any = None, **options: Any) -> Any:
    example = X if scope == "graph" else None
    return quantize(made(), CONFIG, example_inputs=example, compute_dtype=compute_dtype, **options)


def dtypes(model: Any) -> dict[str, str]:
    """Layer -> dtype, from the report's lines."""
    return {line.module: line.detail.rpartition(", ")[2] for line in model.report.kernels}


def each(dtype: str, **other: str) -> dict[str, str]:
    return {**dict.fromkeys(("fc1", "fc2", "fc10"), dtype), **other}


# ----------------------------------------------------------------------------------------------------------- all layers
@pytest.mark.parametrize("said, dtype", [
    (torch.float32, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("torch.float16", "float16"),
    (torch.float64, "float64"), ("auto", AUTO), (None, AUTO), ({}, AUTO),
])  # fmt: skip
def test_one_dtype_for_every_layer(said: Any, dtype: str, scope: str) -> None:
    model = quantized(scope, said)
    assert dtypes(model) == each(dtype)
    assert model(X).dtype == torch.float32


def test_float32_is_what_is_computed_in(scope: str) -> None:
    exact = quantized(scope, backend="eager")(X)
    errors = [(quantized(scope, dtype)(X) - exact).abs().max() for dtype in ("float32", "bfloat16")]
    assert errors[0] < 1e-5 < 1e-4 < errors[1]


def test_the_argument_is_above_the_environment(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_COMPUTE_DTYPE", "float16")
    assert dtypes(quantized(scope)) == dtypes(quantized(scope, "auto")) == each("float16")
    assert dtypes(quantized(scope, "float32")) == each("float32")
    assert dtypes(quantized(scope, {"fc2": "float32"})) == each("float16", fc2="float32")


# -------------------------------------------------------------------------------------------------------- single layers
@pytest.mark.parametrize("said, expected", [
    ({"fc2": "float32"}, each(AUTO, fc2="float32")),
    ({r"fc1$": torch.float16}, each(AUTO, fc1="float16")),
    ({".*": "float64", "fc2": "float32"}, each("float64", fc2="float32")),  # a whole name is above a pattern
    ({"fc2": "float32", ".*": "float64"}, each("float64", fc2="float32")),
    ({"fc.*": "float64", r"fc\d\d": "float32"}, each("float64", fc10="float32")),  # of two patterns the later
    ({nn.Linear: "float64", "fc10": "float16"}, each("float64", fc10="float16")),
    ({".*": "float64", "fc10": "auto"}, each("float64", fc10=AUTO)),
])  # fmt: skip
def test_single_layers(said: Any, expected: dict[str, str], scope: str) -> None:
    assert dtypes(quantized(scope, said)) == expected


def test_a_name_is_matched_at_its_start_and_that_is_said_where_it_surprises(scope: str) -> None:
    with pytest.warns(IncWarning, match=r"compute_dtype\['fc1'\] also takes fc10: names are matched at their start"):
        model = quantized(scope, {"fc1": "float16"})
    assert dtypes(model) == each(AUTO, fc1="float16", fc10="float16")


def test_a_layer_under_two_names_is_found_by_either() -> None:
    model = made()
    model.again = model.fc2
    model = quantize(model, CONFIG, compute_dtype={"again": "float16"})
    assert dtypes(model)["fc2"] == "float16" and dtypes(model)["fc1"] == AUTO


# ------------------------------------------------------------------------------------------------------ said afterwards
def test_convert_takes_it_and_leaves_the_prepared_model_as_it_was(scope: str) -> None:
    prepared = prepare(made(), CONFIG, example_inputs=X if scope == "graph" else None)
    one = convert(prepared, inplace=False, compute_dtype={"fc2": "float32"})
    assert dtypes(one) == each(AUTO, fc2="float32")
    assert dtypes(convert(prepared, inplace=False)) == each(AUTO)
    assert dtypes(convert(made(), CONFIG, example_inputs=X if scope == "graph" else None, compute_dtype="float64")) == (
        each("float64")
    )


def test_it_is_not_saved_and_load_takes_it(scope: str, tmp_path: Path) -> None:
    model = quantized(scope, {"fc2": "float64"})
    model.save(tmp_path)
    again = load(tmp_path, made())
    assert dtypes(again) == each(AUTO)
    said = load(tmp_path, made(), compute_dtype={"fc2": "float64"})
    assert dtypes(said) == each(AUTO, fc2="float64")
    assert torch.equal(said(X), model(X))
    assert dtypes(load(tmp_path, made(), compute_dtype="float32")) == each("float32")
    with pytest.warns(UnusedRuleWarning, match=r"compute_dtype\['fc3'\] matched no weight-only layer"):
        load(tmp_path, made(), compute_dtype={"fc3": "float32"})
    with pytest.raises(ConfigError, match="compute_dtype cannot be 'int8'"):
        load(tmp_path, made(), compute_dtype="int8")


def test_it_goes_with_a_model_that_is_copied_moved_and_given_other_weights(scope: str) -> None:
    model = quantized(scope, {"fc2": "float64"})
    for other in (copy.deepcopy(model), model.to(torch.bfloat16)):
        other.load_state_dict(other.state_dict())
        assert dtypes(other) == each(AUTO, fc2="float64")


def test_the_q_dq_graph_does_not_show_it() -> None:
    graphs = [to_text(quantized("graph", dtype).graph, tensors=True) for dtype in ("float32", "float16")]
    one, other = (re.sub(r'"seconds": [^}]*', "", text) for text in graphs)
    assert one == other


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("said, text", [
    ("int8", "compute_dtype cannot be 'int8'"), (torch.int8, "compute_dtype cannot be torch.int8"),
    ("fp32", "compute_dtype cannot be 'fp32'"), (3, "compute_dtype cannot be 3"),
    ({"fc1": "half"}, r"compute_dtype\['fc1'\] cannot be 'half'"),
    ({"(": "float32"}, "is not a regular expression"), ({4: "float32"}, "expected a module name"),
    ({lambda op: True: "float32"}, "takes no predicates"),
])  # fmt: skip
def test_what_is_no_dtype_is_refused_before_anything_happens(said: Any, text: str, scope: str) -> None:
    model = made()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError, match=text):
        quantize(model, CONFIG, example_inputs=X if scope == "graph" else None, compute_dtype=said)
    with pytest.raises(ConfigError, match=text):
        convert(model, CONFIG, compute_dtype=said)
    assert [type(m) for m in model.modules()] == kinds


def test_what_matches_nothing_is_said(scope: str) -> None:
    with pytest.warns(UnusedRuleWarning, match=r"compute_dtype\['fc3'\] matched no weight-only layer"):
        model = quantized(scope, {"fc3": "float16", "fc2": "float32"})
    assert dtypes(model) == each(AUTO, fc2="float32")


def test_a_backend_without_kernels_says_that_it_is_not_used(scope: str) -> None:
    text = "compute_dtype is not used: on backend 'eager' no kernel runs a weight-only layer"
    with pytest.warns(IncWarning, match=text):
        model = quantized(scope, "float32", backend="eager")
    assert not model.report.kernels
    quantized(scope, "auto", backend="eager")  # nothing was asked for


def test_a_model_without_weight_only_layers_says_that_it_is_not_used(scope: str) -> None:
    with pytest.warns(IncWarning, match="compute_dtype is not used: on backend 'inductor'"):
        quantize(made(), StaticQuantConfig(), lambda m: m(X), example_inputs=X if scope == "graph" else None,
                 compute_dtype={"fc2": "float32"})  # fmt: skip


def test_methods_of_ones_own_say_that_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(algos_mapping, "as_it_is", lambda model, *args, **kwargs: model)

    class AsItIs(BaseConfig):
        fields: ClassVar[dict[str, Field]] = {"dtype": Field("int")}
        operators: ClassVar[tuple[Any, ...]] = (nn.Linear,)

    register_config(algo_name="as_it_is")(AsItIs)
    try:
        with pytest.warns(IncWarning, match="compute_dtype is not used: no kernel runs"):
            quantize(made(), AsItIs(), compute_dtype="float32")
    finally:
        CONFIGS.remove("as_it_is")
