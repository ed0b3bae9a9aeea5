"""`autotune`: try configs until the quantized model is good enough, and give back the best."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inc_graph.common.logger import TuningLogger, logger
from inc_graph.common.options import options
from inc_graph.errors import CaptureError, ConfigError, IncError, IncWarning
from inc_graph.export import example_call, export
from inc_graph.quantization.api import quantize
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.journal import Journal
from inc_graph.quantization.tuning_config import ConfigLoader, Evaluator, TuningConfig
from inc_graph.report import attribute_bytes
from inc_graph.utils.progress import progress

__all__ = ["Trial", "TuningResult", "autotune"]


@dataclass(frozen=True)
class Trial:
    """One config that was tried.

    Attributes:
        index: From 0, in the order they were tried.
        config: What was tried.
        score: What `eval_fn` gave, None if the model could not be quantized so.
        accepted: Whether the score is within the tolerance.
        bytes: Of the weights and buffers of the result.
        milliseconds: One call on the example inputs, None without example inputs.
        seconds: To calibrate, convert and evaluate.
        error: Why the model could not be quantized so.
    """

    index: int
    config: BaseConfig
    score: float | None = None
    accepted: bool = False
    bytes: int = 0
    milliseconds: float | None = None
    seconds: float = 0.0
    error: str = ""


@dataclass
class TuningResult:
    """What `autotune` found: the attribute `tuning` of the model it returns. Prints as a table.

    Attributes:
        baseline: Score of the float model.
        limit: The worst score that is within the tolerance.
        higher_is_better: Whether a larger score is better.
        trials: All of them, in the order they were tried.
        best: The one that the returned model comes from.
        reason: Why the search stopped.
    """

    baseline: float
    limit: float
    higher_is_better: bool
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    reason: str = ""

    def pareto(self) -> list[Trial]:
        """The trials that no other one beats in score, bytes and time at once, the smallest first."""
        done = [t for t in self.trials if t.score is not None and t.score == t.score]
        front = [t for t in done if not any(_dominates(o, t, self.higher_is_better) for o in done)]
        return sorted(front, key=lambda t: t.bytes)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"tuning: {self.reason}", title_justify="left")
        for name in ("trial", "score", "bytes", "ms", "seconds"):
            table.add_column(name, justify="right")
        table.add_column("config", overflow="fold")
        table.add_column("")
        table.add_row(
            "float", f"{self.baseline:.6g}", "", "", "", "", f"within tolerance: {self._sign} {self.limit:.6g}"
        )
        front = self.pareto()
        for t in self.trials:
            notes = ["best"] * (t is self.best) + ["accepted"] * t.accepted + ["Pareto"] * (t in front)
            score = "-" if t.score is None else f"{t.score:.6g}"
            size, ms = f"{t.bytes:,}" if t.bytes else "-", "-" if t.milliseconds is None else f"{t.milliseconds:.2f}"
            row = (str(t.index), score, size, ms, f"{t.seconds:.1f}", str(t.config), t.error or ", ".join(notes))
            table.add_row(*row)
        return table

    @property
    def _sign(self) -> str:
        return ">=" if self.higher_is_better else "<="

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=140, force_terminal=False)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def _dominates(a: Trial, b: Trial, higher_is_better: bool) -> bool:
    def costs(t: Trial) -> tuple[float, ...]:
        score = float(t.score or 0)
        return (-score if higher_is_better else score, t.bytes, t.milliseconds or 0.0)

    return a is not b and costs(a) != costs(b) and all(x <= y for x, y in zip(costs(a), costs(b), strict=True))


def autotune(
    model: nn.Module,
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
        model: A module in eval mode, or a graph from `export`.
        tune_config: What to try and when to stop.
        eval_fn: `eval_fn(model, *eval_args) -> number`; or {"eval_fn": f, "weight": 1.0, "name": "accuracy"}; or a list
            of such dictionaries, whose sum counts. Called with the float model first.
        eval_args: Tuple of further arguments of `eval_fn`.
        run_fn: `run_fn(prepared, *run_args)` runs calibration data through a prepared model.
        run_args: Tuple of further arguments of `run_fn`.
        example_inputs: Tuple, tensor or dict: the model is exported, once, and the trials are timed on them.
        dynamic_shapes: As for `torch.export.export`; only with `example_inputs`.

    Returns:
        The quantized model; its attribute `tuning` is the `TuningResult`. A warning says so if it is not within the
        tolerance.

    Raises:
        ConfigError: an argument makes no sense.
        IncError: no config could be applied to the model; gives the reasons.
        Whatever `eval_fn` and `run_fn` raise.
    """
    if not isinstance(tune_config, TuningConfig):
        raise ConfigError(f"tune_config must be a TuningConfig, not {tune_config!r}")
    evaluator = Evaluator(eval_fn, tune_config.higher_is_better)
    configs = ConfigLoader(tune_config.config_set, tune_config.sampler)
    more = _arguments(eval_args)
    TuningLogger.tuning_start()
    start = time.perf_counter()
    journal = _journal(tune_config, model)
    known = None if journal is None else journal.baseline
    baseline = evaluator.evaluate(model, *more) if known is None else known
    if baseline != baseline:
        raise ConfigError("the score of the float model is NaN, so nothing can be compared to it")
    result = TuningResult(baseline, tune_config.limit(baseline), tune_config.higher_is_better)
    if journal is not None:
        journal.begin(baseline)
    source, inputs = _exported(model, example_inputs, dynamic_shapes)
    best: nn.Module | None = None
    with progress("autotune", min(len(configs.config_set), tune_config.max_trials)) as step:
        for config in _until_done(configs, tune_config, result, start):
            step(str(config))
            noted = None if journal is None else journal.known(config)
            found = None
            if noted is not None:
                trial = Trial(len(result.trials), config, **noted)
            else:
                trial, found = _try(len(result.trials), config, source, inputs, example_inputs, run_fn, run_args,
                                    lambda q: evaluator.evaluate(q, *more))  # fmt: skip
                if journal is not None and trial.score is not None:  # what failed may work once its cause is gone
                    journal.note(config, {k: getattr(trial, k) for k in _NOTED})
            if trial.score is not None:
                trial = replace(trial, accepted=tune_config.accepts(trial.score, baseline))
            result.trials.append(trial)
            if trial.score is not None and _improves(trial, result.best, evaluator):
                result.best, best = trial, found
            del found
    TuningLogger.tuning_end()
    if result.best is None:
        reasons = "; ".join(dict.fromkeys(t.error for t in result.trials))
        raise IncError(f"none of {len(result.trials)} configs could be applied: {reasons}")
    if best is None:  # it comes from the journal
        best = quantize(source, result.best.config, run_fn, run_args, inplace=False, example_inputs=inputs)
    logger.info("%s", result)
    if not result.best.accepted:
        text = f"no config met the tolerance: the best score is {result.best.score:.6g}, wanted {result._sign} "
        warnings.warn(f"{text}{result.limit:.6g} (float: {baseline:.6g})", IncWarning, stacklevel=2)
    best.tuning = result  # type: ignore[assignment]
    return best


