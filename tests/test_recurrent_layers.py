"""LSTM and GRU of a model that is not exported: every way to call them, the numbers of exported ones, all else that a
layer can do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from inc_graph.errors import CaptureError
from inc_graph.export import export
from inc_graph.quantization import (
    DynamicQuantConfig,
    MixedPrecisionConfig,
    RTNConfig,
    StaticQuantConfig,
    convert,
    load,
    prepare,
    quantize,
)

TOKENS = {"act_granularity": "per_token", "w_granularity": "per_channel"}
CONFIG = DynamicQuantConfig(**TOKENS)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any, state: Any = None) -> Any:
        return self.layer(x, state)


def net(kind: type[nn.Module], **options: Any) -> Net:
    return Net(kind(12, 20, **options)).eval()


def quantized(model: nn.Module, config: Any = CONFIG) -> Any:
    return quantize(copy.deepcopy(model), config)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def states(layer: Any, batch: int) -> Any:
    n = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(n, batch, layer.proj_size or layer.hidden_size) / 2
    return (h, torch.randn(n, batch, layer.hidden_size)) if isinstance(layer, nn.LSTM) else h


def close(have: Any, want: Any, limit: float = 0.03) -> bool:
    pairs = list(zip(flat(have), flat(want), strict=True))
    return all(a.shape == b.shape and a.dtype == b.dtype and (a - b).norm() <= limit * b.norm() for a, b in pairs)


OPTIONS: tuple[tuple[type[nn.Module], dict[str, Any], dict[str, Any]], ...] = (
    (nn.LSTM, {}, {"act_sym": True}),
    (nn.LSTM, {"batch_first": True, "bidirectional": True, "num_layers": 2, "dropout": 0.5}, TOKENS),
    (nn.LSTM, {"proj_size": 6, "num_layers": 2, "bias": False}, TOKENS),
    (nn.GRU, {"batch_first": True, "bidirectional": True}, TOKENS),
    (nn.GRU, {"num_layers": 2, "bias": False}, {}),
)


@pytest.mark.parametrize(("kind", "options", "settings"), OPTIONS, ids=str)
def test_every_call(kind: type[nn.Module], options: dict[str, Any], settings: dict[str, Any]) -> None:
    """As the exported layer, bit for bit, and close to the float one."""
    model, config = net(kind, **options), DynamicQuantConfig(**settings)
    q, limit = quantized(model, config), 0.03 if settings is TOKENS else 0.06
    steps, layers = f"{kind.__name__.lower()}_steps", options.get("num_layers", 1) * (1 + q.layer.bidirectional)
    assert q.report.count("linear") == q.report.count(steps) == layers and not q.report.floats
    assert q.report.count("projection") == (layers if "proj_size" in options else 0) and not q.report.reference
    assert {line.module for line in q.report.kernels} == {"layer"}
    assert isinstance(q.layer, kind) and q.layer.hidden_size == 20 and q.layer.bias is options.get("bias", True)
    x, state = torch.randn(4, 3, 12), states(model.layer, 4 if model.layer.batch_first else 3)
    exported = quantize(export(copy.deepcopy(model), (x, state)), config)
    assert all(map(torch.equal, flat(q(x, state)), flat(exported(x, state))))
    for have, want in zip(flat(q(x)), flat(model(x)), strict=True):
        assert have.stride() == want.stride()
    assert close(q(x), model(x), limit) and close(q(x, state), model(x, state), limit)
    one = torch.randn(5, 12)  # no batch
    first = states(model.layer, 1)
    first = tuple(s[:, 0] for s in first) if isinstance(first, tuple) else first[:, 0]
    assert close(q(one), model(one), limit) and close(q(one, first), model(one, first), limit)
    packed = pack_sequence([torch.randn(n, 12) for n in (2, 6, 1)], enforce_sorted=False)
    state = states(model.layer, 3)
    for args in ((packed,), (packed, state)):
        have, want = q(*args), model(*args)
        assert close(have, want, limit) and torch.equal(have[0].batch_sizes, want[0].batch_sizes)
        assert all(map(torch.equal, have[0][2:], want[0][2:]))
    long = torch.randn(1, 40, 12) if model.layer.batch_first else torch.randn(40, 1, 12)
    assert close(q(long), model(long), limit)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_packed_sequence_is_its_sequences(kind: type[nn.Module]) -> None:
    """Ranges by row: a sequence gives the same alone and among others."""
    q = quantized(net(kind, bidirectional=True, num_layers=2))
    each = [torch.randn(n, 12) for n in (7, 5, 5, 1)]
    out, last = q(pack_sequence(each))
    padded, lengths = pad_packed_sequence(out)
    for i, x in enumerate(each):
        alone, end = q(x)
        torch.testing.assert_close(padded[: lengths[i], i], alone)
        for a, b in zip(flat(last), flat(end), strict=True):
            torch.testing.assert_close(a[:, i], b)


class Tagger(nn.Module):
    """What people build: words of sentences of several lengths, a tag for each."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.tags = nn.Linear(48, 5)

    def forward(self, words: Tensor, lengths: list[int]) -> Tensor:
        self.lstm.flatten_parameters()
        packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.tags(out)


