"""Granularities, QSpec and the shape of scales."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inc_graph.errors import SpecError, UnknownNameError
from inc_graph.registry import QTYPES
from inc_graph.spec import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QSpec, scale_shape

GRANULARITIES = [PerTensor(), PerChannel(), PerChannel(-2), PerGroup(32), PerGroup(-1, axis=0), PerBlock((1, -1, 128))]


@pytest.mark.parametrize(
    ("granularity", "ndim", "block"),
    [
        (PerTensor(), 0, ()),
        (PerTensor(), 3, (-1, -1, -1)),
        (PerChannel(), 4, (1, -1, -1, -1)),
        (PerChannel(-1), 2, (-1, 1)),
        (PerGroup(32), 2, (1, 32)),
        (PerGroup(32, axis=0), 3, (32, 1, 1)),
        (PerGroup(-1), 2, (1, -1)),
        (PerBlock((128, 128)), 2, (128, 128)),
        (PerToken(), 3, (1, 1, -1)),
        (PerToken(), 1, (-1,)),
    ],
)
def test_blocks(granularity: Granularity, ndim: int, block: tuple[int, ...]) -> None:
    assert granularity.block(ndim) == block
    assert QSpec("int8", granularity=granularity).block(ndim) == block


@pytest.mark.parametrize(
    ("granularity", "ndim"),
    [(PerChannel(2), 2), (PerChannel(-3), 2), (PerGroup(4), 0), (PerBlock((2, 2)), 3), (PerToken(), 0)],
)
def test_rank_that_does_not_fit(granularity: Granularity, ndim: int) -> None:
    with pytest.raises(SpecError, match=r"dimension"):
        granularity.block(ndim)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PerGroup(0),
        lambda: PerGroup(-2),
        lambda: PerGroup(2.0),  # type: ignore[arg-type]
        lambda: PerChannel(True),
        lambda: PerChannel("0"),  # type: ignore[arg-type]
        lambda: PerBlock((1, 0)),
        lambda: PerBlock("12"),  # type: ignore[arg-type]
        lambda: PerBlock(3),  # type: ignore[arg-type]
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


granularities = st.sampled_from(GRANULARITIES)
names = st.sampled_from(QTYPES.names())


@given(names, st.sampled_from(["symmetric", "asymmetric"]), granularities, st.booleans())
def test_json_round_trip_is_exact(name: str, scheme: str, granularity: Granularity, dynamic: bool) -> None:
    try:
        spec = QSpec(name, scheme, granularity, dynamic)
    except SpecError:
        assert scheme == "asymmetric"
        return
    data = json.loads(json.dumps(spec.to_json()))
    assert data == spec.to_json()
    again = QSpec.from_json(data)
    assert again == spec and hash(again) == hash(spec)


def test_text() -> None:
    assert str(QSpec("int8")) == "int8 symmetric per_tensor"
    assert str(QSpec("int4", "asymmetric", PerGroup(32))) == "int4 asymmetric per_group(size=32,axis=-1)"
    assert str(QSpec("uint8", granularity=PerToken(), dynamic=True)) == "uint8 symmetric per_token dynamic"


def test_aliases_are_resolved() -> None:
    assert QSpec("mxfp8") == QSpec("mxfp8_e4m3") and QSpec("mxfp8").qtype == "mxfp8_e4m3"
    assert QSpec("int8").type.qmax == 127


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"scheme": "affine"}, "scheme must be one of symmetric, asymmetric"),
        ({"granularity": (1, -1)}, "granularity must be"),
        ({"dynamic": 1}, "dynamic must be"),
        ({"qtype": "fp8_e4m3", "scheme": "asymmetric"}, "fp8_e4m3 has no zero point"),
        ({"qtype": "nf4", "scheme": "asymmetric"}, "nf4 has no zero point"),
        ({"qtype": "mxint8", "scheme": "asymmetric"}, "mxint8 has no zero point"),
    ],
)
def test_bad_specs(args: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        QSpec(**{"qtype": "int8", **args})


def test_unknown_qtype() -> None:
    with pytest.raises(UnknownNameError):
        QSpec("int9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("dynamic"), r"QSpec: missing \['dynamic'\]"),
        (lambda d: d.update(bits=4), r"QSpec: unknown \['bits'\]"),
        (lambda d: d.update(granularity={"kind": "per_row"}), "not a granularity"),
        (lambda d: d.update(granularity="per_tensor"), "not a granularity"),
        (lambda d: d.update(granularity={"kind": "per_group", "size": 4}), r"'per_group': missing \['axis'\]"),
        (lambda d: d.update(granularity={"kind": "per_group", "size": "4", "axis": 0}), "size must be an integer"),
        (lambda d: d.update(granularity={"kind": "per_tensor", "axis": 0}), r"'per_tensor': unknown \['axis'\]"),
    ],
)
def test_bad_json(change: Any, message: str) -> None:
    data = QSpec("int8").to_json()
    change(data)
    with pytest.raises(SpecError, match=message):
        QSpec.from_json(data)
    with pytest.raises(SpecError, match="not a QSpec"):
        QSpec.from_json([data])


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QSpec("int8").dynamic = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((), (), ()),
        ((4, 6), (-1, -1), (1, 1)),
        ((4, 6), (1, -1), (4, 1)),
        ((4, 6), (1, 3), (4, 2)),
        ((4, 7), (3, 3), (2, 3)),
        ((4, 7), (1, 128), (4, 1)),
        ((0, 7), (1, -1), (0, 1)),
        ((0, 7), (-1, 2), (1, 4)),
        ((0, 7), (2, -1), (0, 1)),
    ],
)
def test_scale_shape(shape: tuple[int, ...], block: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert scale_shape(shape, block) == expected


@pytest.mark.parametrize(("shape", "block"), [((4, 6), (1,)), ((4,), (0,)), ((4,), (-2,))])
def test_scale_shape_errors(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="block"):
        scale_shape(shape, block)


def test_scale_shape_of_symbols() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(10, 4), static_shapes=False)
    rows, columns = scale_shape(x.shape, (3, -1))
    assert not isinstance(rows, int) and columns == 1
    assert x.shape[0].node.shape_env is not None and not x.shape[0].node.shape_env.guards
    assert rows == 4
