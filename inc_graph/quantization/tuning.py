"""`autotune`: try configs until the quantized model is good enough, and give back the best."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from inc_graph.common.logger import TuningLogger, logger
from inc_graph.common.options import options, reseed
from inc_graph.common.tensorboard import scores
from inc_graph.errors import CaptureError, ConfigError, IncError, IncWarning
from inc_graph.export import export
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.composable import ComposableConfig
from inc_graph.quantization.journal import Journal, journal_in, search_of
from inc_graph.quantization.one_layer import is_graph
from inc_graph.quantization.sensitivity import Measured
from inc_graph.quantization.sensitivity_search import Outcome, Plan, Sensitivity, search
from inc_graph.quantization.tuning_config import ConfigLoader, Evaluator, TuningConfig
from inc_graph.quantization.tuning_table import Trial, TuningResult, watch
from inc_graph.quantization.tuning_trial import Source, errors_of_the_user, exported, run_trial

__all__ = ["Trial", "TuningResult", "autotune"]


def autotune(
    model: nn.Module | ExportedProgram,
    tune_config: TuningConfig,
    eval_fn: Any,
    eval_args: Any = None,
    run_fn: Callable[..., Any] | None = None,
    run_args: Any = None,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
) -> nn.Module:
    """Quantize a model in several ways, and give back the first that is good enough, or else the best.

    The model is never changed, and every trial starts from it: its weights are shared, not copied. Beside it, the best
    model so far and that of the running trial are in memory.

    Args:
        model: A module in eval mode, a graph from `export`, or an `ExportedProgram`.
        tune_config: What to try and when to stop.
        eval_fn: `eval_fn(model, *eval_args) -> number`; or {"eval_fn": f, "weight": 1.0, "name": "accuracy"}; or a list
            of such dictionaries, whose sum counts. Called with the float model first.
        eval_args: Tuple of further arguments of `eval_fn`.
        run_fn: `run_fn(prepared, *run_args)` runs calibration data through a prepared model.
        run_args: Tuple of further arguments of `run_fn`.
        example_inputs: Tuple, tensor or dict: the model is exported, once, and the trials are timed on them.
        dynamic_shapes: As for `torch.export.export`; only with `example_inputs`.

    Returns:
        The quantized model; its attribute `tuning` is the `TuningResult` (`tuning_result`, with a warning, if the
        model has a `tuning` of its own). A warning says so if it is not within the tolerance.

    Raises:
        ConfigError: an argument makes no sense.
        CaptureError: `model` is no model.
        IncError: no config could be applied to the model; gives the reasons.
        Whatever `eval_fn` and `run_fn` raise.
    """
    if not isinstance(tune_config, TuningConfig):
        raise ConfigError(f"tune_config must be a TuningConfig, not {tune_config!r}")
    if isinstance(model, ExportedProgram):
        model = export(model)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"autotune works on a torch.nn.Module, not on {model!r}", hint="give the model itself")
    evaluator = Evaluator(eval_fn, tune_config.higher_is_better)
    configs = ConfigLoader(tune_config.config_set, tune_config.sampler)
    more = _arguments(eval_args)

    def evaluate(m: Any) -> float:
        reseed()
        return evaluator.evaluate(m, *more)

    TuningLogger.tuning_start()
    start = time.perf_counter()
    start_from = exported(model, example_inputs, dynamic_shapes)
    journal = _journal(tune_config, model, "graph" if is_graph(start_from[0]) else "modules", evaluator)
    known = None if journal is None else journal.baseline
    baseline = evaluate(model) if known is None else known
    if baseline != baseline:
        raise ConfigError("the score of the float model is NaN, so nothing can be compared to it")
    result = TuningResult(baseline, tune_config.limit(baseline), tune_config.higher_is_better)
    if journal is not None:
        journal.begin(baseline)
    source = Source(*start_from, example_inputs, run_fn, _arguments(run_args), model)
    best: nn.Module | None = None

    def over() -> bool:
        return tune_config.timeout is not None and time.perf_counter() - start > tune_config.timeout

    with errors_of_the_user(), scores() as write, watch(result) as step:
        if tune_config.strategy == "sensitivity":
            plans = _by_sensitivity(list(configs.config_set), tune_config, source, journal, result, step, over)
        else:
            plans = _in_turn(configs)
        for plan in _until_done(plans, tune_config, result, over):
            step(Trial(0, plan.config, floats=plan.floats, finer=plan.finer).describe())
            trial, found = run_trial(plan, len(result.trials), source, journal, evaluate)
            if (score := trial.score) is not None:
                trial = replace(trial, accepted=tune_config.accepts(score, baseline))
                write(trial.index, score)
            result.trials.append(trial)
            if score is not None and _improves(trial, result.best, evaluator):
                result.best, best = trial, found
            del found
        if result.best is None:
            reasons = "; ".join(dict.fromkeys(t.error for t in result.trials))
            raise IncError(f"none of {len(result.trials)} configs could be applied: {reasons}")
        if best is None:  # it comes from the journal
            best = source.quantize(result.best.config)
    TuningLogger.tuning_end()
    logger.info("%s", result)
    if not result.best.accepted:
        text = f"no config met the tolerance: the best score is {result.best.score:.6g}, wanted {result.sign} "
        warnings.warn(f"{text}{result.limit:.6g} (float: {baseline:.6g})", IncWarning, stacklevel=2)
    _attach(best, result)
    return best


def _attach(model: nn.Module, result: TuningResult) -> None:
    name = "tuning"
    if hasattr(type(model), name) or any(name in d for d in (vars(model), *_parts(model))):
        name = "tuning_result"
        text = f"the model has a `tuning` of its own, so what autotune found is in its attribute `{name}`"
        warnings.warn(text, IncWarning, stacklevel=3)
    vars(model)[name] = result


def _parts(model: nn.Module) -> tuple[dict[str, Any], ...]:
    return model._modules, model._parameters, model._buffers


def _improves(trial: Trial, best: Trial | None, evaluator: Evaluator) -> bool:
    """Accepted ones are better than others; among accepted ones, those that change fewer layers; then the score."""
    if best is None or best.score is None or trial.score is None:
        return True
    if trial.accepted != best.accepted:
        return trial.accepted
    changes = [(len(t.floats), len(t.finer)) for t in (trial, best)]
    if trial.accepted and changes[0] != changes[1]:
        return changes[0] < changes[1]
    return evaluator.better(trial.score, best.score)


# ------------------------------------------------------------------------------------------------------- what is tried
Plans = Generator[Plan, Outcome, str]  # is sent what came of a plan; returns why it ends


def _in_turn(configs: ConfigLoader) -> Plans:
    for config in configs:
        if (yield Plan(config)).accepted:
            return "a config meets the tolerance"
    return "all configs are tried"


def _by_sensitivity(
    configs: list[BaseConfig], tune_config: TuningConfig, source: Source, journal: Journal | None,
    result: TuningResult, step: Callable[[str], None], over: Callable[[], bool],
) -> Plans:  # fmt: skip
    if kinds := sorted({type(c).__name__ for c in configs} - {type(configs[0]).__name__}):
        text = f"strategy='sensitivity' mixes configs of one class: {type(configs[0]).__name__} and {', '.join(kinds)}"
        raise ConfigError(f"{text} do not go together", hint="tune them one after the other, or strategy='configs'")
    if len(configs) > 1 and any(isinstance(c, ComposableConfig) for c in configs):
        text = (
            "strategy='sensitivity' takes a composition only as the one config of the set, without lists of candidates"
        )
        raise ConfigError(text, hint="give it one of config.expand(), or use strategy='configs'")
    start, new = time.perf_counter(), False
    found: list[Measured] = []
    kept: list[BaseConfig] = []
    for config in configs:
        if kept and over():
            break
        measured = None if journal is None else journal.measured(config, tune_config.sensitivity_calls)
        if measured is None:
            try:
                measured, new = source.measure(config, tune_config.sensitivity_calls, step, over), True
            except (IncError, NotImplementedError) as e:
                if config is configs[0]:
                    raise
                warnings.warn(f"{config} is left out of the search: {e}", IncWarning, stacklevel=6)
                continue
            if journal is not None and not measured.cut:
                journal.note_measured(config, tune_config.sensitivity_calls, measured)
        found.append(measured)
        kept.append(config)
    result.sensitivity = Sensitivity.of(found, time.perf_counter() - start if new else 0.0)
    missing = result.sensitivity.unmeasured
    if any(m.cut for m in found):
        done = f"{len(result.sensitivity)} of {len(result.sensitivity) + len(missing)} layers"
        text = (
            f"timeout={tune_config.timeout} s was over while the damage of layers was measured: that of {done} is known"
        )
        warnings.warn(text, IncWarning, stacklevel=6)
    elif missing:
        shown = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        text = f"the damage of {len(missing)} layers cannot be measured, so they are the last to be left float"
        warnings.warn(f"{text}: {shown}", IncWarning, stacklevel=6)
    return (yield from search(result.sensitivity, kept))


def _until_done(
    plans: Plans, tune_config: TuningConfig, result: TuningResult, over: Callable[[], bool]
) -> Iterator[Plan]:
    """The plans, as long as the search goes on; leaves the reason why it stopped."""
    plan = _next(plans, None)
    while isinstance(plan, Plan):
        if len(result.trials) >= tune_config.max_trials:
            result.reason = f"max_trials={tune_config.max_trials} is reached"
            return
        if result.trials and over():
            result.reason = f"timeout={tune_config.timeout} s is over"
            return
        yield plan
        trial = result.trials[-1]
        loss = math.inf if trial.score is None else result.loss(trial.score)
        plan = _next(plans, Outcome(trial.accepted, loss))
    result.reason = plan


def _next(plans: Plans, outcome: Outcome | None) -> Plan | str:
    try:
        return plans.send(outcome)  # type: ignore[arg-type]
    except StopIteration as end:
        return str(end.value)


def _journal(tune_config: TuningConfig, model: nn.Module, scope: str, evaluator: Evaluator) -> Journal | None:
    if tune_config.journal is not None:
        return Journal(tune_config.journal, search_of(model, scope, evaluator))
    if options.folder is None:
        return None
    return journal_in(options.folder, search_of(model, scope, evaluator), options.resume_from is not None)


def _arguments(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)
