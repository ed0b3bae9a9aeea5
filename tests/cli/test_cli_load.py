"""`inc-graph load --check`: a good folder passes every step; what is wrong is found by the step that is for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.cli import main
from inc_graph.cli.examples import example_of_graph
from inc_graph.cli.propagate import propagate
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, quantize
from tests.test_user_algorithm import Net, RoundConfig, own_method

__all__ = ["own_method"]  # a fixture
Out = pytest.CaptureFixture[str]
Rewrite = Callable[[Path, Callable[[Any], None]], None]


def check(capsys: Out, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()  # what was printed before is not the command's
    code = main(["load", "--check", str(folder), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def failed(data: dict[str, Any], step: str) -> str:
    """What the last step, which has to be this one, says."""
    assert not data["ok"] and [s["ok"] for s in data["checks"]].count(False) == 1
    assert data["checks"][-1]["name"] == step, data["checks"][-1]
    return data["checks"][-1]["detail"]


def test_a_graph_that_is_in_order(graph_folder: Path, capsys: Out) -> None:
    code, data = check(capsys, graph_folder, "--run")
    assert code == 0 and data["ok"]
    names = [s["name"] for s in data["checks"]]
    assert names == ["manifest", "files", "report and recipe", "graph", "shapes and dtypes", "kernels", "run"]
    assert main(["load", "--check", str(graph_folder), "--backend", "eager"]) == 0
    out = capsys.readouterr().out
    assert "0 operators in kernels of eager, 2 on the reference" in out and "is in order" in out


def test_layers_are_checked_without_the_float_model(module_folder: Path, capsys: Out) -> None:
    code, data = check(capsys, module_folder, "--run")
    assert code == 0 and data["ok"]
    assert [s["name"] for s in data["checks"]][4] == "other tensors"
    assert "2 outputs on random inputs" in data["checks"][-1]["detail"]


def test_load_alone_needs_the_float_model_for_layers(graph_folder: Path, module_folder: Path, capsys: Out) -> None:
    assert main(["load", str(graph_folder)]) == 0
    assert "static_quant on" in capsys.readouterr().out
    assert main(["load", str(module_folder)]) == 1
    assert "original_model" in capsys.readouterr().err
    assert main(["load", str(graph_folder), "--run"]) == 2


def test_damaged_files(graph_folder: Path, capsys: Out) -> None:
    (weights,) = graph_folder.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    code, found = check(capsys, graph_folder, "--run")
    assert code == 1 and "is damaged" in failed(found, "files")
    manifest = graph_folder / "inc_graph.json"
    manifest.write_text(manifest.read_text().replace('"scope": "graph"', '"scope": "module"'))
    code, found = check(capsys, graph_folder)
    assert code == 1 and "is damaged" in failed(found, "manifest")


def node(body: Any, name: str) -> Any:
    return next(n for n in body["graph"]["nodes"] if n["name"] == name)


def test_a_stored_size_that_is_not_the_operators(graph_folder: Path, rewrite: Rewrite, capsys: Out) -> None:
    """Sizes that are known at run time only are not compared when a graph is loaded: this is the step for them."""

    def edit(body: Any) -> None:
        value = node(body, "relu")["value"]
        assert isinstance(value["shape"][0], str)
        value["shape"][0] = f"2*{value['shape'][0]}"

    rewrite(graph_folder, edit)
    assert main(["load", str(graph_folder)]) == 0
    capsys.readouterr()
    code, data = check(capsys, graph_folder)
    detail = failed(data, "shapes and dtypes")
    assert code == 1 and "node relu: stored is float32 [8, 32], it gives float32 [4, 32]" in detail


def test_a_stored_size_in_other_words_is_the_same(graph_folder: Path, rewrite: Rewrite, capsys: Out) -> None:
    def edit(body: Any) -> None:
        value = node(body, "relu")["value"]
        value["shape"][0] = f"(4*{value['shape'][0]} + 4)//4 - 1"

    rewrite(graph_folder, edit)
    code, data = check(capsys, graph_folder)
    assert code == 0, data["checks"][-1]


def test_a_number_in_place_of_a_size_that_varies(graph_folder: Path, rewrite: Rewrite, capsys: Out) -> None:
    """It is right for the batch that the model was captured with, and for no other one, if there may be others."""

    def edit(body: Any) -> None:
        (facts,) = body["graph"]["symbols"].values()
        facts["high"] = facts["hint"] if fixed else None
        node(body, "relu")["value"]["shape"][0] = facts["hint"]

    fixed = True
    rewrite(graph_folder, edit)
    assert check(capsys, graph_folder)[0] == 0
    fixed = False
    rewrite(graph_folder, edit)
    code, data = check(capsys, graph_folder)
    assert code == 1 and "node relu: stored is float32 [4, 32], it gives float32 [8, 32]" in failed(
        data, "shapes and dtypes"
    )


def test_a_graph_that_makes_no_sense(graph_folder: Path, rewrite: Rewrite, capsys: Out) -> None:
    rewrite(graph_folder, lambda body: node(body, "relu")["args"].append(3))
    code, data = check(capsys, graph_folder)
    assert code == 1 and "relu" in data["checks"][-1]["detail"] and not data["ok"]


def test_layers_with_a_name_missing(module_folder: Path, rewrite: Rewrite, capsys: Out) -> None:
    rewrite(module_folder, lambda body: body["layers"][0].pop("paths"))
    code, data = check(capsys, module_folder)
    assert code == 1 and "paths" in failed(data, "graph")


def test_backends_that_cannot_be(graph_folder: Path, capsys: Out) -> None:
    code, data = check(capsys, graph_folder, "--backend", "toaster")
    assert code == 1 and "unknown backend 'toaster'" in failed(data, "kernels")
    code, data = check(capsys, graph_folder, "--device", "toaster")
    assert code == 1 and "toaster" in failed(data, "kernels")


def test_a_kernel_that_computes_something_else(
    graph_folder: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inc_graph.quantization import QuantizedModel

    real = QuantizedModel.forward
    monkeypatch.setattr(QuantizedModel, "forward", lambda self, *a, **k: real(self, *a, **k) * 2)
    code, data = check(capsys, graph_folder, "--run")
    assert code == 1 and "dB from the reference" in failed(data, "run")
    monkeypatch.setattr(QuantizedModel, "forward", lambda self, *a, **k: real(self, *a, **k) * float("nan"))
    code, data = check(capsys, graph_folder, "--run")
    assert code == 1 and "not a number" in failed(data, "run")
    monkeypatch.setattr(QuantizedModel, "forward", lambda self, *a, **k: real(self, *a, **k)[:, :3])
    code, data = check(capsys, graph_folder, "--run")
    assert code == 1 and "stored is torch.float32" in failed(data, "run")


@pytest.mark.parametrize("mixed", [False, True], ids=["own", "and one of the library"])
def test_models_of_own_methods(mixed: bool, own_method: None, tmp_path: Path, capsys: Out) -> None:
    """What an own method has made are tensors; layers of the library beside them are graphs, and looked at."""
    net, x = Net().eval(), torch.randn(8, 8)
    config = RoundConfig(white_list=["fc2"])
    quantize(net, config + StaticQuantConfig() if mixed else config, lambda m: m(x)).save(tmp_path / "own")
    code, data = check(capsys, tmp_path / "own", "--run")
    names = [s["name"] for s in data["checks"]]
    assert code == 0 and names[:5] == ["manifest", "files", "report and recipe", "graph", "other tensors"]
    assert (names[-1] == "run") == mixed
    assert main(["inspect", str(tmp_path / "own")]) == 0
    assert "round_own" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "own"), "--graph"]) == (0 if mixed else 1)


# -------------------------------------------------------------------------------------------------------- its parts
class Many(nn.Module):
    """Inputs of all kinds, sizes that depend on data, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, more: dict[str, torch.Tensor], half: int = 2) -> Any:
        y = self.layer(self.table(ids)) * mask[..., None]
        y = torch.cond(mask.all(), lambda v: v + 1, lambda v: v - 1, (y,))
        return y[:, ::half], torch.cat([y, more["extra"]], 1), torch.nonzero(more["extra"])


def test_inputs_are_made_as_the_graph_describes_them() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=4, max=9)
    call = (torch.zeros(3, 6, dtype=torch.int64), torch.ones(3, 6, dtype=torch.bool), {"extra": torch.randn(3, 2, 8)})
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, {"extra": {0: batch}}, None)
    gm = export(Many().eval(), (*call, 2), shapes)
    args, kwargs = example_of_graph(gm)
    ids, mask, more, half = args
    assert not kwargs and half == 2
    assert ids.shape == mask.shape and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert more["extra"].shape[0] == ids.shape[0] and more["extra"].shape[1:] == (2, 8)
    gm(*args)  # it checks its inputs
    found = propagate(gm)
    assert not found.differences and found.same > 5
    assert any("cond" in name for name in found.undecided) and any("nonzero" in name for name in found.undecided)
