"""From a config of a weight-only method to what is in the graph, in both scopes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import inc_graph.quantization as c
from inc_graph.errors import CalibrationError, CaptureError, ConfigError, UnusedRuleWarning
from inc_graph.ops import is_dequantize, is_unpack
from inc_graph.quantization import block_by_block, convert, prepare, quantize
from inc_graph.quantization.model import QuantizedModel
from inc_graph.recipe import get_recipe

GROUP = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)
        self.lm_head = nn.Linear(32, 8)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        h = self.table(x) + self.conv(image).mean()
        return self.lm_head(h + self.fc2(torch.relu(self.fc1(h))))


def made() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


INPUTS = (torch.arange(12).view(2, 6), torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8))


def converted(config: Any, scope: str, model: nn.Module | None = None) -> Any:
    model = made() if model is None else model
    example = {"example_inputs": INPUTS} if scope == "graph" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows of calibration data
        return quantize(model, config, lambda m: m(*INPUTS), **example)


def graphs(q: Any) -> list[fx.GraphModule]:
    found = [q] if isinstance(q, QuantizedModel) else [m for m in q.modules() if isinstance(m, QuantizedModel)]
    return [m.graph for m in found]


def formats(q: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Module -> (qtype, block) of its weight."""
    found = {}
    for gm in graphs(q):
        for node in gm.graph.nodes:
            reads = [n for n in node.all_input_nodes if is_dequantize(n)]
            if reads and not is_dequantize(node) and (stack := node.meta.get("nn_module_stack")):
                path = list(stack.values())[-1][0]
                found[path.removeprefix("L['self'].")] = (reads[0].args[4], tuple(reads[0].args[3]))
    return found


SCOPES = pytest.mark.parametrize("scope", ["graph", "layers"])


@SCOPES
@pytest.mark.parametrize("config,expected", [
    (c.RTNConfig(group_size=GROUP), ("int4", (1, 16))),
    (c.RTNConfig(group_size=GROUP, use_sym=False), ("uint4", (1, 16))),
    (c.RTNConfig(bits=3, group_size=-1), ("int3", (1, -1))),
    (c.RTNConfig(bits=8, group_size=GROUP), ("int8", (1, 16))),
    (c.RTNConfig(dtype="int2", group_size=GROUP), ("int2", (1, 16))),
    (c.RTNConfig(dtype="nf4", group_size=GROUP), ("nf4", (1, 16))),
    (c.RTNConfig(dtype="fp4", group_size=GROUP), ("fp4_bnb", (1, 16))),
    (c.RTNConfig(dtype="fp4_e2m1", group_size=GROUP), ("fp4", (1, 16))),
    (c.RTNConfig(dtype="fp8_e4m3", group_size=GROUP), ("fp8_e4m3", (1, 16))),
    (c.RTNConfig(group_dim=0, group_size=GROUP), ("int4", (16, 1))),
    (c.HQQConfig(group_size=GROUP), ("uint4", (16, 1))),
    (c.GPTQConfig(group_size=GROUP), ("int4", (1, 16))),
    (c.GPTQConfig(group_size=GROUP, use_sym=False, bits=8), ("uint8", (1, 16))),
], ids=str)  # fmt: skip
def test_formats(config: Any, expected: Any, scope: str) -> None:
    q = converted(config, scope)
    assert formats(q) == {"fc1": expected, "fc2": expected}  # the head, the table and the convolution stay float
    lines = {line.name: line for line in q.report.weights}
    assert set(lines) <= {"fc1", "fc2"}
    x, y = made()(*INPUTS), q(*INPUTS)
    assert 0 < float((x - y).norm() / x.norm()) < 0.5


@SCOPES
def test_other_operators_are_quantized_where_they_are_named(scope: str) -> None:
    config = c.RTNConfig(group_size=GROUP, quant_lm_head=True)
    config.set_local(nn.Embedding, c.RTNConfig(bits=8, group_size=GROUP))
    config.set_local("conv", c.RTNConfig(bits=4, group_size=GROUP))
    found = formats(converted(config, scope))
    assert found["table"] == ("int8", (1, 16))
    assert found["conv"] == ("int4", (1, 1, -1, -1))  # a kernel of 9 weights is never split
    assert found["lm_head"] == ("int4", (1, 16))


@SCOPES
def test_double_quantized_scales(scope: str) -> None:
    config = c.RTNConfig(group_size=GROUP, use_double_quant=True, double_quant_bits=6, double_quant_group_size=8)
    q = converted(config, scope)
    chains = [n for gm in graphs(q) for n in gm.graph.nodes if is_dequantize(n) and not n.args[1].op == "get_attr"]
    assert len(chains) == 2
    plain = converted(c.RTNConfig(group_size=GROUP), scope)
    a, b = plain(*INPUTS), q(*INPUTS)
    assert 0 < float((a - b).norm() / a.norm()) < 0.2


