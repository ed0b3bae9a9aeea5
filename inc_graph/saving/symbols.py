"""Sizes that are known at run time only, as text and back.

An expression is written as sympy prints it (`s0`, `2*s0 + 1`, `(s0//2)`). It is read by a small parser of its own: what
is in a file is never evaluated as Python.
"""

from __future__ import annotations

import ast
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as torch_sympy
from torch.utils._traceback import CapturedTraceback

from inc_graph.errors import SavedModelError

__all__ = ["Symbols", "write_symbols"]

_BINARY: dict[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: torch_sympy.FloorDiv,
    ast.Mod: torch_sympy.PythonMod,
    ast.BitAnd: sympy.And,
    ast.BitOr: sympy.Or,
}
_COMPARE: dict[type, Any] = {
    ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne, ast.Lt: sympy.Lt, ast.LtE: sympy.Le, ast.Gt: sympy.Gt, ast.GtE: sympy.Ge,
}  # fmt: skip
_NAMES = (
    "CeilDiv", "CeilToInt", "CleanDiv", "FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "Identity", "IntTrueDiv",
    "LShift", "Max", "Min", "Mod", "ModularIndexing", "PowByNatural", "PythonMod", "RShift", "RoundDecimal",
    "RoundToInt", "ToFloat", "TruncToFloat", "TruncToInt", "Where",
)  # fmt: skip
_CALLS: dict[str, Any] = {n: getattr(torch_sympy, n) for n in _NAMES if hasattr(torch_sympy, n)}
_CALLS |= {n: getattr(sympy, n) for n in ("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "floor", "ceiling")}
_LONGEST = 2000  # characters: an expression of a size is short
_MOST = 400  # names, numbers and operators in one
_MOST_SYMBOLS = 10_000
_LARGEST = 1 << 63
_HIGHEST = 32  # power
_HARD = 12  # operators that sympy takes long for: products and quotients of what is not a number


def write_symbols(values: Any) -> dict[str, dict[str, Any]]:
    """{symbol: {"low", "high", "hint", "positive"}} of all symbols in SymInts (and the like) and fake tensors.

    Raises:
        SavedModelError: an expression is of a kind that `Symbols` does not read.
    """
    found: dict[str, dict[str, Any]] = {}
    texts: set[str] = set()
    for node in _nodes(values):
        env = node.shape_env
        texts.add(str(node.expr))
        for symbol in node.expr.free_symbols:
            if str(symbol) in found:
                continue
            bounds = env.var_to_range.get(symbol)
            known = getattr(env, "backed_var_to_val", None)
            known = env.var_to_val if known is None else known
            hint = known.get(symbol)
            found[str(symbol)] = {
                "low": None if bounds is None else _end(bounds.lower),
                "high": None if bounds is None else _end(bounds.upper),
                "hint": int(hint) if hint is not None and hint.is_Integer else None,
                "positive": bool(symbol.is_positive),
                "integer": bool(symbol.is_integer),
            }
    known_symbols = Symbols(found)
    for text in texts:  # a file that could not be read again is never written
        known_symbols.expression(text)
    return found


def _nodes(values: Any) -> Any:
    for value in values:
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            if value.node.is_symbolic():
                yield value.node
        elif isinstance(value, torch.Tensor):
            yield from _nodes([*value.shape, *(value.stride() if value.layout == torch.strided else ())])
        elif isinstance(value, list | tuple):
            yield from _nodes(value)


def _end(bound: Any) -> int | None:
    return int(bound) if getattr(bound, "is_Integer", isinstance(bound, int)) else None


def _check_size(tree: ast.AST) -> None:
    """Refuse what would keep sympy busy for ever."""
    nodes = list(ast.walk(tree))
    hard = 0
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) > _LARGEST:
            raise SavedModelError("a number in an expression of sizes is too large")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.FloorDiv | ast.Mod | ast.Div | ast.Pow):
            hard += not any(isinstance(side, ast.Constant) for side in (node.left, node.right))
    if len(nodes) > _MOST or hard > _HARD or _degree(tree) > _HIGHEST:
        raise SavedModelError("an expression of sizes is too long")


def _degree(tree: ast.AST) -> int:
    """The product of the powers in one another: a tower of them would not end."""
    inner = max((_degree(child) for child in ast.iter_child_nodes(tree)), default=1)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Pow):
        power = tree.right.value if isinstance(tree.right, ast.Constant) else None
        return inner * max(power, 1) if isinstance(power, int) else _HIGHEST + 1
    return inner


