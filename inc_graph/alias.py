"""Which attributes are the same memory.

Tied weights are one weight: an edit of one name must reach, or leave alone, all of them. Names say nothing about that;
the storage does. For many questions about one graph build one `Aliases` (linear); the functions ask a single one.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from inc_graph.errors import IncError
from inc_graph.graph import storage_key

__all__ = ["Aliases", "alias_groups", "aliases_of", "is_tied", "weight_users"]


def _tensors(gm: nn.Module) -> dict[str, torch.Tensor]:
    """Every name of every tensor of the module tree: parameters, buffers and plain tensor attributes."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in gm.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in table.items():
                if isinstance(value, torch.Tensor):
                    found[f"{prefix}.{name}" if prefix else name] = value
    return found


class Aliases:
    """Names by storage and readers by storage, as they were when this was built."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._keys = {name: storage_key(t) for name, t in _tensors(gm).items()}
        self._names: dict[object, set[str]] = {}
        for name, key in self._keys.items():
            self._names.setdefault(key, set()).add(name)
        self._reads: dict[object, list[fx.Node]] = {}
        for node in gm.graph.find_nodes(op="get_attr"):
            if node.target in self._keys:
                self._reads.setdefault(self._keys[node.target], []).append(node)

    def _key(self, attr: str) -> object:
        if attr not in self._keys:
            raise IncError(f"the graph module has no tensor attribute {attr!r}")
        return self._keys[attr]

    def groups(self) -> list[set[str]]:
        """Groups of two or more names that share storage, ordered by their first name. Views count as sharing."""
        return sorted((set(g) for g in self._names.values() if len(g) > 1), key=min)

    def names(self, attr: str) -> set[str]:
        """All names that share storage with `attr`, itself included. IncError if there is no such tensor."""
        return set(self._names[self._key(attr)])

    def users(self, attr: str) -> list[fx.Node]:
        """Nodes that read the memory of `attr` through any of its names, in graph order of the reads."""
        reads = self._reads.get(self._key(attr), [])
        return list(dict.fromkeys(user for read in reads for user in read.users))

    def is_tied(self, attr: str) -> bool:
        """True if more than one node reads the memory of `attr`: edit a copy, or edit for all of them."""
        return len(self.users(attr)) > 1


def alias_groups(gm: fx.GraphModule) -> list[set[str]]:
    """`Aliases(gm).groups()`: attribute names that share storage."""
    return Aliases(gm).groups()


def aliases_of(gm: fx.GraphModule, attr: str) -> set[str]:
    """`Aliases(gm).names(attr)`: all names of the memory of `attr`."""
    return Aliases(gm).names(attr)


def weight_users(gm: fx.GraphModule, attr: str) -> list[fx.Node]:
    """`Aliases(gm).users(attr)`: nodes that read the memory of `attr`."""
    return Aliases(gm).users(attr)


def is_tied(gm: fx.GraphModule, attr: str) -> bool:
    """`Aliases(gm).is_tied(attr)`: whether more than one node reads the memory of `attr`."""
    return Aliases(gm).is_tied(attr)
