"""Every public name of neural_compressor.torch and neural_compressor.common: here, callable the same way, and tested.

`surface_reference.txt` holds the facts, `docs/generate/docs_surface.py` compares, and `docs/surface.md` is the result.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inc_graph import common, utils
from inc_graph import quantization as q
from inc_graph.calibrate import run_calibration
from inc_graph.common import level, level_name
from inc_graph.common.base_config import BaseConfig, ComposableConfig
from inc_graph.common.base_tuning import ConfigSet, SequentialSampler, TuningConfig
from inc_graph.errors import ConfigError
from inc_graph.export import export

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs" / "generate"))
import docs_surface as surface  # noqa: E402

NAMES = surface.reference()
PRESENT = [e for e in NAMES if surface.find(e) is not ...]


PYTHONS = {"Callable", "Dict", "Enum", "List", "Optional", "Tuple", "TypeAlias", "Union", "UserDict", "Version",
           "lru_cache"}  # fmt: skip


def label(entry: surface.Name) -> str:
    return f"{entry.module.rpartition('.')[2]}.{entry.name}"


# ------------------------------------------------------------------------------------------------------------ the table
def test_the_page_is_what_the_code_says() -> None:
    for name, text in surface.pages().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run: python docs/generate"


def test_nothing_is_missing_without_a_reason() -> None:
    missing = [label(e) for e in NAMES if surface.find(e) is ... and e.name not in surface.ABSENT]
    assert not missing


def test_reasons_are_true() -> None:
    absent = {e.name for e in NAMES if surface.find(e) is ...}
    assert set(surface.ABSENT) <= absent, "there is a reason for the absence of what is here"
    different = {e.name for e in PRESENT if surface.compare(e, surface.find(e)).faults}
    assert set(surface.DIFFERS) == different, "differences and their reasons are not the same set"


@pytest.mark.parametrize("entry", PRESENT, ids=label)
def test_imported_after_the_prefix_is_replaced(entry: surface.Name) -> None:
    if inspect.isclass(surface._holder(entry.holder)):  # a member
        assert surface.find(entry) is not ...
        return
    names: dict[str, Any] = {}
    text = f"from {entry.module} import {entry.name}"
    exec(
        text.replace("neural_compressor.torch", "inc_graph").replace("neural_compressor.common", "inc_graph.common"),
        names,
    )
    assert entry.name in names


@pytest.mark.parametrize("entry", PRESENT, ids=label)
def test_a_test_uses_it(entry: surface.Name) -> None:
    assert surface.tests_of(entry)


def test_packages_say_what_they_offer() -> None:
    """What is there is in `__all__`, but for names that are not the library's own."""
    for entry in PRESENT:
        module = surface._holder(entry.holder)
        if hasattr(module, "__path__") and entry.holder != "inc_graph" and entry.name not in PYTHONS:
            assert entry.name in module.__all__, label(entry)


# ------------------------------------------------------------------------------------------------ the comparing itself
def function(a: int, b: int = 2, *, c: int = 3) -> None:
    """With one argument of our own."""


@pytest.mark.parametrize(
    ("parameters", "faults"),
    [
        ("a, b=2", ()),
        ("a, b=2, **kwargs", ()),
        ("a, b=...", ()),
        ("a, b=3", ("`b=2`, there `b=3`",)),
        ("b, a=1", ("`b` is not argument 1", "`a` is not argument 2")),
        ("a, z=1", ("no `z`",)),
        ("", ("`a` is required",)),
    ],
)
def test_differences_are_found(parameters: str, faults: tuple[str, ...]) -> None:
    found = surface.compare(surface.Name("m", "f", parameters), function).faults
    assert found[: len(faults)] == faults and bool(found) == bool(faults)


def test_more_arguments_and_other_values_are_found() -> None:
    assert surface.compare(surface.Name("m", "f", "a, b=2"), function).more == ("c",)
    assert surface.compare(surface.Name("m", "f", "a"), 3).faults == ("it is `3`, there a function",)
    assert not surface.compare(surface.Name("m", "X", None, 3), 3).faults
    assert surface.compare(surface.Name("m", "X", None, 3), 4).faults == ("it is `4`, there `3`",)
    wrong = surface.Name("neural_compressor.torch.quantization", "RTNConfig")
    assert not surface.compare(wrong, q.RTNConfig).faults and surface.compare(wrong, q.HQQConfig).faults


def test_uses_are_found_in_the_syntax_tree() -> None:
    text = """
from inc_graph import common
from inc_graph.quantization import prepare, quantize as all_in_one
import inc_graph.utils as u
from json import load
load, all_in_one, common.options, u.to_dtype, "convert"
"""
    found = set(surface._names_used(surface.ast.parse(text)))
    assert found == {"quantize", "options", ".options", "to_dtype", ".to_dtype", "common"}
    assert not set(surface._names_used(surface.ast.parse("import json\njson.load")))


