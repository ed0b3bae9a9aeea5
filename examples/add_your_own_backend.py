"""A backend of your own: which operators it has kernels for, and how it takes one.

`python -m examples.add_your_own_backend`

This one computes linear layers in exact integer arithmetic with plain torch, as a small device without floating point
matrix units would. What it does not take stays Q-DQ and runs on the reference: always right, and reported.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.graph import insert_call, replace_uses
from inc_graph.lowering.base import Backend, Claim, Context
from inc_graph.ops import DEQUANTIZE
from inc_graph.pattern import Any, Match, P
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.registry import BACKENDS

aten = torch.ops.aten


@torch.library.custom_op("plain_integers::linear", mutates_args=())  # known to torch.compile and to verify()
def integer_linear(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """x uint8 [*, in], w int8 [out, in], w_scale [out, 1] -> float32 [*, out].

    sum_k s_x (x_k - z_x) s_w w_k = s_x s_w (sum_k x_k w_k - z_x sum_k w_k)
    """
    products = x.int() @ w.int().T - x_zero.reshape(()) * w.int().sum(1)
    out = products * (x_scale.reshape(()) * w_scale.reshape(-1))
    return out if bias is None else out + bias


@integer_linear.register_fake
def _(x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x_scale.new_empty((*x.shape[:-1], w.shape[0]))


# What to look for: asymmetric uint8 activations by symmetric int8 weights with one scale an output channel.
# A node that does not fit stays on the reference, and the report says what did not fit.
LINEAR = P(
    aten.linear.default,
    P(DEQUANTIZE, Any("x"), Any("x_scale"), Any("x_zero"), Any("x_block"), "uint8"),
    P(DEQUANTIZE, Any("w"), Any("w_scale"), None, [1, -1], "int8"),
    Any("bias"),
)


def check(context: Context, found: Match) -> str | None:
    """What a pattern cannot say: None to go ahead, or the reason not to."""
    if found["x_zero"] is None or any(b != -1 for b in found["x_block"]):
        return "its input is not asymmetric, with one scale for the whole tensor"
    return None


def rewrite(context: Context, found: Match) -> None:
    args = tuple(found[name] for name in ("x", "x_scale", "x_zero", "w", "w_scale", "bias"))
    call = torch.ops.plain_integers.linear.default
    replace_uses(found.root, insert_call(context.gm, call, args, before=found.root, like=found.root))


class PlainIntegers(Backend):
    name = "plain_integers"
    capabilities: ClassVar = {"linear": (("uint8", "int8"),)}  # the rest stays float, unless set_local asks for it

    def available(self) -> str | None:
        return None  # a reason, if it could not run here

    def claims(self) -> tuple[Claim, ...]:
        return (Claim("integer linear", LINEAR, rewrite, check),)


BACKENDS.add("plain_integers", PlainIntegers())


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)).eval()
    x = torch.randn(16, 4, 16)
    prepared = prepare(export(model, (x,)), StaticQuantConfig(), backend="plain_integers")
    prepared(x)
    quantized = convert(prepared)
    print(quantized.report)
    error = (quantized(x) - quantized.graph(x)).abs().max()
    print(f"differs from the reference by {error:.1e}")


if __name__ == "__main__":
    main()
