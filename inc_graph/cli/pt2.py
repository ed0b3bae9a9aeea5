"""The graph in a file of torch.export.save, as text: read from the description in the archive. Nothing is unpickled."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from inc_graph.cli.result import Result, pairs, size
from inc_graph.errors import SavedModelError

__all__ = ["inspect_archive"]

_DESCRIPTION = re.compile(r"(^|.*/)(models/[^/]+\.json|serialized_exported_program\.json)")
_LIMIT = 1 << 29  # bytes of a description
_SYMBOL = re.compile(r"Symbol\('(\w+)'[^)]*\)")


def inspect_archive(path: Path) -> Result:
    """What `inc-graph inspect` says of a .pt2 file. SavedModelError if it is none."""
    hint = "give a folder that save() wrote, or a file that torch.export.save wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [i for i in archive.infolist() if _DESCRIPTION.fullmatch(i.filename)]
            if not names:
                raise SavedModelError(f"{path} holds no exported program", hint=hint)
            if names[0].file_size > _LIMIT:
                raise SavedModelError(f"{path}: the description in it has {names[0].file_size} bytes: too many")
            data = json.loads(archive.read(names[0]))
    except (zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError, EOFError) as e:
        raise SavedModelError(f"{path} is not a .pt2 file: {str(e)[:120]}", hint=hint) from e
    try:
        text = _graph(data["graph_module"]["graph"], data["graph_module"]["signature"]["input_specs"])
        facts = {"path": str(path), "torch": data.get("torch_version"), "bytes": path.stat().st_size, "graph": text}
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise SavedModelError(f"{path}: its description is of a form that this version does not read: {e!r}") from e
    head = pairs([("file", path), ("size", size(facts["bytes"])), ("written by torch", facts["torch"])])
    return Result(facts, f"{head}\n\n{text}")


def _graph(graph: dict[str, Any], specs: list[Any]) -> str:
    types = {name: _type(meta) for name, meta in graph["tensor_values"].items()}
    lines = [_input(spec, types) for spec in specs]
    for node in graph["nodes"]:
        given = ", ".join(_argument(i["name"], i["arg"]) for i in node["inputs"])
        results = [_value(o) for o in node["outputs"]]
        shown = ", ".join(types.get(r.removeprefix("%"), "") for r in results)
        target = str(node["target"]).removeprefix("torch.ops.").removesuffix(".default")
        path = _module(node.get("metadata", {}).get("nn_module_stack", ""))
        where = f"  # {path}" if path else ""
        lines.append(f"  {', '.join(results) or '_'} = {target}({given}){f' : {shown}' if shown else ''}{where}")
    lines.append(f"  return {', '.join(map(_value, graph['outputs']))}")
    return "\n".join(["graph exported", *lines])


def _input(spec: dict[str, Any], types: dict[str, str]) -> str:
    ((kind, facts),) = spec.items()
    arg = facts.get("arg", {})
    name = arg["name"] if "name" in arg else _value(arg).removeprefix("%")
    path = next((str(v) for k, v in facts.items() if k.endswith("_name")), None)
    stands = f" = @{path}" if path is not None else ""
    return f"  {kind.removeprefix('user_')} %{name}{stands} : {types.get(name, '?')}"


def _type(meta: dict[str, Any]) -> str:
    from torch._export.serde.schema import ScalarType

    try:
        kind = ScalarType(meta["dtype"]).name.lower()
    except ValueError:  # a dtype of a newer torch
        kind = f"dtype{meta['dtype']}"
    return f"{kind}[{', '.join(_value(d) for d in meta['sizes'])}]"


def _argument(name: str, arg: Any) -> str:
    text = _value(arg)
    return text if text.startswith("%") or not name else f"{name}={text}"


def _value(arg: Any) -> str:
    """One value of torch's schema: a table with one entry, which is named after its kind."""
    if not isinstance(arg, dict) or len(arg) != 1:
        return str(arg)
    ((kind, value),) = arg.items()
    if kind == "as_none":
        return "None"
    if isinstance(value, dict) and "name" in value:
        return f"%{value['name']}"
    if isinstance(value, dict) and "as_name" in value:
        return f"%{value['as_name']}"
    if isinstance(value, dict) and "expr_str" in value:
        return _SYMBOL.sub(r"\1", str(value["expr_str"]))
    if isinstance(value, list):
        shown = [f"%{v['name']}" if isinstance(v, dict) and "name" in v else _value(v) for v in value]
        return f"[{', '.join(shown)}]"
    return _value(value) if isinstance(value, dict) else str(value)


def _module(stack: str) -> str:
    """The path of the innermost module: "L__self__,,M;L__self__fc,fc,Linear" gives fc."""
    parts = str(stack).split(";")[-1].split(",")
    return parts[1] if len(parts) > 1 else ""
