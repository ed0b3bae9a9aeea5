"""GPTQ: codes chosen so that the outputs of a layer change least for the inputs that it has been seen to get.

The solution of the published algorithm (Frantar et al., 2022) is refined here: rounds of coordinate descent over codes
and scales, on the same objective, none of which can make it worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.passes.qparams._columns import Columns, Find, compensate, descend
from inc_graph.passes.qparams._double import ScaleOptions
from inc_graph.passes.qparams._groups import check_groups
from inc_graph.passes.qparams._hessian import Hessian, hessian_of
from inc_graph.passes.qparams._levels import Levels, levels_of
from inc_graph.passes.qparams._rank import rank_of
from inc_graph.passes.qparams._scales import Fp8Window, group_params
from inc_graph.passes.qparams.rtn import RTN
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec
from inc_graph.weights import Codes, Gram, WeightAlgorithm, narrow_scale, narrow_zero_point

__all__ = ["GPTQ"]


@ALGORITHMS.register("gptq")
@dataclass(frozen=True)
class GPTQ(ScaleOptions, WeightAlgorithm):
    """Linear weights ``[out, in]`` with groups along the inputs. Measured by its own objective, the error of the
    outputs, the result is not worse than that of `RTN` with the same `search` and scale options; without an order and
    with scales that are floats, no single row is. (But with `fp8_aware`, which allows far fewer scales.)

    Attributes:
        act_order: Columns in the order of falling mean square of their inputs. Groups are then of columns that are
            neighbours in that order, and the layer has to put its inputs in order, too.
        static_groups: Groups, and their scales, are those of the weights as they were. `act_order` needs no order when
            the model runs then.
        hybrid_order: Groups in the order of their greatest column, and columns by order within. No order remains.
        percdamp: What is added to the Hessian's diagonal, as a share of its mean.
        block_size: Columns between two updates of all that follow. It does not change the result but for rounding.
        search: Scales of least error, weighted by what each column costs, instead of those of `RTN`'s full range.
        fp8_aware: Scales that are powers of two, such that code times scale is a number of fp8 e4m3 (over one power of
            two for the whole weight, ``notes["fp8_scale"]``). For integers of at most 4 bits.
        true_sequential: For who collects the inputs: those of a layer after the layers before it in its block were
            rounded. Nothing changes here.
        refine: Rounds of coordinate descent; 0 leaves the result as published.

    Notes of the codes: "damping" (as a share of the mean of the diagonal: more than `percdamp` if the Hessian was not
    positive definite with that), "error" and "rtn_error" (relative, of the outputs, here and by plain rounding), "rank"
    (how many independent inputs were seen, if fewer than the weight has columns), "dead" (columns whose inputs were all
    0, if any).
    """

    name: ClassVar[str] = "gptq"
    inputs: ClassVar[bool] = True
    act_order: bool = False
    static_groups: bool = False
    hybrid_order: bool = False
    percdamp: float = 0.01
    block_size: int = 128
    search: bool = False
    fp8_aware: bool = False
    true_sequential: bool = False
    refine: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_order and self.hybrid_order:
            raise ConfigError("act_order and hybrid_order exclude each other", hint="set one of them to False")
        if isinstance(self.percdamp, bool) or not 0 <= self.percdamp < math.inf:
            raise ConfigError(f"percdamp must be at least 0 and finite, not {self.percdamp!r}")
        for field, least in (("block_size", 1), ("refine", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{field} must be an integer of at least {least}, not {value!r}")
        if self.fp8_aware and self.scale_type is not None:
            raise ConfigError("the powers of two of fp8_aware are not quantized again", hint="drop scale_type")

    def solve(self, weight: Tensor, spec: QSpec, gram: Gram | None = None) -> Codes:
        levels, size = levels_of(spec), _group_size(weight, spec)
        hessian = hessian_of(gram, weight.shape[1], self.percdamp)
        scales = {"scale_type": self.scale_type, "scale_scheme": self.scale_scheme, "scale_group": self.scale_group}
        plain = RTN(search=self.search, **scales).solve(weight, spec)  # type: ignore[arg-type]
        target, rounded = (w.detach().float().T.contiguous() for w in (weight, plain.values()))
        order = self._order(hessian.plain.diagonal(), size)
        kept_order = None
        if order is not None and self.act_order and not self.static_groups and size < len(target):
            hessian, target, rounded = hessian.permuted(order), target[order], rounded[order]
            kept_order, order = order, None

        columns, kept, error = self._columns(target, levels, size, hessian, order)
        zero = None if columns.zero is None else columns.of_columns(columns.zero)
        carrier = levels.encode(columns.k, zero).T.contiguous()
        shape = tuple(columns.scale.T.shape)
        zero = levels.zero_point(None if columns.zero is None else columns.zero.T, shape, target.device)
        codes = Codes(carrier, kept, zero, spec, kept_order)

        limit = hessian.errors(rounded.sub_(target))
        if not self.fp8_aware:
            codes, error = _no_worse(codes, plain, error, limit)
        energy = float(hessian.errors(target).sum())
        share = [math.sqrt(max(float(e.sum()), 0.0) / energy) if energy > 0 else 0.0 for e in (error, limit)]
        notes: dict[str, Any] = {"damping": hessian.damping, "error": share[0], "rtn_error": share[1]}
        if gram is not None and (rank := rank_of(gram)) < len(target):
            notes["rank"] = rank
        if dead := int((hessian.plain.diagonal() <= 0).sum()):
            notes["dead"] = dead
        if self.fp8_aware:
            notes["fp8_scale"] = Fp8Window.of(target, levels).scale
        return replace(codes, notes=notes)

    def _columns(
        self, target: Tensor, levels: Levels, size: int, hessian: Hessian, order: Tensor | None
    ) -> tuple[Columns, Tensor | Codes, Tensor]:
        """Columns that are dealt with in an order, their scales ``[out, groups]`` as they are kept, and what the codes
        cost each output.
        """
        count, out = target.shape
        r = hessian.inverse_factor(order)
        place = torch.arange(count, device=target.device) if order is None else order
        scale = target.new_ones(-(-count // size), out)
        zero = torch.zeros_like(scale) if levels.asymmetric else None
        columns = Columns(levels, torch.empty_like(target), scale, zero, [j // size for j in range(count)])
        work = columns if order is None else replace(columns, k=columns.k.clone(), group_of=(order // size).tolist())
        window = Fp8Window.of(target, levels) if self.fp8_aware else None
        importance = r.diagonal().square().reciprocal() if self.search else None
        find = None if self.static_groups else Find(levels, importance, window)

        if self.static_groups:
            costs = None if importance is None else torch.empty_like(importance).index_copy_(0, place, importance)
            for g, part in enumerate(columns.groups()):
                columns.put(g, group_params(target[part], levels, None if costs is None else costs[part], window))

        def run(find: Find | None, fit_scale: bool) -> Tensor:
            compensate(target[place], r, work, self.block_size, find)
            if work is not columns:
                columns.k.index_copy_(0, place, work.k)
            gradient = hessian.damped @ (target - columns.values())
            for _ in range(self.refine):
                descend(gradient, hessian.damped, columns, fit_scale)
            delta = target - columns.values()
            added = hessian.damped.diagonal() - hessian.plain.diagonal()
            return gradient.addcmul_(added[:, None], delta, value=-1).mul_(delta).sum(0)

        error = run(find, window is None)
        kept, used = self.keep_scale(scale.T.contiguous())
        if self.scale_type is not None:  # once more, with the scales that remain
            scale.copy_(used.T)
            error = run(None, False)
        return columns, kept, error

    def _order(self, diagonal: Tensor, size: int) -> Tensor | None:
        """The order in which columns are dealt with; None: as they are."""
        if not (self.act_order or self.hybrid_order):
            return None
        order = torch.argsort(diagonal, descending=True, stable=True)
        if self.act_order:
            return order
        group = torch.arange(len(diagonal), device=diagonal.device) // size
        greatest = diagonal.new_zeros(int(group[-1]) + 1).scatter_reduce(0, group, diagonal, "amax")
        rank = torch.argsort(torch.argsort(greatest, descending=True, stable=True))
        return order[torch.argsort(rank[group[order]], stable=True)]


def _group_size(weight: Tensor, spec: QSpec) -> int:
    if weight.ndim != 2 or spec.block(2)[0] != 1:
        raise ConfigError(
            f"gptq takes weights [out, in] in groups along the inputs, not {list(weight.shape)} {spec.granularity}",
            hint="use rtn for this layer, or group_dim=1",
        )
    check_groups(weight.shape, spec.block(2))
    size = spec.block(2)[1]
    return weight.shape[1] if size == -1 else size


def _no_worse(codes: Codes, plain: Codes, error: Tensor, limit: Tensor) -> tuple[Codes, Tensor]:
    """Codes with the rows of plain rounding where those are better, or all of those if rows cannot be mixed."""
    worse = error > limit
    mixes = codes.order is None and isinstance(codes.scale, Tensor) and isinstance(plain.scale, Tensor)
    if not mixes:
        return (plain, limit) if float(error.sum()) > float(limit.sum()) else (codes, error)
    if not bool(worse.any()):
        return codes, error
    rows = worse[:, None]
    scale = torch.where(rows, plain.scale.float(), codes.scale.float())
    zero = codes.zero_point
    if isinstance(zero, Tensor) and isinstance(plain.zero_point, Tensor):
        zero = narrow_zero_point(torch.where(rows, plain.zero_point.int(), zero.int()))
    bits = torch.where(rows, plain.carrier.view(torch.uint8), codes.carrier.view(torch.uint8))  # float8 has no where
    return Codes(bits.view(codes.carrier.dtype), narrow_scale(scale), zero, codes.spec), torch.minimum(error, limit)
