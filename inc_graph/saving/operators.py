"""What a graph calls, as names and back: operators of tensors that torch or the program has registered, and few others.

A name in a file is only ever looked up. What could do more than compute is refused on both sides: operators that write
to their arguments or to a file, those of TorchScript (they would run, not be traced), and torch's internal ones, some
of which read any memory.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inc_graph.errors import SavedModelError

__all__ = ["name_of_call", "read_call"]

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{n}": getattr(operator, n) for n in (
        "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lt", "mod", "mul", "ne", "neg", "not_", "or_",
        "pos", "pow", "sub", "truediv",
    )},
    **{f"math.{n}": getattr(math, n) for n in ("ceil", "floor", "trunc")},
    **{f"torch.{n}": getattr(torch, n) for n in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not")},
    "builtins.round": round,
}  # fmt: skip
_NAMES = {v: k for k, v in _FUNCTIONS.items()}
_CONTROL = ("cond", "while_loop", "scan", "map_impl", "associative_scan")  # torch.ops.higher_order
_OPERATOR = re.compile(r"[a-zA-Z]\w*\.\w+\.[a-zA-Z]\w*")
_REFUSED = ("aten::from_file",)  # reads any file
_ASSERTS = ("aten::_assert_scalar",)  # takes numbers, gives nothing, and guards sizes that depend on data
_INTERNAL = frozenset({  # of torch, and not for models; what others register is not in here
    "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_inductor_test", "_native", "_quantized", "_test",
    "aot", "c10d", "c10d_functional", "cuda", "debug_mode_ops", "debugprims", "dist", "export", "fb", "flex_lib",
    "fsdp", "inductor", "inductor_prims", "mkl", "mkldnn", "mkldnn_prepacked", "onednn", "onnx", "onnx_symbolic",
    "prim", "prims", "profiler", "quantization", "quantized", "rngprims", "rpc", "sparse", "static_runtime", "streams",
    "symm_mem",
})  # fmt: skip
_LARGEST_POWER = 16


def name_of_call(node: fx.Node) -> str:
    """The name of what a `call_function` node calls. SavedModelError if it is not among what can be read again."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if (fault := _fault(target)) is not None:
            raise SavedModelError(f"a call of {target} cannot be saved: it {fault}")
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _CONTROL:
        return f"control.{target.name()}"
    if target in _NAMES:
        return _NAMES[target]
    raise SavedModelError(f"a call of {target} cannot be saved")


def _fault(op: torch._ops.OpOverload) -> str | None:
    """Why an operator has no place in a file, None if it has."""
    schema, name = op._schema, op.name().partition(".")[0]
    if name in _REFUSED or op.namespace in _INTERNAL:
        return "is not one that a model needs"
    if not torch._C._dispatch_has_kernel(op.name()):
        return "is one of TorchScript, not of torch"
    if schema.is_mutable and op is not torch.ops.aten.copy_.default:
        return "writes to its arguments"
    if name not in _ASSERTS and not any("Tensor" in str(a.type) for a in [*schema.arguments, *schema.returns]):
        return "has nothing to do with tensors"
    return None


def read_call(name: str) -> Any:
    """What a name stands for.

    Raises:
        SavedModelError: there is no such operator here, or it is none that `name_of_call` would have written.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    kind, _, inner = name.partition(".")
    if kind == "control" and inner in _CONTROL:
        return getattr(torch.ops.higher_order, inner)
    if _OPERATOR.fullmatch(name) is None:
        raise SavedModelError(f"not the name of an operator: {name[:60]!r}")
    space, op, overload = name.split(".")
    try:
        found = getattr(getattr(getattr(torch.ops, space), op), overload)
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        hint = f"import the package that registers the operators of {space!r}, or use the torch it was saved with"
        raise SavedModelError(f"there is no operator {name} here", hint=hint)
    if (fault := _fault(found)) is not None:
        raise SavedModelError(f"operator {name} {fault}")
    return found


def check_arguments(target: Any, args: tuple[Any, ...]) -> None:
    """Refuse arguments that would keep the machine busy for ever."""
    if target is operator.pow and not (len(args) == 2 and isinstance(args[1], int) and abs(args[1]) <= _LARGEST_POWER):
        raise SavedModelError(f"the exponent of operator.pow is not a number up to {_LARGEST_POWER}")
