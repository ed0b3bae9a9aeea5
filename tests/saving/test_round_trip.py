"""What is loaded is what was saved: outputs bit for bit, report, recipe, text of the graph; again and again."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from inc_graph.errors import CaptureError, ConfigError, IncWarning, SavedModelError
from inc_graph.graph import fake_call
from inc_graph.lowering._onednn import HAS_OPAQUE
from inc_graph.quantization import QuantizedModel, StaticQuantConfig, load, prepare, quantize, save
from inc_graph.recipe import get_recipe
from inc_graph.text import to_text
from tests.saving.models import Net, Odd, Tied
from tests.saving.round_trip import CASES, call, converted, equal, folder_of


@pytest.mark.parametrize("name", [name for name in CASES if name != "shared buffers"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_graphs(name: str, weights: str, tmp_path: Path) -> None:
    q, inputs, _ = converted(name, StaticQuantConfig(w_dtype=weights))
    fresh = copy.deepcopy(q)  # written buffers go on where they were
    save(q, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, QuantizedModel) and loaded.backend == q.backend and not loaded.training
    assert to_text(loaded.graph, tensors=True, provenance=True) == to_text(q.graph, tensors=True, provenance=True)
    assert get_recipe(loaded.graph) == get_recipe(q.graph)
    for x in inputs:
        equal(call(loaded, x), call(fresh, x))
    old, new = q.report.to_json(), loaded.report.to_json()
    assert [t[0] for t in new.pop("timings")] == [t[0] for t in old.pop("timings")]
    assert new == old


@pytest.mark.parametrize(
    "name", ["net", "channels last", "tied", "branches", "written buffers", "shared buffers", "odd constants"]
)
def test_layers(name: str, tmp_path: Path) -> None:
    q, inputs, other = converted(name, exported=False)
    fresh = copy.deepcopy(q)
    q.save(tmp_path)
    loaded = load(tmp_path, original_model=other)
    assert loaded is other and type(loaded) is type(q)
    for x in inputs:
        equal(call(loaded, x), call(fresh, x))
    assert loaded.report.to_json() == q.report.to_json()
    assert {n: t.shape for n, t in loaded.named_buffers()} == {n: t.shape for n, t in q.named_buffers()}


def test_backends_can_be_changed(tmp_path: Path) -> None:
    q, (x, *_), _ = converted("net")
    save(q, tmp_path)
    slow = load(tmp_path, backend="eager")
    assert slow.backend == "eager" and not slow.report.kernels and slow.report.reference
    torch.testing.assert_close(call(slow, x)["logits"], call(q, x)["logits"], rtol=0.05, atol=0.05)
    equal(call(slow, x), q.graph(*x))
    slow.save(tmp_path)
    assert load(tmp_path).backend == "eager"  # what was saved for the reference stays there
    q, (x, *_), _ = converted("net", exported=False)
    q.save(tmp_path)
    assert load(tmp_path, Net(), backend="eager").report.backend == "eager"


# --------------------------------------------------------------------------------------------------- again and again
def test_saved_twice_and_from_what_was_loaded(tmp_path: Path) -> None:
    q, (x, *_), _ = converted("net")
    want = call(q, x)
    q.save(tmp_path / "a")
    before = folder_of(tmp_path / "a")
    q.save(tmp_path / "a")
    assert folder_of(tmp_path / "a") == before and len(before) == 3
    loaded = load(tmp_path / "a")
    loaded.save(tmp_path / "a")  # over the files that it is mapped from
    equal(call(loaded, x), want)
    copy.deepcopy(load(tmp_path / "a")).save(tmp_path / "b")
    equal(call(load(tmp_path / "b"), x), want)
    for name in folder_of(tmp_path / "b"):
        if name.startswith("model-"):
            assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_another_model_in_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    first, (x, *_), _ = converted("net")
    first.save(tmp_path)
    mapped = load(tmp_path)
    want = call(first, x)
    second, (ids, *_), other = converted("tied", exported=False)
    second.save(tmp_path)
    equal(call(mapped, x), want)  # its files are gone, what it has mapped is not
    equal(call(load(tmp_path, other), ids), call(second, ids))
    assert len(folder_of(tmp_path)) == 4 and (tmp_path / "notes.txt").read_text() == "mine"


def test_shards(tmp_path: Path) -> None:
    q, (x, *_), _ = converted("net")
    q.save(tmp_path, max_shard_size=300)
    shards = [f for f in folder_of(tmp_path) if f.endswith(".safetensors")]
    assert len(shards) > 2 and all(f"-of-{len(shards):05}" in f for f in shards)
    equal(call(load(tmp_path), x), call(q, x))
    q.save(tmp_path)
    assert len(folder_of(tmp_path)) == 3
    for bad in (0, -1, "2 apples", None, True):
        with pytest.raises(SavedModelError, match="max_shard_size must be a number of bytes"):
            q.save(tmp_path, max_shard_size=bad)


def test_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).eval()
    x = torch.randn(4, 512)
    for given in ({"example_inputs": x}, {}):
        q = quantize(copy.deepcopy(model), StaticQuantConfig(w_dtype="int4"), lambda p: p(x), **given)
        q.save(tmp_path)
        size = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
        assert size < 1.05 * (2 * 512 * 512 // 2 + 4 * 2 * 512 * 2)  # codes; biases and scales in float32
        loaded = load(tmp_path, copy.deepcopy(model))
        assert loaded.report.bytes_after == q.report.bytes_after < 0.14 * q.report.bytes_before
        equal(loaded(x), q(x))


def test_memory_that_is_shared_is_saved_once(tmp_path: Path) -> None:
    q, _, other = converted("tied", StaticQuantConfig().set_local(".*", StaticQuantConfig(w_dtype="fp32"))
                            .set_local("fc", StaticQuantConfig()), exported=False)  # fmt: skip
    q.save(tmp_path)
    loaded = load(tmp_path, other)
    assert loaded.head.weight is loaded.table.weight
    assert isinstance(loaded.head.weight, nn.Parameter) and loaded.head.weight.requires_grad


# ----------------------------------------------------------------------------------------------- the model's own class
class HasSave(Net):
    def save(self, where: str) -> str:
        return f"mine: {where}"


def test_a_method_save_is_kept(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    q = quantize(HasSave().eval(), StaticQuantConfig(), lambda p: p(x))
    assert q.orig_save("a") == "mine: a"
    q.save(tmp_path)
    loaded = load(tmp_path, HasSave())
    assert loaded.orig_save("b") == "mine: b"
    loaded.save(tmp_path)
    twin = copy.deepcopy(loaded)
    assert twin.save.__self__ is twin and twin.orig_save("c") == "mine: c"
    equal(load(tmp_path, HasSave)(x), q(x))  # a class is enough where it needs no arguments


def test_a_model_without_values(tmp_path: Path) -> None:
    q, inputs, _ = converted("odd constants", exported=False)
    q.save(tmp_path)
    with torch.device("meta"):
        empty = Odd()
    loaded = load(tmp_path, empty)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    equal(call(loaded, inputs[0]), call(q, inputs[0]))


def test_a_layer_alone(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    q = quantize(nn.Linear(8, 4).eval(), StaticQuantConfig(), lambda p: p(x))
    q.save(tmp_path)
    loaded = load(tmp_path, nn.Linear(8, 4))
    equal(loaded(x), q(x))
    assert loaded.in_features == 8 and loaded.weight.shape == (4, 8)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (None, "it was quantized layer by layer and needs the model"),
        (3, "original_model must be a torch.nn.Module, not int"),
        (nn.Linear, "Linear needs arguments"),
        (nn.Sequential(nn.Linear(8, 5)), "original_model has no layer 'conv'"),
        (Tied(), "original_model has no layer 'conv'"),
    ],
)
def test_a_model_that_does_not_fit(model: Any, match: str, tmp_path: Path) -> None:
    q, *_ = converted("net", exported=False)
    q.save(tmp_path)
    before = None if not isinstance(model, nn.Module) else list(model.modules())
    with pytest.raises((SavedModelError, ConfigError), match=match):
        load(tmp_path, model)
    assert before is None or list(model.modules()) == before


def test_a_model_of_other_sizes_is_left_alone(tmp_path: Path) -> None:
    q, *_ = converted("odd constants", exported=False)
    q.save(tmp_path)
    other = Odd()
    other.register_buffer("rounded", torch.zeros(7))
    with pytest.raises(SavedModelError, match=r"rounded of original_model has shape \[7\], saved was \[6\]"):
        load(tmp_path, other)
    assert type(other.fc) is nn.Linear
    other = Odd()
    other.fc = nn.Linear(6, 7)
    with pytest.raises(SavedModelError, match="out_features of original_model is 7, saved was 6") as e:
        load(tmp_path, other)
    assert e.value.module == "fc"
    other = Odd()
    other.more = nn.Parameter(torch.zeros(1))
    with pytest.raises(SavedModelError, match="original_model has more, which were not saved"):
        load(tmp_path, other)


# ---------------------------------------------------------------------------------------------------------- arguments
def test_older_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, (x, *_), other = converted("net", exported=False)
    want = call(q, x)
    q.save(x, str(tmp_path / "a"))
    q.save(example_inputs=x, output_dir=tmp_path / "b")
    q.save(checkpoint_dir=os.fspath(tmp_path / "c"), format="default")
    for name in "abc":
        equal(call(load(output_dir=tmp_path / name, model=copy.deepcopy(other)), x), want)
        equal(call(load(str(tmp_path / name), copy.deepcopy(other), "default", "cpu"), x), want)
    monkeypatch.chdir(tmp_path)
    q.save()
    equal(call(load("saved_results", other), x), want)


def test_bad_arguments(tmp_path: Path) -> None:
    q, *_ = converted("net")
    for format in ("huggingface", "vllm"):
        with pytest.raises(NotImplementedError, match=f"format '{format}'"):
            save(q, tmp_path, format)
        with pytest.raises(NotImplementedError, match=f"format '{format}'"):
            load(tmp_path, format=format)
    with pytest.raises(ConfigError, match="format must be 'default', not 'onnx'"):
        q.save(tmp_path, format="onnx")
    with pytest.raises(ConfigError, match="save has no argument 'shards'"):
        q.save(tmp_path, shards=3)
    with pytest.raises(ConfigError, match="load has no argument 'map_location'"):
        load(tmp_path, map_location="cpu")
    with pytest.raises(ConfigError, match="load needs the folder of a saved model, not None"):
        load()
    with pytest.raises(ConfigError, match=r"device 'abacus' cannot be used here"):
        load(tmp_path, device="abacus")
    assert folder_of(tmp_path) == []


@pytest.mark.parametrize("model", [3, None, "model"])
def test_no_models(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="expected a converted model"):
        save(model, tmp_path)


def test_only_what_is_converted(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    for model in (Net().eval(), prepare(Net().eval(), StaticQuantConfig()),
                  prepare(Net().eval(), StaticQuantConfig(), example_inputs=x)):  # fmt: skip
        with pytest.raises(SavedModelError, match="only a converted model can be saved"):
            save(model, tmp_path)
    part = quantize(Net().eval(), StaticQuantConfig(), lambda p: p(x), example_inputs=x)
    with pytest.raises(SavedModelError, match="save its part 'inner' instead"):
        save(nn.ModuleDict({"inner": part}), tmp_path)
    assert folder_of(tmp_path) == []


def test_not_a_folder_of_ours(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=r"is not a saved model: it has no inc_graph.json\n  hint: there is no"):
        load(tmp_path / "nowhere")
    (tmp_path / "qconfig.json").write_text("{}")
    (tmp_path / "quantized_weight.pt").write_bytes(b"")
    with pytest.raises(SavedModelError, match="inc-graph import-inc"):
        load(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(SavedModelError, match="give the folder that save"):
        load(file)
    q, *_ = converted("net")
    with pytest.raises(SavedModelError, match="cannot save to"):
        q.save(file)


# ------------------------------------------------------------------------------------------------------ output classes
def test_classes_of_outputs(tmp_path: Path) -> None:
    """One that is not registered where the model is loaded gives a stand-in with the same fields, and a warning."""

    class Result(dict):  # type: ignore[type-arg]
        pass

    pytree.register_pytree_node(
        Result, lambda r: (list(r.values()), list(r)), lambda v, k: Result(zip(k, v, strict=True)),
        serialized_type_name="tests.saving.Result",
    )  # fmt: skip
    try:

        class Gives(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> Any:
                return Result(logits=self.fc(x), hidden=[x])

        x = torch.randn(2, 4)
        q = quantize(Gives().eval(), StaticQuantConfig(), lambda p: p(x), example_inputs=x)
        q.save(tmp_path)
        want = q(x)["logits"]
        assert type(load(tmp_path)(x)) is Result
    finally:
        pytree._deregister_pytree_node(Result)
    with pytest.warns(IncWarning, match="Result is not known here"):
        loaded = load(tmp_path)
    y = loaded(x)
    equal(y.logits, want)
    assert y[0] is y["logits"] and y.hidden[0].shape == (2, 4)
    with pytest.raises(AttributeError, match="this output has the fields logits, hidden, not 'loss'"):
        _ = y.loss


def test_shapes_can_be_computed_again(tmp_path: Path) -> None:
    """Passes work on a loaded graph as on another one, also where an operator asks about a symbolic size."""
    d = torch.export.Dim.DYNAMIC
    x = torch.randn(2, 3, 17, 19)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    q = quantize(model, StaticQuantConfig(), lambda p: p(x), example_inputs=x, dynamic_shapes=({0: d, 2: d, 3: d},))
    q.save(tmp_path)
    loaded = load(tmp_path)
    graph = loaded.graph
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        assert str(fake_call(graph, node.target, node.args, node.kwargs).shape) == str(node.meta["val"].shape)
    y = torch.randn(4, 3, 33, 40)
    assert torch.equal(loaded(y), q(y))


def test_another_device(tmp_path: Path) -> None:
    """The meta device stands for an accelerator: what the graph creates goes there, too."""

    class Creates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + torch.arange(4, device=x.device) + torch.zeros(4, device=x.device)

    x = torch.randn(2, 4)
    for given in ({"example_inputs": x}, {}):
        q = quantize(Creates().eval(), StaticQuantConfig(), lambda p: p(x), **given)
        q.save(tmp_path)
        with pytest.warns(IncWarning, match="no backend for meta"):
            moved = load(tmp_path, Creates().to("meta"), device="meta")
        assert all(t.is_meta for t in [*moved.parameters(), *moved.buffers()])
        graph = moved.graph if given else moved.fc.inner.graph
        assert all(n.meta["val"].is_meta for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_what_is_loaded_can_be_compiled_and_exported(exported: bool, tmp_path: Path) -> None:
    q, inputs, other = converted("net", exported=exported)
    save(torch.compile(q), tmp_path)  # the wrapper of torch.compile is not saved
    loaded = load(tmp_path, other)
    with torch.no_grad():
        want = call(q, inputs[0])["logits"]
        torch.testing.assert_close(torch.compile(loaded)(*inputs[0])["logits"], want)
        program = torch.export.export(loaded, inputs[0])
        torch.testing.assert_close(program.module()(*inputs[0])["logits"], want)
    assert ("inc" if HAS_OPAQUE else "onednn.qlinear") in str(program.graph)  # not the float layers


def test_a_part_of_the_model_called_save(tmp_path: Path) -> None:
    class Saves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.save, self.report = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.report(self.save(x))

    x = torch.randn(2, 4)
    q = quantize(Saves().eval(), StaticQuantConfig(), lambda p: p(x))
    want = q(x)
    assert want.shape == (2, 4) and q.quantization_report.count("linear") == 2
    save(q, tmp_path)
    equal(load(tmp_path, Saves())(x), want)
