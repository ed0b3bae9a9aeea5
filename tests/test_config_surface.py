"""The configs that scripts for neural_compressor.torch 3.10 use: same names, arguments, defaults and dictionaries.

`upstream/configs.json` records what that version says of itself.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from inc_graph.errors import ConfigError
from inc_graph.quantization import config as c
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.utils.processor import ProcessorType

UPSTREAM = json.loads((Path(__file__).parent / "upstream" / "configs.json").read_text())
CLASSES = sorted(UPSTREAM["to_dict"])


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_defaults(name: str) -> None:
    """Theirs come first, in their order: positional calls mean the same."""
    theirs = UPSTREAM["classes"][name]
    kind = getattr(c, name)
    assert kind.name == theirs["name"]
    mine = {n: plain(p.default) for n, p in inspect.signature(kind).parameters.items()}
    wanted = [n for n, _ in theirs["arguments"]]
    assert list(mine)[: len(wanted)] == wanted
    strings = {"fake_quant": "False", "use_qdq": "False"}  # they turn them into text
    assert {n: mine[n] for n in wanted} == {n: strings.get(n, v) for n, v in theirs["arguments"]}


@pytest.mark.parametrize("name", CLASSES)
def test_dictionaries(name: str) -> None:
    config = getattr(c, name)()
    assert plain(config.to_dict()) == UPSTREAM["to_dict"][name]
    assert type(config).from_dict(UPSTREAM["to_dict"][name]) == config


def test_registry_and_tuning_sets() -> None:
    found = c.get_all_registered_configs()
    for name, kind, priority in UPSTREAM["registry"]:
        assert (found[name].__name__, found[name].priority) == (kind, priority)
    counts = [(type(x).__name__, len(x.expand())) for x in c.get_all_config_set()]
    theirs = [tuple(pair) for pair in UPSTREAM["expand"]]
    theirs[11] = ("HybridGPTQConfig", 1)  # there it appears under the name of its parent
    order = {n: i for i, (n, _) in enumerate(theirs)}
    assert sorted(counts, key=lambda pair: order[pair[0]]) == theirs
    assert [type(x).__name__ for x in c.get_woq_tuning_config()] == [
        "RTNConfig", "AutoRoundConfig", "GPTQConfig", "AWQConfig",
    ]  # fmt: skip
    assert len(c.get_rtn_double_quant_config_set()) == 2


@pytest.mark.parametrize("name", CLASSES)
def test_every_candidate_is_a_config(name: str) -> None:
    kind = getattr(c, name)
    whole = kind.get_config_set_for_tuning()
    before = copy.deepcopy(whole)
    members = whole.expand()
    assert whole == before and all(type(m) is kind and not m.is_set() for m in members)
    assert all(a != b for i, a in enumerate(members) for b in members[:i])
    assert kind.from_dict(plain(whole.to_dict())) == whole


@pytest.mark.parametrize("name", CLASSES)
def test_supported_configs(name: str) -> None:
    kind = getattr(c, name)
    (supported,) = kind.register_supported_configs()
    assert kind.supported_configs == [supported] and supported.config.is_set() == any(
        len(f.choices) > 1 and f.tunable for f in kind.fields.values()
    )


def test_processor_types() -> None:
    for get in (c.get_default_rtn_config, c.get_default_gptq_config, c.get_default_AutoRound_config):
        assert get("client") == get(ProcessorType.Client) == get("Client")
        assert get("client").use_layer_wise and get("server") == type(get("server"))()
        assert get() in (get("client"), get("server"))
        with pytest.raises(ConfigError, match="'client' or 'server', not 'laptop'"):
            get("laptop")


def test_static_is_int8_or_fp8() -> None:
    assert type(c.StaticQuantConfig()) is c.INT8StaticQuantConfig
    fp8 = c.StaticQuantConfig(fp8_config="E5M2", use_qdq=True)
    assert type(fp8) is c.FP8Config and (fp8.use_qdq, fp8.fake_quant) == ("True", "False")
    assert (fp8.measure, fp8.quantize, c.FP8Config(mode="MEASURE").measure) == (False, False, True)
    assert c.HybridGPTQConfig().convert_from_fp8(fp8).fp8_config == "E5M2"


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    for name in CLASSES:
        config: BaseConfig = getattr(c, name)()
        config.to_json_file(tmp_path / name)
        back = type(config).from_json_file(tmp_path / name)
        assert back == config and back.to_json_string() == config.to_json_string()
    assert sorted(p.name for p in tmp_path.iterdir()) == CLASSES
    with pytest.raises(ConfigError, match=r"missing.json"):
        c.RTNConfig.from_json_file(tmp_path / "missing.json")
    (tmp_path / "broken").write_text("{")
    with pytest.raises(ConfigError, match="broken: RTNConfig: not JSON"):
        c.RTNConfig.from_json_file(tmp_path / "broken")
    (tmp_path / "foreign").write_text('{"bitz": 3}')
    with pytest.raises(ConfigError, match="foreign: RTNConfig has no field 'bitz'\n  hint: did you mean 'bits'"):
        c.RTNConfig.from_json_file(tmp_path / "foreign")
