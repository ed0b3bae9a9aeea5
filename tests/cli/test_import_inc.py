"""`inc-graph import-inc`: folders of neural_compressor, made by hand after their layout, give the weights that they
stand for; what is no such folder is refused, and executed never."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inc_folders import Packed, codebook, integers, write
from torch import nn

from inc_graph.cli import main
from inc_graph.errors import IncWarning, SavedModelError
from inc_graph.quantization import load
from inc_graph.saving.import_inc import import_inc


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers compute in float32, so that they can be compared with what was dequantized by hand."""
    monkeypatch.setenv("INC_COMPUTE_DTYPE", "float32")


class Net(nn.Module):
    """Two layers that are quantized, one that is not, and tensors of all kinds."""

    def __init__(self, inputs: int = 64, middle: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, middle)
        self.norm = nn.BatchNorm1d(middle)
        self.second = nn.Linear(middle, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(self.norm(self.first(x)))))


def float_net(first: Packed, second: Packed) -> Net:
    """The model with the weights that the packed ones stand for."""
    torch.manual_seed(1)
    net = Net(first.weight.shape[1], first.weight.shape[0]).eval()
    net.norm.running_mean.uniform_(-1, 1)
    for layer, packed in ((net.first, first), (net.second, second)):
        layer.weight.data = packed.dequantized()
        layer.bias.data = torch.zeros(packed.weight.shape[0]) if packed.bias is None else packed.bias
    return net


def others(net: Net) -> dict[str, torch.Tensor]:
    return {k: v for k, v in net.state_dict().items() if not k.startswith(("first.", "second."))}


SECOND = integers(24, 16, group=-1, seed=5)
FIRST = {
    "symmetric": integers(),
    "asymmetric": integers(symmetric=False),
    "one group": integers(group=-1),
    "ragged group": integers(inputs=40, group=32, symmetric=False),
    "outputs that fill no word": integers(outputs=21, symmetric=False),
    "2 bits": integers(bits=2, symmetric=False),
    "3 bits": integers(bits=3, symmetric=False),
    "8 bits": integers(bits=8),
    "8 bits, asymmetric": integers(bits=8, symmetric=False),
    "zero points of zero": integers(zero_points=0),
    "no bias": integers(bias=False),
    "inputs in another order": integers(shuffled=True, symmetric=False),
    "in another order, no bias": integers(shuffled=True, bias=False),
    "scaled input": integers(scaled=True),
    "scaled and in another order": integers(scaled=True, shuffled=True),
    "nf4": codebook("nf4"),
    "fp4": codebook("fp4"),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_imported_model_is_the_one_dequantized_by_hand(name: str, tmp_path: Path) -> None:
    first = FIRST[name]
    second = SECOND if first.weight.shape[0] == 24 else integers(21, 16, group=-1, seed=5)
    net = float_net(first, second)
    source = write(tmp_path / "src", {"first": first, "second": second}, others(net))
    assert main(["import-inc", str(source), str(tmp_path / "dst")]) == 0
    torch.manual_seed(9)
    loaded = load(tmp_path / "dst", Net(first.weight.shape[1], first.weight.shape[0]).eval())
    if first.input_scale is None and "g_idx" not in first.tensors:
        exact = 0.0 if name != "fp4" else 1e-6  # its values are multiples of 1/192 here, of 1/16 there
        torch.testing.assert_close(loaded.first.weight, first.weight, rtol=exact, atol=0.0)
    x = torch.randn(5, first.weight.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded.first(x[0]), net.first(x[0]), rtol=1e-5, atol=1e-5)
    assert loaded.head.weight.requires_grad and torch.equal(loaded.head.weight, net.head.weight)


def test_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    first = integers(256, 256, group=128)
    net = float_net(first, integers(256, 16, group=-1))
    write(tmp_path / "src", {"first": first}, {"head.weight": net.head.weight.data})
    import_inc(tmp_path / "src", tmp_path / "dst")
    stored = sum(f.stat().st_size for f in (tmp_path / "dst").glob("*.safetensors"))
    assert stored < 256 * 256 / 2 + 256 * 2 * 2 + 256 * 4 + 16 * 8 * 4 + 2000


def test_shared_tensors_stay_shared(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 64)
            self.first = nn.Linear(64, 64)
            self.head = nn.Linear(64, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(self.table(x)))

    first = integers(64, 64)
    net = Tied().eval()
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("first")}
    write(tmp_path / "src", {"first": first}, state)
    import_inc(tmp_path / "src", tmp_path / "dst")
    loaded = load(tmp_path / "dst", Tied().eval())
    assert loaded.head.weight is loaded.table.weight
    net.first.weight.data, net.first.bias.data = first.weight, first.bias
    ids = torch.arange(12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), net(ids), rtol=1e-5, atol=1e-5)


