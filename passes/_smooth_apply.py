"""Put chosen scales into a float graph: constants divided and multiplied, or a multiplication in front of layers.

A constant that several operators read the same way stays one; one that is read in other places too stays as it is
there, and a scaled one is made beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.graph import get_tensor, insert_get_attr, replace_uses, set_tensor, view_key
from inc_graph.oppattern import argument, pattern_of
from inc_graph.passes._place import Maker, stamp
from inc_graph.passes._smooth_sites import Group, Site, weight_index

__all__ = ["Edits"]

aten = torch.ops.aten


@dataclass
class _Factors:
    """What one reader's constant is to be multiplied by, for which sites, and a key that is equal for equal factors; in
    the end the constant's memory, and the attribute that holds the product."""

    parts: list[Tensor] = field(default_factory=list)
    key: tuple[Any, ...] = ()
    sites: list[Site] = field(default_factory=list)
    memory: Any = None
    attr: str = ""


class Edits:
    """Collects what is to be done to a graph, and does it in `apply`."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.make = gm, Maker(gm)
        self.factors: dict[tuple[fx.Node, fx.Node], _Factors] = {}  # (reader, constant)
        self.takers: dict[Site, list[fx.Node]] = {}
        self.copied: dict[Site, list[str]] = {}
        self.parted: dict[Site, list[str]] = {}  # what other readers read as it was, or scaled otherwise

    def add(self, group: Group) -> None:
        """Scale the inputs of the layers of a group, by its scale."""
        scale = group.scale
        assert scale is not None
        wide = torch.cat([scale, scale.new_ones(1)])  # -1 is not scaled
        for site in group.sites:
            if site.done == "left":
                continue
            for layer in site.layers:
                pattern = pattern_of(layer)
                weight = argument(layer, pattern.weight)  # type: ignore[union-attr, arg-type]
                self._note(site, layer, weight, weight_index(layer, len(scale)), wide, (id(group), "in"), lambda s: s)
            if site.plan is None:
                self._multiply(site, scale)
                continue
            copies = {norm: self._copy(norm, readers) for norm, readers in site.plan.copies.items()}
            self.copied[site] = [norm.name for norm in copies]
            for edit in site.plan.edits:
                reader = copies.get(edit.reader, edit.reader)
                self._note(site, reader, edit.constant, edit.index, wide, (id(group), "out"), torch.reciprocal)
            self.takers[site] = site.plan.takers

    def _note(
        self,
        site: Site,
        reader: fx.Node,
        constant: fx.Node,
        index: Tensor,
        wide: Tensor,
        key: Any,
        of: Callable[[Tensor], Tensor],
    ) -> None:
        found = self.factors.setdefault((reader, constant), _Factors())
        found.sites.append(site)
        found.parts.append(of(wide)[index])
        found.key += (key, tuple(index.shape), index.contiguous().numpy().tobytes())

    def _copy(self, norm: fx.Node, readers: list[fx.Node]) -> fx.Node:
        with self.gm.graph.inserting_after(norm):
            new = self.gm.graph.create_node(norm.op, norm.target, norm.args, norm.kwargs)
        new.meta["val"] = norm.meta["val"]
        stamp(new, norm)
        replace_uses(norm, new, only=readers)
        return new

    def _multiply(self, site: Site, scale: Tensor) -> None:
        value, like = site.value, site.value.meta["val"]
        shape = [-1 if d == site.axis % like.ndim else 1 for d in range(like.ndim)]
        by = scale.reciprocal().to(like.dtype).view(shape[site.axis % like.ndim :])
        read = self.make.read(f"{value.name}_smooth", by)
        new = self.make.call(aten.mul.Tensor, (value, read), after=value, like=value)
        replace_uses(value, new, only=site.layers)
        self.takers[site] = []

    def apply(self) -> None:
        """Make the constants, and say in `parted` which of them are two now."""
        made: dict[Any, str] = {}
        versions: dict[Any, list[tuple[str, fx.Node]]] = {}  # of a tensor: attribute and reader
        for (reader, constant), factors in self.factors.items():
            tensor = get_tensor(self.gm, constant)
            factors.memory = view_key(tensor)
            key = (factors.memory, factors.key)
            if key not in made:
                with torch.no_grad():
                    new = tensor.detach().double()
                    for factor in factors.parts:
                        new = new * factor.to(new.device)
                    new = new.to(tensor.dtype)
                held = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
                made[key] = set_tensor(self.gm, f"{constant.target}_smooth", held, not isinstance(held, nn.Parameter))
            replace_uses(constant, insert_get_attr(self.gm, reader, made[key]), only=[reader])
            factors.attr = made[key]
            versions.setdefault(factors.memory, []).append((factors.attr, reader))
        for (_, constant), factors in self.factors.items():
            known = {reader for _, reader in versions[factors.memory]}
            versions[factors.memory] += [("", user) for user in constant.users if user not in known]
        for (_, constant), factors in self.factors.items():
            other = next((other for attr, other in versions[factors.memory] if attr != factors.attr), None)
            if other is not None:
                for site in factors.sites:
                    text = f"copy of {constant.target}, which {other.name} reads too"
                    self.parted.setdefault(site, []).append(text)
