"""Put an observer on every value that will be quantized, and route the readers that want it quantized through it.

    value --> reader        becomes        value --> observer --> reader
                                             `----------------> reader that stays float

Values that share a scale (the inputs of cat) share one observer. The output of a carrier (view, max_pool) is not observed:
it holds values of its input. A layer whose bias will be corrected gets the mean of its input collected too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from inc_graph.calibrate import Observer
from inc_graph.errors import PassError
from inc_graph.graph import erase_dead, insert_module, inc_meta, module_path, peek_meta, replace_uses, set_level, set_module
from inc_graph.input_mean import MeanObserver
from inc_graph.options import make_estimator
from inc_graph.oppattern import pattern_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.spec import QSpec


@PASSES.register("insert-observers")
@dataclass(frozen=True)
class InsertObservers(Pass):
    """annotated -> observed."""

    name: ClassVar[str] = "insert-observers"
    requires: ClassVar[str] = "annotated"
    ensures: ClassVar[str] = "observed"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        shared: dict[tuple[str, str], str] = {}  # (group, key) -> module name
        means: dict[tuple[fx.Node, str], fx.Node] = {}
        for value in list(gm.graph.nodes):
            for key, quant in peek_meta(value).get("quant", {}).items():
                if not is_carried(value, key):
                    self._observe(gm, value, key, quant, shared)
                    report.matched.append(value.name)
            if peek_meta(value).get("weight", {}).get("correct_bias"):
                _observe_mean(gm, value, means)
        erase_dead(gm)  # recompiles
        set_level(gm, "observed")
        return PassResult(gm, True, report)

    @staticmethod
    def _observe(gm: fx.GraphModule, value: fx.Node, key: str, quant: dict, shared: dict[tuple[str, str], str]) -> None:
        readers = [u for u in value.users if peek_meta(u).get("reads", {}).get(value.name) == key]
        if not readers:
            raise PassError("annotated as quantized but read by nobody", node=value)
        group = (quant["group"], key)
        if group not in shared:
            module = Observer(make_estimator(quant["algorithm"]), QSpec.from_json(quant["spec"]), value.name, module_path(value))
            shared[group] = set_module(gm, f"observer_{quant['group']}", module)
        node = _call(gm, shared[group], value)
        inc_meta(node)["observes"] = {"value": value.name, "key": key}
        replace_uses(value, node, only=readers)


def _call(gm: fx.GraphModule, module: str, value: fx.Node) -> fx.Node:
    with gm.graph.inserting_after(value):
        node = gm.graph.create_node("call_module", module, (value,), {})
    node.meta["val"] = value.meta["val"]
    for item in ("nn_module_stack", "stack_trace"):
        if item in value.meta:
            node.meta[item] = value.meta[item]
    return node


def is_carried(value: fx.Node, key: str) -> bool:
    """Whether `value` only moves elements of something that is quantized under the same key already."""
    pattern = pattern_of(value)
    return pattern is not None and pattern.role == "carrier" and key in peek_meta(value).get("reads", {}).values()


def _observe_mean(gm: fx.GraphModule, layer: fx.Node, means: dict[tuple[fx.Node, str], fx.Node]) -> None:
    """Collect the mean of a layer's input: of its channels (last dimension) for linear, of the whole map for conv."""
    source: Any = layer.args[0]
    kind = "channels" if inc_meta(layer)["op"] == "linear" else "map"
    if (source, kind) not in means:
        module = MeanObserver(kind, layer.name, module_path(layer))
        means[source, kind] = insert_module(gm, f"mean_{layer.name}", module, source, after=source)
    layer.args = (means[source, kind], *layer.args[1:])
    inc_meta(layer)["weight"]["mean"] = means[source, kind].target
