"""The contestants of static_int8: this library and others, each behind one function that imports what it needs.

A contestant takes a :class:`Task` and returns a :class:`Peer`, whose ``run`` maps the model's input tensors to its
output tensor for any batch size. All get the same float model, the same calibration batches and two threads; what a
contestant cannot do it raises, and that becomes its row.

Options of this library are chosen on calibration data only: every other batch estimates the ranges, the rest judges.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_models import sqnr_db

THREADS = 2
Run = Callable[..., Tensor]


class NotApplicable(Exception):
    """The contestant does not run in this task; it gets no row."""


@dataclass(frozen=True)
class Task:
    """A float model in eval mode, its calibration batches, the names of its inputs; axis 0 of each is the batch.

    ``compare(output, inputs)`` gives what two models are compared by; ``quick`` asks for a short search of options.
    """

    name: str
    model: nn.Module
    calibration: list[tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    transformer: bool = False
    compare: Callable[[Tensor, tuple[Tensor, ...]], Tensor] = lambda output, inputs: output
    quick: bool = False


@dataclass(frozen=True)
class Peer:
    run: Run
    note: str = ""


def eager(task: Task) -> Peer:
    return Peer(task.model)


def inductor(task: Task) -> Peer:
    return Peer(_compile(copy.deepcopy(task.model)))  # freezing takes the parameters out of the module it compiles


def torchao_x86(task: Task) -> Peer:
    """PT2E with the quantizer for x86, compiled; if that fails its Q-DQ model itself runs, and the row says so."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(task.model, task.calibration[0], dynamic_shapes=_dynamic(task)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for batch in task.calibration:
        prepared(*batch)
    model = convert_pt2e(prepared)
    anchors = [n for n in model.graph.nodes if str(n.target).startswith(("aten.conv", "aten.linear"))]
    taken = sum("dequantize" in str(n.args[0]) and "dequantize" in str(n.args[1]) for n in anchors)
    note = f"{taken} of {len(anchors)} conv and linear quantized"
    compiled = _compile(model)
    try:
        compiled(*task.calibration[0])
    except Exception as error:
        return Peer(model, f"{note}; not compiled: {reason(error)}")
    return Peer(compiled, note)


def onnxruntime_fp32(task: Task) -> Peer:
    with tempfile.TemporaryDirectory() as folder:
        return Peer(_session(task, _to_onnx(task, Path(folder))))


def onnxruntime_static(task: Task) -> Peer:
    return _onnxruntime_static(task, "defaults")


def onnxruntime_static_inputs(task: Task) -> Peer:
    """Only the inputs of MatMul and Gemm; the default, sums and norms too, is not for transformers."""
    if not task.transformer:
        raise NotApplicable
    anchors = ["MatMul", "Gemm"]
    return _onnxruntime_static(
        task,
        "only the inputs of MatMul",
        op_types_to_quantize=anchors,
        extra_options={"OpTypesToExcludeOutputQuantization": anchors},
    )


def _onnxruntime_static(task: Task, note: str, **options: Any) -> Peer:
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(task.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(task.inputs, (x.numpy() for x in batch), strict=True))

    with tempfile.TemporaryDirectory() as folder:
        path = _prepared_onnx(task, Path(folder))
        target = Path(folder) / "int8.onnx"
        q.quantize_static(
            path,
            target,
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            **options,
        )
        return Peer(_session(task, target), f"QDQ, per channel, min-max, {note}")


def onnxruntime_dynamic(task: Task) -> Peer:
    from onnxruntime import quantization as q

    if not task.transformer:
        raise NotApplicable
    with tempfile.TemporaryDirectory() as folder:
        path = _prepared_onnx(task, Path(folder))
        target = Path(folder) / "int8.onnx"
        q.quantize_dynamic(path, target, per_channel=True, weight_type=q.QuantType.QInt8)
        return Peer(_session(task, target), "per channel")


def openvino_nncf(task: Task) -> Peer:
    return _openvino(task, {})


def openvino_nncf_fp32(task: Task) -> Peer:
    """With float32 between the int8 operators: OpenVINO's default is bfloat16 where the processor has it."""
    return _openvino(task, {"INFERENCE_PRECISION_HINT": "f32"})


def ours(task: Task) -> Peer:
    """Called directly, without torch.compile."""
    model = _quantized(task, _exported(task), {}, task.calibration)
    return Peer(model, f"{_described({})}; {_kernels(model)}")


def ours_compiled(task: Task) -> Peer:
    model = _quantized(task, _exported(task), {}, task.calibration)
    return Peer(_compile(model), "the same model under torch.compile, frozen")


def ours_best(task: Task) -> Peer:
    exported = _exported(task)
    tried, options, found = search(task, exported)
    model = _quantized(task, exported, options, task.calibration)
    note = f"best of {tried} on held-out calibration data ({found:.1f} dB there): {_described(options)}"
    return Peer(model, f"{note}; {_kernels(model)}")


ESTIMATORS = (
    "minmax",
    "histogram_mse",
    "moving_average",
    "percentile{percent=99.999}",
    "percentile{percent=99.99}",
    "kl",
)


