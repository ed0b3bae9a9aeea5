"""WHAT and where scales live: granularities and :class:`QSpec`.

A granularity becomes a ``block`` for a tensor of known rank: one entry per dimension, ``-1`` for the whole dimension,
``1`` for each index, ``g`` for groups of ``g`` (a ragged last group is legal). That one notation is all that the
operators know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from inc_graph.errors import SpecError
from inc_graph.qtypes import QType, get_qtype

__all__ = ["Granularity", "PerBlock", "PerChannel", "PerGroup", "PerTensor", "PerToken", "QSpec", "scale_shape"]

SCHEMES = ("symmetric", "asymmetric")


class Granularity:
    """Base of the granularities. Subclasses are frozen dataclasses with a ``kind`` and :meth:`block`."""

    kind: ClassVar[str]

    def block(self, ndim: int) -> tuple[int, ...]:
        """Block of a tensor with ``ndim`` dimensions: ``ndim`` entries, each -1, 1 or a group size.

        Raises:
            SpecError: if the granularity does not fit that rank.
        """
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """JSON-able form: ``{"kind": ..., <fields>}``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    @staticmethod
    def from_json(data: Any) -> Granularity:
        """Inverse of :meth:`to_json`. Raises :class:`SpecError` on anything that it did not write."""
        cls = _GRANULARITIES.get(str(data.get("kind"))) if isinstance(data, Mapping) else None
        if cls is None:
            raise SpecError(f"not a granularity: {data!r}", hint=f"'kind' is one of: {', '.join(_GRANULARITIES)}")
        args = {k: v for k, v in data.items() if k != "kind"}
        _same_keys(args, [f.name for f in fields(cls)], f"granularity '{cls.kind}'")  # type: ignore[arg-type]
        return cls(**args)

    def __str__(self) -> str:
        args = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.kind}({args})" if args else self.kind


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""

    kind: ClassVar[str] = "per_tensor"

    def block(self, ndim: int) -> tuple[int, ...]:
        return (-1,) * ndim


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of ``axis`` (negative counts from the end)."""

    axis: int = 0
    kind: ClassVar[str] = "per_channel"

    def __post_init__(self) -> None:
        _need_int("axis", self.axis)

    def block(self, ndim: int) -> tuple[int, ...]:
        axis = _axis(self, self.axis, ndim)
        return tuple(1 if d == axis else -1 for d in range(ndim))


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for every ``size`` consecutive entries along ``axis``, apart for each index of the other dimensions.

    ``size=-1`` means the whole axis: for a 2-D weight that is one scale per output channel.
    """

    size: int
    axis: int = -1
    kind: ClassVar[str] = "per_group"

    def __post_init__(self) -> None:
        _need_size("size", self.size)
        _need_int("axis", self.axis)

    def block(self, ndim: int) -> tuple[int, ...]:
        axis = _axis(self, self.axis, ndim)
        return tuple(self.size if d == axis else 1 for d in range(ndim))


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each block of ``sizes``, which has one entry per dimension (-1: the whole dimension)."""

    sizes: tuple[int, ...]
    kind: ClassVar[str] = "per_block"

    def __post_init__(self) -> None:
        if isinstance(self.sizes, str) or not isinstance(self.sizes, Sequence):
            raise SpecError(f"sizes must be a sequence of integers, not {self.sizes!r}")
        object.__setattr__(self, "sizes", tuple(self.sizes))  # JSON brings lists
        for size in self.sizes:
            _need_size("sizes", size)

    def block(self, ndim: int) -> tuple[int, ...]:
        if len(self.sizes) != ndim:
            raise SpecError(f"{self} has {len(self.sizes)} sizes but the tensor has {ndim} dimensions")
        return self.sizes


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each row: every index of all dimensions but the last."""

    kind: ClassVar[str] = "per_token"

    def block(self, ndim: int) -> tuple[int, ...]:
        if ndim < 1:
            raise SpecError("per_token needs at least one dimension")
        return (1,) * (ndim - 1) + (-1,)


