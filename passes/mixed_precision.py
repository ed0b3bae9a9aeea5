"""Compute in half precision what stands it: casts, weights stored cast, and nothing else changes.

    x (float32), W -> linear -> gelu -> linear -> layer_norm
    x -> cast -> linear(W half) -> gelu -> linear(W half) -> cast -> layer_norm

At level "float" or "qdq": what is quantized there stays so, the rest becomes half. `_precision` says what may,
`_halves` decides; here it is carried out. Each value is cast at most once to a dtype, right behind where it is made; a
cast of a cast is never left. Inputs and outputs of the graph and buffers that it writes to keep their dtypes. Weights
are copied in half precision, those that share memory once; the user's stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.errors import PassError
from inc_graph.graph import (
    erase_dead,
    fake_call,
    get_tensor,
    inc_meta,
    insert_call,
    mutated_attrs,
    peek_meta,
    replace_uses,
    take_fuel,
    val,
    view_key,
)
from inc_graph.passes._halves import Halves, cast_of, decide_halves, is_indifferent
from inc_graph.passes._place import Maker
from inc_graph.passes._precision import is_mask
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.recipe import HALF_DTYPES, get_recipe
from inc_graph.registry import PASSES
from inc_graph.report import type_of

aten = torch.ops.aten
_TO = aten._to_copy.default


@PASSES.register("mixed-precision")
@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Half precision where rules ask for it.

    dtype: "bf16" or "fp16" for the whole graph; "": as the recipe that the graph carries says.
    """

    name: ClassVar[str] = "mixed-precision"
    requires: ClassVar[tuple[str, ...]] = ("float", "qdq")
    dtype: str = ""

    def run(self, gm: fx.GraphModule) -> PassResult:
        if self.dtype and self.dtype not in HALF_DTYPES:
            raise PassError(f"dtype must be one of {', '.join(HALF_DTYPES)}, not {self.dtype!r}")
        recipe = None if self.dtype else get_recipe(gm)
        halves = decide_halves(gm, recipe, HALF_DTYPES.get(self.dtype))
        report = PassReport(missed=[(n.name, why) for n, why in halves.reasons.items()])
        if halves.dtypes and not take_fuel():
            halves = Halves(reasons=dict.fromkeys(halves.dtypes, "no fuel is left to change it"))
        if not halves.dtypes:
            return PassResult(gm, _note(halves), report)
        _Rewrite(gm, halves).run()
        report.matched += [n.name for n in halves.dtypes if n not in halves.tails]
        _note(halves)
        erase_dead(gm)
        return PassResult(gm, True, report)


def _note(halves: Halves) -> bool:
    """Annotate what became of each operator. Whether that has changed an annotation."""
    before = {node: dict(peek_meta(node)) for node in [*halves.dtypes, *halves.reasons]}
    for node, dtype in halves.dtypes.items():
        if node in halves.tails:
            continue
        notes = inc_meta(node)
        notes.pop("float", None)
        notes["half"] = str(dtype).removeprefix("torch.")
        if node in halves.rules:
            notes["op"], notes["rule"] = type_of(node), halves.rules[node]
    for node, reason in halves.reasons.items():
        notes = peek_meta(node)
        if "op" in notes and "rule" in notes and "reads" not in notes and "weight" not in notes:
            for key in ("op", "rule"):
                del notes[key]
        if "float" in notes or "half" in notes:
            notes.pop("half", None)
            notes["float"] = f"float32: {reason}"
    return any(peek_meta(node) != notes for node, notes in before.items())


@dataclass
class _Rewrite:
    gm: fx.GraphModule
    halves: Halves
    make: Maker = field(init=False)
    written: set[str] = field(init=False)
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict)
    weights: dict[Any, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.make, self.written = Maker(self.gm), mutated_attrs(self.gm)

    def run(self) -> None:
        floats = {n: val(n) for n in self.gm.graph.nodes if _dtype(n) == torch.float32}
        for node in list(self.gm.graph.nodes):
            if is_indifferent(node):
                self._indifferent(node)
                continue
            want = self.halves.computed(node) or torch.float32
            for source in node.all_input_nodes:
                if source in floats and not (source.op == "get_attr" and want == torch.float32):
                    if source.op == "get_attr" and val(source).ndim == 0:
                        continue
                    node.replace_input_with(source, self._as(source, want, node))
            if want != torch.float32:
                node.meta["val"] = fake_call(self.gm, node.target, node.args, node.kwargs)  # type: ignore[arg-type]

    def _indifferent(self, node: fx.Node) -> None:
        """One that reads a value as it is there, or which is that cast itself."""
        source: Any = node.args[0]
        here = _dtype(source)
        if (origin := cast_of(node)) is None:
            there = self.halves.dtypes.get(source, here)
            node.replace_input_with(source, self._as(source, there, node))
        elif here == _dtype(node):
            replace_uses(node, source)
        elif (origin, _dtype(node)) in self.casts:
            replace_uses(node, self.casts[origin, _dtype(node)])  # type: ignore[index]
        else:
            self.casts[origin, _dtype(node)] = node  # type: ignore[index]

    def _as(self, source: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        """A value in a dtype: itself, what it was cast from, a stored constant, or its one cast."""
        if _dtype(source) == dtype:
            return source
        if (origin := cast_of(source)) is not None and _dtype(origin) == dtype and _wider(source, origin):
            return origin
        if source.op == "get_attr" and str(source.target) not in self.written:
            return self._stored(source, dtype, is_mask(reader, source))
        if (source, dtype) not in self.casts:
            value = source
            if is_mask(reader, source):
                value = self._saturated(source, dtype)
            self.casts[source, dtype] = _cast(self.gm, value, dtype, source)
        return self.casts[source, dtype]

    def _stored(self, read: fx.Node, dtype: torch.dtype, saturates: bool = False) -> fx.Node:
        tensor = get_tensor(self.gm, read).detach()
        key = (view_key(tensor), dtype, saturates)
        if key not in self.weights:
            if saturates:
                info = torch.finfo(dtype)
                tensor = torch.where(tensor.isinf(), tensor, tensor.clamp(info.min, info.max))
            self.weights[key] = self.make.read(f"{read.target}_{str(dtype).removeprefix('torch.')}", tensor.to(dtype))
        return self.weights[key]

    def _saturated(self, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
        """An additive mask within the range of half precision: the lowest float32 would become -inf, and a row of
        these NaN; what is infinite stays so."""
        info = torch.finfo(dtype)
        clipped = insert_call(self.gm, aten.clamp.default, (mask, info.min, info.max), after=mask, like=mask)
        endless = insert_call(self.gm, aten.isinf.default, (mask,), after=clipped, like=mask)
        return insert_call(self.gm, aten.where.self, (endless, mask, clipped), after=endless, like=mask)


def _cast(gm: fx.GraphModule, value: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    first = Maker(gm).first
    place = {"before": first} if value < first else {"after": value}
    made = insert_call(gm, _TO, (value,), {"dtype": dtype}, like=like, **place)  # type: ignore[arg-type]
    inc_meta(made)["cast"] = str(dtype).removeprefix("torch.")
    return made


def _wider(cast: fx.Node, origin: fx.Node) -> bool:
    """Whether a cast loses nothing, so that casting back gives what it was made of."""
    return val(cast).dtype.itemsize > val(origin).dtype.itemsize


def _dtype(node: Any) -> torch.dtype | None:
    value = val(node) if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
