"""Hypothesis strategies of tensors, blocks and number formats, and an independent way to spread scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from inc_graph.qtypes import QType, get_qtype

INTS = ["int8", "uint8", "int4", "uint4", "int3", "uint3", "int2", "uint2", "int7", "uint7", "int16", "mxint8"]
FLOATS = ["fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2"]
CODEBOOKS = ["nf4", "fp4", "fp4_bnb", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"]
ALL = INTS + FLOATS + CODEBOOKS
MX = [name for name in ALL if name.startswith("mx")]
SPECIAL = [0.0, -0.0, 1e-45, -1e-38, 1e38, -1e38]


@dataclass(frozen=True)
class Case:
    """One drawn problem."""

    x: torch.Tensor
    block: tuple[int, ...]
    qtype: QType
    method: str

    def __repr__(self) -> str:
        x = f"{self.x.dtype} {list(self.x.shape)} strides {list(self.x.stride())}"
        return f"Case({x}, block={self.block}, {self.qtype}, {self.method}, values={self.x.flatten()[:8].tolist()})"


def methods(qtype: QType) -> st.SearchStrategy[str]:
    affine = qtype.is_int and qtype.scale_format == "float32"
    return st.sampled_from(["symmetric", "asymmetric"] if affine else ["symmetric"])


@st.composite
def shapes(draw: st.DrawFn, min_dims: int = 0, max_dims: int = 4, min_side: int = 1) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(min_side, 7), min_size=min_dims, max_size=max_dims)))


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> torch.Tensor:
    """Normal values of a drawn magnitude and offset, constants, ties or special values, in several memory layouts."""
    dtype = draw(st.sampled_from(list(dtypes)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kind = draw(st.sampled_from(["normal", "normal", "shifted", "constant", "ties", "special"]))
    layout = draw(st.sampled_from(["contiguous", "contiguous", "transposed", "sliced", "expanded"]))
    x = torch.randn(tuple(shape), generator=generator)
    if kind in ("normal", "shifted"):
        x = (x + (3.0 if kind == "shifted" else 0.0)) * 2.0 ** draw(st.integers(-12, 12))
    elif kind == "constant":
        x = torch.full_like(x, draw(st.sampled_from([0.0, 1.0, -2.5, 1e-30])))
    elif kind == "ties":
        x = torch.randint(-20, 20, tuple(shape), generator=generator) / 2
    else:
        pick = torch.randint(len(SPECIAL), tuple(shape), generator=generator)
        x = torch.tensor(SPECIAL)[pick]
    x = x.to(dtype).nan_to_num()  # finite: what a half overflows to has tests of its own
    if layout == "transposed" and x.dim() >= 2:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced" and x.dim() >= 1:
        x = torch.stack([x, x], -1)[..., 0]
    elif layout == "expanded" and x.dim() >= 1 and x.numel():
        x = x[:1].expand(tuple(shape))
    return x


def blocks(shape: Sequence[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(st.sampled_from([-1, 1, 2, 3, 5, 9]) for _ in shape))


@st.composite
def cases(
    draw: st.DrawFn,
    qtypes: Sequence[str] = ALL,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    min_dims: int = 0,
    max_dims: int = 4,
    min_side: int = 1,
) -> Case:
    qtype = get_qtype(draw(st.sampled_from(list(qtypes))))
    shape = draw(shapes(min_dims, max_dims, min_side))
    return Case(draw(tensors(shape, dtypes)), draw(blocks(shape)), qtype, draw(methods(qtype)))


def spread(param: torch.Tensor, shape: Sequence[int], block: Sequence[int]) -> torch.Tensor:
    """``param`` of one entry per block as one entry per element, by indexing: shares no code with the library."""
    indices = [np.arange(n) // (max(n, 1) if g == -1 else g) for n, g in zip(shape, block, strict=True)]
    return torch.from_numpy(np.asarray(param.numpy()[np.ix_(*indices)]).reshape(tuple(shape)))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of ``x`` in logical order, so that NaN and the sign of zero compare too."""
    return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
