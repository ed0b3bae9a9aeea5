"""What the public functions give: backends, the report, inputs and outputs of every form."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import inc_graph.quantization
from inc_graph.errors import CaptureError, ConfigError, IncError
from inc_graph.export import export
from inc_graph.graph import get_level
from inc_graph.quantization import (
    StaticQuantConfig,
    convert,
    prepare,
    quantize,
)
from inc_graph.text import to_text
from tests import api_models
from tests.api_models import DYNAMIC, calibrated, close, kinds

model, data, no_grad = api_models.model, api_models.data, api_models.no_grad  # fixtures


# ------------------------------------------------------------------------------------- backends, reference and report
def test_reference_and_backends(model: nn.Module, data: list[Tensor]) -> None:
    prepared = calibrated(model, data)
    q, reference, eager = convert(prepared), convert(prepared, reference=True), convert(prepared, backend="eager")
    assert (q.backend, reference.backend, eager.backend) == ("inductor", "eager", "eager")
    assert torch.equal(reference(data[0]), eager(data[0])) and torch.equal(reference(data[0]), q.graph(data[0]))
    assert close(reference(data[0]), q(data[0]), 45)  # one rounding step here and there
    assert not reference.report.kernels and len(reference.report.reference) == len(q.report.kernels)
    assert get_level(q.graph) == "qdq" and get_level(q.lowered) == "lowered"
    with pytest.raises(ConfigError, match="reference=True runs on no backend"):
        convert(prepared, backend="inductor", reference=True)
    aimed = calibrated(model, data, backend="eager")
    assert convert(aimed).backend == "eager" and len(kinds(convert(aimed))) == 5  # matmuls too: no table limits it
    assert all(v == "reference" for v in kinds(convert(aimed)).values())


def test_the_graph_can_be_edited(model: nn.Module, data: list[Tensor]) -> None:
    q = convert(calibrated(model, data))
    want, before, graph = q(data[0]), to_text(q.graph), q.graph
    for name, codes in graph.named_buffers():
        if name.endswith("_q"):
            codes.zero_()
    for node in list(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)):
        node.replace_all_uses_with(node.args[0])
    graph.recompile()
    assert not torch.equal(graph(data[0]), q.graph(data[0]))
    assert torch.equal(q(data[0]), want) and to_text(q.graph) == before


def test_report(model: nn.Module, data: list[Tensor]) -> None:
    q = convert(calibrated(model, data))
    report = q.report
    assert (report.method, report.backend) == ("static_quant", "inductor")
    assert report.bytes_before == sum(p.numel() * 4 for p in model.parameters()) and report.bytes_after > 0
    assert {t[0] for t in report.timings} >= {"annotate", "insert-observers", "convert-qdq", "lower"}
    assert json.loads(json.dumps(report.to_json()))["kernels"][0]["module"] == "fc1"
    assert "3 operators in int8 kernels" in repr(q) and "int8 linear" in str(report)
    before = str(report)
    prepared = prepare(model, StaticQuantConfig(), inplace=False)
    prepared(data[0])
    assert convert(prepared).report.count("linear") == 3 and str(report) == before


def test_weights_take_a_quarter() -> None:
    model, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval(), torch.randn(4, 256)
    for options in ({"example_inputs": x}, {}):
        q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, **options)
        assert 0.25 < q.report.bytes_after / q.report.bytes_before < 0.27


def test_a_converted_model_stays_as_it_is(model: nn.Module, data: list[Tensor]) -> None:
    q = convert(calibrated(model, data))
    want = q(data[0])
    assert not q.training and q.eval() is q
    for bad in (q.train, q.half, q.bfloat16, q.double, lambda: q.to("meta"), lambda: q.to(torch.float16)):
        with pytest.raises(IncError, match="converted model cannot"):
            bad()
    assert q.to("cpu") is q and q.float() is q and q.cpu() is q and torch.equal(q(data[0]), want)


# --------------------------------------------------------------------------------------------- inputs and outputs
@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


torch.export.register_dataclass(Output)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, batch: dict[str, Any], pair: tuple[Tensor, list[Tensor]], flag: bool = True) -> Any:
        h = torch.tanh(self.fc(batch["x"] + pair[0]) + pair[1][0])
        return Output(self.out(h), (h,)) if flag else {"y": [self.out(h)], "n": (None, 3)}


@pytest.mark.parametrize("flag", [True, False])
def test_nested_inputs_and_outputs(flag: bool) -> None:
    torch.manual_seed(0)
    model = Nested().eval()

    def make() -> tuple[Any, ...]:
        return {"x": torch.randn(3, 8), "unused": torch.ones(3)}, (torch.randn(3, 8), [torch.randn(3, 8)]), flag

    batches = [make() for _ in range(4)]
    prepared = prepare(model, StaticQuantConfig(), example_inputs=batches[0])
    for batch in batches:
        assert pytree.tree_structure(prepared(*batch)) == pytree.tree_structure(model(*batch))
    q = convert(prepared)
    want, got = model(*batches[0]), q(*batches[0])
    assert type(got) is type(want) and pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        assert close(a, b) if isinstance(a, Tensor) else a == b
    with pytest.raises(IncError, match="captured as the constant"):
        q(*batches[0][:2], not flag)


def test_model_outputs_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.fc = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            h = self.emb(input_ids)
            return outputs.SequenceClassifierOutput(logits=self.fc(h.mean(1)), hidden_states=(h,))

    model, x = Classifier().eval(), torch.randint(20, (2, 5))
    q = quantize(model, StaticQuantConfig(), lambda m: m(input_ids=x), example_inputs={"input_ids": x})
    out = q(input_ids=x)
    assert type(out) is outputs.SequenceClassifierOutput and close(out.logits, model(x).logits)
    assert out.hidden_states[0].shape == (2, 5, 8) and out.loss is None


def test_dynamic_batch_and_sequence() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    prepared = prepare(
        model, StaticQuantConfig(), example_inputs=torch.randint(20, (2, 5)), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},)
    )
    for shape in ((1, 1), (2, 5), (4, 7), (1, 30)):
        prepared(torch.randint(20, shape))
    q = convert(prepared)
    for shape in ((1, 1), (3, 9), (16, 2), (0, 4), (5, 0)):
        x = torch.randint(20, shape)
        assert q(x).shape == (*shape, 16) and (x.numel() == 0 or close(model(x), q(x), 20))
    image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).eval()
    shapes = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    prepared = prepare(image, StaticQuantConfig(), example_inputs=torch.randn(2, 3, 16, 16), dynamic_shapes=shapes)
    sizes = [(1, 3, 16, 16), (4, 3, 9, 20)]
    for size in sizes:
        prepared(torch.randn(size))
    q = convert(prepared)
    for size in (*sizes, (3, 3, 31, 8)):
        x = torch.randn(size)
        assert close(image(x), q(x), 20)


@pytest.mark.parametrize("exported", [True, False])
def test_prepared_and_converted_models_are_not_pickled(model: nn.Module, data: list[Tensor], exported: bool) -> None:
    prepared = prepare(model, StaticQuantConfig(), example_inputs=data[0] if exported else None)
    prepared(data[0])
    converted = [convert(prepared, inplace=False, backend=b) for b in (None, "eager")]
    graphs = [q.graph for q in converted] if exported else []
    for thing in (prepared, copy.deepcopy(prepared), *converted, *graphs):
        for save in (lambda t=thing: pickle.dumps(t), lambda t=thing: torch.save(t, io.BytesIO())):
            with pytest.raises(pickle.PicklingError, match=r"cannot be pickled(.|\n)*save\(q_model, folder") as e:
                save()
            assert isinstance(e.value, IncError)
    for q in converted:
        assert torch.equal(copy.copy(q)(data[0]), q(data[0])) and torch.equal(copy.deepcopy(q)(data[0]), q(data[0]))


def test_calibration_leaves_the_buffers_of_the_original_graph_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.fc(x) + self.calls

    graph, x = export(Counts().eval(), torch.randn(2, 4)), torch.randn(2, 4)
    q = quantize(graph, StaticQuantConfig(), lambda p: [p(x) for _ in range(3)])
    assert graph.calls == 0
    q(x)
    assert graph.calls == 0 and q.graph.calls == 1


def test_what_the_hint_says_about_saving_is_true(model: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    q_model, folder = convert(calibrated(model, data)), tmp_path
    inc_graph.quantization.save(q_model, folder)
    assert torch.equal(inc_graph.quantization.load(folder)(data[0]), q_model(data[0]))


def test_the_graph_goes_through_torchs_own_files(model: nn.Module, data: list[Tensor]) -> None:
    q, file = convert(calibrated(model, data)), io.BytesIO()
    torch.export.save(torch.export.export(q.graph, (data[0],)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(data[0]), q.graph(data[0]))


class Running(nn.Module):
    """Subtracts a running mean of detached activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.mean.mul_(0.9).add_(y.detach().mean(0) * 0.1)
        return self.b(y - self.mean)