class Symbols:
    """The symbols of a saved graph, in a shape environment of their own.

    Raises:
        SavedModelError: the table is not of the form that `write_symbols` gives.
    """

    def __init__(self, table: Any) -> None:
        self.env = ShapeEnv()
        self._symbols: dict[str, sympy.Symbol] = {}
        self.add(table)

    def add(self, table: Any) -> None:
        """More symbols; those that are there already stay."""
        if not isinstance(table, dict) or len(table) > _MOST_SYMBOLS:
            raise SavedModelError("the symbols are not a table, or too many")
        for name, facts in table.items():
            if name not in self._symbols:
                self._add(name, facts)

    def _add(self, name: str, facts: Any) -> None:
        keys = {"low", "high", "hint", "positive", "integer"}
        if not name.isidentifier() or not isinstance(facts, dict) or set(facts) != keys:
            raise SavedModelError(f"not a symbol: {name[:40]!r}")
        low, high, hint = facts["low"], facts["high"], facts["hint"]
        if any(v is not None and (not isinstance(v, int) or isinstance(v, bool)) for v in (low, high, hint)):
            raise SavedModelError(f"the bounds of symbol {name!r} are no integers")
        whole = {"integer": True} if facts["integer"] else {}
        symbol = sympy.Symbol(name, **({"positive": True} if facts["positive"] else {}), **whole)
        limit = torch_sympy.int_oo if whole else sympy.oo
        lower, upper = (-limit if low is None else sympy.Integer(low)), (limit if high is None else sympy.Integer(high))
        if not lower <= upper:
            raise SavedModelError(f"symbol {name!r} has no value between {low} and {high}")
        self.env.constrain_symbol_range(symbol, compiler_min=lower, compiler_max=upper)
        self.env.var_to_stack[symbol] = CapturedTraceback.extract(skip=1)  # guards ask where it came from
        if hint is not None:
            add = getattr(self.env, "add_backed_var_to_val", None) or self.env.add_var_to_val
            add(symbol, hint)
        self._symbols[name] = symbol

    def expression(self, text: Any) -> Any:
        """The sympy expression of a text."""
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise SavedModelError("not an expression of sizes")
        try:
            tree = ast.parse(text, mode="eval").body
            _check_size(tree)
            return self._read(tree)
        except SavedModelError:
            raise
        except Exception as e:  # syntax, depth, and whatever sympy says of arguments that make no sense
            raise SavedModelError(f"not an expression of sizes: {text[:60]!r}") from e

    def _read(self, tree: ast.AST) -> Any:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, bool):
            return sympy.true if tree.value else sympy.false
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
            return sympy.Integer(tree.value) if isinstance(tree.value, int) else sympy.Float(tree.value)
        if isinstance(tree, ast.Name) and tree.id in self._symbols:
            return self._symbols[tree.id]
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return -self._read(tree.operand)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Invert):
            return sympy.Not(self._read(tree.operand))
        if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
            return _BINARY[type(tree.op)](self._read(tree.left), self._read(tree.right))
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Pow) and isinstance(tree.right, ast.Constant):
            power = tree.right.value
            if isinstance(power, int) and power >= 0:
                return self._read(tree.left) ** power
        if isinstance(tree, ast.Compare) and len(tree.ops) == 1 and type(tree.ops[0]) in _COMPARE:
            return _COMPARE[type(tree.ops[0])](self._read(tree.left), self._read(tree.comparators[0]))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _CALLS:
            if not tree.keywords:
                return _CALLS[tree.func.id](*map(self._read, tree.args))
        raise SavedModelError(f"not an expression of sizes: {ast.unparse(tree)[:60]!r}")

    def _hint(self, expression: Any) -> Any:
        known = getattr(self.env, "backed_var_to_val", None)
        value = expression.xreplace(dict(self.env.var_to_val if known is None else known))
        return value if not value.free_symbols else None

    def integer(self, text: Any) -> int | torch.SymInt:
        """A size: an integer, or the SymInt of an expression."""
        if isinstance(text, int) and not isinstance(text, bool):
            return text
        expression = self.expression(text)
        if expression.is_Integer:
            return int(expression)
        hint = self._hint(expression)
        return self.env.create_symintnode(expression, hint=None if hint is None else int(hint))

    def number(self, kind: Any, text: Any) -> Any:
        """A value of kind "int", "float" or "bool"."""
        if kind == "int":
            return self.integer(text)
        expression = self.expression(text)
        hint = self._hint(expression)
        if kind == "float":
            return self.env.create_symfloatnode(expression, hint=None if hint is None else float(hint))
        if kind == "bool":
            return self.env.create_symboolnode(expression)
        raise SavedModelError(f"not a kind of number: {kind!r}"[:80])
