"""What is saved and loaded, and how the two are compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from inc_graph.quantization import StaticQuantConfig, quantize
from tests.saving.models import cases

CASES = cases()


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def equal(a: Any, b: Any) -> None:
    (left, tree_a), (right, tree_b) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert str(tree_a).split("(")[0] == str(tree_b).split("(")[0] and len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.stride() == y.stride()
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y and type(x) is type(y)


def converted(name: str, config: Any = None, exported: bool = True) -> tuple[nn.Module, list[Any], nn.Module]:
    """(quantized model, inputs, an untouched float model of the same form)."""
    model, example, shapes, more = CASES[name]
    model = copy.deepcopy(model).eval()
    other = copy.deepcopy(model)
    given = {"example_inputs": example, "dynamic_shapes": shapes} if exported else {}
    q = quantize(model, config or StaticQuantConfig(), lambda p: call(p, example), **given)
    return q, [example, *more], other


def folder_of(path: Path) -> list[str]:
    return sorted(f.name for f in path.iterdir())


def exported(model: nn.Module, *x: Any) -> nn.Module:
    return quantize(model.eval(), StaticQuantConfig(), lambda p: p(*x), example_inputs=x)