def test_buffers_take_no_history_at_any_stage(data: list[Tensor]) -> None:
    model = Running().eval()
    with torch.enable_grad():
        prepared = prepare(export(model, data[0]), StaticQuantConfig())
        for x in data:
            prepared(x)
        q = convert(copy.deepcopy(prepared))
        q(data[0]), q(data[0])
        for stage in (prepared, copy.deepcopy(prepared), q, q.graph, copy.deepcopy(q)):
            means = [b for name, b in stage.named_buffers() if name.endswith("mean")]
            assert means and not any(b.requires_grad for b in means)


def test_an_embedding_that_renormalizes_runs_with_gradients_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 16, max_norm=1.0), nn.Linear(16, 4)).eval()
    ids = torch.arange(6)
    with torch.enable_grad():
        try:
            graph = export(model, ids)
        except CaptureError as e:  # torch 2.8 exports no write to a parameter
            assert "mutation" in e.message
            return
        prepared = prepare(graph, StaticQuantConfig())
        prepared(ids)
        assert close(model(ids), convert(prepared)(ids))
    assert model[0].weight.requires_grad


def test_nothing_is_warned_of_without_reason() -> None:
    """Warnings are for what the user can act on; torch's about its own later releases are not."""
    program = """
import torch, warnings
from torch import nn
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare
warnings.simplefilter("error")
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)).eval()
x = torch.randn(2, 3, 8, 8)
prepared = prepare(export(model, (x,)), StaticQuantConfig())
prepared(x)
print(convert(prepared)(x).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([2, 2])\n", "")