def _improves(trial: Trial, best: Trial | None, evaluator: Evaluator) -> bool:
    if best is None or best.score is None or trial.score is None:
        return True
    return evaluator.better(trial.score, best.score)


def _until_done(
    configs: ConfigLoader, tune_config: TuningConfig, result: TuningResult, start: float
) -> Iterator[BaseConfig]:
    """The configs, as long as the search goes on; leaves the reason why it stopped."""
    for config in configs:
        if result.trials and result.trials[-1].accepted:
            result.reason = "a config meets the tolerance"
            return
        if len(result.trials) >= tune_config.max_trials:
            result.reason = f"max_trials={tune_config.max_trials} is reached"
            return
        if tune_config.timeout is not None and result.trials and time.perf_counter() - start > tune_config.timeout:
            result.reason = f"timeout={tune_config.timeout} s is over"
            return
        yield config
    met = bool(result.trials) and result.trials[-1].accepted
    result.reason = "a config meets the tolerance" if met else "all configs are tried"


def _try(
    index: int, config: BaseConfig, source: nn.Module, inputs: Any, example_inputs: Any, run_fn: Any, run_args: Any,
    evaluate: Callable[[nn.Module], float],
) -> tuple[Trial, nn.Module | None]:  # fmt: skip
    TuningLogger.trial_start(index)
    start = time.perf_counter()
    try:
        q_model = quantize(source, config, _passing(run_fn), run_args, inplace=False, example_inputs=inputs)
    except _FromUser as e:
        raise e.error from e.error.__cause__
    except (IncError, NotImplementedError) as e:
        logger.warning("trial %s, %s: %s", index, config, e)
        return Trial(index, config, error=str(e).splitlines()[0], seconds=time.perf_counter() - start), None
    score = evaluate(q_model)
    ms = None if example_inputs is None else _milliseconds(q_model, example_inputs)
    TuningLogger.trial_end(index)
    seconds = time.perf_counter() - start
    return Trial(index, config, score, bytes=attribute_bytes(q_model), milliseconds=ms, seconds=seconds), q_model


_NOTED = ("score", "bytes", "milliseconds", "seconds")  # of a trial, in the journal


def _journal(tune_config: TuningConfig, model: nn.Module) -> Journal | None:
    if tune_config.journal is not None:
        return Journal(tune_config.journal, model)
    return None if options.folder is None else Journal(Path(options.folder) / "autotune.jsonl", model)


class _FromUser(BaseException):
    """Carries what the user's function raised past what a trial may fail with."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _passing(run_fn: Any) -> Any:
    if not callable(run_fn):
        return run_fn

    def run(*args: Any) -> Any:
        try:
            return run_fn(*args)
        except Exception as e:
            raise _FromUser(e) from None

    return run


def _exported(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> tuple[nn.Module, Any]:
    """The model to start from, and the example inputs that `quantize` still needs."""
    if example_inputs is None or (isinstance(model, torch.fx.GraphModule) and "inc" in model.meta):
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


def _arguments(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)
