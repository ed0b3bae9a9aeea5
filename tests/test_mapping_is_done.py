"""`to_config_mapping` says what `prepare` then does: random models, rules, compositions, derived and shared layers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inc_graph.errors import ConfigError
from inc_graph.export import export
from inc_graph.graph import module_path, peek_meta
from inc_graph.oppattern import OperatorInfo, pattern_of
from inc_graph.quantization import config as c
from inc_graph.quantization import prepare
from inc_graph.quantization.layers import leaves
from inc_graph.recipe import get_recipe

pytestmark = pytest.mark.slow


class Sub(nn.Linear):
    pass


class SubSub(Sub):
    pass


class Net(nn.Module):
    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for path, layer in layers.items():
            *parents, last = path.split(".")
            home: nn.Module = self
            for name in parents:
                if name not in home._modules:
                    home.add_module(name, nn.Module())
                home = home.get_submodule(name)
            home.add_module(last, layer)
        self.order = list(layers)

    def forward(self, x: Tensor) -> Tensor:
        for path in self.order:
            x = torch.tanh(self.get_submodule(path)(x))
        return x


def has_fc(operator: OperatorInfo) -> bool:
    return "fc" in operator.name


def is_wide(operator: OperatorInfo) -> bool:
    return operator.op == "linear" and operator.weight_shape == (6, 6) and operator.module_type != "SubSub"


PATHS = ["fc1", "fc10", "Lin", "blk.fc1", "blk.q", "blk.up.fc1", "lm_head"]
KEYS = ["fc1", "fc1$", "fc", "blk", "blk.fc1", "blk.*", ".*", "Lin", "Linear", "Sub", ".*fc1$", "lm_head",
        nn.Linear, Sub, SubSub, nn.functional.linear, nn.Conv2d, has_fc, is_wide]  # fmt: skip
keys = st.sampled_from(KEYS)
formats = st.sampled_from(["fp32", "int4", "int8", "uint8"])


class Urgent(c.INT8StaticQuantConfig):
    """Of a higher priority."""

    priority = 5


@st.composite
def members(draw: st.DrawFn) -> Any:
    white = draw(st.just("*") | st.lists(keys, min_size=1, max_size=2, unique_by=str))
    kind = draw(st.sampled_from([c.INT8StaticQuantConfig, c.INT8StaticQuantConfig, Urgent]))
    config = kind(w_dtype=draw(st.sampled_from(["int8", "int7"])), white_list=white)
    for key in draw(st.lists(keys, max_size=3, unique_by=str)):
        config.set_local(key, c.INT8StaticQuantConfig(w_dtype=draw(formats)))
    return config


configs = st.lists(members(), min_size=1, max_size=3).map(lambda m: m[0] if len(m) == 1 else c.ComposableConfig(m))


@st.composite
def models(draw: st.DrawFn) -> Net:
    layers: dict[str, nn.Module] = {}
    for path in draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=5, unique=True)):
        shared = draw(st.sampled_from([None, None, *layers.values()]))
        layers[path] = shared or draw(st.sampled_from([nn.Linear, Sub, SubSub]))(6, 6)
    return Net(layers).eval()


def weights_of(graph: Any) -> list[tuple[str, str]]:
    """(path, weight format that its rule asks for) of each layer."""
    rules = get_recipe(graph).rules
    found = []
    for node in graph.graph.nodes:
        if (pattern := pattern_of(node)) is not None and pattern.name == "linear":
            notes = peek_meta(node)
            found.append((module_path(node), rules[notes["rule"]].what.weight.qtype if "rule" in notes else "fp32"))
    return found


def what_is_done(model: Net, config: Any, scope: str) -> dict[str, str]:
    x = torch.randn(2, 6)
    paths = [path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    done = dict.fromkeys(paths, "fp32")
    try:
        if scope == "graph":
            return done | dict(weights_of(prepare(export(model, (x,)), config, backend="eager")))
        prepared = prepare(model, config, inplace=False, backend="eager")
    except ConfigError as e:
        assert "nothing in this model can be quantized" in e.message
        return done
    for leaf, names in leaves(prepared).items():
        ((_, found),) = weights_of(leaf.inner)
        done.update(dict.fromkeys(names, found))
    return done


@pytest.mark.parametrize("scope", ["graph", "layers"])
def test_the_mapping_is_what_prepare_does(scope: str) -> None:
    @settings(max_examples=25 if scope == "graph" else 40, deadline=None)
    @given(models(), configs)
    def check(model: Net, config: Any) -> None:
        mapping = config.to_config_mapping(model_info=config.get_model_info(model))
        said = {path: "fp32" if found.leaves_float() else found.w_dtype for (path, _), found in mapping.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = what_is_done(model, config, scope)
        names: dict[nn.Module, list[str]] = {}
        for path in done:
            names.setdefault(model.get_submodule(path), []).append(path)
        for paths in names.values():
            for path in paths:
                # layer by layer, a layer that has several names gets what is said of one of them
                meant = [path] if scope == "graph" else paths
                assert done[path] in [said.get(p, "fp32") for p in meant], (path, said, done)

    check()


def test_every_name_of_a_shared_layer_is_in_the_mapping() -> None:
    layer = Sub(6, 6)
    info = c.INT8StaticQuantConfig.get_model_info(Net({"a": layer, "b": layer}))
    assert info == [("a", "Sub"), ("b", "Sub")]
    config = c.StaticQuantConfig().set_local("b", c.StaticQuantConfig(w_dtype="int4"))
    assert [x.w_dtype for x in config.to_config_mapping(model_info=info).values()] == ["int8", "int4"]


def test_a_name_with_several_configs() -> None:
    """A config that quantizes is above one that leaves float, then the priority counts, then how a setting fits."""
    info = [("fc1", "Linear"), ("fc2", "Linear")]

    def said(config: Any) -> list[str]:
        return [found.w_dtype for found in config.to_config_mapping(model_info=info).values()]

    kind, fp32 = c.StaticQuantConfig, c.StaticQuantConfig(w_dtype="fp32")
    assert said(kind().set_local("fc1$", fp32) + kind(w_dtype="int4")) == ["int4", "int4"]
    assert said(kind(w_dtype="int4", white_list=[nn.Linear]) + kind()) == ["int4", "int4"]
    assert said(kind(w_dtype="int4", white_list=["fc1"]) + kind(w_dtype="uint8")) == ["int4", "uint8"]
    assert said(kind(w_dtype="int4", white_list=["fc1"]) + Urgent(w_dtype="uint8")) == ["uint8", "uint8"]
    assert said(Urgent(white_list=["fc1"]).set_local("fc1", fp32) + kind(w_dtype="int4")) == ["int4", "int4"]
