"""Methods of one's own that are refused, or written as neural_compressor has them."""

from __future__ import annotations

import copy
import json
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from inc_graph.algorithms import register_algo
from inc_graph.common.base_config import BaseConfig, register_config
from inc_graph.common.utils import Mode
from inc_graph.errors import CaptureError, ConfigError, IncError, IncWarning, UnknownNameError
from inc_graph.export import export
from inc_graph.quantization import (
    StaticQuantConfig,
    convert,
    finalize_calibration,
    prepare,
    quantize,
)
from inc_graph.registry import CONFIGS
from tests import user_algorithm_models as shared
from tests.model_state import same, snapshot
from tests.user_algorithm_models import CALLS, Net, RoundConfig, bits_of

own_method, model, x = shared.own_method, shared.model, shared.x  # fixtures


# ------------------------------------------------------------------------------------------------------------- refusals
def refused(model: nn.Module, error: type[Exception], match: str, call: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call(model)
    assert same(before, snapshot(model))


def test_what_cannot_be_is_refused_and_changes_nothing(model: Net, x: Tensor) -> None:
    own = RoundConfig()
    refused(model, ConfigError, "round_own works on modules, and this is a graph", lambda m: prepare(export(m, x), own))
    program = torch.export.export(model, (x,))
    refused(model, CaptureError, "round_own works on a torch.nn.Module, not on ExportedProgram",
            lambda m: quantize(program, own))  # fmt: skip
    refused(model, CaptureError, "not on str", lambda m: prepare("model", own))
    refused(model, ConfigError, "dynamic_shapes cannot be used", lambda m: prepare(m, own, dynamic_shapes={}))
    refused(model.norm, ConfigError, "no module that is for round_own", lambda m: prepare(m, own))
    refused(model, ConfigError, "lists of candidates", lambda m: prepare(m, RoundConfig([2, 8])))
    refused(model, ConfigError, "run_fn must be a function", lambda m: quantize(m, own, 3))
    mixed = RoundConfig(white_list=["fc2"]) + StaticQuantConfig()
    refused(model, ConfigError, "needs calibration data", lambda m: quantize(m, mixed))
    refused(model, ConfigError, "needs calibration data", lambda m: convert(m, mixed))

    class Missing(BaseConfig):
        name: ClassVar[str] = "nowhere"
        operators: ClassVar[tuple[Any, ...]] = (nn.Linear,)

    refused(model, NotImplementedError, r"Missing: .*enter yours with register_algo\('nowhere'\)",
            lambda m: prepare(m, RoundConfig(white_list=["fc2"]) + Missing()))  # fmt: skip
    refused(model, UnknownNameError, "round_owm.*did you mean 'round_own'", lambda m: prepare(m, {"round_owm": {}}))

    def bad(operator: Any) -> bool:
        return operator.weight_shape[1] > 8 and operator.nothing

    refused(model, ConfigError, "predicate bad fails for OperatorInfo", lambda m: prepare(m, own.set_local(bad, own)))
    assert not CALLS  # nothing of this got as far as the entry


def test_each_phase_once(model: Net, x: Tensor) -> None:
    prepared = prepare(model, RoundConfig())
    with pytest.raises(ConfigError, match="prepared already"):
        prepare(prepared, RoundConfig())
    with pytest.raises(ConfigError, match="keep their own statistics"):
        finalize_calibration(prepared)
    with pytest.warns(IncWarning, match="quant_config is not used"):
        q = convert(prepared, RoundConfig(2))
    assert bits_of(q)["fc1"] == 8
    for call in (lambda: prepare(q, RoundConfig()), lambda: quantize(nn.Sequential(q), RoundConfig())):
        with pytest.raises(ConfigError, match="converted already"):
            call()
    with pytest.raises(ConfigError, match="converted already"):
        convert(q)


def test_an_entry_that_returns_nothing(model: Net) -> None:
    @register_algo("round_own")
    def forgets(model: nn.Module, configs_mapping: Any, mode: Mode, **kwargs: Any) -> Any:
        return None if mode is Mode.CONVERT else model

    prepared = prepare(model, RoundConfig())
    with pytest.raises(IncError, match=r"the entry of 'round_own' gave NoneType for Mode.CONVERT, not a model"):
        convert(prepared)


def test_a_config_class_may_demand_data(model: Net, x: Tensor) -> None:
    class Demanding(RoundConfig):
        needs_calibration = True

    for call in (quantize, convert):
        with pytest.raises(ConfigError, match="calibration data"):
            call(model, Demanding())
    assert bits_of(quantize(model, Demanding(), lambda m: m(x)))


def test_registering(model: Net) -> None:
    for bad in ("", None, 3):
        with pytest.raises(ConfigError, match="needs a name"):
            register_algo(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a function"):
        register_algo("thing")(3)  # type: ignore[type-var]
    first, second = (type("Again", (BaseConfig,), {"__module__": "notebook"}) for _ in range(2))
    register_config(algo_name="again")(first)
    register_config(algo_name="again")(second)  # the cell was run twice
    assert CONFIGS.get("again") is second is not first
    with pytest.raises(IncError, match="registered twice"):
        register_config(algo_name="again")(type("Other", (BaseConfig,), {"__module__": "notebook"}))


# --------------------------------------------------------------------------- a config class as neural_compressor has it
def test_a_class_with_init_in_the_place_of_fields(model: Net) -> None:
    class TheirsConfig(BaseConfig):
        supported_configs: ClassVar[list[Any]] = []
        params_list: ClassVar[list[str]] = ["bits", "group_size"]

        def __init__(self, bits: int = 4, group_size: int = 32, names: list[str] = [], white_list: Any = "*"):  # noqa: B006
            super().__init__(white_list=white_list)
            self.bits = bits
            self.group_size = group_size
            self.names = names
            self._post_init()

        @staticmethod
        def get_model_info(model: nn.Module) -> list[tuple[str, str]]:
            return [(n, type(m).__name__) for n, m in model.named_modules() if isinstance(m, nn.Linear)]

        @classmethod
        def get_config_set_for_tuning(cls) -> Any:
            return cls(bits=[2, 8])

    register_config(framework_name="torch", algo_name="theirs", priority=20)(TheirsConfig)

    @register_algo(name="theirs")
    def theirs_entry(
        model: nn.Module, configs_mapping: Any, mode: Mode = Mode.QUANTIZE, *args: Any, **kwargs: Any
    ) -> Any:
        model.got = {path: (c.bits, c.group_size) for (path, _), c in configs_mapping.items() if c.name == "theirs"}
        return model

    config = TheirsConfig(8, names=["a"]).set_local("fc2", TheirsConfig(bits=2))
    assert TheirsConfig.name == "theirs" and TheirsConfig.priority == 20
    assert TheirsConfig.from_dict(json.loads(config.to_json_string())) == config == copy.deepcopy(config)
    assert repr(TheirsConfig(8)) == "TheirsConfig(bits=8)" and config.names == ["a"] and not config.is_set()
    assert [c.bits for c in TheirsConfig.get_config_set_for_tuning().expand()] == [2, 8]
    with pytest.raises(TypeError):
        TheirsConfig(bitz=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="has no field 'bitz'"):
        config.bitz = 3
    q = quantize(model, config + RoundConfig(white_list=["fc10"]))
    assert q.got == {"fc1": (8, 32), "fc2": (2, 32)} and bits_of(q) == {"fc10": 8}  # its priority is higher
    with pytest.raises(ConfigError, match="the argument 'bits' needs a default"):

        class NoDefault(BaseConfig):
            def __init__(self, bits: int) -> None: ...
