"""Names of `neural_compressor.torch.utils` beside those of test_utils.py: constants, tables, blocks, files, the hub."""

from __future__ import annotations

import collections
import enum
import functools
import json
import logging
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inc_graph
from inc_graph import utils
from inc_graph.errors import ConfigError, IncError, UnknownNameError
from inc_graph.quantization import DynamicQuantConfig, RTNConfig, StaticQuantConfig
from inc_graph.quantization import config as configs
from inc_graph.utils import (
    SUPPORTED_LAYERS,
    Mode,
    SaveLoadFormat,
    Statistics,
    Version,
    cpu_info,
    dowload_hf_model,
    dump_model_op_stats,
    find_matching_blocks,
    get_block_names,
    get_double_quant_config_dict,
    get_enum_from_format,
    get_layer_names_in_block,
    get_multimodal_block_names,
    get_torch_version,
    load_empty_model,
    read_json_file,
    validate_modules,
    write_json_file,
)


class Conv1D(nn.Module):
    """As transformers has it: the weight is transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(nx, nf)), nn.Parameter(torch.zeros(nf))


Conv1D.__module__ = "transformers.pytorch_utils"


# -------------------------------------------------------------------------------------------------- values and versions
def test_constants() -> None:
    priorities = {
        "RTN": utils.PRIORITY_RTN, "GPTQ": utils.PRIORITY_GPTQ, "AWQ": utils.PRIORITY_AWQ, "TEQ": utils.PRIORITY_TEQ,
        "HQQ": utils.PRIORITY_HQQ, "AutoRound": utils.PRIORITY_AUTOROUND,
    }  # fmt: skip
    for name, priority in priorities.items():
        assert getattr(configs, f"{name}Config").priority == priority
    assert (utils.PT2E_STATIC_QUANT, utils.PT2E_DYNAMIC_QUANT) == ("pt2e_static_quant", DynamicQuantConfig.name)
    assert utils.UNIT_MAPPING["GB"] == 2**30 and set(utils.UNIT_MAPPING) == {"B", "KB", "MB", "GB", "TB"}
    assert (utils.QCONFIG_NAME, utils.WEIGHT_NAME) == ("qconfig.json", "quantized_weight.pt")
    assert utils.SHARDED_WEIGHT_NAME == "model_bin_index.json" and utils.HPU_WEIGHT_NAME == "quantized_hpu_weight.pt"
    assert utils.HPU_SAFE_WEIGHTS_NAME == "hpu_model.safetensors"
    assert utils.SHARDED_HPU_WEIGHT_NAME == "quantized_hpu_weight.safetensors"
    assert utils.LM_HEAD_NAMES is configs.LM_HEAD_NAMES and utils.DOUBLE_QUANT_CONFIGS is configs.DOUBLE_QUANT_CONFIGS
    assert typing.get_origin(utils.OP_NAME_AND_TYPE_TUPLE_TYPE) is tuple


def test_names_of_python_that_scripts_take_from_there() -> None:
    assert (utils.Dict, utils.List, utils.Tuple) == (typing.Dict, typing.List, typing.Tuple)  # noqa: UP006
    assert (utils.Optional, utils.Union, utils.Callable) == (typing.Optional, typing.Union, typing.Callable)
    assert utils.TypeAlias is typing.TypeAlias and utils.Enum is enum.Enum
    assert utils.UserDict is collections.UserDict and utils.lru_cache is functools.lru_cache
    with pytest.raises(AttributeError, match="has no attribute 'Dictionary'"):
        _ = utils.Dictionary


def test_versions() -> None:
    packaging = pytest.importorskip("packaging.version")
    here = get_torch_version()
    for other in (here, str(here), packaging.Version(str(here)), here.release, torch.torch_version.TorchVersion(here)):
        assert here == other and other == here and here >= other and not here < other and other <= here
    for older in ("2.7.1", (2, 7), packaging.Version("2.7.1"), Version("2.7.1"), utils.TORCH_VERSION_2_7_0):
        assert here > older and older < here and not here <= older and here != older
    assert Version("2.10.0") > Version("2.9.1") == "2.9.1" and Version("2.10.3").release == (2, 10, 3)
    assert (Version("2.10.3").major, Version("2.10").minor, Version("2.10").micro) == (2, 10, 0)
    assert utils.TORCH_VERSION_2_2_2 < utils.TORCH_VERSION_2_8_0 <= here and utils.GT_OR_EQUAL_TORCH_VERSION_2_5
    assert (here >= utils.TORCH_VERSION_2_11_0) == (here.release >= (2, 11, 0))
    assert len({here, str(here)}) == 1


def test_formats() -> None:
    assert [get_enum_from_format(f) for f in ("default", "HuggingFace", SaveLoadFormat.VLLM)] == list(SaveLoadFormat)
    for bad in ("pickle", None, Mode.LOAD):
        with pytest.raises(ConfigError, match="one of 'default', 'huggingface', 'vllm', not"):
            get_enum_from_format(bad)
    assert [m.value for m in Mode] == ["prepare", "convert", "quantize", "load"]


def test_presets_of_double_quantization() -> None:
    one = get_double_quant_config_dict()
    one["bits"] = 3  # it is the caller's own
    assert get_double_quant_config_dict("BNB_NF4")["bits"] == 4
    assert RTNConfig.from_dict(get_double_quant_config_dict("GGML_TYPE_Q4_K")).double_quant_bits == 6
    with pytest.raises(UnknownNameError, match="no preset 'BNB'"):
        get_double_quant_config_dict("BNB")


def test_the_processor() -> None:
    assert (
        cpu_info.cores >= cpu_info.cores_per_socket >= 1
        and cpu_info.sockets * cpu_info.cores_per_socket <= cpu_info.cores
    )
    assert isinstance(cpu_info.bf16, bool) and isinstance(cpu_info.vnni, bool) and isinstance(cpu_info.brand_raw, str)
    if sys.platform == "linux" and "avx512" in torch.backends.cpu.get_cpu_capability().lower():
        flags = Path("/proc/cpuinfo").read_text()
        assert cpu_info.vnni == any(f in flags for f in ("avx512_vnni", "avx_vnni", "amx_int8"))


# --------------------------------------------------------------------------------------------------------------- tables
def test_statistics() -> None:
    lines: list[str] = []
    Statistics([["Linear", 12, 3], ["Conv2d", 1, 0]], "Layers", ["Op Type", "Total", "INT8"], lines.append).print_stat()
    assert lines == [
        "|*********Layers*********|",
        "+---------+-------+------+",
        "| Op Type | Total | INT8 |",
        "+---------+-------+------+",
        "| Linear  |  12   |  3   |",
        "| Conv2d  |   1   |  0   |",
        "+---------+-------+------+",
    ]
    assert str(Statistics([], "none", ["a"])).count("\n") == 4


def test_what_each_layer_got(caplog: pytest.LogCaptureFixture) -> None:
    """neural_compressor's fails for a config without `dtype` and `bits`, such as a static one."""
    mapping = {
        ("a", "Linear"): RTNConfig(bits=4, group_size=32), ("b", "Linear"): RTNConfig(dtype="fp32"),
        ("c", nn.Conv2d): StaticQuantConfig(), ("d", "Linear"): RTNConfig(bits=4, group_size=32),
        ("e", "Conv2d"): configs.MixedPrecisionConfig(),
    }  # fmt: skip
    with caplog.at_level(logging.INFO, logger="inc_graph"):
        dump_model_op_stats(Mode.PREPARE, mapping)
        assert not caplog.records
        dump_model_op_stats("quantize", mapping)
    assert "Mixed Precision Statistics" in caplog.records[0].getMessage()
    rows = [r.getMessage().strip("|").split("|") for r in caplog.records[1:] if "|" in r.getMessage()]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    head = table.pop("Op Type")
    static = StaticQuantConfig()
    assert head == ["Total", f"A({static.act_dtype})W({static.w_dtype})", "A32W4G32", "FP32", "MIXED_PRECISION"]
    assert table == {"Linear": ["3", "0", "2", "1", "0"], "Conv2d": ["2", "1", "0", "0", "1"]}


