"""`inc-graph inspect`: what is in a saved folder, or in a file of torch.export.save."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from inc_graph.cli.result import Result, UsageError, pairs, size, table
from inc_graph.errors import IncError

NAME = "inspect"
HELP = "what is in a saved folder or in a .pt2 file"
DESCRIPTION = """What is in a folder that save() has written, or in a .pt2 file that torch.export.save has written.

Of a folder: method, backend, sizes, the recipe, and what became of each operator. Weights are not read for it, and not
checked: `inc-graph load --check` does that. Of a .pt2 file: the captured graph as text, from the description in the
archive. Nothing is unpickled."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("path", metavar="PATH", help="a saved folder, or a .pt2 file")
    parser.add_argument("--graph", action="store_true", help="also the Q-DQ graph as text")
    parser.add_argument("--layer", metavar="NAME", help="one operator instead: its rule, formats, scales and history")


def run(args: argparse.Namespace) -> Result:
    """Exit code 1 if the folder cannot be read, or has no such layer."""
    if Path(args.path).is_file():
        from inc_graph.cli.pt2 import inspect_archive

        if args.layer:
            raise UsageError("--layer is for saved folders, not for a .pt2 file")
        return inspect_archive(Path(args.path))
    from inc_graph.cli.folder import Folder

    folder = Folder(args.path)
    if args.layer:
        return _layer(folder, args.layer)
    data, text = _overview(folder)
    if args.graph:
        if not folder.has_graphs:
            raise IncError(f"{args.path} was quantized by a method of one's own: it holds tensors, and no graph")
        from inc_graph.text import to_text

        graphs = {", ".join(p for p in paths if p): to_text(gm) for paths, gm in folder.graphs()}
        data["graphs"] = graphs
        text += "".join(f"\n\n{f'layer {name}: ' if name else ''}{graph.rstrip()}" for name, graph in graphs.items())
    return Result(data, text)


# ------------------------------------------------------------------------------------------------------------- overview
def _overview(folder: Any) -> tuple[dict[str, Any], str]:
    facts, files = folder.facts, folder.files
    weights = sum(f["bytes"] for name, f in files.items() if name.endswith(".safetensors"))
    data: dict[str, Any] = {
        "path": str(folder.path),
        "scope": folder.scope,
        "method": facts.get("method"),
        "backend": facts.get("backend"),
        "device": facts.get("device"),
        "producer": folder.producer,
        "files": {name: f["bytes"] for name, f in files.items()},
        "tensor_bytes": weights,
    }
    rows = [
        ("folder", folder.path),
        ("scope", {"graph": "a whole graph", "module": "layer by layer"}.get(folder.scope, "a method of one's own")),
        *((name, facts.get(name)) for name in ("method", "backend", "device")),
        ("written by", ", ".join(f"{name} {version}" for name, version in folder.producer.items())),
        ("files", "\n".join(f"{name}  {size(f['bytes'])}" for name, f in files.items())),
    ]
    report, recipe = folder.report, folder.recipe
    data |= {"report": report.to_json(), "recipe": recipe and recipe.to_json(), "algorithms": facts.get("algorithms")}
    if facts.get("algorithms"):
        rows.append(("own methods", ", ".join(facts["algorithms"])))
    rows.append(("in memory", f"{size(report.bytes_after)}, of {size(report.bytes_before)} as float"))
    rows.append(("recipe", recipe))
    operators = [(line.module or line.name, line.op, f"kernel: {line.detail}") for line in report.kernels]
    operators += [(x.module or x.name, x.op, f"quantized, on the reference: {x.detail}") for x in report.reference]
    operators += [(x.module or x.name, x.op, f"float: {x.detail}") for x in report.floats]
    shown = table("", ("operator", "type", "what it is"), operators).lstrip("\n")
    return data, "\n".join([pairs(rows), shown, *(f"note: {n}" for n in report.notes)])


# ------------------------------------------------------------------------------------------------------------ one layer
def _layer(folder: Any, name: str) -> Result:
    from inc_graph.cli.layer_facts import operators_in

    if not folder.has_graphs:
        raise IncError(f"{folder.path} was quantized by a method of one's own: it holds tensors, and no layers of ours")
    found: list[dict[str, Any]] = []
    names: set[str] = set()
    for paths, gm in folder.graphs():
        for operator in operators_in(gm, folder.recipe, paths):
            names |= {operator["name"], *operator["modules"]}
            if name == operator["name"] or name in operator["modules"]:
                found.append(operator)
    if not found:
        near = difflib.get_close_matches(name, sorted(names), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "inspect without --layer lists them"
        raise IncError(f"{folder.path} has no operator {name!r}", hint=hint)
    return Result({"path": str(folder.path), "operators": found}, "\n\n".join(map(_operator_text, found)))


def _operator_text(operator: dict[str, Any]) -> str:
    rows: list[tuple[str, Any]] = [
        ("operator", operator["name"]),
        ("module", ", ".join(filter(None, operator["modules"])) or None),
        ("type", operator["op"]),
        ("rule", operator["rule"] or f"float: {operator['float'] or 'no rule speaks of it'}"),
    ]
    for value in operator["values"]:
        rows.append((value["role"], _value_text(value)))
    if operator["provenance"]:
        rows.append(("made by", ", ".join(operator["provenance"])))
    return pairs(rows)


def _value_text(value: dict[str, Any]) -> str:
    lines = [f"{value['qtype']} {value['shape']} in blocks of {value['block']}, from {value['source']}"]
    if value["scale"]:
        scale = value["scale"]
        lines.append(f"scale {scale['shape']} from {scale['min']:.6g} to {scale['max']:.6g}")
    else:
        lines.append("scale computed at each call")
    if value["zero_point"]:
        lines.append(f"zero point from {value['zero_point']['min']:g} to {value['zero_point']['max']:g}")
    if value["stored_bytes"] is not None:
        lines.append(f"stored in {size(value['stored_bytes'])}")
    if value["provenance"]:
        lines.append(f"made by {', '.join(value['provenance'])}")
    return "\n".join(lines)
