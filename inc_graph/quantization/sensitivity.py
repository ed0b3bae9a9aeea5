"""How much harm each layer does to the model's output if it alone is quantized. No metric of the user's is asked.

A graph is calibrated once. Its float values are then computed in order, and at each quantized operator a branch goes
off: this operator as its Q-DQ form computes it, everything behind it in float. So a layer costs the part of a forward
that is behind it, and no more memory than two of them. A model that is quantized layer by layer has no such graph:
there each layer costs a forward.

The damage is the noise that appears in the output, relative to the output, in decibel: -SQNR. The larger, the worse.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.errors import ConfigError, IncWarning
from inc_graph.export import example_call
from inc_graph.quantization.api import prepare
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.finish import observers_of
from inc_graph.quantization.one_layer import Call, is_graph, own, scope_of

__all__ = ["Damage", "Measured", "measure"]


@dataclass(frozen=True)
class Damage:
    """One layer: how `set_local` names it alone, its operator type, its damage in dB.

    `general`: the config itself speaks of it, and no local setting, so another config of the class may replace it.
    """

    name: str
    op: str
    db: float
    general: bool = True


@dataclass
class Measured:
    """The layers of one config, in the order of the graph; those that could not be measured with the reason.

    `cut`: the time was over before all of it was done.
    """

    layers: list[Damage] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)
    cut: bool = False


def measure(
    model: nn.Module,
    config: BaseConfig,
    run_fn: Callable[..., Any] | None,
    run_args: tuple[Any, ...],
    example_inputs: Any = None,
    *,
    exportable: Any = None,
    calls: int = 2,
    step: Callable[[str], None] = lambda text: None,
    over: Callable[[], bool] = lambda: False,
) -> Measured:
    """The damage of each layer that `config` quantizes.

    Args:
        model: A graph from `export`, which is left as it is; or a module that may be changed, so give a copy.
        config: Without lists of candidates.
        run_fn, run_args: Calibration, as for `quantize`; None only for a method without.
        example_inputs: What the damage is measured on if `run_fn` does not call the prepared model.
        exportable: The `example_inputs` of `prepare`.
        calls: The damage is measured on the inputs of the first so many calls.
        step: Told what is being done.
        over: Asked after each layer whether the time is over: what is not measured by then, is not.

    Raises:
        ConfigError: there are no inputs, the output holds no finite float values, or the method has no Q-DQ form.
        IncError: as `prepare` and `convert`.
    """
    step("calibrating")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", IncWarning)  # the first trial gives the same ones
        prepared = prepare(model, config, inplace=not is_graph(model), example_inputs=exportable)
        scope = scope_of(prepared)
        inputs = _calibrate(prepared, run_fn, run_args, example_inputs, calls)
        for observer in observers_of(prepared):
            observer.enabled = False  # from here on prepared(x) is the float model
        found, total = Measured(), {u.name: _Noise() for u in scope.units}
        scope.settle()
        found.cut = over()
        for number, call in enumerate(inputs, 1):
            outputs = iter(()) if found.cut else scope.outputs(call, found.unmeasured)
            for at, (unit, want, have) in enumerate(outputs, 1):
                step(f"measuring layer {at} of {len(scope.units)}, call {number} of {len(inputs)}")
                total[unit.name].add(want, have)
                found.cut = over()
                if found.cut:
                    break
    for unit in scope.units:
        if found.cut and not total[unit.name].sums:
            found.unmeasured.setdefault(unit.name, "the time was over")
        if unit.name not in found.unmeasured:
            db = total[unit.name].db()
            if db is None:
                hint = "give run_fn inputs for which the model's output has finite float values other than 0"
                raise ConfigError("no damage can be measured on the model's output", hint=hint)
            found.layers.append(Damage(unit.name, unit.op, db, unit.general))
    return found


# ---------------------------------------------------------------------------------------------------------- the inputs
def _calibrate(
    prepared: nn.Module, run_fn: Callable[..., Any] | None, run_args: tuple[Any, ...], example_inputs: Any, calls: int
) -> list[Call]:
    seen: list[Call] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(seen) < calls:
            seen.append(own((args, kwargs)))

    handle = prepared.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        if run_fn is not None:
            run_fn(prepared, *run_args)
        if not seen and example_inputs is not None:  # whose values are no calibration data
            watching = [o for o in observers_of(prepared) if o.enabled]
            for observer in watching:
                observer.enabled = False
            args, kwargs = example_call(prepared, example_inputs)
            prepared(*args, **kwargs)
            for observer in watching:
                observer.enabled = True
    finally:
        handle.remove()
    if not seen:
        hint = "let run_fn call the model itself, prepared(x), or give example_inputs"
        raise ConfigError("there are no inputs to measure the damage of layers on", hint=hint)
    return seen


# ----------------------------------------------------------------------------------------------------------- the noise
@dataclass
class _Noise:
    """Noise and signal of each output, summed over the calls. All outputs count alike, whatever their scale."""

    sums: dict[int, list[float]] = field(default_factory=dict)

    def add(self, want: list[Tensor], have: list[Tensor]) -> None:
        for i, (w, h) in enumerate(zip(want, have, strict=True)):
            good = w.isfinite()  # a masked logit is -inf in both
            w, h = w.double().where(good, 0.0), h.double().where(good, 0.0)
            noise, signal = self.sums.setdefault(i, [0.0, 0.0])
            self.sums[i] = [noise + float((w - h).square().sum()), signal + float(w.square().sum())]

    def db(self) -> float | None:
        """None if there is no output to compare with; inf if the output is no number any more, -inf if it is equal."""
        ratios = [noise / signal for noise, signal in self.sums.values() if signal > 0]
        if not ratios:
            return None
        ratio = sum(ratios) / len(ratios)
        return math.inf if not math.isfinite(ratio) else -math.inf if ratio == 0 else 10 * math.log10(ratio)
