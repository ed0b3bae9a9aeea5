"""A qtype, an operator pattern, an algorithm and a backend, each added by one file in a folder of the user's."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.calibrate import Observer
from inc_graph.errors import ConfigError, IncError, UnknownNameError
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.registry import ALGORITHMS, BACKENDS, PATTERNS, QTYPES, Registry
from inc_graph.text import to_text

FILES = {
    "qtype": """
        import torch
        from inc_graph.qtypes import QType, register

        register(QType("int5_ext", "int", 5, torch.int8, -16, 15), "five_ext")
        """,
    "pattern": """
        import torch
        from inc_graph.oppattern import OpPattern, register_pattern

        lib = torch.library.Library("ext_test", "FRAGMENT")
        lib.define("scaled(Tensor x, Tensor weight, float factor) -> Tensor")
        lib.impl("scaled", lambda x, weight, factor: x @ weight * factor, "CompositeExplicitAutograd")
        torch.library.register_fake("ext_test::scaled", lambda x, w, f: x.new_empty(*x.shape[:-1], w.shape[1]), lib=lib)

        register_pattern(
            OpPattern("scaled_ext", (torch.ops.ext_test.scaled.default,), weight=1, channel_axis=1)
        )
        """,
    "algorithm": """
        from dataclasses import dataclass
        from typing import ClassVar

        from inc_graph.calibrate import RangeEstimator
        from inc_graph.errors import ConfigError
        from inc_graph.registry import ALGORITHMS

        @ALGORITHMS.register("shrunk_ext")
        @dataclass(frozen=True)
        class Shrunk(RangeEstimator):
            name: ClassVar[str] = "shrunk_ext"
            factor: float = 0.5

            def __post_init__(self):
                if not 0 < self.factor <= 1:
                    raise ConfigError(f"factor must be in (0, 1], not {self.factor}")

            def update(self, state, x, low, high):
                return {**state, "min": low.minimum(state["min"]), "max": high.maximum(state["max"])}

            def limits(self, state, qspec):
                return state["min"] * self.factor, state["max"] * self.factor
        """,
    "backend": """
        import torch
        from inc_graph.graph import insert_call, replace_uses
        from inc_graph.lowering.base import Backend, Claim
        from inc_graph.ops import DEQUANTIZE
        from inc_graph.pattern import Any, P
        from inc_graph.registry import BACKENDS

        CALLS = []

        def kernel(x, scale, w, w_scale, bias):
            CALLS.append(x.shape)
            return torch.nn.functional.linear(x.float() * scale, w.float() * w_scale, bias)

        def rewrite(context, found):
            args = (found["x"], found["s"], found["w"], found["ws"], found["b"])
            new = insert_call(context.gm, kernel, args, before=found.root, like=found.root)
            replace_uses(found.root, new)

        def check(context, found):
            return "it has more than 16 outputs" if found.root.meta["val"].shape[-1] > 16 else None

        x, w = P(DEQUANTIZE, Any("x"), Any("s"), None), P(DEQUANTIZE, Any("w"), Any("ws"))
        linear = P(torch.ops.aten.linear.default, x, w, Any("b"))

        class Mine(Backend):
            name = "mine_ext"
            capabilities = {"linear": (("int8", "int8"),)}

            def available(self):
                return None

            def claims(self):
                return (Claim("my linear", linear, rewrite, check),)

        BACKENDS.add("mine_ext", Mine())
        """,
}
NAMES = {
    "qtype": (QTYPES, "int5_ext"),
    "pattern": (PATTERNS, "scaled_ext"),
    "algorithm": (ALGORITHMS, "shrunk_ext"),
    "backend": (BACKENDS, "mine_ext"),
}


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Any]:
    """Write one of the files and load its folder; everything is taken out again afterwards."""
    loaded: list[str] = []
    before = {id(r): set(r.names()) for r, _ in NAMES.values()}

    def do(kind: str, text: str = "", name: str = "") -> Any:
        folder = tmp_path / (name or kind)
        folder.mkdir()
        (folder / f"my_{kind}.py").write_text(textwrap.dedent(text or FILES[kind]))
        loaded.extend(NAMES[kind][0].load_folder(folder))
        return sys.modules[loaded[-1]]

    yield do
    for registry, _ in NAMES.values():
        for extra in set(registry.names()) - before[id(registry)]:
            registry.remove(extra)
    for name in loaded:
        module = sys.modules.pop(name)
        if hasattr(module, "lib"):
            module.lib._destroy()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def run(m: nn.Module, config: StaticQuantConfig, **options: Any) -> tuple[Any, nn.Module, float]:
    """(converted, prepared, SQNR in dB) on random data."""
    x = torch.randn(32, 16)
    prepared = prepare(m, config, example_inputs=x, inplace=False, **options)
    prepared(x)
    q = convert(prepared)
    want, got = m(x), q(x)
    return q, prepared, float(10 * torch.log10((want**2).sum() / ((want - got) ** 2).sum()))


def test_a_qtype(load: Any) -> None:
    with pytest.raises(ConfigError, match="w_dtype must be one of"):
        StaticQuantConfig(w_dtype="int5_ext")
    load("qtype")
    q, _, db = run(model(), StaticQuantConfig(w_dtype="int5_ext"))
    assert 15 < db < 32  # 5 bits: 18 dB less than 8
    assert "'int5_ext'" in to_text(q.graph) or "int5_ext" in to_text(q.graph)
    packed = [b for n, b in q.graph.named_buffers() if n.endswith("_q")]
    assert [tuple(b.shape) for b in packed] == [(32, 16 * 5 // 8), (8, 32 * 5 // 8)]  # five bits each
    assert [x.op for x in q.report.reference] == ["linear", "linear"]  # no kernel takes it, and it runs all the same
    assert run(model(), StaticQuantConfig(w_dtype="five_ext"))[2] > 15


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.ext_test.scaled(torch.relu(self.first(x)), self.weight, 0.5)


def test_an_operator_pattern(load: Any) -> None:
    load("pattern")
    q, _prepared, db = run(Scaled().eval(), StaticQuantConfig(), backend="eager")
    assert db > 30 and [x.op for x in q.report.reference] == ["linear", "scaled_ext"] and not q.report.floats
    scales = {n: b.shape for n, b in q.graph.named_buffers() if n.startswith("weight") and n.endswith("scale")}
    assert list(scales.values()) == [(1, 4)]  # one an output channel, along the axis that the pattern says
    q, _, _ = run(Scaled().eval(), StaticQuantConfig())  # a backend that does not know it leaves it float, and says so
    assert [(x.op, x.detail) for x in q.report.floats] == [
        ("scaled_ext", "backend 'inductor' has no quantized kernel for scaled_ext")
    ]
    PATTERNS.remove("scaled_ext")
    q, _, _ = run(Scaled().eval(), StaticQuantConfig())
    assert [(x.op, x.detail) for x in q.report.floats] == [
        ("ext_test::scaled", "no quantization pattern for this operator")
    ]


def test_a_range_estimator(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a range estimator .*not 'shrunk_ext'"):
        StaticQuantConfig(act_algo="shrunk_ext")
    load("algorithm")
    with pytest.raises(ConfigError, match="factor must be in"):
        StaticQuantConfig(act_algo="shrunk_ext{factor=2}")
    m = model()
    config = StaticQuantConfig(act_algo="shrunk_ext{factor=1.0}", w_algo="shrunk_ext{factor=1}")
    assert run(m, config)[2] == pytest.approx(run(m, StaticQuantConfig())[2], abs=3)  # at 1 it is minmax; other data
    _q, prepared, db = run(m, StaticQuantConfig(act_algo="shrunk_ext"))
    assert db < 20  # half of the range is cut off
    observers = [o for o in prepared.modules() if isinstance(o, Observer)]
    assert {(o.estimator.name, o.estimator.factor) for o in observers} == {("shrunk_ext", 0.5)}


def test_a_backend(load: Any) -> None:
    mine = load("backend")
    m = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    config = StaticQuantConfig(act_dtype="int8", act_sym=True)
    q, prepared, db = run(m, config, backend="mine_ext")
    assert db > 30 and q.backend == "mine_ext" and mine.CALLS[-1] == (32, 32)
    assert [(x.module, x.detail) for x in q.report.kernels] == [("2", "my linear")]
    assert [(x.module, x.detail) for x in q.report.reference] == [("0", "it has more than 16 outputs")]
    assert convert(prepared, backend="inductor").report.count("linear") == 2  # what was prepared is not bound to it
    BACKENDS.remove("mine_ext")
    with pytest.raises(UnknownNameError, match="unknown backend 'mine_ext'"):
        convert(prepared)


@pytest.mark.parametrize("kind", sorted(FILES))
def test_a_name_that_is_taken_is_refused(load: Any, kind: str) -> None:
    registry, name = NAMES[kind]
    assert name not in registry
    first = load(kind)
    mine = registry.get(name)
    other = FILES[kind].replace("15)", "14)").replace("channel_axis=1", "channel_axis=0")
    other = "\n".join(line for line in other.splitlines() if "lib" not in line or kind != "pattern")
    with pytest.raises(IncError, match=rf"'?{name}'? is registered twice: by .*{first.__name__}.* and by") as e:
        load(kind, other, "second")
    assert "my_" in str(e.value) and registry.get(name) is mine
    registry.remove(name)
    assert name not in registry
    with pytest.raises(UnknownNameError):
        registry.remove(name)


def test_bad_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(IncError, match="no such folder"):
        ALGORITHMS.load_folder(tmp_path / "none")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "_private.py").write_text("raise SystemExit\n")
    for _ in range(2):
        with pytest.raises(IncError, match=r"broken.py failed to import: No module named") as e:
            ALGORITHMS.load_folder(tmp_path)
        assert isinstance(e.value.__cause__, ImportError)
    assert not any(m.endswith("_broken") for m in sys.modules) and isinstance(ALGORITHMS, Registry)
