"""Whether anything about a model has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from inc_graph.text import to_text


def snapshot(m: nn.Module) -> dict[str, Any]:
    """All there is to see of a model: its tensors (by object and by value), attributes, modes, hooks and graphs."""
    return {
        "tensors": {n: (id(t), _copy(t)) for n, t in [*m.named_parameters(), *m.named_buffers()]},
        "modules": {n: (id(c), type(c), c.training, sorted(map(str, vars(c)))) for n, c in m.named_modules()},
        "hooks": {n: [len(v) for k, v in vars(c).items() if "_hooks" in k and v] for n, c in m.named_modules()},
        "graph": {
            n: (to_text(c), id(c.graph), repr(c.meta)) for n, c in m.named_modules() if isinstance(c, fx.GraphModule)
        },
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two snapshots are of one unchanged model."""
    x, y = a["tensors"], b["tensors"]
    tensors = x.keys() == y.keys() and all(x[n][0] == y[n][0] and _equal(x[n][1], y[n][1]) for n in x)
    return tensors and all(a[k] == b[k] for k in ("modules", "hooks", "graph"))


def _copy(t: torch.Tensor) -> Any:
    return None if t.is_meta or isinstance(t, nn.parameter.UninitializedTensorMixin) else t.detach().clone()


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    dense = (t.to_dense() if t.layout != torch.strided else t for t in (a, b))
    return torch.equal(*(t.nan_to_num(1e30) if t.is_floating_point() else t for t in dense))