def test_a_model(tmp_path: Path) -> None:
    model = Tagger().eval()
    words, lengths = torch.randint(30, (3, 9)), [4, 9, 6]
    q = quantized(model)
    want, y = model(words, lengths), q(words, lengths)
    assert (y - want).norm() <= 0.03 * want.norm() and q.report.count("lstm_steps") == 4
    again = copy.deepcopy(q)
    assert torch.equal(again(words, lengths), y) and again.lstm is not q.lstm
    q.save(tmp_path / "q")
    loaded = load(tmp_path / "q", copy.deepcopy(model))
    assert torch.equal(loaded(words, lengths), y) and loaded.lstm.num_layers == 2 and loaded.lstm.batch_first
    assert any("weight_hh_l1_reverse" in key for key in q.state_dict())
    with pytest.raises(RuntimeError, match=r"lstm\.weight \(packed for this machine"):
        again.load_state_dict(q.state_dict())  # the weights of inputs are not in it
    assert torch.equal(again(words, lengths), y)
    big = quantized(Net(nn.LSTM(128, 256, 2)).eval())
    assert big.report.bytes_after <= 0.27 * big.report.bytes_before


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_prepared(kind: type[nn.Module]) -> None:
    """Between prepare and convert it computes as the float layer does; together with other methods, too."""
    model, x = nn.Sequential(nn.Linear(12, 12), kind(12, 20)).eval(), torch.randn(4, 3, 12)
    for config in (CONFIG, StaticQuantConfig() + CONFIG, CONFIG + MixedPrecisionConfig("bf16")):
        prepared = prepare(copy.deepcopy(model), config)
        assert all(map(torch.allclose, flat(prepared(x)), flat(model(x))))
        q = convert(prepared)
        assert close(q(x), model(x)) and q.report.count(f"{kind.__name__.lower()}_steps") == 1


