"""Attention in float32 as one compiled pass: `_attention.c`, called with the addresses of tensors.

    softmax(scale q k^T + mask) v

torch's own kernel for the CPU spends more time on the scores between its two small products than on these. What the
compiled one does not take (other dtypes, gradients, a processor without AVX-512, a few queries) torch computes, so that
the call means the same everywhere. `taken` counts what ran: "native" and "torch".
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inc_graph.graph import insert_call, replace_uses, val
from inc_graph.lowering._context import OneDnnContext
from inc_graph.lowering._direct import is_transformed, is_watched
from inc_graph.lowering._onednn import define
from inc_graph.lowering.base import Claim
from inc_graph.native import load, memory, runner
from inc_graph.oppattern import argument
from inc_graph.pattern import Match, P

__all__ = ["ATTENTION", "attention", "taken"]

aten = torch.ops.aten

_SOURCE = Path(__file__).with_name("_attention.c")
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_STEPS = _LONG * 3
_VECTOR = 16  # floats; the size of a head is a multiple
_FEW = 8  # queries for which bringing the keys into order takes longer than it saves
_PIECES = 4  # of work for each thread

taken: Counter[str] = Counter()


class _Job(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("q", "k", "v", "mask", "out")),
        *((n, _LONG) for n in ("batch", "heads", "queries", "keys", "size")),
        *((n, _STEPS) for n in ("q_step", "k_step", "v_step", "mask_step")),
        *((n, _LONG) for n in ("each", "next", "failed")),
        ("scale", ctypes.c_float),
        *((n, _INT) for n in ("mask_type", "causal", "unused")),
    )


class _Kernel:
    """The library, loaded; `fast` where its vectors are the processor's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.fast, self._run = bool(library.vectors()), runner(library, _Job)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        """See `_takes`; nothing is checked."""
        batch, heads, queries, size = q.shape
        keys, threads = k.shape[2], torch.get_num_threads()
        out = memory(batch, queries, heads, size)
        pieces = -(-_PIECES * threads // (batch * heads))  # of a head
        each = max(48, -(-queries // pieces))
        job = _Job(
            q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), batch=batch, heads=heads,
            queries=queries, keys=keys, size=size, q_step=q.stride()[:3], k_step=k.stride()[:3], v_step=v.stride()[:3],
            each=each, scale=scale, causal=causal,
        )  # fmt: skip
        if mask is not None:
            mask = mask.expand(batch, heads, queries, keys)
            mask = mask if mask.stride(3) == 1 or keys == 1 else mask.contiguous()
            job.mask, job.mask_step = mask.data_ptr(), mask.stride()[:3]
            job.mask_type = 1 if mask.dtype == torch.float32 else 2
        if self._run(job):
            raise MemoryError("no memory for the keys of a head")
        return out.transpose(1, 2)


@functools.cache
def _wrapped(library: ctypes.CDLL) -> _Kernel:
    return _Kernel(library)


def _kernel() -> _Kernel | None:
    library = load(_SOURCE)
    kernel = None if library is None else _wrapped(library)
    return kernel if kernel is not None and kernel.fast else None


def _takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel does; else torch is asked, which refuses what is wrong."""
    for x in (q, k, v):
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu" or x.stride(3) != 1 or not x.numel():
            return False
    if (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]) or k.shape != v.shape:
        return False
    if q.shape[3] % _VECTOR or q.shape[2] < _FEW:
        return False
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    if mask is not None:
        full = (*q.shape[:3], k.shape[2])
        fits = mask.dim() <= 4 and all(
            a in (1, b) for a, b in zip(reversed(mask.shape), reversed(full), strict=False)
        )  # fmt: skip
        if not fits or mask.dtype not in (torch.bool, torch.float32) or mask.device.type != "cpu":
            return False
    return not _wants_gradient(*tensors)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    plain = all(type(x) is Tensor for x in (q, k, v)) and not (causal and mask is not None)
    kernel = _kernel() if plain and _takes(q, k, v, mask) else None
    if kernel is None:
        taken["torch"] += 1
        return _by_torch(q, k, v, mask, scale, causal)
    taken["native"] += 1
    return kernel(q, k, v, mask, q.shape[3] ** -0.5 if scale is None else scale, causal)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return y.transpose(-3, -2).contiguous().transpose(-3, -2)  # the layout that is promised, which it has mostly


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, bool causal) -> Tensor", _attention, _fake)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """`scaled_dot_product_attention` without dropout. Call target of the lowered graph.

    Args:
        q: [batch, heads, queries, size].
        k, v: [batch, heads, keys, size].
        mask: bool (what is seen) or of q's dtype (what is added); broadcast to [batch, heads, queries, keys].
        scale: Of the scores; None: 1 / sqrt(size).
        causal: Whether query i sees keys 0 to i.

    Returns:
        [batch, heads, queries, size], heads beside each other in memory. Zeros for a query that sees nothing.
    """
    if is_transformed():
        return _by_torch(q, k, v, mask, scale, causal)
    if is_watched() and (torch.compiler.is_compiling() or not _wants_gradient(q, k, v)):
        found: Tensor = torch.ops.inc_onednn.attention(q, k, v, mask, scale, causal)
        return found
    return _attention(q, k, v, mask, scale, causal)


# --------------------------------------------------------------------------------------------------------------- claim
def _check(c: OneDnnContext, found: Match) -> str | None:
    """ "" unless it is attention in float32 whose result has the layout of the kernel's."""
    node = found.root
    q, k, v, mask, dropout, causal, _, gqa = (argument(node, i) for i in range(8))
    values = [val(x) for x in (q, k, v)]  # type: ignore[arg-type]
    if dropout or gqa or (causal and mask is not None):
        return ""
    for x in values:
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            return ""
    sizes = [[str(d) for d in x.shape] for x in values]  # text: no guards
    (qs, ks, vs), size = sizes, values[0].shape[3]
    if qs[:2] != ks[:2] or qs[3] != ks[3] or ks != vs or not isinstance(size, int) or size % _VECTOR:
        return ""
    return None if _sides(val(node)) == _sides(_fake(*values, None, None, False)) else ""


def _sides(x: Any) -> list[str]:
    return [str(s) for s in (*x.shape, *x.stride())]


def _rewrite(c: OneDnnContext, found: Match) -> None:
    node = found.root
    q, k, v, mask, _, causal, scale, _ = (argument(node, i) for i in range(8))
    args = (q, k, v, mask, scale, bool(causal))
    replace_uses(node, insert_call(c.gm, attention, args, before=node, like=node))
    c.gm.graph.erase_node(node)  # it may draw random numbers, so that no elimination of dead code takes it


ATTENTION = Claim("attention", P(aten.scaled_dot_product_attention.default), _rewrite, _check, kernel=False)
