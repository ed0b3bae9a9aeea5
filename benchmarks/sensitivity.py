"""The sensitivity strategy of autotune on EfficientNet-Lite0: ``python -m benchmarks.sensitivity [--one-by-one]``.

Top-1 of 20 photographs has steps of 5 %, so the metric is the mean Kullback-Leibler divergence of the predicted
classes from those of the float model (nats; 0 for the float model). It is taken on 20 random crops that are not among
the calibration images, and the tolerance is 0.001 in absolute terms. The whole photographs, on which nothing was
chosen, judge the results: the same metric, SQNR of the logits, top-1.

``--one-by-one`` adds what the strategy replaces: the metric itself for each layer alone left float, the layers ordered
by what that gains, and as many of them float as the tolerance needs. It takes some minutes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import real_models as rm
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, TuningConfig, autotune, quantize

TOLERANCE = 0.001  # nats


@dataclass
class Row:
    """One way to quantize: the metric that it was chosen by, and what the photographs say."""

    name: str
    score: float
    floats: int
    evaluations: int
    seconds: float
    kl: float
    db: float
    top1: int
    bytes: int = 0


@dataclass
class Result:
    rows: dict[str, Row]  # "float", "plain", "sensitivity", perhaps "one by one"
    layers: int
    names: tuple[str, ...]  # of the layers that the strategy left float
    measuring: float  # seconds of the strategy's that measuring the layers took

    def table(self) -> Table:
        table = Table(title=f"EfficientNet-Lite0, mean KL on crops <= {TOLERANCE}", title_justify="left")
        table.add_column("static INT8")
        for name in ("KL on crops", f"float of {self.layers}", "evaluations", "s", "KL", "dB", "top-1 of 20", "bytes"):
            table.add_column(name, justify="right")
        for r in self.rows.values():
            judged = (f"{r.kl:.5f}", f"{r.db:.1f}", str(r.top1), f"{r.bytes:,}")
            table.add_row(r.name, f"{r.score:.5f}", str(r.floats), str(r.evaluations), f"{r.seconds:.1f}", *judged)
        return table


def divergence(model: Callable[[Tensor], Tensor], images: Tensor, reference: Tensor) -> float:
    """Mean KL divergence in nats of the model's classes from those of ``reference`` (logits of the same images)."""
    have, want = model(images).log_softmax(-1), reference.log_softmax(-1)
    return float(nn.functional.kl_div(have, want, reduction="batchmean", log_target=True))


class Task:
    """The model, the images, and the metric, which counts its calls."""

    def __init__(self, calibration: int) -> None:
        model, self.photographs, self.labels = rm.efficientnet_lite0()
        self.calibration = rm.calibration_images(calibration).split(4)
        self.crops = rm.calibration_images(20, seed=1)
        shapes = ({0: torch.export.Dim("batch", min=1, max=256)},)
        self.model = export(model, (self.calibration[0],), dynamic_shapes=shapes)
        self.logits, self.crop_logits = self.model(self.photographs), self.model(self.crops)
        self.evaluations = 0

    def calibrate(self, prepared: nn.Module) -> None:
        for batch in self.calibration:
            prepared(batch)

    def metric(self, model: nn.Module) -> float:
        self.evaluations += 1
        return divergence(model, self.crops, self.crop_logits)

    def leaving(self, names: Sequence[str]) -> nn.Module:
        """Quantized but for these layers."""
        config = StaticQuantConfig()
        if names:
            config.set_local(list(names), StaticQuantConfig(w_dtype="fp32"))
        return quantize(self.model, config, self.calibrate)

    def row(self, name: str, model: nn.Module, score: float, floats: int, evaluations: int, start: float) -> Row:
        seconds = time.perf_counter() - start
        logits = model(self.photographs)
        kl, db = divergence(model, self.photographs, self.logits), rm.sqnr_db(self.logits, logits)
        size = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
        size = model.report.bytes_after if hasattr(model, "report") else size  # packed layers are no tensors
        return Row(name, score, floats, evaluations, seconds, kl, db, rm.top_k(logits, self.labels), size)


@torch.no_grad()
def efficientnet(one_by_one: bool = False, say: Callable[[str], object] = print, calibration: int = 40) -> Result:
    """Float, plain static INT8 and the strategy; with ``one_by_one`` also what it replaces.

    Each trial calibrates on so many images.
    """
    warnings.filterwarnings("ignore", module="copyreg")  # torch.export deprecates a class of its own
    task = Task(calibration)
    start = time.perf_counter()
    rows = {"float": task.row("none: float", task.model, 0.0, 0, 0, start)}
    plain = task.leaving(())
    rows["plain"] = task.row("all of it", plain, task.metric(plain), 0, 1, start)
    task.evaluations, start = 0, time.perf_counter()
    config = TuningConfig(
        StaticQuantConfig(), strategy="sensitivity", tolerable_loss=TOLERANCE, relative=False, higher_is_better=False
    )
    tuned = autotune(task.model, config, task.metric, run_fn=task.calibrate)
    result = tuned.tuning
    assert result.sensitivity is not None and result.best is not None and result.best.score is not None
    found = Result(rows, len(result.sensitivity), result.best.floats, result.sensitivity.seconds)
    rows["sensitivity"] = task.row(
        'strategy="sensitivity"', tuned, result.best.score, len(found.names), task.evaluations, start
    )
    say(str(result))
    if one_by_one:
        rows["one by one"] = _one_by_one(task, [layer.name for layer in result.sensitivity], say)
    return found


def _one_by_one(task: Task, names: list[str], say: Callable[[str], object]) -> Row:
    task.evaluations, start = 0, time.perf_counter()
    alone = {}
    for name in names:
        alone[name] = task.metric(task.leaving([name]))
        say(f"{name} float: {alone[name]:.5f}")
    order = sorted(names, key=alone.__getitem__)
    low, high = 0, len(names) - 1  # the plain model misses the tolerance
    best, score = None, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        model = task.leaving(order[:middle])
        value = task.metric(model)
        if value <= TOLERANCE:
            high, best, score = middle, model, value
        else:
            low = middle
    assert best is not None, "no number of float layers meets the tolerance"
    return task.row("one by one", best, score, high, task.evaluations, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--one-by-one", action="store_true", help="also evaluate every layer by itself; slow")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = efficientnet(options.one_by_one)
    console = Console(width=120)
    console.print(found.table())
    console.print(f"measuring the layers: {found.measuring:.1f} s; float: {', '.join(found.names)}")


if __name__ == "__main__":
    main()