# --------------------------------------------------------------------------------------------------------------- blocks
class Block(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.fc, self.act, self.more = first, nn.ReLU(), nn.ModuleList([Conv1D(2, 2), nn.Conv1d(2, 2, 1)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(2, 2)
        self.text = nn.Module()
        self.text.layers = nn.ModuleList([Block(shared), Block(nn.Linear(2, 2)), Block(shared)])
        self.Vision_tower = nn.ModuleList([nn.Linear(2, 2)])
        self.head = nn.Linear(2, 2)


def test_layers_in_blocks() -> None:
    model = Model()
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    first = ["text.layers.0.fc", "text.layers.0.more.0"]
    rest = ["text.layers.1.fc", "text.layers.1.more.0", "text.layers.2.more.0"]
    assert get_block_names(model) == [["text.layers.0", "text.layers.1", "text.layers.2"]]
    assert get_layer_names_in_block(model) == first + rest
    assert get_layer_names_in_block(model, [nn.Conv1d]) == [f"text.layers.{i}.more.1" for i in range(3)]
    for asked in ("layers.0$", [["text.layers.0"]], ["text.layers.0"], ("text.layers.0",)):
        assert get_layer_names_in_block(model, to_quant_block_names=asked) == first
    with pytest.raises(ConfigError, match=r"no block 'text\.layers\.7'"):
        get_layer_names_in_block(model, to_quant_block_names=["text.layers.7"])
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == before


def test_blocks_by_name() -> None:
    blocks = [["a.0", "a.1", "a.10"], ["b.0"]]
    find = functools.partial(find_matching_blocks, nn.ReLU(), blocks)
    assert find() == find("") == blocks and find()[0] is not blocks[0]
    assert (
        find("a.1") == [["a.1", "a.10"]]
        and find("1$, ^b") == [["a.1"], ["b.0"]]
        and find("a.1, a.1$") == [["a.1", "a.10"]]
    )
    assert find([["a.0"], ["b.0"]]) == [["a.0"], ["b.0"]] and find(["a.0", "b.0"]) == [["a.0", "b.0"]]
    with pytest.raises(ConfigError, match=r"no block matches 'c'\n  hint: blocks are called a\.0"):
        find("c")


def test_blocks_of_models_for_text_and_images() -> None:
    model = Model()
    text = [f"text.layers.{i}" for i in range(3)]
    assert get_multimodal_block_names(model) == [text]  # and not the lists inside of the blocks
    assert get_multimodal_block_names(model, quant_vision=True) == [text, ["Vision_tower.0"]]
    assert get_multimodal_block_names(nn.ReLU()) == []
    assert (
        validate_modules([("a", None), ("b", None)])
        and validate_modules(["layer", "layers.0"])
        and validate_modules(["a"])
    )
    for nested in (["a.b", "c", "a"], [("a", None), ("a.b.c", None)], ["a.b", "a.b.c", "x"]):
        with pytest.raises(ConfigError, match=r"module 'a\.b(\.c)?' lies in 'a(\.b)?'"):
            validate_modules(nested)
    with pytest.raises(ValueError, match="no modules"):
        validate_modules([])


def test_layers_of_transformers_whether_it_is_imported_or_not() -> None:
    """In neural_compressor the list depends on whether transformers was imported before."""
    stands_for = SUPPORTED_LAYERS[1]
    assert repr(stands_for) == "<class 'transformers.pytorch_utils.Conv1D'>" and SUPPORTED_LAYERS[0] is nn.Linear
    real, other = Conv1D(2, 3), type("Conv1D", (nn.Module,), {})()
    assert isinstance(real, stands_for) and not isinstance(other, stands_for) and not isinstance(nn.ReLU(), stands_for)
    model = nn.Sequential(real, other, nn.Linear(2, 2), type("Sub", (Conv1D,), {})(2, 2))
    assert utils.get_model_info(model, SUPPORTED_LAYERS) == [("0", "Conv1D"), ("2", "Linear"), ("3", "Sub")]
    assert ("0", "Conv1D") in RTNConfig.get_model_info(model)


_ORDER = """
import sys, types
def transformers():
    package = types.ModuleType("transformers"); package.__path__ = []
    module = types.ModuleType("transformers.pytorch_utils")
    import torch
    module.Conv1D = type("Conv1D", (torch.nn.Linear.__base__,), {"__module__": module.__name__})
    sys.modules.update({package.__name__: package, module.__name__: module})
    return module.Conv1D
kind = transformers() if FIRST else None
from inc_graph.utils import SUPPORTED_LAYERS, get_layer_names_in_block, is_transformers_imported
from inc_graph.quantization import RTNConfig
from torch import nn
kind = kind or transformers()
block = nn.ModuleList([nn.Sequential(kind(), nn.Linear(2, 2))])
print(is_transformers_imported(), get_layer_names_in_block(block), RTNConfig.get_model_info(block))
"""


def test_the_order_of_imports_changes_nothing() -> None:
    programs = [_ORDER.replace("FIRST", str(first)) for first in (True, False)]
    found = [subprocess.run([sys.executable, "-c", p], capture_output=True, text=True, timeout=300) for p in programs]
    assert found[0].stdout == found[1].stdout, [f.stderr for f in found]
    assert found[0].stdout == "True ['0.0', '0.1'] [('0.0', 'Conv1D'), ('0.1', 'Linear')]\n"


# ---------------------------------------------------------------------------------------------------------------- files
def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json_file(path, {"a": [1, None, "ü"]})
    assert read_json_file(path) == read_json_file(str(path)) == {"a": [1, None, "ü"]}
    with pytest.raises(IncError, match=r"facts\.json is not written: .*not JSON serializable"):
        write_json_file(path, {"a": object()})
    assert read_json_file(path) == {"a": [1, None, "ü"]} and [p.name for p in tmp_path.iterdir()] == ["facts.json"]
    path.write_bytes(b"{\xff")
    for broken in (path, tmp_path / "missing.json"):
        with pytest.raises(IncError, match=broken.name):
            read_json_file(broken)


# -------------------------------------------------------------------------------------------------------------- the hub
class Hub(types.ModuleType):
    """huggingface_hub with one model."""

    def __init__(self, folder: Path, files: list[str], cached: bool) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.files, self.cached, self.calls = folder, files, cached, []

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        if options.get("local_files_only") and not self.cached:
            raise FileNotFoundError(repo_id)
        for name in self.files:
            (self.folder / name).touch()
        return str(self.folder)

    def list_repo_files(self, repo_id: str, **options: Any) -> list[str]:
        self.calls.append(("list", options))
        return self.files


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("huggingface_hub", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    yield


def test_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """neural_compressor's forgets folder and revision when it has to fetch the model."""
    hub = Hub(tmp_path, ["model.safetensors", "model.bin", "config.json"], cached=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert dowload_hf_model("some/model", cache_dir="cache", repo_type="model", revision="v2") == str(tmp_path)
    (_, first), (_, listed), (_, second) = hub.calls
    which = {"repo_type": "model", "revision": "v2"}
    assert first == {"cache_dir": "cache", "local_files_only": True, **which} and listed == which
    assert second == {"cache_dir": "cache", "ignore_patterns": ["*.bin", "*.bin.index.json"], **which}
    for files, skipped in ((["model.bin"], None), (["model.safetensors"], None)):
        hub = Hub(tmp_path, files, cached=False)
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        dowload_hf_model("some/model")
        assert hub.calls[-1][1]["ignore_patterns"] is skipped
    hub = Hub(tmp_path, ["model.safetensors"], cached=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert dowload_hf_model("some/model") == str(tmp_path) and len(hub.calls) == 1  # nothing is fetched


@pytest.mark.usefixtures("no_package")
def test_without_the_packages() -> None:
    for call, name in ((dowload_hf_model, "huggingface_hub"), (load_empty_model, "transformers")):
        with pytest.raises(IncError, match=rf"{name} is not installed(.|\n)*inc_graph\[hf\]"):
            call("some/model")


@pytest.mark.parametrize("cls", [None, "LlamaForCausalLM", "AutoModel"])
def test_empty_models(cls: str | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    kind = None if cls is None else getattr(transformers, cls)
    register = nn.Module.register_parameter
    model = inc_graph.load_empty_model(tmp_path, cls=kind)
    assert nn.Module.register_parameter is register  # modules are made as ever
    assert type(model).__name__ == ("LlamaModel" if cls == "AutoModel" else "LlamaForCausalLM")
    assert not model.training and model.path == str(tmp_path)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    if cls == "AutoModel":
        return
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.manual_seed(0)
    real = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(real.state_dict(), assign=True)
    model.tie_weights()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, real(ids).logits)  # the buffers, which no file has, are right
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        assert {p.dtype for p in load_empty_model(tmp_path, kind, **{name: "auto"}).parameters()} == {torch.bfloat16}
    with pytest.raises((OSError, ValueError)):
        load_empty_model(str(tmp_path / "missing" / "folder" / "deep"))


def test_nothing_of_this_is_needed_to_read_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"bits": 3}))
    assert RTNConfig.from_json_file(tmp_path / "config.json").bits == 3


def test_statistics_of_no_phase() -> None:
    with pytest.raises(ConfigError, match=r"mode must be one of 'prepare'.*not 'foo'"):
        dump_model_op_stats("foo", {})
