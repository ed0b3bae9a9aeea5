"""Run every node of a graph again on fake values, and compare what it gives with what is stored.

A size that is known at run time only is an expression, whose form depends on the version of torch and on what the
exporter knew. So the graph is run with numbers in place of the symbols: those that it was captured with, and two and
three times these, as far as a symbol's bounds allow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import fake_tensor as fake
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from inc_graph.graph import get_attr, val

__all__ = ["Propagated", "propagate"]

_FACTORS = (1, 2, 3)
_UNKNOWN = 5  # for a symbol whose value depends on data
_NEEDS_DATA = (
    GuardOnDataDependentSymNode,
    fake.DataDependentOutputException,
    fake.DynamicOutputShapeException,
    fake.UnsupportedFakeTensorException,
    fake.UnsupportedOperatorException,
)


@dataclass
class Propagated:
    """What was found.

    Attributes:
        same: How many nodes give what is stored.
        differences: (node, what differs) of those that do not.
        undecided: Nodes whose value depends on data, or that run whole graphs (those are looked at by themselves).
    """

    same: int = 0
    differences: list[tuple[str, str]] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)


@dataclass
class _Numbers:
    """Numbers in place of symbols."""

    values: dict[Any, int]
    surely: bool  # these are sizes that the graph was captured with

    def of(self, value: Any) -> Any:
        """A fake value without symbols."""
        if isinstance(value, torch.Tensor):
            sizes, strides = ([self.of(d) for d in x] for x in (value.shape, value.stride()))
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        if isinstance(value, list | tuple):
            return [self.of(v) for v in value]
        for kind, plain in ((torch.SymInt, int), (torch.SymFloat, float), (torch.SymBool, bool)):
            if isinstance(value, kind):
                return plain(value.node.expr.xreplace(self.values))
        return value


def propagate(gm: fx.GraphModule) -> Propagated:
    """Run each call of the graph, and of the graphs that it runs, on the stored values of its arguments."""
    found = Propagated()
    _graph(gm, found)
    return found


def _graph(gm: fx.GraphModule, found: Propagated) -> None:
    trials = list(_trials(gm))
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(body := get_attr(gm, str(node.target)), fx.GraphModule):
            _graph(body, found)
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            found.undecided.append(node.name)
            continue
        outcomes = [_run(node, numbers) for numbers in trials]
        wrong = next((o for o in outcomes if o), None)
        if wrong:
            found.differences.append((node.name, wrong))
        elif None in outcomes:
            found.same += 1
        else:
            found.undecided.append(node.name)


def _trials(gm: fx.GraphModule) -> Iterator[_Numbers]:
    known: dict[Any, Any] = {}  # symbol -> (captured number, bounds)
    for item in _symbolic(val(n) for n in gm.graph.nodes):
        env = item.node.shape_env
        numbers = getattr(env, "backed_var_to_val", None)
        numbers = env.var_to_val if numbers is None else numbers
        for symbol in item.node.expr.free_symbols:
            known[symbol] = (numbers.get(symbol), env.var_to_range.get(symbol))
    surely = all(number is not None for number, _ in known.values())
    for factor in _FACTORS if known else (1,):
        values = {s: int(_UNKNOWN if n is None else n) * (1 if n is None else factor) for s, (n, _) in known.items()}
        if factor == 1 or all(_allows(bounds, values[s]) for s, (_, bounds) in known.items()):
            yield _Numbers(values, surely and factor == 1)


def _symbolic(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            yield value
        elif isinstance(value, torch.Tensor):
            yield from _symbolic([*value.shape, *value.stride()])
        elif isinstance(value, list | tuple):
            yield from _symbolic(value)


def _allows(bounds: Any, number: int) -> bool:
    high: Any = getattr(bounds, "upper", None)
    return not getattr(high, "is_Integer", False) or number <= int(high)


def _run(node: fx.Node, numbers: _Numbers) -> str | None:
    """None if the node gives what is stored, what differs if not, "" if it cannot be known."""
    with fake.FakeTensorMode(allow_non_fake_inputs=True), enable_python_dispatcher(), torch.no_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: numbers.of(val(n)))
        try:
            made = node.target(*args, **kwargs)  # type: ignore[operator]
        except _NEEDS_DATA:
            return ""
        except Exception as e:  # whatever an operator says of arguments that it does not take
            return f"cannot be run: {type(e).__name__}: {str(e)[:200]}" if numbers.surely else ""
        stored = numbers.of(val(node))
        made = numbers.of(made)
    if _shown(made) == _shown(stored):
        return None
    return f"stored is {_shown(stored)}, it gives {_shown(made)}"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list):
        return f"({', '.join(map(_shown, value))})"
    return f"{float(value):.6g}" if isinstance(value, float) else repr(value)
