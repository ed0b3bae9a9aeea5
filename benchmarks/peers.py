"""The contestants of static_int8: this library and others, each behind one function that imports what it needs.

A contestant takes a :class:`Task` and returns a :class:`Peer`, whose ``run`` maps the model's input tensors to its
output tensor for any batch size. All get the same float model, the same calibration batches and two threads; what a
contestant cannot do it raises, and that becomes its row.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

THREADS = 2
Run = Callable[..., Tensor]


class NotApplicable(Exception):
    """The contestant does not run in this task; it gets no row."""


@dataclass(frozen=True)
class Task:
    """A float model in eval mode, its calibration batches, the names of its inputs; axis 0 of each is the batch."""

    name: str
    model: nn.Module
    calibration: list[tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    transformer: bool = False


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


def ours(task: Task, *, compiled: bool = False, **options: Any) -> Peer:
    """``options`` are fields of StaticQuantConfig."""
    from inc_graph.export import export
    from inc_graph.quantization import StaticQuantConfig, convert, prepare

    exported = export(task.model, task.calibration[0], dynamic_shapes=_dynamic(task))
    prepared = prepare(exported, StaticQuantConfig(**options))
    for batch in task.calibration:
        prepared(*batch)
    model = convert(prepared)
    note = ", ".join(f"{k}={v}" for k, v in options.items())
    if compiled:
        return Peer(_compile(model), "torch.compile, frozen")
    return Peer(model, note)


def ours_compiled(task: Task) -> Peer:
    return ours(task, compiled=True)


def ours_best(task: Task) -> Peer:
    return ours(task, act_algo="histogram_mse", w_algo="mse", bias_correction=True)


OURS = "inc_graph"
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
    f"{OURS}, best options": ours_best,
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
