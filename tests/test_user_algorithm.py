"""Methods of one's own: a Quantizer and a config, entered, get set_local, compositions, autotune and loading."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from inc_graph.algorithms import Quantizer, algos_mapping, get_quantizer, postprocess_model, register_algo
from inc_graph.common.base_config import BaseConfig, ComposableConfig, register_config
from inc_graph.common.base_tuning import TuningConfig
from inc_graph.common.utils import Mode
from inc_graph.errors import ConfigError, IncWarning, UnusedRuleWarning
from inc_graph.quantization import (
    AWQConfig,
    RTNConfig,
    StaticQuantConfig,
    autotune,
    convert,
    prepare,
    quantize,
)
from inc_graph.quantization.user_algorithms import algorithms_of, rebuild
from tests import user_algorithm_models as shared
from tests.model_state import same, snapshot
from tests.user_algorithm_models import CALLS, Codes, Net, RoundConfig, RoundQuantizer, bits_of, entry

own_method, model, x = shared.own_method, shared.model, shared.x  # fixtures


def close(a: Tensor, b: Tensor, db: float = 25) -> bool:
    return bool(10 * torch.log10((a**2).sum() / ((a - b) ** 2).sum()) > db)


# ------------------------------------------------------------------------------------------------------------ the calls
def test_prepare_run_convert(model: Net, x: Tensor) -> None:
    want, config = model(x), RoundConfig()
    prepared = prepare(model, config, example_inputs=(x,))
    assert prepared is model and bits_of(prepared) == {} and isinstance(prepared.quantizer, RoundQuantizer)
    prepared(x)
    q = convert(prepared)
    assert q is model and bits_of(q) == {"fc1": 8, "fc10": 8, "fc2": 8} and "quantizer" not in vars(q)
    assert float(q.fc1.limit) == pytest.approx(float(x.abs().max())) and close(want, q(x))
    assert [mode for mode, _, _ in CALLS] == [Mode.PREPARE, Mode.CONVERT]
    assert list(CALLS[0][1]) == [("fc1", "Linear"), ("fc10", "Linear"), ("fc2", "Linear")]
    assert all(kwargs["example_inputs"][0] is x for _, _, kwargs in CALLS) and config == RoundConfig()
    assert "round_own" in str(q.report) and "fc1, fc10, fc2" in str(q.report)
    assert 0 < q.report.bytes_after < q.report.bytes_before


@pytest.mark.parametrize("run_args", [None, (3,), [3], 3], ids=str)
def test_quantize(model: Net, x: Tensor, run_args: Any) -> None:
    seen: list[Any] = []

    def run(m: nn.Module, *more: Any) -> None:
        seen.append(more)
        m(x)

    q = quantize(model, RoundConfig(), run, run_args, example_inputs={"x": x})
    assert q is model and seen == [() if run_args is None else (3,)] and float(q.fc1.limit) == float(x.abs().max())
    (mode, _, kwargs) = CALLS[0]
    assert mode is Mode.QUANTIZE and kwargs["run_fn"] is run and kwargs["run_args"] == run_args
    assert kwargs["example_inputs"]["x"] is x


def test_without_data(model: Net, x: Tensor) -> None:
    other = copy.deepcopy(model)
    a, b = quantize(model, RoundConfig()), convert(other, {"round_own": {"bits": 8}})
    assert bits_of(a) == bits_of(b) == {"fc1": 8, "fc10": 8, "fc2": 8} and torch.equal(a(x), b(x))


@pytest.mark.parametrize("inplace", [True, False])
def test_inplace(model: Net, x: Tensor, inplace: bool) -> None:
    before = snapshot(model)
    prepared = prepare(model, RoundConfig(), inplace)
    prepared(x)
    assert (prepared is model) is inplace and same(before, snapshot(model)) is not inplace
    q = convert(prepared, inplace=inplace)
    assert (q is prepared) is inplace and bits_of(q) and bool(bits_of(prepared)) is inplace
    assert float(q.fc1.limit) == float(x.abs().max())
    if not inplace:
        again = convert(prepared, inplace=False)  # a prepared model can be converted more than once
        assert torch.equal(again(x), q(x)) and same(before, snapshot(model))
        assert quantize(model, RoundConfig(), inplace=False) is not model and same(before, snapshot(model))


# ----------------------------------------------------------------------------------------------- which module gets what
def test_local_settings(model: Net) -> None:
    def wide(operator: Any) -> bool:
        return operator.weight_shape == (16, 16) and operator.op == "linear"

    two, three, fp32 = RoundConfig(2), RoundConfig(3), RoundConfig(dtype="fp32")
    cases: list[tuple[BaseConfig, dict[str, int]]] = [
        (RoundConfig().set_local("fc2", two), {"fc1": 8, "fc10": 8, "fc2": 2}),
        (RoundConfig().set_local("fc1$", two), {"fc1": 2, "fc10": 8, "fc2": 8}),
        (RoundConfig().set_local(".*2", fp32), {"fc1": 8, "fc10": 8}),
        (RoundConfig().set_local(nn.Linear, two).set_local("fc2", three), {"fc1": 2, "fc10": 2, "fc2": 3}),
        (RoundConfig().set_local(wide, two), {"fc1": 8, "fc10": 2, "fc2": 8}),
        (RoundConfig(white_list=["fc2", wide]), {"fc10": 8, "fc2": 8}),
        (RoundConfig(white_list=[nn.Linear]).set_local(["fc1$", "fc2"], two), {"fc1": 2, "fc10": 8, "fc2": 2}),
    ]
    for config, want in cases:
        before = copy.deepcopy(config)
        assert bits_of(quantize(copy.deepcopy(model), config)) == want, config
        assert config == before


def test_settings_that_fit_nothing_or_too_much_are_reported(model: Net) -> None:
    config = RoundConfig(white_list=[nn.Linear, nn.Conv2d]).set_local("fc3", RoundConfig(2))
    with pytest.warns(UnusedRuleWarning) as caught:
        quantize(copy.deepcopy(model), config)
    assert [str(w.message) for w in caught] == [
        "white_list entry Conv2d matched no module that is for round_own",
        "set_local('fc3') matched no module that is for round_own",
    ]
    assert all(w.filename == __file__ for w in caught)
    with pytest.warns(IncWarning, match=r"set_local\('fc1'\) also takes fc10") as caught:
        prepare(model, RoundConfig().set_local("fc1", RoundConfig(2)))
    assert caught[0].filename == __file__


def test_the_entry_cannot_change_the_users_config(model: Net) -> None:
    @register_algo("round_own")
    def greedy(model: nn.Module, configs_mapping: dict[Any, Any], mode: Mode, **kwargs: Any) -> nn.Module:
        for config in configs_mapping.values():
            config.bits = 2
        configs_mapping.clear()
        return model

    config = RoundConfig().set_local("fc2", RoundConfig(4))
    prepared = prepare(model, config)
    convert(prepared)
    assert config == RoundConfig().set_local("fc2", RoundConfig(4))


# --------------------------------------------------------------------------------------------------------- compositions
class Halves(Quantizer):
    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        for path in self.quant_config:
            module = model.get_submodule(path)
            module.weight.copy_(module.weight.half())
            module.halved = True
        return model


def halves_method(name: str = "halves", priority: int = 10) -> type[BaseConfig]:
    class HalvesConfig(BaseConfig):
        operators: ClassVar[tuple[Any, ...]] = (nn.Linear, nn.LayerNorm)

    @register_algo(name)
    def run(model: nn.Module, configs_mapping: Any, mode: Mode, *args: Any, **kwargs: Any) -> nn.Module:
        quantizer = get_quantizer(model, Halves, [path for (path, _), c in configs_mapping.items() if c.name == name])
        model = quantizer.execute(model, mode, *args, **kwargs)
        postprocess_model(model, mode, quantizer)
        return model

    return register_config(algo_name=name, priority=priority)(HalvesConfig)


def halved(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if getattr(m, "halved", False)]


def test_two_own_methods(model: Net, x: Tensor) -> None:
    both = RoundConfig(white_list=["fc2"]) + halves_method()()
    prepared = prepare(model, both)
    assert [type(q) for q in vars(prepared)["_inc_quantizers"]] == [RoundQuantizer, Halves]
    prepared(x)
    q = convert(prepared)
    assert bits_of(q) == {"fc2": 8} and float(q.fc2.limit) < float("inf")  # each found its own quantizer again
    assert halved(q) == ["fc1", "fc10", "norm"]  # the layer norm is not for the other method, whatever its priority


def test_priority(model: Net) -> None:
    other = halves_method(priority=99)
    q = quantize(copy.deepcopy(model), RoundConfig() + other())
    assert bits_of(q) == {} and halved(q) == ["fc1", "fc10", "norm", "fc2"]
    q = quantize(model, RoundConfig() + halves_method("weak", 1)())
    assert len(bits_of(q)) == 3 and halved(q) == ["norm"]


@pytest.mark.parametrize("form", ["sum", "own local", "local of own"])
@pytest.mark.parametrize("call", ["quantize", "prepare", "copy"])
def test_beside_a_method_of_the_library(model: Net, x: Tensor, form: str, call: str) -> None:
    config = {
        "sum": RoundConfig(white_list=["fc10"]) + StaticQuantConfig(),
        "own local": StaticQuantConfig().set_local("fc10", RoundConfig()),
        "local of own": RoundConfig(white_list=["fc10"]).set_local("fc(1|2)$", StaticQuantConfig()),
    }[form]
    want, before = model(x), snapshot(model)
    if call == "quantize":
        q = quantize(model, config, lambda m: m(x))
    else:
        prepared = prepare(model, config, inplace=call == "prepare")
        prepared(x)
        q = convert(prepared, inplace=call == "prepare")
    assert bits_of(q) == {"fc10": 8} and close(want, q(x))
    assert {line.module for line in q.report.quantized} == {"fc1", "fc2"} and q.report.method.startswith("round_own, ")
    assert (q is model) is (call != "copy") and same(before, snapshot(model)) is (call == "copy")


def test_a_method_of_the_library_can_be_replaced(model: Net) -> None:
    @register_algo("rtn")
    def mine(model: nn.Module, configs_mapping: Any, mode: Mode, **kwargs: Any) -> nn.Module:
        model.got = {path: c.bits for (path, _), c in configs_mapping.items()}
        return model

    q = quantize(model, RTNConfig(bits=3).set_local("fc2", RTNConfig(bits=2)))
    assert q.got == {"fc1": 3, "fc10": 3, "fc2": 2}


@pytest.mark.parametrize("key", [None, "b"])
def test_a_layer_with_two_names_is_replaced_at_both(x: Tensor, key: str | None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    config = RoundConfig() if key is None else RoundConfig(4).set_local(key, RoundConfig())
    assert RoundConfig.get_model_info(Twice()) == [("a", "Linear"), ("b", "Linear")]
    model = Twice().eval()
    want = model(x)
    q = quantize(model, config, lambda m: m(x))
    assert type(q.a) is Codes and q.b is q.a and close(want, q(x))
    back = rebuild(Twice(), reread(algorithms_of(q)))
    back.load_state_dict(q.state_dict())
    assert back.b is back.a and torch.equal(back(x), q(x))


# ------------------------------------------------------------------------------------------------------------- autotune
def test_autotune(model: Net, x: Tensor) -> None:
    want, before = model(x), snapshot(model)

    def score(m: nn.Module) -> float:
        return -float((m(x) - want).abs().mean())

    tuning = TuningConfig([RoundConfig([2, 8])], tolerable_loss=0.05, relative=False)
    best = autotune(model, tuning, score, run_fn=lambda m: m(x))
    assert set(bits_of(best).values()) == {8} and same(before, snapshot(model))
    assert [t.config.bits for t in best.tuning.trials] == [2, 8] and [t.accepted for t in best.tuning.trials] == [
        False,
        True,
    ]


# -------------------------------------------------------------------------------------------------------------- loading
def reread(configs: Any) -> Any:
    """As a file gives them back."""
    return json.loads(json.dumps({name: c.to_dict() for name, c in configs.items()}))


@pytest.mark.parametrize("load", [False, True])
def test_a_converted_model_can_be_rebuilt(model: Net, x: Tensor, load: bool) -> None:
    def is_wide(operator: Any) -> bool:
        return operator.weight_shape == (16, 16)

    halves = halves_method()
    if load:

        @register_algo("round_own", load=True)
        def with_load(model: nn.Module, configs_mapping: Any, mode: Mode, **kwargs: Any) -> nn.Module:
            CALLS.append((mode, configs_mapping, kwargs))
            if mode is not Mode.LOAD:
                return entry(model, configs_mapping, mode, **kwargs)
            for (path, _), config in configs_mapping.items():
                if config.name == "round_own":
                    model.set_submodule(path, Codes(model.get_submodule(path), config.bits, 0.0))
            return model

    config = RoundConfig(white_list=[nn.Linear]).set_local(is_wide, RoundConfig(3)).set_local("fc2", halves())
    fresh = Net().eval()
    q = quantize(model, config + halves(white_list=["norm"]), lambda m: m(x))
    assert bits_of(q) == {"fc1": 8, "fc10": 3} and halved(q) == ["norm", "fc2"]
    CALLS.clear()
    configs = algorithms_of(q)
    assert configs is not None and list(configs) == ["round_own", "halves"] and algorithms_of(fresh) is None
    back = rebuild(fresh, reread(configs))
    assert not torch.equal(back(x), q(x))
    assert back.load_state_dict(q.state_dict(), strict=True)
    assert torch.equal(back(x), q(x)) and reread(algorithms_of(back)) == reread(configs)
    assert [mode for mode, _, _ in CALLS] == ([Mode.LOAD] if load else [Mode.PREPARE, Mode.CONVERT])
    assert {k: c.bits for k, c in CALLS[0][1].items() if c.name == "round_own"} == {
        ("fc1", "Linear"): 8, ("fc10", "Linear"): 3,
    }  # fmt: skip
    assert rebuild(Net().eval(), configs) is not None  # the configs themselves, too


def test_what_cannot_be_rebuilt(model: Net, x: Tensor) -> None:
    q = quantize(model, RoundConfig(white_list=["fc10"]) + StaticQuantConfig(), lambda m: m(x))
    configs = algorithms_of(q)
    assert configs is not None and set(configs) == {"round_own", "static_quant"}
    back = rebuild(Net().eval(), configs)  # the layers of the library's methods are for the caller to put back
    assert list(bits_of(back)) == ["fc10"] and type(back.fc1) is type(back.fc2) is nn.Linear
    only = {"round_own": configs["round_own"]}
    with pytest.raises(RuntimeError, match="Missing key"):
        rebuild(Net(), {"round_own": RoundConfig()}).load_state_dict(rebuild(Net(), only).state_dict())
    with pytest.raises(ConfigError, match="no module that is for round_own"), pytest.warns(UnusedRuleWarning):
        rebuild(nn.Sequential(nn.ReLU()), only)
    del algos_mapping["round_own"]
    with pytest.raises(NotImplementedError, match=r"enter yours with register_algo\('round_own'\)"):
        rebuild(Net(), only)


def test_nothing_warns_when_it_is_right(model: Net, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncWarning)
        q = quantize(model, ComposableConfig([RoundConfig(white_list=["fc2"])]), lambda m: m(x))
        rebuild(Net(), reread(algorithms_of(q)))
    with pytest.raises(NotImplementedError, match="awq"):
        prepare(Net().eval(), AWQConfig() + RoundConfig(white_list=["fc2"]))


# ------------------------------------------------------------------------------------------------------- the base class
def test_quantizer() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Quantizer()  # type: ignore[abstract]
    said: list[Any] = []

    class Says(Quantizer):
        def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            said.append(("prepare", args))
            return model

        def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            said.append(("convert", args))
            return model

    quantizer, model = Says({"fc": 1}), nn.ReLU()
    assert quantizer.quant_config == {"fc": 1} and Says().quant_config is None
    assert quantizer.execute(model, Mode.PREPARE, 1) is quantizer.execute(model, "convert", 2) is model
    quantizer.execute(model, mode=Mode.QUANTIZE, run_fn=lambda m, a: said.append((m, a)), run_args=(7,))
    assert said == [("prepare", (1,)), ("convert", (2,)), ("prepare", ()), (model, 7), ("convert", ())]
    with pytest.raises(NotImplementedError, match="Says has no `load`"):
        quantizer.execute(model, Mode.LOAD)
    with pytest.raises(ValueError, match="compile"):
        quantizer.execute(model, "compile")
    assert get_quantizer(model, Says, {"fc": 2}) is not quantizer
    postprocess_model(model, Mode.PREPARE, quantizer)
    assert get_quantizer(model, Says) is quantizer is model.quantizer and not list(model.children())
    assert type(get_quantizer(model, Halves)) is Halves  # of another method
    postprocess_model(model, Mode.CONVERT, quantizer)
    assert not hasattr(model, "quantizer") and get_quantizer(model, Says) is not quantizer
