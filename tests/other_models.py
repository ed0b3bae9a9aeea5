"""The bar for models that nobody tuned for."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from inc_graph.oppattern import pattern_of
from inc_graph.ops import is_inc
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.report import Report

LAYERS = (
    "linear",
    "embedding",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)


aten = torch.ops.aten


MOVES = (operator.getitem, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default)


def sqnr(want: Any, got: Any) -> float:
    """Signal to noise in dB over all float outputs together."""
    a, b = (
        [
            t.detach().double().flatten()
            for t in pytree.tree_leaves(v)
            if isinstance(t, Tensor) and t.is_floating_point()
        ]
        for v in (want, got)
    )
    x, y = torch.cat(a), torch.cat(b)
    return float("inf") if torch.equal(x, y) else float(10 * torch.log10((x**2).sum() / ((x - y) ** 2).sum()))


def kernels(report: Report) -> dict[str, int]:
    """Layers that run in int8 kernels, by type (sums that were fused into one are not counted)."""
    return {op: n for op, n in Counter(line.op for line in report.kernels).items() if op in LAYERS}


def floats(node: fx.Node) -> bool:
    """Whether a node holds float values that are not constants."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return node.op != "get_attr" and any(isinstance(v, Tensor) and v.is_floating_point() for v in values)


def nothing_hidden(q: Any) -> None:
    """Every operator that makes floats of floats is in the report, or only moves values, or follows one that is."""
    report = q.report
    named = {line.name for line in (*report.kernels, *report.reference, *report.floats)}
    assert all(line.detail for line in (*report.kernels, *report.reference, *report.floats))
    for node in q.graph.graph.nodes:
        if node.op != "call_function" or is_inc(node) or node.name in named or not floats(node):
            continue
        pattern = pattern_of(node)
        follows = node.target in MOVES or (pattern is not None and pattern.role in ("carrier", "activation"))
        assert follows or not any(map(floats, node.all_input_nodes)), node.format_node()


def check(
    model: nn.Module,
    make: Callable[[], tuple[Any, ...]],
    expect: dict[str, int],
    *,
    bound: float = 33,
    config: Any = None,
    dynamic_shapes: Any = None,
    kwargs: dict[str, Any] | None = None,
    exported: bool = True,
) -> Any:
    """Quantize on 4 batches of `make` and compare with the float model on them; `expect` counts int8 kernels by type.

    The batches compared are those calibrated on: the arithmetic is tested, not whether 4 batches cover a range.
    """
    model.eval()
    kwargs = kwargs or {}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    data = [make() for _ in range(4)]
    inputs = {"example_inputs": kwargs or data[0], "dynamic_shapes": dynamic_shapes} if exported else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none of these models is one to warn about
        warnings.filterwarnings("ignore", message=".*(quantize_per_tensor|nested tensors|batch_first|_flat_weights).*")
        prepared = prepare(model, config or StaticQuantConfig(), inplace=False, **inputs)
        with torch.no_grad():
            for x in data:
                prepared(*x, **kwargs)
            q = convert(prepared)
            want, got = [model(*x, **kwargs) for x in data], [q(*x, **kwargs) for x in data]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items()), "the user's model was changed"
    assert pytree.tree_structure(want) == pytree.tree_structure(got)
    for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    print(f"{type(model).__name__}: {sqnr(want, got):.1f} dB, {kernels(q.report)}")
    print(q.report)
    assert kernels(q.report) == expect
    assert sqnr(want, got) > bound
    if exported:
        nothing_hidden(q)
    return q


def rand(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape),)


def ids(n: int = 64, length: int = 10) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(n, (2, length)),)