def test_layers_as_teq_leaves_them(tmp_path: Path) -> None:
    """Settings under the name of a layer inside, and a float layer whose input is scaled."""
    first = integers(scaled=True)
    net = float_net(first, SECOND)
    state, scale = others(net), torch.rand(16) + 0.5
    state |= {"head.linear.weight": state.pop("head.weight"), "head.linear.bias": state.pop("head.bias")}
    state["head.input_scale"] = scale
    source = write(tmp_path / "src", {"first": first, "second": SECOND}, state)
    config = (source / "qconfig.json").read_text().replace("('first', ", "('first.orig_layer', ")
    (source / "qconfig.json").write_text(config)
    assert import_inc(source, tmp_path / "dst").layers[0].remarks == ("the input is scaled",)
    loaded = load(tmp_path / "dst", Net().eval())
    net.head.weight.data *= scale
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_model_in_bfloat16_stays_one(tmp_path: Path) -> None:
    first = integers()
    net = float_net(first, SECOND).to(torch.bfloat16)
    write(tmp_path / "src", {"first": first, "second": SECOND}, others(net))
    import_inc(tmp_path / "src", tmp_path / "dst")
    loaded = load(tmp_path / "dst", Net().to(torch.bfloat16).eval())
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert loaded(x).dtype == torch.bfloat16
        torch.testing.assert_close(loaded(x), net(x), rtol=0.05, atol=0.2)


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = float_net(FIRST["asymmetric"], SECOND)
    source = write(tmp_path / "src", {"first": FIRST["asymmetric"], "second": SECOND}, others(net))
    assert main(["import-inc", str(source), str(tmp_path / "dst"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    first, second = data["layers"]
    assert (first["path"], first["qtype"], first["group"]) == ("first", "uint4", 32)
    assert (second["path"], second["qtype"], second["group"]) == ("second", "int4", -1)
    assert data["other_tensors"] == len(others(net)) and data["method"] == "rtn"
    assert main(["load", "--check", str(tmp_path / "dst"), "--run"]) == 0
    assert main(["inspect", str(tmp_path / "dst"), "--layer", "first"]) == 0
    out = capsys.readouterr().out
    assert "uint4 [24, 64] in blocks of [1, 32]" in out and "import-inc" in out


# ------------------------------------------------------------------------------------------------------------- refused
def refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(["import-inc", str(source), str(tmp_path / "dst")]) == 1
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    for word in words:
        assert word in said.err
    assert not (tmp_path / "dst").exists()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    net = float_net(FIRST["symmetric"], SECOND)
    return write(tmp_path / "src", {"first": FIRST["symmetric"], "second": SECOND}, others(net))


class Dangerous:
    """Unpickling it writes a file."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['INC_TEST_MARK']}",)


def test_a_pickle_with_code_is_refused_and_not_executed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "executed"
    monkeypatch.setenv("INC_TEST_MARK", str(mark))
    for zipped in (True, False):
        torch.save({"a": Dangerous()}, source / "quantized_weight.pt", _use_new_zipfile_serialization=zipped)
        refused(source, tmp_path, capsys, "quantized_weight.pt holds more than tensors")
        assert not mark.exists()


def test_programs_are_refused_with_what_to_do(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    (source / "qconfig.json").write_text(json.dumps({"static_quant": {}}))
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "p.pt2")
    shutil.move(tmp_path / "p.pt2", source / "quantized_weight.pt")
    refused(source, tmp_path, capsys, "PT2E", "StaticQuantConfig")
    torch.jit.trace(model, x).save(str(source / "quantized_weight.pt"))
    refused(source, tmp_path, capsys, "TorchScript", "SmoothQuantConfig")


@pytest.mark.parametrize("name", ["model_bin_index.json", "quantized_hpu_weight.pt", "quantize_config.json"])
def test_other_layouts_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / name).write_text("{}")
    refused(tmp_path / "src", tmp_path, capsys, "cannot be imported", "quantize the float model again")


def test_what_is_no_folder_of_it(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "nothing", tmp_path, capsys, "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, capsys, "was not saved by neural_compressor")
    import_inc(source, tmp_path / "ours")
    refused(tmp_path / "ours", tmp_path, capsys, "already", "load it")
    torch.save([torch.zeros(3)], source / "quantized_weight.pt")
    refused(source, tmp_path, capsys, "not a state_dict")
    torch.save({"first.val": torch.zeros(3)}, source / "quantized_weight.pt")
    refused(source, tmp_path, capsys, "HQQ")
    data = (source / "quantized_weight.pt").read_bytes()
    (source / "quantized_weight.pt").write_bytes(data[: len(data) // 2])
    refused(source, tmp_path, capsys, "quantized_weight.pt")
    (source / "qconfig.json").write_text("{")
    refused(source, tmp_path, capsys, "qconfig.json cannot be read")


def changed(**tensors: torch.Tensor | None) -> Packed:
    packed = integers(symmetric=False)
    for name, tensor in tensors.items():
        if tensor is None:
            del packed.tensors[name]
        else:
            packed.tensors[name] = tensor
    return packed


WRONG = {
    "no scales": (changed(scales=None), "no scales"),
    "no zero points": (changed(qzeros=None), "no qzeros"),
    "bits that do not fit": (changed(qzeros=torch.zeros(2, 6, dtype=torch.int32)), "zero points"),
    "other groups": (changed(scales=torch.ones(5, 24), qzeros=torch.zeros(5, 3, dtype=torch.int32)), "groups"),
    "other outputs": (changed(scales=torch.ones(2, 23)), "do not fit together"),
    "a bias that is too long": (changed(bias=torch.ones(25)), "bias has shape"),
    "uneven groups": (changed(g_idx=torch.zeros(64, dtype=torch.int32)), "g_idx"),
    "floats for codes": (changed(qweight=torch.zeros(8, 24)), "qweight is torch.float32"),
    "float8 below": (changed(scale_bf16_to_fp8=torch.ones(1)), "W4A8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, words = WRONG[name]
    write(tmp_path / "src", {"first": packed}, {})
    refused(tmp_path / "src", tmp_path, capsys, words, "module 'first'")


def test_settings_that_are_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = integers()
    for change, words in (
        ({"dtype": "fp4_e2m1"}, "fp4_e2m1"),
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 7}, "group"),
    ):
        old, packed.config = packed.config, {**packed.config, **change}
        write(tmp_path / "src", {"first": packed}, {})
        refused(tmp_path / "src", tmp_path, capsys, words, "module 'first'")
        packed.config = old
    (tmp_path / "src" / "qconfig.json").write_text("{}")
    refused(tmp_path / "src", tmp_path, capsys, "does not speak of this layer")


# ------------------------------------------------------------------------------------------------ the number of inputs
def test_inputs_that_the_file_leaves_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten codes of 3 bits are in a word, so 64 inputs fill the last one up: the rest is seen to be empty."""
    packed = integers(bits=3, group=-1)
    write(tmp_path / "src", {"first": packed}, {})
    with pytest.warns(IncWarning, match="'first' is taken to have 64 inputs"):
        import_inc(tmp_path / "src", tmp_path / "dst")
    source, target = str(tmp_path / "src"), str(tmp_path / "dst")
    assert main(["import-inc", source, target, "--in-features", "first=66"]) == 0
    with pytest.raises(SavedModelError, match="in_features of original_model is 64, saved was 66"):
        load(target, nn.ModuleDict({"first": nn.Linear(64, 24)}).eval())
    assert main(["import-inc", source, target, "--in-features", "first=64"]) == 0
    loaded = load(target, nn.ModuleDict({"first": nn.Linear(64, 24)}).eval())
    assert torch.equal(loaded["first"].weight, packed.weight)
    capsys.readouterr()
    assert main(["import-inc", source, target, "--in-features", "first=80"]) == 1
    assert "80 inputs do not fit" in capsys.readouterr().err
    assert main(["import-inc", source, target, "--in-features", "other=64"]) == 1
    assert "no quantized layer 'other'" in capsys.readouterr().err
    assert main(["import-inc", source, target, "--in-features", "first"]) == 2


def test_parameters_and_buffers_are_those_of_the_model(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 24)
            self.register_buffer("inv_freq", torch.full((24,), 2.0), persistent=False)
            self.register_buffer("table", torch.rand(24))
            self.running_mean = nn.Parameter(torch.rand(24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * self.inv_freq + self.table + self.running_mean

    packed, net = integers(), Odd().eval()
    write(tmp_path / "src", {"first": packed}, {"table": net.table, "running_mean": net.running_mean.data})
    import_inc(tmp_path / "src", tmp_path / "dst")
    loaded = load(tmp_path / "dst", Odd().eval())
    net.first.weight.data, net.first.bias.data = packed.weight, packed.bias
    x = torch.randn(3, 64)
    torch.testing.assert_close(loaded(x), net(x))
    assert isinstance(loaded.running_mean, nn.Parameter) and "table" in loaded._buffers
