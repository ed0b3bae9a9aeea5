"""What the claims of the inductor backend read from a Q-DQ graph: scales as numbers, weights and biases as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from inc_graph.graph import get_tensor, val
from inc_graph.lowering._packed import PackedWeight
from inc_graph.lowering.base import Context
from inc_graph.oppattern import argument
from inc_graph.ops import is_dequantize

__all__ = ["CODES", "FULL", "WEIGHTS", "OneDnnContext", "QParams", "Weight", "bias_of", "only_user", "size_hint",
           "typical_shape", "weight_of"]  # fmt: skip

CODES = {"uint8": torch.uint8, "int8": torch.int8, "uint7": torch.uint8, "int7": torch.int8}
"""8-bit activation formats and the dtype that holds their codes."""
FULL = ("uint8", "int8")
"""Formats that a kernel can write: it saturates at the ends of the dtype, which are not those of the 7-bit formats."""
WEIGHTS = ("int8", "int7")


@dataclass(frozen=True)
class QParams:
    """Per-tensor quantization as numbers."""

    scale: float
    zero_point: int
    qtype: str

    @property
    def dtype(self) -> torch.dtype:
        return CODES[self.qtype]

    @property
    def full(self) -> bool:
        return self.qtype in FULL

    def code(self, value: float) -> float:
        """The code of a real value, not yet saturated."""
        return value / self.scale + self.zero_point


@dataclass
class OneDnnContext(Context):
    """The graph being lowered, and the numbers behind its quantize and dequantize nodes.

    `compute_dtype`: what the backend's user wants weight-only layers to be computed in.
    """

    compute_dtype: torch.dtype | None = None
    numbers: dict[fx.Node, QParams | None] = field(default_factory=dict)
    promised: dict[fx.Node, torch.Tensor] = field(default_factory=dict)  # layer call -> value it took the place of
    weights: dict[Any, PackedWeight] = field(default_factory=dict)  # packed by now: what tells them apart -> weight
    counted: set[Any] = field(default_factory=set)  # those of them that a layer counts the bytes of
    dynamic: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)  # quantize -> lowered codes, params
    sources: dict[str, str] = field(default_factory=dict)  # attribute of a dynamic layer -> that of its weight
    offset: dict[fx.Node, bool] = field(default_factory=dict)  # codes -> what `asymmetric` found before any was lowered

    def qparams(self, node: fx.Node) -> QParams | None:
        """Of a quantize or dequantize node, if it is static and per tensor in an 8-bit integer format."""
        if node not in self.numbers:
            self.numbers[node] = self._read(node)
        return self.numbers[node]

    def asymmetric(self, codes: fx.Node) -> bool:
        """Whether some layer that reads these codes has an input with another zero point than 0.

        Asked once for all of them: the layers that are lowered read the codes no more.
        """
        if codes not in self.offset:
            inputs = [argument(user, 0) for read in codes.users for user in read.users]
            found = [self.qparams(x) for x in inputs if isinstance(x, fx.Node) and is_dequantize(x)]
            self.offset[codes] = any(p is not None and (p.zero_point != 0 or p.dtype != torch.uint8) for p in found)
        return self.offset[codes]

    def _read(self, node: fx.Node) -> QParams | None:
        scale, zero, block, qtype = (argument(node, i) for i in range(1, 5))
        if qtype not in CODES or any(b != -1 for b in block):
            return None
        numbers: list[float] = []
        for n in (scale, zero):
            if n is None:
                numbers.append(0)
            elif n.op != "get_attr" or (tensor := get_tensor(self.gm, n)).numel() != 1:
                return None
            else:
                numbers.append(tensor.item())
        return QParams(float(numbers[0]), int(numbers[1]), qtype)


@dataclass(frozen=True)
class Weight:
    """A quantized constant: codes int8, one float32 scale per output channel, and the attributes that held the two.

    `asymmetric`: whether some layer that reads it has an input with another zero point than 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    attr: str
    scale_attr: str
    asymmetric: bool = True


def weight_of(c: OneDnnContext, layer: fx.Node, axis: int) -> Weight | str:
    """The weight of a layer whose output channels lie on `axis`, or the reason why no kernel takes it."""
    w: Any = argument(layer, 1)
    if not is_dequantize(w):
        return "its weight is not quantized"
    codes, scale, zero, block, qtype = (argument(w, i) for i in range(5))
    if qtype not in WEIGHTS:
        return f"weights of type {qtype}; the kernel takes int8"
    if codes.op != "get_attr" or scale.op != "get_attr":
        return "its weight is not a constant"
    if zero is not None and (zero.op != "get_attr" or bool(get_tensor(c.gm, zero).any())):
        return "asymmetric weights; the kernel takes none with a zero point"
    if any(b not in ((1, -1) if d == axis else (-1,)) for d, b in enumerate(block)):
        return f"weight block {list(block)}; the kernel takes one scale per output channel or per tensor"
    q, s = get_tensor(c.gm, codes), get_tensor(c.gm, scale).reshape(-1)
    if q.device.type != "cpu":
        return f"its weight is on {q.device}; the kernel runs on the CPU"
    scales = s.float().expand(q.shape[axis]).contiguous()
    return Weight(q, scales, str(codes.target), str(scale.target), c.asymmetric(codes))


def bias_of(c: OneDnnContext, layer: fx.Node) -> torch.Tensor | str | None:
    """The bias of a layer in float32, None if it has none, or the reason why no kernel takes it."""
    bias: Any = argument(layer, 2)
    if bias is None:
        return None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return "its bias is computed at run time"
    return get_tensor(c.gm, bias).detach().float().contiguous()


def only_user(node: fx.Node) -> fx.Node | None:
    """The one user of a node, None if there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def typical_shape(node: fx.Node) -> list[int]:
    """The shape of a node's value, symbolic sizes as in the example that was captured."""
    return [size_hint(d) for d in val(node).shape]


def size_hint(size: Any) -> int:
    """A size or stride as a number: a symbolic one as in the example that was captured, 8 if that had none."""
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint) if hint is not None else 8
