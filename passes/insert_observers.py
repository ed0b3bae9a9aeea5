"""Put an observer on every value that will be quantized, and route the readers that want it quantized through it.

    value --> reader        becomes        value --> observer --> reader
                                             `----------------> reader that stays float

Values that share a scale (the inputs of cat) share one observer. The output of a carrier (view, max_pool) is not
observed: it holds values of its input. A layer whose bias will be corrected gets the mean of its input collected too;
one whose weight is rounded against its inputs gets their outer products collected, once for all that read one input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from inc_graph.calibrate import Observer
from inc_graph.errors import PassError
from inc_graph.gram import GramObserver
from inc_graph.graph import erase_dead, inc_meta, module_path, peek_meta, replace_uses, set_level, set_module
from inc_graph.input_mean import MeanObserver
from inc_graph.oppattern import pattern_of
from inc_graph.options import make_estimator, needs_inputs
from inc_graph.passes._place import behind, head, stamp
from inc_graph.passes._unfold import patches_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.spec import QSpec


class RowObserver(Observer):
    """Observer of values that share a scale though their ranks differ: each is taken in as one row."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself. Raises as `Observer`."""
        super().forward(x.reshape(-1))
        return x


@dataclass
class _State:
    gm: fx.GraphModule
    first: fx.Node
    ranks: dict[tuple[str, str], set[int]]  # (group, key) -> ranks of its values
    observers: dict[tuple[str, str], str] = field(default_factory=dict)  # (group, key) -> module name
    grams: dict[Any, fx.Node] = field(default_factory=dict)  # (value, how rows are made) -> call of a gram observer
    means: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict)  # (value, kind) -> call of a mean observer


@PASSES.register("insert-observers")
@dataclass(frozen=True)
class InsertObservers(Pass):
    """annotated -> observed."""

    name: ClassVar[str] = "insert-observers"
    requires: ClassVar[str] = "annotated"
    ensures: ClassVar[str] = "observed"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        state = _State(gm, head(gm), _ranks(gm))
        for value in list(gm.graph.nodes):
            for key, quant in peek_meta(value).get("quant", {}).items():
                if not is_carried(value, key):
                    _observe(state, value, key, quant)
                    report.matched.append(value.name)
            if peek_meta(value).get("weight", {}).get("correct_bias"):
                _observe_mean(state, value)
            if needs_inputs(peek_meta(value).get("weight", {}).get("algorithm", "")):
                _observe_gram(state, value)
        erase_dead(gm)  # recompiles
        set_level(gm, "observed")
        return PassResult(gm, True, report)


def _ranks(gm: fx.GraphModule) -> dict[tuple[str, str], set[int]]:
    found: dict[tuple[str, str], set[int]] = {}
    for value in gm.graph.nodes:
        for key, quant in peek_meta(value).get("quant", {}).items():
            if not is_carried(value, key):
                found.setdefault((quant["group"], key), set()).add(value.meta["val"].ndim)
    return found


def is_carried(value: fx.Node, key: str) -> bool:
    """Whether `value` only moves elements of something that is quantized under the same key already."""
    pattern = pattern_of(value)
    return pattern is not None and pattern.role == "carrier" and key in peek_meta(value).get("reads", {}).values()


def _observe(state: _State, value: fx.Node, key: str, quant: dict[str, Any]) -> None:
    readers = [u for u in value.users if peek_meta(u).get("reads", {}).get(value.name) == key]
    if not readers:
        raise PassError("annotated as quantized but read by nobody", node=value)
    group = (quant["group"], key)
    spec = QSpec.from_json(quant["spec"])
    if spec.dynamic:  # its scale is found at run time
        return
    if group not in state.observers:
        kind = Observer if len(state.ranks[group]) == 1 else RowObserver
        module = kind(make_estimator(quant["algorithm"]), spec, value.name, module_path(value))
        state.observers[group] = set_module(state.gm, f"observer_{quant['group']}", module)
    node = _call(state, state.observers[group], value)
    inc_meta(node)["observes"] = {"value": value.name, "key": key}
    replace_uses(value, node, only=readers)


def _call(state: _State, module: str | nn.Module, value: fx.Node, kind: str = "mean") -> fx.Node:
    seen: Any = value.args[0] if value.op == "call_module" else value
    name = module if isinstance(module, str) else set_module(state.gm, f"{kind}_{seen.name}", module)
    with behind(state.gm, value, state.first):
        node = state.gm.graph.create_node("call_module", name, (value,), {})
    node.meta["val"] = value.meta["val"]
    stamp(node, value)
    return node


def _observe_mean(state: _State, layer: fx.Node) -> None:
    """Collect the mean of a layer's input: of its channels (last dimension) for linear, of the whole map for conv."""
    source: Any = layer.args[0]
    kind = "channels" if inc_meta(layer)["op"] == "linear" else "map"
    if (source, kind) not in state.means:
        state.means[source, kind] = _call(state, MeanObserver(kind, layer.name, module_path(layer)), source)
    mean = state.means[source, kind]
    layer.args = (mean, *layer.args[1:])
    inc_meta(layer)["weight"]["mean"] = mean.target


def _observe_gram(state: _State, layer: fx.Node) -> None:
    source: Any = layer.args[0]
    key = (source, unfold := patches_of(layer))
    if key not in state.grams:
        state.grams[key] = _call(state, GramObserver(layer.name, module_path(layer), unfold), source, "gram")
    gram = state.grams[key]
    layer.args = (gram, *layer.args[1:])
    inc_meta(layer)["weight"]["gram"] = gram.target
