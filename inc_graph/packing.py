"""Sub-byte storage: codes to dense bytes and back, in plain torch.

Element ``i`` of a row (the last dimension) occupies the bits ``[i * bits, (i + 1) * bits)`` of the row's byte stream,
low bits first; signed codes as two's complement. So two 4-bit codes share a byte, the first in the low nibble, and
eight 3-bit codes take three bytes. Rows start on a byte; the last byte of a row is filled with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from inc_graph.errors import SpecError
from inc_graph.qtypes import QType, get_qtype

__all__ = ["check_packed", "pack", "unpack"]

Tensor = torch.Tensor


def pack(q: Tensor, qtype: str | QType) -> Tensor:
    """Codes to bytes: each row becomes a stream of ``storage_bits`` per element.

    Args:
        q: Tensor ``[..., n]`` of the carrier dtype (0-d counts as ``[1]``).
        qtype: Name of the number format.

    Returns:
        uint8 tensor ``[..., qtype.packed_size(n)]``.

    Raises:
        SpecError: if ``q`` is not of the carrier dtype.
    """
    qt = get_qtype(qtype)
    if q.dtype != qt.carrier:
        raise SpecError(f"{qt.name} values are held in {qt.carrier}, not {q.dtype}")
    q = q.reshape(1) if q.dim() == 0 else q
    bits = qt.storage_bits
    if bits >= 8:
        return q.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    word, group, size = _word(bits)
    rows = _groups(q.view(torch.uint8) & (2**bits - 1), group)
    packed = rows[..., 0].to(word)
    for i in range(1, group):
        packed = packed | (rows[..., i].to(word) << (bits * i))
    if size == 1:
        return packed.contiguous()
    stream = torch.stack([(packed >> (8 * i)) & 255 for i in range(size)], -1).to(torch.uint8).flatten(-2)
    return stream[..., : qt.packed_size(q.shape[-1])].contiguous()


def unpack(packed: Tensor, qtype: str | QType, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: uint8 tensor ``[..., qtype.packed_size(n)]``.
        qtype: Name of the number format.
        shape: Shape ``[..., n]`` of the codes.

    Returns:
        Contiguous tensor of the carrier dtype and the given shape.

    Raises:
        SpecError: if ``packed`` is not uint8 or has not the shape that ``shape`` packs to.
    """
    qt = get_qtype(qtype)
    check_packed(packed, qt, shape)
    n, bits = (shape[-1] if len(shape) else 1), qt.storage_bits
    if bits >= 8:
        elements = packed.unflatten(-1, (n, bits // 8)).clone(memory_format=torch.contiguous_format)
        return elements.view(qt.carrier).reshape(tuple(shape))
    word, group, size = _word(bits)
    rows = _groups(packed, size).to(word)
    stream = rows[..., 0]
    for i in range(1, size):
        stream = stream | (rows[..., i] << (8 * i))
    parts = [((stream >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(group)]
    codes = torch.stack(parts, -1).flatten(-2)[..., :n]
    if qt.carrier == torch.int8:  # move the sign to the top, and let the arithmetic shift copy it down
        codes = (codes << (8 - bits)).view(torch.int8) >> (8 - bits)
    return codes.reshape(tuple(shape)).contiguous()


def check_packed(packed: Tensor, qt: QType, shape: Sequence[int]) -> None:
    """Raise :class:`SpecError` unless ``packed`` is what codes of ``shape`` pack to. Safe for symbolic shapes."""
    rows = tuple(shape) if len(shape) else (1,)
    want = (*rows[:-1], qt.packed_size(rows[-1]))
    if packed.dtype != torch.uint8:
        raise SpecError(f"packed values are held in torch.uint8, not {packed.dtype}")
    if packed.dim() != len(want) or any(a != b for a, b in zip(packed.shape, want, strict=True)):
        raise SpecError(f"{qt.name} codes {list(shape)} pack to {list(want)} bytes, not {list(packed.shape)}")


def _word(bits: int) -> tuple[torch.dtype, int, int]:
    """``(dtype, elements, bytes)`` of a word: the smallest whole number of bytes that holds whole codes."""
    size = math.lcm(bits, 8) // 8
    dtype = torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64
    return dtype, 8 * size // bits, size


def _groups(x: Tensor, size: int) -> Tensor:
    """``[..., n]`` to ``[..., ceil(n / size), size]``, filled up with zeros."""
    x = F.pad(x, (0, -x.shape[-1] % size))
    return x.unflatten(-1, (x.shape[-1] // size, size))
