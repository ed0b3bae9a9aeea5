"""Graphs as text: stable, readable, good to diff.

    graph float
      input %x : f32[s0, 3, 8, 8]
      attr @conv.weight : f32[4, 3, 3, 3]
      %conv2d_1 = aten.conv2d(%x, @conv.weight, None, [1, 1]) : f32[s0, 4, 6, 6]  # features.conv
      return (%conv2d_1,)

Values are numbered by operator and symbols by first appearance, so the text does not depend on how the graph was made.
Attribute reads are written in place as `@path`; the attributes are listed once, sorted. Annotations stand in `{...}`,
sorted. Bodies of control flow follow as further graphs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import Any

import torch
from torch import fx

from inc_graph.graph import get_attr, get_level, module_path, peek_meta, val

__all__ = ["diff", "dtype_name", "target_name", "to_text"]

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "bool",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_SYMBOL = re.compile(r"\b([a-z]*[su])(\d+)\b")


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a dtype: torch.float32 is "f32"."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def target_name(node: fx.Node) -> str:
    """Readable name of what a node calls: "aten.conv2d", "aten.add.Tensor", "getitem", "call @observer"."""
    if node.op == "call_module":
        return f"call @{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def to_text(gm: fx.GraphModule, *, tensors: bool = False, provenance: bool = False) -> str:
    """The graph as text.

    Args:
        gm: Any level.
        tensors: Add a digest of each attribute's values, so that two texts are equal only if the weights are.
        provenance: Also print which passes made a node.
    """
    return "\n".join(_Printer(tensors, provenance).graph(gm, "", get_level(gm))) + "\n"


def diff(a: str | fx.GraphModule, b: str | fx.GraphModule, names: tuple[str, str] = ("before", "after")) -> str:
    """Unified diff of two texts or graphs; empty if they are equal."""
    old, new = ((t if isinstance(t, str) else to_text(t)).splitlines(keepends=True) for t in (a, b))
    return "".join(difflib.unified_diff(old, new, names[0], names[1]))


class _Printer:
    def __init__(self, tensors: bool, provenance: bool) -> None:
        self.tensors, self.provenance = tensors, provenance
        self.symbols: dict[str, str] = {}

    def graph(self, gm: fx.GraphModule, title: str, level: str) -> list[str]:
        names: dict[fx.Node, str] = {}
        counts: dict[str, int] = {}
        inputs: list[str] = []
        attrs: set[str] = set()
        body: list[str] = []
        inner: dict[str, fx.GraphModule] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                names[node] = f"@{node.target}"
                value = get_attr(gm, node.target)
                if isinstance(value, fx.GraphModule):
                    inner[node.target] = value
                else:
                    attrs.add(f"  attr @{node.target}{self.type(node)}{self.digest(value)}{self.notes(node)}")
            elif node.op == "placeholder":
                names[node] = f"%{node.target}"
                inputs.append(f"  input %{node.target}{self.type(node)}{self.notes(node)}")
            elif node.op == "output":
                body.append(f"  return {self.value(node.args[0], names)}")
            else:
                names[node] = self.number(node, gm, counts)
                args = [self.value(a, names) for a in node.args]
                args += [f"{k}={self.value(v, names)}" for k, v in sorted(node.kwargs.items())]
                path = module_path(node)
                tail = self.type(node) + self.notes(node) + (f"  # {path}" if path else "")
                body.append(f"  {names[node]} = {target_name(node)}({', '.join(args)}){tail}")
        lines = [f"graph {title or level}", *inputs, *sorted(attrs, key=_natural), *body]
        for name, child in sorted(inner.items()):
            lines += ["", *self.graph(child, f"@{name}", level)]
        return lines

    def number(self, node: fx.Node, gm: fx.GraphModule, counts: dict[str, int]) -> str:
        if node.op == "call_module":
            base = type(get_attr(gm, str(node.target))).__name__
        elif isinstance(node.target, torch._ops.OpOverload):
            base = node.target._schema.name.rpartition("::")[2]
        else:
            base = getattr(node.target, "__name__", "call")
        counts[base] = counts.get(base, 0) + 1
        return f"%{base}_{counts[base]}"

    def symbolic(self, text: str) -> str:
        def rename(m: re.Match[str]) -> str:
            kind = m.group(1)[-1]  # s: a size known at run time; u: one that depends on data
            if m.group(0) not in self.symbols:
                number = sum(1 for s in self.symbols.values() if s[0] == kind)
                self.symbols[m.group(0)] = f"{kind}{number}"
            return self.symbols[m.group(0)]

        return _SYMBOL.sub(rename, text)

    def type(self, node: fx.Node) -> str:
        text = self.type_of(val(node))
        return f" : {text}" if text else ""

    def type_of(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            dims = ", ".join(self.symbolic(str(d)) for d in value.shape)
            return f"{dtype_name(value.dtype)}[{dims}]"
        if isinstance(value, list | tuple):
            return f"({', '.join(self.type_of(v) or 'none' for v in value)})"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.symbolic(str(value))
        return "" if value is None else type(value).__name__

    def value(self, value: Any, names: dict[fx.Node, str]) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, tuple):
            items = [self.value(v, names) for v in value]
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(self.value(v, names) for v in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k}: {self.value(v, names)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            return ":".join("" if v is None else self.value(v, names) for v in (value.start, value.stop, value.step))
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        if isinstance(value, torch.memory_format | torch.layout):
            return str(value).removeprefix("torch.")
        return str(value) if isinstance(value, torch.device) else repr(value)

    def digest(self, value: Any) -> str:
        if not self.tensors or not isinstance(value, torch.Tensor):
            return ""
        data = torch.empty(0, dtype=torch.uint8)
        if value.numel():
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f" = #{hashlib.sha256(data.numpy().tobytes()).hexdigest()[:12]}"

    def notes(self, node: fx.Node) -> str:
        notes = {k: v for k, v in peek_meta(node).items() if self.provenance or k != "provenance"}
        return " " + json.dumps(notes, sort_keys=True, default=repr) if notes else ""


def _natural(text: str) -> list[Any]:
    """Sort key with layers.2 before layers.10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", text)]
