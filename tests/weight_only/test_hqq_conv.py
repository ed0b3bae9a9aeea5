"""HQQ on convolutions: a group is one weight of each of some kernels, all at the same place in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.errors import ConfigError
from inc_graph.passes.qparams.hqq import HQQ
from inc_graph.passes.qparams.rtn import RTN
from inc_graph.quantization import HQQConfig, RTNConfig, convert, load, prepare, quantize
from inc_graph.spec import PerBlock, QSpec

X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
KINDS = (nn.Conv2d, nn.ConvTranspose2d)
BITS = range(2, 9)
slow = pytest.mark.slow
EXAMPLES: list[Any] = [None, (X,)]
both = pytest.mark.parametrize("example", EXAMPLES, ids=["layers", "graph"])


def made() -> nn.Sequential:
    """A plain convolution, a grouped one, one of 1 x 1, a transposed and a depthwise one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 24, 1),
        nn.ConvTranspose2d(24, 16, 2, 2), nn.Conv2d(16, 16, 3, groups=16),
    ).eval()  # fmt: skip


def named(config: Any) -> Any:
    for kind in KINDS:
        config.set_local(kind, config)
    return config


@both
@pytest.mark.parametrize(
    ("bits", "group"), [pytest.param(bits, (8, -1, 5)[bits % 3], marks=[] if bits == 4 else slow) for bits in BITS]
)
def test_saved_loaded_and_on_the_reference(bits: int, group: int, example: Any, tmp_path: Path) -> None:
    """Equal groups, all outputs, a ragged end."""
    prepared = prepare(made(), named(HQQConfig(bits=bits, group_size=group)), False, example)
    model: Any = convert(prepared, inplace=False)
    reference = convert(prepared, reference=True)
    assert [line.form for line in model.report.weights] == [
        f"uint{bits} [{'1, ' if i == 3 else ''}{group}, {'1, 1' if i == 3 else '1, 1, 1'}]" for i in range(5)
    ]
    want = reference(X)
    assert torch.allclose(model(X), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    model.save(tmp_path)
    assert torch.equal(load(tmp_path, None if example else made())(X), model(X))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [8, -1, 5])
def test_no_worse_than_rounding_to_nearest(bits: int, group: int) -> None:
    weights = [m.weight.detach() for m in made() if isinstance(m, nn.Conv2d)]
    spec = QSpec(f"uint{bits}", "asymmetric", PerBlock((group, 1, 1, 1)))
    found, nearest = ([a.solve(w, spec).notes["error"] for w in weights] for a in (HQQ(quant_zero=False), RTN()))
    assert sum(found) <= sum(nearest)


def test_each_place_in_the_kernels_has_scales_of_its_own() -> None:
    """As if the weight were that of a linear layer with a column for each of these places."""
    conv = made()[0]
    flat = nn.Linear(36, 16, bias=False)
    flat.weight.data = conv.weight.detach().flatten(1).clone()
    a = quantize(nn.Sequential(conv).eval(), named(HQQConfig(group_size=8)))
    b = quantize(nn.Sequential(flat).eval(), HQQConfig(group_size=8))
    assert torch.equal(a[0].weight.flatten(1), b[0].weight + 0)


@both
def test_a_group_larger_than_the_outputs_names_the_layer(example: Any) -> None:
    config = named(HQQConfig(group_size=16)).set_local("6", HQQConfig(group_size=17))
    with pytest.raises(ConfigError, match="group_size 17 is larger than the output dimension, 16") as e:
        quantize(made(), config, example_inputs=example)
    assert "'6'" in str(e.value)


def test_a_transposed_convolution_is_loaded_and_has_its_weight(tmp_path: Path) -> None:
    model: Any = quantize(made(), named(RTNConfig(bits=8, group_size=-1)))
    assert (model[5].weight - made()[5].weight).abs().max() < 0.01 and model[5].transposed
    model.save(tmp_path)
    assert torch.equal(load(tmp_path, made())(X), model(X))
