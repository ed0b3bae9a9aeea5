"""Q-DQ graphs made by hand, and how close a lowered graph comes to the reference.

`Builder` writes a graph without exporting anything, so that a property test can afford hundreds of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inc_graph.graph import insert_call, insert_get_attr, set_level, set_tensor
from inc_graph.lowering._onednn import Int8Layer
from inc_graph.numerics import affine_qparams, choose_qparams, quantize
from inc_graph.ops import DEQUANTIZE, QUANTIZE, UNPACK
from inc_graph.packing import pack
from inc_graph.qtypes import get_qtype
from inc_graph.registry import BACKENDS
from inc_graph.text import to_text
from inc_graph.verify import verify

aten = torch.ops.aten


@dataclass(frozen=True)
class Params:
    """Per-tensor quantization of an activation."""

    scale: float
    zero_point: int
    qtype: str = "uint8"

    @staticmethod
    def of(x: Tensor, qtype: str = "uint8") -> Params:
        """What min-max calibration on `x` gives."""
        scale, zero = affine_qparams(x.min(), x.max(), qtype, "asymmetric")
        return Params(scale.item(), int(zero), qtype)

    def values(self, *shape: int, seed: int = 0) -> Tensor:
        """Random values over the whole range and a little beyond, none of them half-way between two codes."""
        qt = get_qtype(self.qtype)
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(int(qt.qmin) - 9, int(qt.qmax) + 10, shape, generator=generator)
        return (codes - self.zero_point + 0.8 * torch.rand(shape, generator=generator) - 0.4) * self.scale


class Builder:
    """A Q-DQ graph, node by node."""

    def __init__(self) -> None:
        self.gm = fx.GraphModule(nn.Module(), fx.Graph())
        self.mode = FakeTensorMode()
        self.end = self.gm.graph.output(())
        self.end.meta["val"] = self.mode.from_tensor(torch.empty(()))  # constants are read in this mode

    def input(self, x: Tensor) -> fx.Node:
        with self.gm.graph.inserting_before(next(iter(self.gm.graph.nodes))):
            node = self.gm.graph.placeholder(f"x{len(self.gm.graph.find_nodes(op='placeholder'))}")
        node.meta["val"] = self.mode.from_tensor(x, static_shapes=True)
        return node

    def const(self, tensor: Tensor, name: str = "c") -> fx.Node:
        return insert_get_attr(self.gm, self.end, set_tensor(self.gm, name, tensor))

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(self.gm, op, args, kwargs, before=self.end)

    def quantize(self, x: fx.Node, p: Params) -> fx.Node:
        return self.call(QUANTIZE, x, *self._args(x, p))

    def act(self, x: fx.Node, p: Params) -> fx.Node:
        """quantize and dequantize."""
        args = self._args(x, p)
        return self.call(DEQUANTIZE, self.call(QUANTIZE, x, *args), *args, x.meta["val"].dtype)

    def _args(self, x: fx.Node, p: Params) -> tuple[Any, ...]:
        ndim = x.meta["val"].ndim
        scale = self.const(torch.full([1] * ndim, p.scale), "scale")
        zero = self.const(torch.full([1] * ndim, p.zero_point, dtype=torch.int32), "zero_point")
        return scale, zero, [-1] * ndim, p.qtype

    def weight(
        self, w: Tensor, qtype: str = "int8", block: list[int] | None = None, scheme: str = "symmetric"
    ) -> fx.Node:
        """A quantized weight as convert-qdq writes it; `block` defaults to one scale per entry of dimension 0."""
        block = block or [1] + [-1] * (w.ndim - 1)
        scale, zero = choose_qparams(w.float(), block, qtype, scheme)
        codes = quantize(w.float(), scale, zero, block, qtype)
        if get_qtype(qtype).storage_bits < 8:
            q = self.call(UNPACK, self.const(pack(codes, qtype), "weight_q"), qtype, list(w.shape))
        else:
            q = self.const(codes, "weight_q")
        z = None if scheme == "symmetric" else self.const(zero, "weight_zero")
        return self.call(DEQUANTIZE, q, self.const(scale, "weight_scale"), z, block, qtype, w.dtype)

    def done(self, *outputs: fx.Node) -> fx.GraphModule:
        self.end.args = (outputs,)
        return as_qdq(self.gm)


def as_qdq(gm: fx.GraphModule) -> fx.GraphModule:
    """Stamp a graph that is Q-DQ already, and verify it."""
    gm.graph.eliminate_dead_code()
    gm.recompile()
    set_level(gm, "qdq")
    verify(gm)
    return gm


def lower(gm: fx.GraphModule, backend: str = "inductor") -> Any:
    """Lower, and see that the Q-DQ graph was left as it was and that the result is well formed."""
    before = to_text(gm, tensors=True)
    lowered = BACKENDS.get(backend).lower(gm)
    assert to_text(gm, tensors=True) == before
    verify(lowered.graph)
    return lowered


def calls(lowered: Any) -> list[str]:
    """Names of what the lowered graph calls, in order, but for the one that restores the layout of an output."""
    targets = [n.target for n in lowered.graph.graph.nodes if n.op == "call_function"]
    names = [str(t) if isinstance(t, torch._ops.OpOverload) else t.__name__ for t in targets]
    return [name for name in names if name != "aten.contiguous.default"]


def layers(lowered: Any) -> list[Any]:
    """The int8 layers of the lowered graph, in order."""
    names = [n.target for n in lowered.graph.graph.find_nodes(op="get_attr") if "." not in n.target]
    return [v for v in (getattr(lowered.graph, n) for n in names) if isinstance(v, Int8Layer)]


def run_both(gm: fx.GraphModule, lowered: Any, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(reference, lowered) of each output. Inputs must come back untouched, and a second run must give the same."""
    given = [x.clone(memory_format=torch.preserve_format) for x in inputs]
    with torch.no_grad():
        expected = gm(*inputs)
        got = lowered.graph(*given)
        again = lowered.graph(*given)
    assert all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True)), "an input was written to"
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "the second run differs from the first"
    for e, g in zip(expected, got, strict=True):
        assert (e.shape, e.dtype) == (g.shape, g.dtype)
    return list(zip(expected, got, strict=True))


def assert_close(
    expected: Tensor, got: Tensor, scale: float | None = None, *, steps: int = 1, equal: float = 0.97
) -> None:
    """With a scale: at most `steps` quantization steps apart, and at least the fraction `equal` (but for two values)
    equal. Without one: equal up to 1e-4 of the largest value."""
    expected, got = expected.double(), got.double()
    if not expected.numel():
        return
    error = (expected - got).abs()
    if scale is None:
        assert error.max() <= 1e-4 * expected.abs().max() + 1e-6, f"off by {error.max():.3g}"
        return
    assert error.max() <= (steps + 0.01) * scale, f"{error.max() / scale:.2f} steps apart"
    different = len(expected[error > 0.01 * scale].unique())  # one value on a tie may fill whole regions
    assert different <= max(2, (1 - equal) * error.numel()), f"{different} of {error.numel()} values differ"
