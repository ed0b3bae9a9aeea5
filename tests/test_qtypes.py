"""The table of number formats."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from inc_graph.errors import IncError, SpecError, UnknownNameError
from inc_graph.qtypes import QType, get_qtype, register
from inc_graph.registry import QTYPES

INTS = {
    "int2": (-2, 1), "int3": (-4, 3), "int4": (-8, 7), "int7": (-64, 63), "int8": (-128, 127), "int16": (-32768, 32767),
    "int32": (-(2**31), 2**31 - 1), "uint2": (0, 3), "uint3": (0, 7), "uint4": (0, 15), "uint7": (0, 127),
    "uint8": (0, 255), "mxint8": (-127, 127),
}  # fmt: skip


@pytest.mark.parametrize("name", INTS)
def test_integer_ranges(name: str) -> None:
    qtype = get_qtype(name)
    assert (qtype.qmin, qtype.qmax) == INTS[name]
    assert qtype.is_int and qtype.signed == (INTS[name][0] < 0)
    assert not qtype.carrier.is_floating_point and 8 * qtype.carrier.itemsize >= qtype.bits


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_fp8_range_is_the_dtypes(name: str) -> None:
    qtype = get_qtype(name)
    info = torch.finfo(qtype.carrier)
    assert (qtype.qmin, qtype.qmax) == (info.min, info.max) and qtype.carrier == qtype.element_dtype


def test_small_float_codebooks() -> None:
    assert get_qtype("fp4").codebook == (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    for name, top, least in (("mxfp6_e2m3", 7.5, 0.125), ("mxfp6_e3m2", 28.0, 0.0625)):
        book = get_qtype(name).codebook
        assert book is not None and len(book) == 64
        assert max(book) == top and min(v for v in book if v > 0) == least
        assert book[32:] == tuple(-v for v in book[:32]) and list(book[:32]) == sorted(book[:32])


def test_nf4_and_bitsandbytes_codebooks() -> None:
    nf4 = get_qtype("nf4").codebook
    assert nf4 is not None and list(nf4) == sorted(nf4) and nf4[7] == 0 and len(set(nf4)) == 16
    bnb = get_qtype("fp4_bnb").codebook
    assert bnb is not None
    assert bnb[:8] == pytest.approx([0, 0.0052083333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25])


def test_mx_formats() -> None:
    for name in ("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e2m3", "mxfp4", "mxint8"):
        qtype = get_qtype(name)
        assert (qtype.scale_format, qtype.block) == ("e8m0", 32)
    assert get_qtype("mxfp8") is get_qtype("mxfp8_e4m3")
    assert get_qtype("mxfp6") is get_qtype("mxfp6_e3m2")


@pytest.mark.parametrize(
    ("name", "per_byte", "bytes_of_5"),
    [
        ("int4", 2, 3),
        ("nf4", 2, 3),
        ("int2", 4, 2),
        ("int3", 0, 2),
        ("mxfp6", 0, 4),
        ("int7", 1, 5),
        ("int8", 1, 5),
        ("fp8_e4m3", 1, 5),
        ("int16", 0, 10),
        ("int32", 0, 20),
    ],
)
def test_storage(name: str, per_byte: int, bytes_of_5: int) -> None:
    qtype = get_qtype(name)
    assert qtype.packed_per_byte == per_byte and qtype.packed_size(5) == bytes_of_5 and qtype.packed_size(0) == 0


def test_lookup() -> None:
    int8 = get_qtype("int8")
    assert get_qtype(int8) is int8 and str(int8) == "int8" and hash(int8) == hash(dataclasses.replace(int8))
    with pytest.raises(UnknownNameError, match=r"unknown qtype 'int9'; did you mean 'int"):
        get_qtype("int9")


def test_register_your_own() -> None:
    mine = QType("own5", "int", 5, torch.int8, -16, 15)
    try:
        assert register(mine, "i5") is mine
        assert get_qtype("i5") is get_qtype("own5") is mine
        register(QType("own5", "int", 5, torch.int8, -16, 15))  # the same again
        with pytest.raises(IncError, match=rf"'own5' is registered twice: by {__name__} and by {__name__}"):
            register(dataclasses.replace(mine, qmin=-15))
    finally:
        QTYPES.remove("own5")
        QTYPES.remove("i5")


BOOK = (-1.0, 0.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"kind": "posit"}, "kind must be one of int, float, codebook"),
        ({"bits": 9}, "bits must be between 1 and the carrier's 8"),
        ({"bits": 0}, "bits must be between"),
        ({"carrier": "int8"}, "carrier must be a torch.dtype"),
        ({"carrier": torch.float32}, "cannot hold integers"),
        ({"qmin": 7}, "must be below qmax"),
        ({"qmin": 1}, "must contain zero"),
        ({"qmin": -9}, "4 bits cannot hold"),
        ({"carrier": torch.uint8}, "torch.uint8 cannot hold the range"),
        ({"scale_format": "e9"}, "scale_format must be"),
        ({"block": 0}, "block must be positive"),
        ({"codebook": BOOK}, "goes with kind 'codebook' only"),
        ({"element_dtype": torch.float8_e5m2}, "goes with kind 'float' only"),
        ({"kind": "codebook"}, "goes with kind 'codebook' only"),
        ({"kind": "codebook", "codebook": BOOK}, "carrier is torch.uint8"),
        ({"kind": "codebook", "codebook": BOOK, "carrier": torch.uint8}, "must be the codebook's ends"),
        ({"kind": "codebook", "codebook": (-8.0, 7.0), "carrier": torch.uint8}, "must hold zero"),
        ({"kind": "codebook", "codebook": (0.0,) * 17, "carrier": torch.uint8}, "do not fit 4 bits"),
        ({"kind": "float"}, "goes with kind 'float' only"),
        ({"kind": "float", "element_dtype": torch.float8_e5m2}, "must agree"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"name": "x", "kind": "int", "bits": 4, "carrier": torch.int8, "qmin": -8, "qmax": 7}
    QType(**good)
    with pytest.raises(SpecError, match=message):
        QType(**{**good, **changes})
