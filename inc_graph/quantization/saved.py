"""Saving what `convert` makes: where it goes, and what is written of it."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from inc_graph.errors import ConfigError, SavedModelError
from inc_graph.recipe import get_recipe
from inc_graph.report import Report
from inc_graph.saving import write_graph, write_model
from inc_graph.saving.values import encode

__all__ = ["Converted", "destination", "graph_facts", "save_graph", "save_layers"]

_LATER = ("huggingface", "vllm")
DEFAULT_SHARD = "2GB"


class Converted(Protocol):
    """What a converted graph gives to be saved (`QuantizedModel`)."""

    report: Report

    def parts(self) -> tuple[fx.GraphModule, dict[str, Callable[[], torch.Tensor]]]: ...


def check_format(format: Any) -> None:
    """Only "default" is there. NotImplementedError for others of neural_compressor, ConfigError for what is none."""
    name = str(format.value if isinstance(format, enum.Enum) else format)
    if name in _LATER:
        raise NotImplementedError(f"format {name!r} is not in this version; format='default' saves every model")
    if name != "default":
        raise ConfigError(f"format must be 'default', not {format!r}")


def destination(checkpoint_dir: Any, format: Any, options: dict[str, Any]) -> tuple[Path, int | str]:
    """(folder, shard size) of the arguments of `save`, which also takes those of older versions of neural_compressor:
    `save(example_inputs, output_dir)`, `save(output_dir=...)`. What they say of the inputs is not needed."""
    options = dict(options)
    options.pop("example_inputs", None)
    limit = options.pop("max_shard_size", DEFAULT_SHARD)
    leaves = [] if isinstance(checkpoint_dir, str | os.PathLike) else pytree.tree_leaves(checkpoint_dir)
    if any(isinstance(x, torch.Tensor) for x in leaves):  # example inputs
        checkpoint_dir, format = (format if format != "default" else "saved_results"), "default"
    checkpoint_dir = options.pop("output_dir", checkpoint_dir)
    if options:
        raise ConfigError(
            f"save has no argument {next(iter(options))!r}", hint="it has checkpoint_dir, format, max_shard_size"
        )
    check_format(format)
    if not isinstance(checkpoint_dir, str | os.PathLike) or not str(checkpoint_dir):
        raise ConfigError(f"checkpoint_dir must be the path of a folder, not {checkpoint_dir!r}")
    return Path(checkpoint_dir), limit


def graph_facts(report: Report, recipe: Any, device: str) -> dict[str, Any]:
    """What is told of a model without reading its graph."""
    return {
        "method": report.method,
        "backend": report.backend,
        "device": device,
        "report": report.to_json(),
        "recipe": recipe,
    }


def device_of(gm: fx.GraphModule) -> str:
    """The device of a graph's tensors."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return str(value.device)
    return "cpu"


def save_graph(model: Converted, folder: Path, max_shard_size: int | str = DEFAULT_SHARD) -> None:
    """Save a converted graph."""
    gm, packed = model.parts()
    facts = graph_facts(model.report, get_recipe(gm).to_json(), device_of(gm))
    write_model(folder, "graph", facts, lambda tensors: {"graph": write_graph(gm, tensors, packed)}, max_shard_size)


def save_layers(
    layers: list[tuple[list[str], Converted, dict[str, Any]]],
    state: list[tuple[list[str], torch.Tensor, dict[str, Any]]],
    report: Report,
    model_class: str,
    folder: Path,
    max_shard_size: int | str = DEFAULT_SHARD,
    algorithms: Mapping[str, Any] | None = None,
) -> None:
    """Save a model whose layers are quantized.

    Args:
        layers: (paths, converted layer, facts) of each quantized layer.
        state: (paths, tensor, facts) of each other parameter and buffer.
        report: Of the whole model.
        model_class: Its qualified name, for messages.
        folder, max_shard_size: As for `save_graph`.
        algorithms: Own method -> its config, for a model that own methods have converted.
    """
    first = layers[0][1].parts()[0] if layers else None
    recipe = None if first is None else get_recipe(first).to_json()
    own = None if algorithms is None else {name: config.to_dict() for name, config in algorithms.items()}

    def body(tensors: Any) -> dict[str, Any]:
        parts = []
        tensors.expect(t for _, t, _ in state)
        for paths, layer, facts in layers:
            gm, packed = layer.parts()
            try:
                data = write_graph(gm, tensors, packed)
            except SavedModelError as e:
                raise SavedModelError(e.message, node=e.node, module=paths[0], hint=e.hint) from e
            del data["meta"]["recipe"]  # one for all
            parts.append({"paths": paths, "graph": data, "facts": encode(facts)})
        rest = [{"paths": p, **tensors.add(p[0], t), **f} for p, t, f in state]
        return {"class": model_class, "layers": parts, "state": rest}

    device = device_of(first) if first is not None else str(state[0][1].device) if state else "cpu"
    facts = graph_facts(report, recipe, device)
    if own is not None:
        facts["algorithms"] = own
    write_model(folder, "module" if own is None else "algorithm", facts, body, max_shard_size)