def search(task: Task, exported: Any) -> tuple[int, dict[str, Any], float]:
    """(tried, the best options of static INT8, their SQNR in dB): first the activations' ranges, then the rest.

    Even calibration batches estimate the ranges, odd ones judge; evaluation data takes no part.
    """
    fit, judge = task.calibration[0::2], task.calibration[1::2]

    def outputs(run: Run) -> Tensor:
        return torch.cat([task.compare(run(*batch), batch) for batch in judge])

    reference = outputs(task.model)
    scores: dict[tuple[tuple[str, Any], ...], float] = {}

    def best(candidates: Iterator[dict[str, Any]]) -> dict[str, Any]:
        for options in candidates:
            key = tuple(sorted(options.items()))
            if key not in scores:
                scores[key] = sqnr_db(reference, outputs(_quantized(task, exported, options, fit)))
        return dict(max(scores, key=scores.__getitem__))

    estimators = ESTIMATORS[:2] if task.quick else ESTIMATORS
    first = best({"act_algo": a} for a in estimators)
    if not task.quick:
        pairs = [(w, b) for w in ("minmax", "mse") for b in (True, False)]
        first = best({**first, **_changed(w_algo=w, bias_correction=b)} for w, b in pairs)
    return len(scores), first, max(scores.values())


def _changed(**options: Any) -> dict[str, Any]:
    from inc_graph.quantization import StaticQuantConfig

    defaults = StaticQuantConfig().get_params_dict()
    return {k: v for k, v in options.items() if v != defaults[k]}


def _described(options: dict[str, Any]) -> str:
    from inc_graph.quantization import StaticQuantConfig

    values = StaticQuantConfig(**options).get_params_dict()
    shown = ("act_dtype", "act_algo", "w_dtype", "w_granularity", "w_algo", "bias_correction")
    return ", ".join(f"{k}={values[k]}" for k in shown)


def _kernels(model: Any) -> str:
    kinds = Counter(line.op for line in model.report.kernels)
    return f"in int8 kernels: {', '.join(f'{n} {op}' for op, n in kinds.items())}"


def _exported(task: Task) -> Any:
    from inc_graph.export import export

    return export(task.model, task.calibration[0], dynamic_shapes=_dynamic(task))


def _quantized(task: Task, exported: Any, options: dict[str, Any], data: list[tuple[Tensor, ...]]) -> nn.Module:
    """``options`` are fields of StaticQuantConfig; ``exported`` stays as it is."""
    from inc_graph.quantization import StaticQuantConfig, convert, prepare

    prepared = prepare(exported, StaticQuantConfig(**options), inplace=False)
    for batch in data:
        prepared(*batch)
    return convert(prepared)


OURS = "inc_graph, defaults"
CONTESTANTS: dict[str, Callable[[Task], Peer]] = {
    "torch fp32 eager": eager,
    "inductor fp32 frozen": inductor,
    "onnxruntime fp32": onnxruntime_fp32,
    "torchao x86 int8": torchao_x86,
    "onnxruntime static int8": onnxruntime_static,
    "onnxruntime static int8, inputs": onnxruntime_static_inputs,
    "onnxruntime dynamic int8": onnxruntime_dynamic,
    "OpenVINO + NNCF int8": openvino_nncf,
    "OpenVINO + NNCF int8, rest fp32": openvino_nncf_fp32,
    OURS: ours,
    f"{OURS}, compiled": ours_compiled,
    "inc_graph, best options": ours_best,
}


def reason(error: BaseException, width: int = 160) -> str:
    """Type and first line of an error, for a cell of the table."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:width]


def _compile(model: nn.Module) -> Run:
    """torch.compile with frozen weights, one static shape at a time: the fastest inductor does.

    Freezing is set for the process: torchao's int8 patterns do not compile when it is given as an option of one call.
    """
    import torch._inductor.config as config

    config.freezing = True
    return torch.compile(model, dynamic=False)


def _dynamic(task: Task) -> tuple[dict[int, Any], ...]:
    return tuple({0: torch.export.Dim("batch", min=1, max=256)} for _ in task.inputs)


def _to_onnx(task: Task, folder: Path) -> Path:
    path = folder / "float.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks on constants
        torch.onnx.export(
            task.model,
            task.calibration[0],
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=list(task.inputs),
            output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in (*task.inputs, "output")},
        )
    return path


def _prepared_onnx(task: Task, folder: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.onnx"
    quant_pre_process(_to_onnx(task, folder), path)
    return path


def _session(task: Task, path: Path) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    # Threads that spin after the last operator would slow whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        feed = dict(zip(task.inputs, (x.numpy() for x in inputs), strict=True))
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _openvino(task: Task, config: dict[str, str]) -> Peer:
    import logging

    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    example = task.calibration[0]
    model = openvino.convert_model(task.model, example_input=example if len(example) > 1 else example[0])
    for node, name in zip(model.inputs, task.inputs, strict=True):
        node.get_tensor().set_names({name})
    dataset = nncf.Dataset(
        task.calibration, lambda batch: dict(zip(task.inputs, (x.numpy() for x in batch), strict=True))
    )
    quantized = nncf.quantize(
        model,
        dataset,
        subset_size=len(task.calibration),
        model_type=nncf.ModelType.TRANSFORMER if task.transformer else None,
    )
    core = openvino.Core()
    by_shape: dict[tuple[int, ...], Any] = {}

    def run(*inputs: Tensor) -> Tensor:
        key = tuple(inputs[0].shape)
        if key not in by_shape:  # static shapes are the faster ones
            static = quantized.clone()
            static.reshape({name: list(x.shape) for name, x in zip(task.inputs, inputs, strict=True)})
            settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", **config}
            by_shape[key] = core.compile_model(static, "CPU", settings)
        result = by_shape[key](dict(zip(task.inputs, (x.numpy() for x in inputs), strict=True)))
        return torch.from_numpy(result[0])

    return Peer(run, "NNCF defaults" + "".join(f", {k}={v}" for k, v in config.items()))