@SCOPES
def test_act_order_moves_the_inputs(scope: str) -> None:
    q = converted(c.GPTQConfig(group_size=GROUP, act_order=True), scope)
    selects = [n for gm in graphs(q) for n in gm.graph.nodes if n.target is torch.ops.aten.index_select.default]
    assert len(selects) == 2
    x, y = made()(*INPUTS), q(*INPUTS)
    assert float((x - y).norm() / x.norm()) < 0.3


@SCOPES
def test_half_a_byte_a_weight(scope: str) -> None:
    example = {"example_inputs": (torch.zeros(2, 256),)} if scope == "graph" else {}
    q: Any = quantize(nn.Sequential(nn.Linear(256, 512, bias=False)).eval(), c.RTNConfig(group_size=32), **example)
    assert q.report.bytes_after <= 0.30 * 2 * 256 * 512
    assert any(is_unpack(n) for gm in graphs(q) for n in gm.graph.nodes)


# ------------------------------------------------------------------------------------------------------------ bad input
@SCOPES
@pytest.mark.parametrize("config,text", [
    (c.RTNConfig(group_size=64), r"group_size 64 is larger than the input dimension, 32.*fc1"),
    (c.RTNConfig(bits=1), "integers of 1 bits cannot be had"),
    (c.RTNConfig(use_double_quant=True, double_quant_dtype="nf4"), "double_quant_dtype 'nf4' cannot be had"),
    (c.GPTQConfig(group_size=16).set_local("table", c.GPTQConfig(group_size=16)), "gptq rounds against the inputs"),
    (c.RTNConfig(group_size=16).set_local("conv", c.RTNConfig(group_dim=0)), "than the output dimension, 4.*conv"),
], ids=str)  # fmt: skip
def test_refused_and_nothing_changed(config: Any, text: str, scope: str) -> None:
    model = made()
    before, want = copy.deepcopy(model.state_dict()), model(*INPUTS)
    example = {"example_inputs": INPUTS} if scope == "graph" else {}
    with pytest.raises(ConfigError, match=f"(?s){text}"):
        prepare(model, config, **example)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(*INPUTS), want)


def test_a_layer_that_cannot_be_quantized_is_an_error_if_it_is_named() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2), "fc": nn.Linear(32, 32)}).eval()
    prepare(model, c.RTNConfig(), inplace=False)  # everything: what cannot be is in the report
    with pytest.raises(ConfigError, match=r"(?s)reads its weight and never calls it.*attn.out_proj"):
        prepare(model, c.RTNConfig().set_local("attn.out_proj", c.RTNConfig(bits=8)))


@SCOPES
def test_a_weight_that_is_not_finite(scope: str) -> None:
    model = made()
    model.fc2.weight.data[3, 5] = float("nan")
    example = {"example_inputs": INPUTS} if scope == "graph" else {}
    with pytest.raises(ConfigError, match=r"(?s)NaN or infinity.*fc2") as e:
        prepare(model, c.RTNConfig(group_size=GROUP), **example)
    assert "weight weight" not in str(e.value) and str(e.value.hint).startswith("repair the weight")
    config = c.RTNConfig(group_size=GROUP).set_local("fc2", c.RTNConfig(dtype="fp32"))
    assert prepare(model, config, **example) is not None  # as the hint says


def test_a_calibration_call_that_is_not_finite_is_named_by_its_number() -> None:
    prepared = prepare(nn.Sequential(nn.Linear(16, 16)).eval(), c.GPTQConfig(group_size=GROUP))
    for batch in torch.randn(2, 20, 16):
        prepared(batch)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(CalibrationError, match="calibration call 3: its input holds NaN or infinity"):
            prepared(torch.full((2, 16), bad))
    prepared(torch.randn(20, 16))  # what was refused does not count
    with pytest.raises(CalibrationError, match="calibration call 4: "):
        copy.deepcopy(prepared)(torch.full((2, 16), torch.nan))


@SCOPES
def test_gptq_without_data(scope: str) -> None:
    example = {"example_inputs": INPUTS} if scope == "graph" else {}
    prepared = prepare(made(), c.GPTQConfig(group_size=GROUP), **example)
    with pytest.raises(CalibrationError, match="no calibration data"):
        convert(prepared)
    with pytest.raises(ConfigError, match="needs calibration data"):
        convert(made(), c.GPTQConfig(group_size=GROUP))


@SCOPES
def test_rtn_and_hqq_convert_at_once(scope: str) -> None:
    example = {"example_inputs": INPUTS} if scope == "graph" else {}
    for config in (c.RTNConfig(group_size=GROUP), c.HQQConfig(group_size=GROUP)):
        q: Any = convert(made(), config, **example)
        assert len(q.report.quantized) == 2


