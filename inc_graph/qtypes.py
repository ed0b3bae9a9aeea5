"""WHAT number format: the table of quantized element types.

A :class:`QType` is plain data. Code that consumes one looks at its fields and never at its name, so a new format is one
``register(QType(...))`` anywhere. Three kinds cover everything:

* ``int``: integers in ``[qmin, qmax]`` held in an integer carrier;
* ``float``: a float8 dtype that torch itself can cast to (``element_dtype``);
* ``codebook``: up to 256 real values; the carrier holds the index (for small floats the index is the bit pattern).

The MX formats (OCP Microscaling Formats v1.0) are one of these element kinds with power-of-two scales
(``scale_format="e8m0"``) and a default block of 32. ``nf4`` is the 4-bit NormalFloat of Dettmers et al., 2023 (QLoRA).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from inc_graph.errors import SpecError
from inc_graph.registry import QTYPES

__all__ = ["QType", "get_qtype", "register"]

_KINDS = ("int", "float", "codebook")
_SCALE_FORMATS = ("float32", "e8m0")


@dataclass(frozen=True)
class QType:
    """One quantized element type.

    Attributes:
        name: Name used in specs, graphs and files.
        kind: ``"int"``, ``"float"`` or ``"codebook"``.
        bits: Information bits per element.
        carrier: Dtype of a tensor that holds one element per entry (unpacked).
        qmin: Smallest representable value before scaling (an integer for ``int``, else a real value).
        qmax: Largest representable value before scaling.
        codebook: For ``codebook``: the value of every index, else None.
        element_dtype: For ``float``: the torch dtype that rounds to this format, else None.
        scale_format: ``"float32"``, or ``"e8m0"`` where scales are powers of two. Scale tensors are float32 either way.
        block: Block size that the format prescribes along the last dimension, or None.

    Raises:
        SpecError: if the fields contradict each other.
    """

    name: str
    kind: str
    bits: int
    carrier: torch.dtype
    qmin: float
    qmax: float
    codebook: tuple[float, ...] | None = None
    element_dtype: torch.dtype | None = None
    scale_format: str = "float32"
    block: int | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise SpecError(f"qtype {self.name!r}: {what}")

        need(isinstance(self.name, str) and bool(self.name), "needs a name")
        need(self.kind in _KINDS, f"kind must be one of {', '.join(_KINDS)}, not {self.kind!r}")
        need(isinstance(self.carrier, torch.dtype), f"carrier must be a torch.dtype, not {self.carrier!r}")
        width = 8 * self.carrier.itemsize
        need(1 <= self.bits <= width, f"bits must be between 1 and the carrier's {width}, not {self.bits}")
        need(self.qmin < self.qmax, f"qmin {self.qmin} must be below qmax {self.qmax}")
        need(self.qmin <= 0 <= self.qmax, f"the range [{self.qmin}, {self.qmax}] must contain zero")
        need(self.scale_format in _SCALE_FORMATS, f"scale_format must be one of {', '.join(_SCALE_FORMATS)}")
        need(self.block is None or self.block >= 1, f"block must be positive, not {self.block}")
        need((self.kind == "codebook") == (self.codebook is not None), "a codebook goes with kind 'codebook' only")
        need((self.kind == "float") == (self.element_dtype is not None), "an element_dtype goes with kind 'float' only")
        if self.kind == "int":
            need(not self.carrier.is_floating_point, f"carrier {self.carrier} cannot hold integers")
            span = int(self.qmax) - int(self.qmin)
            need(span < 2**self.bits, f"{self.bits} bits cannot hold [{self.qmin}, {self.qmax}]")
            info = torch.iinfo(self.carrier)
            need(info.min <= self.qmin and self.qmax <= info.max, f"{self.carrier} cannot hold the range")
        if self.codebook is not None:
            need(self.carrier == torch.uint8, "a codebook's carrier is torch.uint8")
            need(1 < len(self.codebook) <= 2**self.bits, f"{len(self.codebook)} codes do not fit {self.bits} bits")
            need(0.0 in self.codebook, "the codebook must hold zero")
            ends = (min(self.codebook), max(self.codebook))
            need(ends == (self.qmin, self.qmax), f"qmin/qmax must be the codebook's ends {ends}")
        if self.element_dtype is not None:
            need(self.carrier == self.element_dtype, "carrier and element_dtype must agree")

    @property
    def is_int(self) -> bool:
        """True for integer formats."""
        return self.kind == "int"

    @property
    def signed(self) -> bool:
        """True if negative values are representable."""
        return self.qmin < 0

    @property
    def storage_bits(self) -> int:
        """Bits one element takes when packed: ``bits`` for 1 to 6, else the whole carrier."""
        return self.bits if self.bits <= 6 else 8 * self.carrier.itemsize

    @property
    def packed_per_byte(self) -> int:
        """Elements in one packed byte; 0 where elements straddle bytes (3 and 6 bits) or are wider than one."""
        return 0 if 8 % self.storage_bits else 8 // self.storage_bits

    def packed_size(self, count: int) -> int:
        """Bytes that ``count`` elements (one row) take when packed. Safe for symbolic sizes."""
        return (count * self.storage_bits + 7) // 8

    def __str__(self) -> str:
        return self.name


def register(qtype: QType, *aliases: str) -> QType:
    """Enter a format into the table under its name and ``aliases``; returns it.

    Raises:
        IncError: if a name is taken by a different format.
    """
    owner = str(sys._getframe(1).f_globals.get("__name__", "?"))
    for name in (qtype.name, *aliases):
        QTYPES.add(name, qtype, owner=owner)
    return qtype


def get_qtype(qtype: str | QType) -> QType:
    """Look a format up by name or alias; a :class:`QType` is returned as it is.

    Raises:
        UnknownNameError: if no format has that name.
    """
    return qtype if isinstance(qtype, QType) else QTYPES.get(qtype)


def _minifloat(exponent: int, mantissa: int) -> tuple[float, ...]:
    """Values by bit pattern of a float with IEEE bias and subnormals but neither infinity nor NaN."""
    bias = 2 ** (exponent - 1) - 1
    positive = []
    for code in range(2 ** (exponent + mantissa)):
        e, m = code >> mantissa, code & (2**mantissa - 1)
        fraction = m / 2**mantissa
        positive.append((1 + fraction) * 2.0 ** (e - bias) if e else fraction * 2.0 ** (1 - bias))
    return (*positive, *(-v for v in positive))


def _codebook(name: str, bits: int, values: tuple[float, ...]) -> QType:
    return QType(name, "codebook", bits, torch.uint8, min(values), max(values), codebook=values)


def _mx(name: str, element: QType) -> QType:
    return replace(element, name=name, scale_format="e8m0", block=32)


# Normal quantiles, as published; index = rank.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# The 4-bit float of bitsandbytes: multiples of 1/192, in its own code order.
_FP4_BNB = tuple(v / 192 for v in (0, 1, 128, 192, 64, 96, 32, 48))

for _bits in (2, 3, 4, 5, 6, 7, 8):
    register(QType(f"int{_bits}", "int", _bits, torch.int8, -(2 ** (_bits - 1)), 2 ** (_bits - 1) - 1))
    register(QType(f"uint{_bits}", "int", _bits, torch.uint8, 0, 2**_bits - 1))
register(QType("int16", "int", 16, torch.int16, -(2**15), 2**15 - 1))
register(QType("int32", "int", 32, torch.int32, -(2**31), 2**31 - 1))

_E4M3 = register(QType("fp8_e4m3", "float", 8, torch.float8_e4m3fn, -448.0, 448.0, element_dtype=torch.float8_e4m3fn))
_E5M2 = register(QType("fp8_e5m2", "float", 8, torch.float8_e5m2, -57344.0, 57344.0, element_dtype=torch.float8_e5m2))
for _name, _dtype, _most in (
    ("fp8_e4m3fnuz", torch.float8_e4m3fnuz, 240.0),
    ("fp8_e5m2fnuz", torch.float8_e5m2fnuz, 57344.0),
):
    register(QType(_name, "float", 8, _dtype, -_most, _most, element_dtype=_dtype))

register(_codebook("nf4", 4, _NF4))
register(_codebook("fp4_bnb", 4, (*_FP4_BNB, *(-v for v in _FP4_BNB))))
_FP4 = register(_codebook("fp4", 4, _minifloat(2, 1)), "fp4_e2m1")

register(_mx("mxfp8_e4m3", _E4M3), "mxfp8")
register(_mx("mxfp8_e5m2", _E5M2))
register(_mx("mxfp6_e2m3", _codebook("e2m3", 6, _minifloat(2, 3))))
register(_mx("mxfp6_e3m2", _codebook("e3m2", 6, _minifloat(3, 2))), "mxfp6")
register(_mx("mxfp4", _FP4))
# The most negative code is left unused so that the range is symmetric; the format's 2**-6 is part of the scale.
register(_mx("mxint8", QType("int8", "int", 8, torch.int8, -127, 127)))
