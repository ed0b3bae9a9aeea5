"""Folders that neural_compressor saved, `qconfig.json` and `quantized_weight.pt`, as saved models of ours.

Each quantized layer becomes a graph, as if it had been quantized here; the other tensors are saved as they are.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.capture import capture
from inc_graph.errors import IncWarning, SavedModelError
from inc_graph.graph import (
    clone,
    editing,
    erase_dead,
    inc_meta,
    insert_call,
    insert_get_attr,
    replace_uses,
    set_level,
    set_tensor,
    view_key,
)
from inc_graph.ops import DEQUANTIZE, UNPACK
from inc_graph.packing import pack
from inc_graph.qtypes import get_qtype
from inc_graph.quantization.saved import graph_facts
from inc_graph.recipe import OpQuant, Recipe, Where, WhereRule, set_recipe
from inc_graph.report import Report, read_graph
from inc_graph.saving.graphs import write_graph
from inc_graph.saving.inc_folder import CONFIG, read_config, read_state, take_layers
from inc_graph.saving.inc_layout import Layer, read_layer
from inc_graph.saving.model_files import write_model
from inc_graph.saving.tensors import TensorWriter
from inc_graph.saving.values import encode
from inc_graph.spec import PerGroup, QSpec
from inc_graph.utils.device import choose_backend
from inc_graph.utils.progress import progress

__all__ = ["Imported", "import_inc"]

_LATER = "kernels are chosen when it is loaded"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ImportedLayer:
    """One layer of the result."""

    path: str
    qtype: str
    out_features: int
    in_features: int
    group: int
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**vars(self), "remarks": list(self.remarks)}


@dataclass(frozen=True)
class Imported:
    """What was imported: method, layers, and the number of tensors that are in none."""

    method: str
    layers: tuple[ImportedLayer, ...]
    others: int


def import_inc(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], in_features: dict[str, int] | None = None
) -> Imported:
    """Make a saved model of a folder that neural_compressor saved.

    Args:
        source: The folder.
        destination: The folder to write. `inc_graph.quantization.load(destination, original_model)` reads it.
        in_features: Layer -> how many inputs it has, where a warning says that the file leaves it open.

    Raises:
        SavedModelError: it is no such folder, of another layout, or damaged; names the layer and says what to do.
    """
    folder = Path(source)
    config = read_config(folder)
    state = read_state(folder)
    found = take_layers(folder, state)
    sizes = dict(in_features or {})
    method = next((name for entry in config.values() for name in entry), "rtn")
    layers = []
    with progress("unpack", len(found)) as step:
        for path, tensors in found.items():
            step(path)
            names = (path, f"{path}.orig_layer", f"{path}.linear")  # TEQ and AWQ put a layer into another one
            entry = next((config[n] for n in names if n in config), None)
            if entry is None:
                raise SavedModelError(f"{folder / CONFIG} does not speak of this layer", module=path)
            layers.append(read_layer(path, tensors, next(iter(entry.values())), sizes.pop(path, None)))
    if sizes:
        raise SavedModelError(
            f"there is no quantized layer {next(iter(sizes))!r}", hint=f"there are {', '.join(found)}"
        )
    _warn_of_guesses(layers)
    _write(layers, state, method, _main_dtype(state), Path(destination))
    made = (ImportedLayer(x.path, x.qtype, x.out_features, x.in_features, x.group, tuple(x.remarks)) for x in layers)
    return Imported(method, tuple(made), len(state))


def _warn_of_guesses(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.guessed:
            text = (
                f"layer {layer.path!r} is taken to have {layer.in_features} inputs: the file leaves it open. "
                f"If loading says otherwise, give --in-features {layer.path}=NUMBER"
            )
            layer.remarks.append("the number of inputs is a guess")
            warnings.warn(text, IncWarning, stacklevel=3)


def _main_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """What the model computes in: the dtype of most of its other tensors. On a CPU, neural_compressor's float16 layers
    compute in float32."""
    found = Counter[torch.dtype]()
    for tensor in state.values():
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            found[tensor.dtype] += tensor.numel()
    return found.most_common(1)[0][0] if found else torch.float32


# ---------------------------------------------------------------------------------------------------------------- write
class _Float(nn.Module):
    """A layer as it is called, before its weight is replaced."""

    bias: Tensor | None
    input_scale: Tensor | None
    order: Tensor | None

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layer.out_features, layer.in_features, dtype=dtype))
        for name in ("bias", "input_scale", "order"):
            value = getattr(layer, name)
            if value is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, value if name == "order" else value.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale
        if self.order is not None:
            x = torch.index_select(x, 1, self.order)
        return nn.functional.linear(x, self.weight, self.bias)


def _graph(
    layer: Layer, rule: int, dtype: torch.dtype, method: str, known: dict[Any, fx.GraphModule]
) -> fx.GraphModule:
    """linear over dequantize(unpack(bytes)), at level "qdq"."""
    module = _Float(layer, dtype).eval()
    form = tuple((n, tuple(t.shape)) for n, t in [*module.named_parameters(), *module.named_buffers()])
    if form not in known:
        example = torch.zeros(6, layer.in_features, dtype=dtype)
        known[form] = capture(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    gm = clone(known[form])
    for name, tensor in module.named_buffers():
        gm._buffers[name] = tensor
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = {layer.path: (layer.path, nn.Linear)}
    linear = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    spec = _spec(layer)
    inc_meta(linear).update(op="linear", rule=rule, weight={"spec": spec.to_json(), "algorithm": method})
    with editing("import-inc"):
        _put_weight(gm, linear, layer, spec, dtype)
        erase_dead(gm)
    set_level(gm, "qdq")
    return gm


def _spec(layer: Layer) -> QSpec:
    scheme = "symmetric" if layer.zero_point is None else "asymmetric"
    return QSpec(layer.qtype, scheme, PerGroup(layer.group, axis=1))


def _put_weight(gm: fx.GraphModule, linear: fx.Node, layer: Layer, spec: QSpec, dtype: torch.dtype) -> None:
    def read(name: str, tensor: Tensor) -> fx.Node:
        return insert_get_attr(gm, linear, set_tensor(gm, name, tensor))

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(gm, target, args, before=linear)

    qtype = get_qtype(layer.qtype)
    if qtype.storage_bits < 8:
        q = call(UNPACK, read("weight_q", pack(layer.codes, qtype)), qtype.name, list(layer.codes.shape))
    else:
        q = read("weight_q", layer.codes)
    scale = read("weight_scale", layer.scale)
    zero = None if layer.zero_point is None else read("weight_zero_point", layer.zero_point.contiguous())
    weight = call(DEQUANTIZE, q, scale, zero, list(spec.block(2)), qtype.name, dtype)
    replace_uses(linear.args[1], weight, only=[linear])  # type: ignore[arg-type]


def _write(layers: list[Layer], state: dict[str, Tensor], method: str, dtype: torch.dtype, destination: Path) -> None:
    specs = list(dict.fromkeys(_spec(x) for x in layers))
    members = [tuple(x.path for x in layers if _spec(x) == spec) for spec in specs]
    rules = tuple(
        WhereRule(
            Where("predicate", "imported from neural_compressor", paths), OpQuant(None, spec, weight_algorithm=method)
        )
        for spec, paths in zip(specs, members, strict=True)
    )
    backend = choose_backend("auto", "cpu")[0]
    recipe = Recipe(method, rules, "", "", backend=backend)
    report = Report(method, backend, notes=["imported from a folder of neural_compressor"])
    known: dict[Any, fx.GraphModule] = {}

    def body(tensors: TensorWriter) -> dict[str, Any]:
        parts = []
        with progress("write", len(layers)) as step:
            for layer in layers:
                step(layer.path)
                gm = _graph(layer, specs.index(_spec(layer)), dtype, method, known)
                report.reference += [replace(x, detail=_LATER) for x in read_graph(gm)[0]]
                parts.append(
                    {"paths": [layer.path], "graph": _body_of(gm, recipe, tensors), "facts": _facts(layer, dtype)}
                )
        entries = _state(state, tensors)
        total = sum(x.codes.numel() for x in layers) * dtype.itemsize
        rest = sum(t.nbytes for t in state.values())
        report.bytes_before = total + rest
        report.bytes_after = sum(e.nbytes for e in tensors.entries)
        facts["report"] = report.to_json()
        return {"class": "torch.nn.Module", "layers": parts, "state": entries, "state_dict": True}

    facts = graph_facts(report, recipe.to_json(), "cpu")
    write_model(destination, "module", facts, body)


def _body_of(gm: fx.GraphModule, recipe: Recipe, tensors: TensorWriter) -> dict[str, Any]:
    set_recipe(gm, recipe)
    data = write_graph(gm, tensors)
    del data["meta"]["recipe"]  # one for all
    return data


def _facts(layer: Layer, dtype: torch.dtype) -> Any:
    attributes = {"in_features": layer.in_features, "out_features": layer.out_features}
    if layer.bias is None:
        attributes["bias"] = None  # type: ignore[assignment]
    return encode({"form": ["rows", 2, layer.in_features, dtype], "attributes": attributes})


def _state(state: dict[str, Tensor], tensors: TensorWriter) -> list[dict[str, Any]]:
    """Records of the other tensors. A state_dict does not say which are parameters: those that look like it are."""
    groups: dict[Any, list[str]] = {}
    for path, tensor in state.items():
        place = (view_key(tensor), tensor.dtype)
        groups.setdefault(place, []).append(path)
    tensors.expect(state[paths[0]] for paths in groups.values())
    entries = []
    for paths in groups.values():
        tensor = state[paths[0]]
        parameter = tensor.is_floating_point() and not paths[0].endswith(_BUFFERS)
        record = tensors.add(paths[0], tensor)
        entries.append({"paths": paths, **record, "parameter": parameter, "grad": parameter})
    return entries
