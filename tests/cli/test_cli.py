"""`inc-graph`: what all commands have in common, `version`, `inspect` and `completion`."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_models
import pytest
import torch

import inc_graph
from inc_graph.cli import main
from inc_graph.cli.app import build_parser
from inc_graph.registry import BACKENDS

Out = pytest.CaptureFixture[str]


def said(capsys: Out, *argv: object) -> Any:
    """The JSON document that a command prints, and nothing else on stdout."""
    capsys.readouterr()  # what was printed before is not the command's
    code = main([*map(str, argv), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out)


# ------------------------------------------------------------------------------------------------------ all commands
def test_the_entry_point_and_what_it_imports() -> None:
    """Another process: `python -m`, exit codes, and no torch for what does not need it."""

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)

    done = run("-m", "inc_graph.cli", "version", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["inc_graph"] == inc_graph.__version__
    assert run("-m", "inc_graph.cli", "no-such-command").returncode == 2
    code = """
import sys
from inc_graph.cli import main
codes = [main(["--help"]), main(["quantize", "--help"]), main(["version"]), main(["completion", "bash"])]
assert codes == [0, 0, 0, 0], codes
assert "torch" not in sys.modules and "rich" not in sys.modules
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_package_installs_the_command() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (module, name) = re.findall(r'^\[project\.scripts\]\ninc-graph = "([\w.]+):(\w+)"$', text, re.MULTILINE)[0]
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize("argv", [[], ["bogus"], ["inspect"], ["version", "--bogus"], ["completion", "tcsh"]])
def test_wrong_usage_is_2(argv: list[str], capsys: Out) -> None:
    assert main(argv) == 2
    read = capsys.readouterr()
    assert not read.out and "usage: inc-graph" in read.err


@pytest.mark.parametrize("argv", [["inspect"], ["load"], ["load", "--check"]])
def test_errors_are_1_without_a_traceback(argv: list[str], tmp_path: Path, capsys: Out) -> None:
    code = main([*argv, str(tmp_path)])
    read = capsys.readouterr()
    assert code == 1 and "Traceback" not in read.err
    assert "is not a saved model" in (read.out if "--check" in argv else read.err)


def test_errors_as_json_and_with_debug(tmp_path: Path, capsys: Out) -> None:
    code, data = said(capsys, "inspect", tmp_path)
    assert code == 1 and data["error"]["type"] == "SavedModelError" and data["error"]["hint"]
    code, data = said(capsys, "load", tmp_path)
    assert code == 1 and "is not a saved model" in data["error"]["message"]
    with pytest.raises(inc_graph.errors.SavedModelError):
        main(["inspect", str(tmp_path), "--debug"])