def test_compiled() -> None:
    model = nn.Sequential(nn.LSTM(12, 20, num_layers=2)).eval()
    q, x = quantized(model), torch.randn(4, 3, 12)
    want, state = q(x)
    compiled = torch.compile(q)
    for _ in range(2):
        y, last = compiled(x)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(last, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = net(nn.LSTM, bidirectional=True).to(dtype)
    x = torch.randn(4, 3, 12, dtype=dtype)
    assert close(quantized(model)(x), model(x), 0.04)


def test_autocast() -> None:
    model = net(nn.GRU)
    q, x = quantized(model), torch.randn(4, 3, 12)
    packed = pack_sequence([torch.randn(n, 12) for n in (5, 2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (x, packed):
            out, last = q(value)
            assert flat(out)[0].dtype == last.dtype == torch.bfloat16
            assert close([t.float() for t in flat((out, last))], q_float(q, value), 0.01)


def q_float(q: nn.Module, value: Any) -> list[Tensor]:
    with torch.autocast("cpu", enabled=False):
        return flat(q(value))


def test_hooks_and_a_shared_layer() -> None:
    layer = nn.GRU(12, 12)
    model = nn.ModuleDict({"a": layer, "b": layer}).eval()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    q = quantized(model)
    assert q["a"] is q["b"] and q.report.count("gru_steps") == 1
    q["a"](torch.randn(2, 1, 12))
    assert seen == [1]


# ----------------------------------------------------------------------------------------------------- what stays float
def test_rules() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(8, 8), "b": nn.GRU(8, 8), "c": nn.Linear(8, 8)}).eval()
    floats = DynamicQuantConfig(w_dtype="fp32")
    for key, kept in ((nn.LSTM, "a"), ("a", "a"), ("GRU", "b")):
        q = quantized(model, DynamicQuantConfig(**TOKENS).set_local(key, floats))
        (line,) = q.report.floats
        assert line.module == kept and "kept float by set_local" in line.detail
        assert type(q[kept]) is type(model[kept]) and "c" in {x.module for x in q.report.kernels}
    q = quantized(model, RTNConfig(group_size=-1))  # weights alone
    assert {x.module for x in q.report.floats} == {"a", "b"} and type(q["a"]) is nn.LSTM


class Own(nn.LSTM):
    def forward(self, x: Any, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


def test_a_forward_of_its_own_stays() -> None:
    q = quantized(nn.ModuleDict({"a": Own(8, 8), "c": nn.Linear(8, 8)}).eval())
    (line,) = q.report.floats
    assert line.module == "a" and "a forward of its own" in line.detail and type(q["a"]) is Own


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((torch.zeros(4, 3, 5),), r"its input has shape \[4, 3, 5\], it takes \[\*, \*, 12\]"),
        ((torch.zeros(0, 3, 12),), "there is no step"),
        ((torch.zeros(12),), r"its input has shape \[12\]"),
        ((torch.zeros(4, 3, 12).half(),), "its input is torch.float16, it takes torch.float32"),
        ((torch.zeros(4, 3, 12), torch.zeros(1, 3, 20)), "it takes 2 first states, not 1"),
        ((torch.zeros(4, 3, 12), (torch.zeros(1, 2, 20),) * 2), r"its first h has shape \[1, 2, 20\]"),
        (("text",), "its input is str, not a tensor"),
    ],
)
def test_bad_inputs(args: Any, match: str) -> None:
    q = quantized(net(nn.LSTM))
    with pytest.raises(CaptureError, match=match) as e:
        q(*args)
    assert e.value.module == "layer"


# ------------------------------------------------------------------------------------ any number of steps, exported
@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_a_dynamic_number_of_steps(kind: type[nn.Module], tmp_path: Path) -> None:
    """torch's exporter ties a graph with such a layer to the steps of the example."""
    model = nn.Sequential(nn.Linear(12, 12), kind(12, 20, bidirectional=True)).eval()
    dims = {0: torch.export.Dim("steps", min=2, max=99), 1: torch.export.Dim.DYNAMIC}
    exported = export(model, (torch.randn(5, 3, 12),), dynamic_shapes=(dims,))
    for config in (CONFIG, DynamicQuantConfig(**TOKENS).set_local(kind, DynamicQuantConfig(w_dtype="fp32"))):
        q = quantize(copy.deepcopy(exported), config)
        q.save(tmp_path / "q")
        again = load(tmp_path / "q")
        for shape in ((5, 3), (31, 2)):
            x = torch.randn(*shape, 12)
            assert close(q(x), model(x)) and all(map(torch.equal, flat(again(x)), flat(q(x))))


def test_steps_of_no_sequence() -> None:
    for layer in (nn.LSTM(6, 8, 2, bidirectional=True, proj_size=3), nn.GRU(6, 8, batch_first=True)):
        x = torch.randn(0, 5, 6) if layer.batch_first else torch.randn(5, 0, 6)
        out, last = layer.eval()(x)
        got, end = quantized(Net(layer).eval())(x)
        assert got.shape == out.shape
        flat = [last] if isinstance(last, Tensor) else list(last)
        assert [s.shape for s in ([end] if isinstance(end, Tensor) else end)] == [s.shape for s in flat]