_GRANULARITIES: dict[str, type[Granularity]] = {
    cls.kind: cls for cls in (PerTensor, PerChannel, PerGroup, PerBlock, PerToken)
}


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized.

    Attributes:
        qtype: Name in the qtype table; an alias is replaced by the name it stands for.
        scheme: ``"symmetric"`` (range around zero) or ``"asymmetric"`` (range from minimum to maximum, integers only).
        granularity: Which elements share a scale.
        dynamic: True if scales are computed at run time from the tensor itself.

    Raises:
        UnknownNameError: if the qtype is not known.
        SpecError: if a value is not legal or the combination is not.
    """

    qtype: str
    scheme: str = "symmetric"
    granularity: Granularity = field(default_factory=PerTensor)
    dynamic: bool = False

    def __post_init__(self) -> None:
        qtype = get_qtype(self.qtype)
        object.__setattr__(self, "qtype", qtype.name)
        if self.scheme not in SCHEMES:
            raise SpecError(f"scheme must be one of {', '.join(SCHEMES)}, not {self.scheme!r}")
        if not isinstance(self.granularity, Granularity):
            raise SpecError(f"granularity must be a Granularity such as PerTensor(), not {self.granularity!r}")
        if not isinstance(self.dynamic, bool):
            raise SpecError(f"dynamic must be True or False, not {self.dynamic!r}")
        if self.scheme == "asymmetric" and (not qtype.is_int or qtype.scale_format != "float32"):
            raise SpecError(f"{qtype.name} has no zero point, so the scheme must be symmetric")

    @property
    def type(self) -> QType:
        """The :class:`QType` that ``qtype`` names."""
        return get_qtype(self.qtype)

    def block(self, ndim: int) -> tuple[int, ...]:
        """Block of a tensor with ``ndim`` dimensions; see :meth:`Granularity.block`."""
        return self.granularity.block(ndim)

    def to_json(self) -> dict[str, Any]:
        """JSON-able dictionary; ``QSpec.from_json(spec.to_json()) == spec``."""
        return {
            "qtype": self.qtype,
            "scheme": self.scheme,
            "granularity": self.granularity.to_json(),
            "dynamic": self.dynamic,
        }

    @classmethod
    def from_json(cls, data: Any) -> QSpec:
        """Inverse of :meth:`to_json`.

        Raises:
            SpecError: if a field is missing, unknown or illegal.
            UnknownNameError: if the qtype is not known.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"not a QSpec: {data!r}")
        _same_keys(data, [f.name for f in fields(cls)], "QSpec")
        return cls(data["qtype"], data["scheme"], Granularity.from_json(data["granularity"]), data["dynamic"])

    def __str__(self) -> str:
        return f"{self.qtype} {self.scheme} {self.granularity}{' dynamic' if self.dynamic else ''}"


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scale of a tensor: the number of blocks along each dimension (rounded up).

    Args:
        shape: Shape of the tensor; entries may be symbolic.
        block: One entry per dimension: -1, 1 or a group size.

    Raises:
        SpecError: if the lengths differ or an entry of ``block`` is neither -1 nor positive.
    """
    if len(shape) != len(block):
        raise SpecError(f"block {list(block)} has {len(block)} entries but the tensor has {len(shape)} dimensions")
    return tuple(_count(n, g) for n, g in zip(shape, block, strict=True))


def _count(n: int, g: int) -> int:
    if g == -1:
        return 1
    if g == 1:
        return n
    if g < 1:
        raise SpecError(f"a block entry is -1 or positive, not {g}")
    return (n + g - 1) // g


def _need_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(f"{name} must be an integer, not {value!r}")


def _need_size(name: str, value: object) -> None:
    _need_int(name, value)
    if value != -1 and value < 1:  # type: ignore[operator]
        raise SpecError(f"{name} must be -1 or positive, not {value!r}")


def _axis(what: Granularity, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise SpecError(f"{what} does not fit a tensor with {ndim} dimensions")
    return axis % ndim


def _same_keys(data: Mapping[str, Any], names: list[str], what: str) -> None:
    if set(data) != set(names):
        missing, unknown = sorted(set(names) - set(data)), sorted(set(data) - set(names))
        parts = [f"missing {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown)
        raise SpecError(f"{what}: {' and '.join(parts)} field(s)")
