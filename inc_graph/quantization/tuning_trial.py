"""One trial of `autotune`: quantize the float model as a config says, and evaluate the result."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx, nn

from inc_graph.capture import own_mutated
from inc_graph.common.logger import TuningLogger, logger
from inc_graph.common.options import reseed
from inc_graph.errors import CaptureError, ConfigError, IncError
from inc_graph.export import example_call, export, unwrap
from inc_graph.graph import clone
from inc_graph.quantization.api import quantize
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.journal import TRIAL, Journal
from inc_graph.quantization.layers import own_copy
from inc_graph.quantization.one_layer import is_graph
from inc_graph.quantization.sensitivity import Measured, measure
from inc_graph.quantization.sensitivity_search import Plan
from inc_graph.quantization.tuning_table import Trial
from inc_graph.quantization.user_algorithms import has_own_algorithm, needs_data
from inc_graph.report import attribute_bytes

__all__ = ["Source", "errors_of_the_user", "exported", "run_trial"]


@dataclass(frozen=True)
class Source:
    """The float model that every trial starts from, and what quantizes it. Weights are shared with it, never copied."""

    model: nn.Module
    exportable: Any  # example inputs, where each trial has to try the export anew
    example_inputs: Any
    run_fn: Any
    run_args: tuple[Any, ...]
    original: nn.Module  # what methods of one's own work on: modules, and a copy whose weights they may write to

    def quantize(self, config: BaseConfig) -> nn.Module:
        """The quantized model. What `run_fn` raises comes as `errors_of_the_user` turns it back."""
        reseed()  # what is drawn at random is the same for each trial
        if has_own_algorithm(config):
            model = own_copy(unwrap(self.original))
            return quantize(model, config, _passing(self.run_fn), self.run_args, example_inputs=self.example_inputs)
        return quantize(self._start(), config, _passing(self.run_fn), self.run_args, example_inputs=self.exportable)

    def measure(
        self, config: BaseConfig, calls: int, step: Callable[[str], None], over: Callable[[], bool]
    ) -> Measured:
        """The damage of each layer."""
        if has_own_algorithm(config):
            text = f"strategy='sensitivity' cannot measure the layers of {config}: a method of one's own has no graph"
            raise ConfigError(text, hint="use strategy='configs'")
        if self.run_fn is None and needs_data(config):
            raise ConfigError("this method needs calibration data", hint="pass run_fn")
        if self.run_fn is not None and not callable(self.run_fn):
            raise ConfigError(f"run_fn must be a function that runs data through the model, not {self.run_fn!r}")
        return measure(
            self._start(), config, _passing(self.run_fn), self.run_args, self.example_inputs,
            exportable=self.exportable, calls=calls, step=step, over=over,
        )  # fmt: skip

    def _start(self) -> nn.Module:
        """A copy with the same parameters: only what calibration writes to, buffers, is its own."""
        if is_graph(self.model):
            gm = clone(cast(fx.GraphModule, self.model))
            own_mutated(gm)
            return gm
        model = unwrap(self.model)
        try:
            return copy.deepcopy(model, {id(p): p for p in model.parameters()})
        except Exception as e:
            hint = "give example_inputs, so that it is exported"
            raise CaptureError(f"the model cannot be copied: {type(e).__name__}: {e}", hint=hint) from e


def run_trial(
    plan: Plan, index: int, source: Source, journal: Journal | None, evaluate: Callable[[nn.Module], float]
) -> tuple[Trial, nn.Module | None]:
    """The trial, and its model: None if a journal knew it, or if it failed."""
    known = None if journal is None else journal.known(plan.config)
    trial = Trial(index, plan.config, floats=plan.floats, finer=plan.finer)
    if known is not None:
        return replace(trial, **known), None
    TuningLogger.trial_start(index)
    start = time.perf_counter()
    try:
        q_model = source.quantize(plan.config)
    except (IncError, NotImplementedError) as e:
        logger.warning("trial %s, %s: %s", index, plan.config, e)
        return replace(trial, error=str(e).splitlines()[0], seconds=time.perf_counter() - start), None
    score = evaluate(q_model)
    ms = None if source.example_inputs is None else _milliseconds(q_model, source.example_inputs)
    TuningLogger.trial_end(index)
    seconds = time.perf_counter() - start
    trial = replace(trial, score=score, bytes=attribute_bytes(q_model), milliseconds=ms, seconds=seconds)
    if journal is not None:  # what failed is not noted: it may work once its cause is gone
        journal.note(plan.config, {k: getattr(trial, k) for k in TRIAL})
    return trial, q_model


class _FromUser(BaseException):
    """Carries what the user's function raised past what a trial may fail with."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@contextlib.contextmanager
def errors_of_the_user() -> Iterator[None]:
    """Within the block, what the user's `run_fn` raises in a trial comes through as it is."""
    try:
        yield
    except _FromUser as e:
        raise e.error from e.error.__cause__


def _passing(run_fn: Any) -> Any:
    if not callable(run_fn):
        return run_fn

    def run(*args: Any) -> Any:
        try:
            return run_fn(*args)
        except Exception as e:
            raise _FromUser(e) from None

    return run


def exported(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> tuple[nn.Module, Any]:
    """The model to start from, and the example inputs that `quantize` still needs."""
    if example_inputs is None or is_graph(model):
        if dynamic_shapes is not None:
            hint = "give them to export()" if example_inputs is not None else "give example_inputs, too"
            raise ConfigError("dynamic_shapes cannot be used here", hint=hint)
        return model, None
    try:
        return export(model, example_inputs, dynamic_shapes), None
    except CaptureError:
        if dynamic_shapes is not None:
            raise
        return model, example_inputs  # each trial falls back to its layers, and says why


def _milliseconds(model: nn.Module, example_inputs: Any) -> float:
    args, kwargs = example_call(model, example_inputs)
    times = []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            model(*args, **kwargs)
            times.append(time.perf_counter() - start)
    return min(times) * 1e3