# ------------------------------------------------------------------------------------- what no other file has a test of
def test_default_configs_are_the_classes_defaults() -> None:
    assert q.get_default_awq_config() == q.AWQConfig() and q.get_default_teq_config() == q.TEQConfig()
    assert q.get_default_hqq_config() == q.HQQConfig() and q.get_default_sq_config() == q.SmoothQuantConfig()
    assert q.get_default_mx_config() == q.MXQuantConfig() and q.get_default_fp8_config() == q.FP8Config()
    assert q.get_default_dynamic_config() == q.DynamicQuantConfig()
    assert q.get_default_mixed_precision_config() == q.MixedPrecisionConfig()
    assert q.get_default_AutoRound_config("server") == q.AutoRoundConfig()
    assert q.get_default_AutoRound_config("server") is not q.get_default_AutoRound_config("server")
    assert [c.dtype for c in q.get_default_mixed_precision_config_set().expand()] == ["fp16", "bf16", "fp32"]
    assert q.get_default_fp8_config_set().expand() == [q.FP8Config()]


def test_double_quantization_presets() -> None:
    nf4 = q.get_default_double_quant_config()
    assert (nf4.dtype, nf4.use_double_quant, nf4.double_quant_bits) == ("nf4", True, 8)
    assert q.get_default_double_quant_config("GGML_TYPE_Q4_K").double_quant_bits == 6
    assert nf4 in q.get_rtn_double_quant_config_set()
    with pytest.raises(KeyError, match="BNB_NF5"):
        q.get_default_double_quant_config("BNB_NF5")


def test_processor_types() -> None:
    found = utils.detect_processor_type_based_on_hw()
    assert found in utils.ProcessorType and utils.get_processor_type_from_user_config() == found
    assert utils.get_processor_type_from_user_config("client") == utils.ProcessorType.Client
    assert set(q.RTNConfig.get_predefined_configs()) == set(utils.ProcessorType)


def test_members_of_configs() -> None:
    config = q.RTNConfig(bits=8, white_list=["a"])
    assert config.get_params_dict()["bits"] == 8 and "white_list" not in config.params_list
    assert config.non_tunable_params == ["white_list"] and config.white_list == ["a"] and config.name == "rtn"
    assert q.RTNConfig.to_diff_dict(config) == {"bits": 8}
    assert BaseConfig.get_the_default_value_of_param(config, "bits") == 4
    q.RTNConfig.validate(config)
    with pytest.raises(ConfigError, match="expected a GPTQConfig"):
        q.GPTQConfig.validate(config)


def test_samplers_and_compositions_by_their_old_modules() -> None:
    configs = ConfigSet([q.RTNConfig(bits=[4, 8]), q.GPTQConfig()])
    assert list(SequentialSampler(configs)) == [0, 1, 2]
    assert TuningConfig(config_set=configs).sampler is SequentialSampler and TuningConfig is q.TuningConfig
    assert ComposableConfig([q.RTNConfig(), q.GPTQConfig()]) == q.RTNConfig() + q.GPTQConfig()


def test_temporary_files_of_fp8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = q.FP8Config(fp8_config="E5M2")
    assert config.json_file is None
    config.save_temp_json_file()
    assert config.json_file is not None and Path(config.json_file).parent == tmp_path
    assert q.FP8Config.from_json_file(config.json_file) == config


def test_level_of_the_logger() -> None:
    assert logging.getLevelName(level) == level_name and common.logger.name == "inc_graph"


def test_packages_that_are_not_installed_are_not_available() -> None:
    for name, there in (("numba", utils.is_numba_available), ("optimum", utils.is_optimum_available)):
        assert there() == utils.is_package_available(name)
    assert utils.is_optimum_habana_available() in (False, True) and utils.is_tbb_available() in (False, True)


def test_batches_on_a_device() -> None:
    batch = UserDict(ids=torch.ones(2, dtype=torch.int64), rest=[torch.zeros(1), (torch.ones(1), "x")])
    moved = utils.to_device(batch, "meta")
    assert type(moved) is UserDict and moved["ids"].is_meta and moved["rest"][1][0].is_meta
    assert moved["rest"][1][1] == "x" and not batch["ids"].is_meta


def test_asymmetric_weights_by_channel() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(32, 16)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # all of one sign: a symmetric format would waste half of its codes
        prepared = q.prepare(export(model, (x,)), q.StaticQuantConfig(w_sym=False))
        run_calibration(prepared, [x])
        q_model = q.convert(prepared)
        error = (q_model(x) - model(x)).norm() / model(x).norm()
    assert error < 0.02 and [line.op for line in q_model.report.reference] == ["linear"]