def test_the_implied_float_head_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedRuleWarning)
        convert(nn.Sequential(nn.Linear(32, 32)).eval(), c.RTNConfig())
        convert(nn.Linear(32, 32).eval(), c.RTNConfig(), example_inputs=(torch.zeros(2, 32),))


# -------------------------------------------------------------------------------------------------------- compositions
@SCOPES
def test_weight_only_beside_static_int8(scope: str) -> None:
    static = c.StaticQuantConfig()
    q = converted(c.RTNConfig(group_size=GROUP, white_list=["fc1$"]) + static, scope)
    methods = {line.module or line.name: line.method for line in q.report.recipe.lines}
    assert "int4" in methods["fc1"] and "activation" not in methods["fc1"]
    assert "activation uint8" in methods["fc2"] and "activation uint8" in methods["conv"]
    x, y = made()(*INPUTS), q(*INPUTS)
    assert float((x - y).norm() / x.norm()) < 0.3


def test_what_a_method_is_for_is_no_claim_on_the_rest() -> None:
    """A convolution is not taken from static INT8 by RTN, whose priority is higher, since RTN is for linear layers."""
    prepared = prepare(made(), c.RTNConfig(group_size=GROUP) + c.StaticQuantConfig(), example_inputs=INPUTS)
    recipe = get_recipe(prepared)  # type: ignore[arg-type]
    assert recipe.supported is not None
    prepared(*INPUTS)
    methods = {line.module: line.method for line in convert(prepared).report.recipe.lines}  # type: ignore[union-attr]
    assert "activation uint8" in methods["conv"] and "rtn" in methods["fc1"]


# -------------------------------------------------------------------------------------------------- from a checkpoint
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("config", [c.RTNConfig(), c.HQQConfig(group_size=16), c.GPTQConfig()], ids=lambda x: x.name)
def test_streamed_from_a_checkpoint(
    config: Any, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(block_by_block, "LOCKSTEP_BYTES", -1)  # what is streamed runs block by block, in two runs
    from inc_graph.utils import load_empty_model

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, tie_word_embeddings=sharded,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    ids = torch.arange(40).view(1, 40)

    def run(m: nn.Module) -> None:
        m(ids)

    want = quantize(model, config, run)
    empty = load_empty_model(tmp_path)
    assert all(p.is_meta for p in empty.parameters())
    prepared = prepare(empty, config)
    layers = [p for n, p in prepared.named_parameters() if "proj" in n]
    assert layers and all(p.is_meta for p in layers)  # values are read when they are needed, and dropped again
    run(prepared)
    assert all(p.is_meta for n, p in prepared.named_parameters() if "proj" in n)
    have = convert(prepared)
    assert not any(t.is_meta for t in [*have.parameters(), *have.buffers()])
    assert torch.equal(want(ids).logits, have(ids).logits)


def test_bad_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def empty() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()

    with pytest.raises(CaptureError, match=r"(?s)'0.weight' is on the meta device.*model_path"):
        prepare(empty(), c.RTNConfig())
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        prepare(empty(), c.RTNConfig(model_path=str(tmp_path)))
    good = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).state_dict()
    save_file({k: v for k, v in good.items() if k != "1.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has no tensor '1\.bias'"):
        prepare(empty(), c.RTNConfig(model_path=str(tmp_path)))
    save_file({**good, "1.weight": torch.zeros(4, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'1.weight' has shape \[4, 32\] in model.safetensors, and \[32, 32\]"):
        prepare(empty(), c.RTNConfig(model_path=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        prepare(empty(), c.RTNConfig(model_path=str(tmp_path)))
    save_file(good, tmp_path / "model.safetensors")
    q = convert(empty(), c.RTNConfig(model_path=str(tmp_path / "model.safetensors")))
    assert q(torch.zeros(1, 32)).shape == (1, 32)


@SCOPES
def test_convolutions_take_their_bits(scope: str) -> None:
    """Kernels of 1 x 1 too, whose rows would take a byte each if they were packed one by one."""
    model = nn.Sequential(nn.Conv2d(64, 32, 1, bias=False), nn.Conv2d(32, 64, 3, bias=False)).eval()
    x = torch.randn(1, 64, 9, 9)
    config = c.RTNConfig(bits=4, group_size=-1).set_local(nn.Conv2d, c.RTNConfig(bits=4, group_size=-1))
    example = {"example_inputs": (x,)} if scope == "graph" else {}
    q: Any = quantize(copy.deepcopy(model), config, **example)
    weights = 64 * 32 + 64 * 32 * 9
    assert q.report.bytes_after <= weights / 2 + 2 * (32 + 64)
    assert float((q(x) - model(x)).norm() / model(x).norm()) < 0.3

    r: Any = convert(prepare(copy.deepcopy(model), config, **example), reference=True)
    torch.testing.assert_close(r(x), q(x), rtol=1e-4, atol=1e-4)
