"""Intel Extension for PyTorch: whether it can be used here, and TorchScript functions that it compiles.

IPEX belongs to one release of torch. It is imported when the first graph is lowered for it, if the program has not done
so before; imported beside another torch it would fail, so versions are compared first.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from inc_graph.errors import LoweringError
from inc_graph.lowering._context import size_hint
from inc_graph.lowering._onednn import NotPickled
from inc_graph.lowering._torchscript import Written

__all__ = ["GROUP", "Scripted", "example", "import_ipex", "run_scripted", "why_not"]

MODULE = "intel_extension_for_pytorch"
GROUP = "ipex::LlgaFusionGroup"
_INSTALL = (
    "in an environment of its own: pip install 'torch==2.8.*' 'intel-extension-for-pytorch==2.8.*' 'transformers<5'"
)


# --------------------------------------------------------------------------------------------------------- is it here
def _versions() -> tuple[str, str]:
    """Versions of IPEX and of torch; that of IPEX is "" if it is not there, "?" if it does not say."""
    loaded = sys.modules.get(MODULE)
    if loaded is not None:
        return str(getattr(loaded, "__version__", "?")), torch.__version__
    try:
        return importlib.metadata.version("intel_extension_for_pytorch"), torch.__version__
    except importlib.metadata.PackageNotFoundError:
        return "", torch.__version__


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def why_not() -> str | None:
    """Why IPEX cannot be used here, with both versions and what to do; None if it can. Imports nothing."""
    ours, theirs = _versions()
    if not ours:
        return f"intel_extension_for_pytorch is not installed ({_INSTALL})"
    if _release(ours) != _release(theirs):
        works = f"it works with torch {_release(ours)} only" if ours != "?" else "it does not tell its version"
        return f"intel_extension_for_pytorch {ours} was not made for torch {theirs}: {works} ({_INSTALL})"
    return None


def import_ipex() -> None:
    """LoweringError if IPEX cannot be imported."""
    ours, theirs = _versions()
    try:
        importlib.import_module(MODULE)
        fuses = hasattr(sys.modules[MODULE], "_C")
    except Exception as e:  # it raises whatever its parts raise
        text = f"intel_extension_for_pytorch {ours} cannot be imported beside torch {theirs}: {type(e).__name__}: {e}"
        raise LoweringError(text, hint=_INSTALL) from e
    if not fuses:
        raise LoweringError(f"what is imported as {MODULE} is not IPEX", hint=_INSTALL)


# ---------------------------------------------------------------------------------------------------------- functions
class Scripted:
    """A TorchScript function that IPEX has compiled. Immutable; takes tensors and sizes, gives a list of tensors.

    Attributes:
        groups: Number of fusion groups with int8 operators.
        operators: Names of the graph's nodes that compute there on quantized values.
        inside: Names of all nodes there.
    """

    def __init__(self, written: Written, examples: list[Any]) -> None:
        self._function, self._nbytes = written.function, written.nbytes
        with warnings.catch_warnings():  # IPEX says that torch.compile is to come in the place of this
            warnings.filterwarnings("ignore", message="JIT pass will be deprecated")
            for _ in range(torch._C._jit_get_num_profiled_runs() + 2):  # it profiles, then it fuses
                self.run(examples)
        self.groups, self.operators, self.inside = _groups(torch.jit.last_executed_optimized_graph())

    def run(self, inputs: list[Any]) -> list[Tensor]:
        """The function's values. Casts are written in the graph: an autocast region around a call changes nothing."""
        with torch.no_grad():
            if not torch.is_autocast_enabled("cpu"):
                return list(self._function(*inputs))
            with torch.autocast("cpu", enabled=False):
                return list(self._function(*inputs))

    def nbytes(self) -> int:
        """Bytes of the constants. What IPEX packs of them it keeps to itself."""
        return self._nbytes

    def __copy__(self) -> Scripted:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        hint = "inc_graph.quantization.save(q_model, folder) saves what it was made of"
        raise NotPickled("a function that IPEX has compiled for this machine cannot be pickled", hint=hint)

    def __repr__(self) -> str:
        return f"Scripted({len(self.operators)} operators in {self.groups} int8 groups)"


def run_scripted(inputs: list[Any], script: Scripted) -> list[Tensor]:
    """Call target of the lowered graph."""
    return script.run(inputs)


def _groups(graph: Any) -> tuple[int, frozenset[str], frozenset[str]]:
    """Of the fusion groups with int8 operators in an executed graph: their number, the names of those operators, the
    names of all operators in them."""
    count, operators, everything = 0, set(), set()
    todo = [graph]
    while todo:
        for node in todo.pop().nodes():
            todo += node.blocks()
            if node.kind() != GROUP:
                continue
            inside = list(node.g("Subgraph").nodes())
            int8 = [n for n in inside if any(i.node().kind() == "aten::dequantize" for i in n.inputs())]
            if int8:
                count += 1
                operators |= _names(int8)
                everything |= _names(inside)
    return count, frozenset(operators), frozenset(everything)


def _names(nodes: list[Any]) -> set[str]:
    """Names that the values of TorchScript nodes were given; passes number their copies."""
    return {re.sub(r"\.\d+$", "", v.debugName()) for n in nodes for v in n.outputs()}


def example(value: Any) -> Any:
    """Something of the shape and dtype of a fake value."""
    if isinstance(value, Tensor):
        shape = [_number(d) for d in value.shape]
        return torch.zeros(shape, dtype=value.dtype)  # also of indices a legal value; nothing random is drawn
    return [example(v) for v in value] if isinstance(value, list | tuple) else _number(value)


def _number(size: Any) -> int:
    """A size as in the example that was captured; where there was none, every symbol stands for 8."""
    if isinstance(size, int):
        return size
    if getattr(size.node, "hint", None) is not None:
        return size_hint(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 8)))
