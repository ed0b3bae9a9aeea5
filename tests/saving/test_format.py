"""The format of today, as files in the repository: later versions have to read them.

`INC_WRITE_FORMAT=1 pytest tests/saving/test_format.py` writes those of the current version anew; those of a version
that was released are never touched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inc_graph.quantization import StaticQuantConfig, load, quantize
from inc_graph.recipe import get_recipe
from inc_graph.saving.folder import MANIFEST, VERSION
from tests.saving.models import Net

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("format_*"))


def write(folder: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    config = StaticQuantConfig(w_dtype="int4").set_local("head", StaticQuantConfig(act_algo="histogram_mse"))
    for name, given in (
        ("graph", {"example_inputs": x, "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}),
        ("layers", {}),
    ):
        torch.manual_seed(1)
        q = quantize(Net().eval(), config, lambda p: p(x), backend="eager", **given)
        q.save(folder / name, max_shard_size=2000)
        save_file({"x": x, "y": q(x)["logits"]}, folder / f"{name}_values.safetensors")


def test_the_format_of_this_version_is_kept() -> None:
    folder = HERE / f"format_{VERSION}"
    if os.environ.get("INC_WRITE_FORMAT"):
        folder.mkdir(exist_ok=True)
        write(folder)
    assert folder in VERSIONS or folder.exists(), "write the files of this version, see above"
    assert json.loads((folder / "graph" / MANIFEST).read_text())["version"] == VERSION


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["graph", "layers"])
def test_older_formats_are_read(folder: Path, name: str) -> None:
    values = load_file(folder / f"{name}_values.safetensors")
    model = load(folder / name, Net())
    torch.testing.assert_close(model(values["x"])["logits"], values["y"], rtol=1e-5, atol=1e-5)
    assert model.report.backend == "eager" and len(model.report.reference) == 4 - (name == "layers")
    if name == "graph":
        assert model(torch.cat([values["x"]] * 2))["logits"].shape == (4, 5)
        origins = [r.origin for r in get_recipe(model.graph).rules]
        assert any("head" in o for o in origins)
    else:
        assert isinstance(model.head, nn.Module) and model.head.in_features == 8