def test_options_for_all_stand_before_the_command_too(capsys: Out) -> None:
    assert main(["--json", "version"]) == 0
    assert "inc_graph" in json.loads(capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------- version
def test_version_tells_what_was_detected(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INC_TARGET_DEVICE", raising=False)
    monkeypatch.setenv("INC_FUEL", "7")
    code, data = said(capsys, "version", "--verbose")
    assert code == 0
    assert data["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert data["machine"]["cores"] >= 1 and data["machine"]["memory_bytes"] > 1 << 28
    assert data["machine"]["torch_uses"] == torch.backends.cpu.get_cpu_capability()
    assert bool(data["accelerators"]["cuda"]) == torch.cuda.is_available()
    for name, backend in BACKENDS.items():
        assert data["backends"][name] == {"available": backend.available() is None, "reason": backend.available()}
    assert data["backends"]["eager"]["available"]
    assert data["chosen"]["backend"] in BACKENDS.names() and data["settings"]["INC_FUEL"] == "7"
    assert main(["version", "--verbose"]) == 0
    text = capsys.readouterr().out
    assert data["machine"]["torch_uses"] in text and "INC_FUEL" in text


def test_a_device_that_is_none_is_not_in_order(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", "toaster")
    code, data = said(capsys, "version", "--verbose")
    assert code == 1 and "toaster" in data["chosen"]["error"]
    assert main(["version"]) == 0


def test_a_backend_that_cannot_run_says_why(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type(BACKENDS.get("inductor"))
    monkeypatch.setattr(backend, "available", lambda self: "no oneDNN in this build")
    monkeypatch.delenv("INC_TARGET_DEVICE", raising=False)
    _, data = said(capsys, "version", "-v")
    assert data["backends"]["inductor"] == {"available": False, "reason": "no oneDNN in this build"}
    if data["chosen"]["device"] == "cpu":
        assert data["chosen"]["backend"] == "eager" and "no oneDNN" in data["chosen"]["note"]


# ----------------------------------------------------------------------------------------------------------- inspect
def test_inspect_a_graph(graph_folder: Path, capsys: Out) -> None:
    code, data = said(capsys, "inspect", graph_folder)
    assert code == 0
    assert data["scope"] == "graph" and data["method"] == "static_quant" and data["producer"]["torch"]
    assert {x["module"] for x in data["report"]["kernels"] + data["report"]["reference"]} == {"first", "second"}
    assert sum(data["files"].values()) == sum((graph_folder / f).stat().st_size for f in data["files"])
    assert main(["inspect", str(graph_folder)]) == 0
    out = capsys.readouterr().out
    assert "first" in out and "linear" in out and "0. all -> activation uint8" in out and "graph qdq" not in out


def test_inspect_reads_no_weights(graph_folder: Path, capsys: Out) -> None:
    (weights,) = graph_folder.glob("*.safetensors")
    weights.unlink()
    assert main(["inspect", str(graph_folder)]) == 0
    assert main(["inspect", str(graph_folder), "--graph"]) == 1


def test_inspect_the_graph_as_text(graph_folder: Path, module_folder: Path, capsys: Out) -> None:
    _, data = said(capsys, "inspect", graph_folder, "--graph")
    assert list(data["graphs"]) == [""] and "inc.dequantize(@first_weight_q" in data["graphs"][""]
    _, data = said(capsys, "inspect", module_folder, "--graph")
    assert list(data["graphs"]) == ["first", "second"]
    assert all("aten.linear" in text for text in data["graphs"].values())
    assert main(["inspect", str(module_folder), "--graph"]) == 0
    assert "layer second: graph qdq" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["graph_folder", "module_folder"])
def test_inspect_one_layer(folder: str, request: pytest.FixtureRequest, capsys: Out) -> None:
    path = request.getfixturevalue(folder)
    _, data = said(capsys, "inspect", path, "--layer", "first")
    (operator,) = data["operators"]
    assert operator["op"] == "linear" and operator["modules"] == ["first"] and operator["rule"].startswith("0. all")
    weight = next(v for v in operator["values"] if v["role"] == "weight")
    assert (weight["qtype"], weight["shape"], weight["block"]) == ("int8", [32, 16], [1, -1])
    assert weight["scale"]["shape"] == [32, 1] and 0 < weight["scale"]["min"] < weight["scale"]["max"]
    want = cli_models.ready.first.weight.detach().abs().amax(1) / 127
    assert weight["scale"]["max"] == pytest.approx(want.max().item(), rel=0.01)
    assert weight["stored_bytes"] == 32 * 16 and "convert-qdq" in weight["provenance"]
    activation = next(v for v in operator["values"] if v["role"] == "input")
    output = [v for v in operator["values"] if v["role"] == "output"]
    assert [v["source"] for v in output] == (["relu"] if folder == "graph_folder" else [])
    assert activation["qtype"] == "uint8" and activation["zero_point"]["min"] == activation["zero_point"]["max"]
    assert main(["inspect", str(path), "--layer", "first"]) == 0
    assert "stored in 512 bytes" in capsys.readouterr().out


def test_a_layer_that_is_not_there(graph_folder: Path, capsys: Out) -> None:
    assert main(["inspect", str(graph_folder), "--layer", "frist"]) == 1
    assert "did you mean 'first'" in capsys.readouterr().err


def test_inspect_a_pt2_file_executes_nothing(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.pt2"
    x = torch.randn(4, 16)
    torch.export.save(torch.export.export(cli_models.net(), (x,), dynamic_shapes=({0: torch.export.Dim("b")},)), file)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", never)
    monkeypatch.setattr(torch, "load", never)
    code, data = said(capsys, "inspect", file)
    assert code == 0 and data["bytes"] == file.stat().st_size
    assert "aten.linear(%x, %p_first_weight, %p_first_bias) : float[s" in data["graph"]
    assert "parameter %p_first_weight = @first.weight : float[32, 16]" in data["graph"]
    assert "  input %x : float[s" in data["graph"]
    assert "# first" in data["graph"] and "return %linear_1" in data["graph"]
    assert main(["inspect", str(file), "--layer", "first"]) == 2


def test_a_file_that_is_no_pt2(tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "net.pt2"
    for content in (b"", b"no zip", b"PK\x03\x04 cut"):
        file.write_bytes(content)
        assert main(["inspect", str(file)]) == 1
        assert "is not a .pt2 file" in capsys.readouterr().err
    torch.save({"a": torch.zeros(2)}, file)
    assert main(["inspect", str(file)]) == 1
    assert "holds no exported program" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- completion
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(shell: str, capsys: Out, tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    commands = next(a for a in build_parser()._actions if hasattr(a, "choices") and a.choices).choices
    assert set(commands) == {"version", "inspect", "load", "quantize", "import-inc", "completion"}
    for name, parser in commands.items():
        assert name in script
        for option in (o for a in parser._actions for o in a.option_strings if o.startswith("--")):
            assert (f"-l {option[2:]}" if shell == "fish" else option) in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [("inc-graph ver", {"version"}), ("inc-graph load --ch", {"--check"}), ("inc-graph completion z", {"zsh"})],
)
def test_bash_completes(line: str, expected: set[str], capsys: Out, tmp_path: Path) -> None:
    assert main(["completion", "bash"]) == 0
    words = line.split(" ")
    ask = (
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _inc_graph; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    code = capsys.readouterr().out + "\n" + ask
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path)
    assert set(done.stdout.split()) == expected
