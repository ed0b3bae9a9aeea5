"""`inc-graph quantize`: the same model as the API makes; what cannot be meant is refused before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_models
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inc_graph.cli import main
from inc_graph.quantization import DynamicQuantConfig, QuantizedModel, load, quantize
from inc_graph.registry import CONFIGS

Out = pytest.CaptureFixture[str]
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def samples(count: int = 24, width: int = 16) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def data() -> str:
    save_file({"x": samples()}, "data.safetensors")
    return "data.safetensors"


def run(*argv: str) -> int:
    return main(["quantize", *argv, "--output", "out"])


def static(model: str = "cli_models:net", *argv: str) -> int:
    return run(model, "--config", "static_quant", *argv)


def by_hand(batches: list[torch.Tensor], config: Any = None) -> torch.nn.Module:
    """What the API makes of the same model and data."""

    def calibrate(model: torch.nn.Module) -> None:
        for batch in batches:
            model(x=batch)

    config = config or CONFIGS.get("static_quant")()
    return quantize(cli_models.net(), config, calibrate, example_inputs={"x": batches[0]})


def test_the_saved_model_is_that_of_the_api(data: str, capsys: Out) -> None:
    assert static("cli_models:net", "--calibration", data, "--batch-size", "8") == 0
    said = capsys.readouterr()
    assert "static_quant on" in said.out and "calibrated with 3 calls" in said.out
    assert "a line of the user's" in said.err and "a line of the user's" not in said.out
    want = by_hand(list(samples().split(8)))
    x = samples(8)
    assert torch.equal(load("out")(x=x), want(x=x))


def test_json_is_all_that_stdout_gets(data: str, capsys: Out) -> None:
    assert static("cli_models:net", "--calibration", data, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["calibration_calls"] == 24 and said["method"] == "static_quant" and said["output"] == "out"
    assert {x["module"] for x in said["report"]["kernels"] + said["report"]["reference"]} == {"first", "second"}
    assert said["files"] == {f.name: f.stat().st_size for f in Path("out").iterdir() if f.name != "inc_graph.json"}


def test_a_config_file_with_locals(data: str) -> None:
    config = {
        "static_quant": {
            "global": {"act_algo": "minmax"},
            "local": {"second": {"w_dtype": "fp32", "act_dtype": "fp32"}},
        }
    }
    Path("config.json").write_text(json.dumps(config))
    assert run("cli_models:net", "--config", "config.json", "--calibration", data) == 0
    report = load("out").report
    assert [x.module for x in report.quantized] == ["first"] and [x.module for x in report.floats] == ["second"]


def test_arrays_of_numpy_limits_and_other_backends(capsys: Out) -> None:
    np.savez("data.npz", x=samples().numpy(), scale=np.ones((24, 8), dtype=np.float32))
    options = ("--calibration", "data.npz", "--samples", "10", "--batch-size", "4", "--backend", "eager")
    assert static("cli_models:net", *options, "--device", "cpu") == 0
    said = capsys.readouterr()
    assert "calibrated with 2 calls" in said.out and "the last 2 samples are not used" in said.err
    loaded = load("out")
    assert isinstance(loaded, QuantizedModel) and loaded.backend == "eager"
    assert loaded(x=samples(4), scale=torch.ones(4, 8)).shape == (4, 8)


@pytest.mark.parametrize("name", ["positional", "named", "tensors"])
def test_data_from_a_function(name: str, capsys: Out) -> None:
    assert static("cli_models:ready", "--calibration", f"cli_models:{name}", "--samples", "5") == 0
    assert "calibrated with 5 calls" in capsys.readouterr().out


def test_any_batch_size(data: str, capsys: Out) -> None:
    assert static("cli_models:net", "--calibration", data, "--batch-size", "7", "--dynamic-batch") == 0
    said = capsys.readouterr()
    assert "calibrated with 4 calls" in said.out and "not used" not in said.err
    loaded = load("out")
    assert loaded(x=samples(5)).shape == (5, 8) and loaded(x=samples(1)).shape == (1, 8)


def test_any_batch_size_with_data_from_a_function(data: str, capsys: Out) -> None:
    assert static("cli_models:net", "--calibration", "cli_models:positional", "--dynamic-batch") == 0
    assert load("out")(samples(5)).shape == (5, 8)
    capsys.readouterr()
    assert static("cli_models:net", "--calibration", "cli_models:single", "--dynamic-batch") == 1
    assert "2 samples or more" in capsys.readouterr().err


def test_layer_by_layer(data: str) -> None:
    assert static("cli_models:net", "--calibration", data, "--batch-size", "8", "--layer-by-layer") == 0
    loaded = load("out", cli_models.net())
    assert isinstance(loaded, cli_models.Net)
    assert main(["load", "--check", "out", "--run"]) == 0


def test_a_method_that_needs_no_data(capsys: Out) -> None:
    try:
        DynamicQuantConfig().recipe("eager", None)
    except NotImplementedError as e:  # said as an error of the library is
        assert run("cli_models:net", "--config", "pt2e_dynamic_quant") == 1
        said = capsys.readouterr()
        assert f"error: {e}" in said.err and "Traceback" not in said.err and not Path("out").exists()
    else:
        assert run("cli_models:net", "--config", "pt2e_dynamic_quant") == 0
        assert "calibrated with 0 calls" in capsys.readouterr().out


def test_the_module_is_found_in_the_current_folder(data: str) -> None:
    """As with `python -m`; in a process of its own, whose path does not have the folder of the tests."""
    Path("here.py").write_text((HERE / "cli_models.py").read_text())
    command = [sys.executable, "-P", "-m", "inc_graph.cli", "quantize", "here:net", "--config", "static_quant"]
    done = subprocess.run(
        [*command, "--calibration", data, "--output", "out", "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["calibration_calls"] == 24


# ------------------------------------------------------------------------------------------------------- .pt2 files
@pytest.fixture
def exported() -> str:
    program = torch.export.export(cli_models.net(), (samples(8),))
    torch.export.save(program, "net.pt2")
    return "net.pt2"


def test_a_pt2_file_has_to_be_trusted(exported: str, data: str, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the file was read")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "load", never)
        assert static(exported, "--calibration", data) == 2
    assert "--trust-model" in capsys.readouterr().err and not Path("out").exists()
    assert static(exported, "--calibration", data, "--trust-model") == 0
    assert "calibrated with 3 calls" in capsys.readouterr().out  # of 8, as it was exported
    want = by_hand(list(samples().split(8)))
    x = samples(8)
    assert torch.equal(load("out")(x), want(x=x))


def test_samples_that_make_no_whole_batch_are_left_out_aloud(exported: str, data: str, capsys: Out) -> None:
    assert static(exported, "--calibration", data, "--trust-model", "--samples", "20") == 0
    said = capsys.readouterr()
    assert "calibrated with 2 calls" in said.out and "the last 4 samples are not used" in said.err


def test_a_pt2_file_that_is_none(data: str, capsys: Out) -> None:
    Path("net.pt2").write_bytes(b"nothing")
    assert static("net.pt2", "--calibration", data, "--trust-model") == 1
    assert "net.pt2 cannot be read" in capsys.readouterr().err
    assert static("net.pt2", "--dynamic-batch", "--batch-size", "4") == 2


# ------------------------------------------------------------------------------------------------------------ refused
REFUSED = {
    "cli_models": "neither a file nor package.module:function",
    "cli_models:bogus": "has no 'bogus'",
    "no_such_module_here:f": "cannot be imported",
    "cli_models:number": "neither a model nor a function",
    "cli_models:tensors": "not a torch.nn.Module",
}


@pytest.mark.parametrize("model", REFUSED)
def test_models_that_are_none(model: str, data: str, capsys: Out) -> None:
    assert static(model, "--calibration", data) == 1
    said = capsys.readouterr()
    assert REFUSED[model] in said.err and "Traceback" not in said.err and not Path("out").exists()


def test_configs_that_are_none(data: str, capsys: Out) -> None:
    def fails(config: str, words: str) -> None:
        assert run("cli_models:net", "--config", config, "--calibration", data) == 1
        assert words in capsys.readouterr().err

    fails("static_quantt", "did you mean 'static_quant'")
    fails("missing.json", "cannot be read")
    for content, words in (
        ("{", "cannot be read"),
        ("3", "holds no config"),
        ('{"static_quant": {"global": {"x": 1}}}', "'x'"),
    ):
        Path("config.json").write_text(content)
        fails("config.json", words)


def test_data_that_is_none(capsys: Out) -> None:
    def fails(name: str, words: str) -> None:
        assert static("cli_models:net", "--calibration", name) == 1
        said = capsys.readouterr()
        assert words in said.err and "Traceback" not in said.err and not Path("out").exists()

    fails("missing.npz", "cannot be read")
    Path("bad.safetensors").write_bytes(b"nothing")
    fails("bad.safetensors", "cannot be read")
    np.savez("pickled.npz", x=np.array([{}], dtype=object))
    fails("pickled.npz", "allow_pickle=False")
    save_file({"y": samples()}, "names.safetensors")
    fails("names.safetensors", "name the arrays as the inputs of the model: x, scale")
    save_file({"x": samples(), "scale": torch.ones(7)}, "counts.safetensors")
    fails("counts.safetensors", "the first dimension must count the samples")
    fails("cli_models:nothing", "has no samples")
    fails("cli_models:number", "not an iterable")
    fails("cli_models:wrong_shape", "input 'x' has shape [4, 17]")
    assert static("cli_models:net") == 1
    assert "needs calibration data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--batch-size", "0"),
        ("--samples", "many"),
        ("--dynamic-batch",),
        ("--dynamic-batch", "--batch-size", "1"),
        ("--dynamic-batch", "--batch-size", "4", "--layer-by-layer"),
    ],
)
def test_options_that_cannot_be_meant(options: tuple[str, ...], data: str, capsys: Out) -> None:
    assert static("cli_models:net", "--calibration", data, *options) == 2
    assert "usage: inc-graph quantize" in capsys.readouterr().err


def test_batches_of_a_function_are_its_own(capsys: Out) -> None:
    assert static("cli_models:net", "--calibration", "cli_models:tensors", "--batch-size", "2") == 1
    assert "--batch-size is for data in a file" in capsys.readouterr().err


def test_backends_and_devices_that_are_not_there(data: str, capsys: Out) -> None:
    assert static("cli_models:net", "--calibration", data, "--backend", "toaster") == 1
    assert "unknown backend 'toaster'" in capsys.readouterr().err
    assert static("cli_models:net", "--calibration", data, "--device", "toaster") == 1
    assert "toaster" in capsys.readouterr().err
