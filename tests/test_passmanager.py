"""Pipelines: text and back, contracts of passes, failures, fuel, verification and dumps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any as Anything

import pytest
import torch
from torch import fx, nn

from inc_graph import graph as g
from inc_graph.capture import capture
from inc_graph.errors import IncError, PassError, UnknownNameError
from inc_graph.passmanager import Pass, PassReport, PassResult, Pipeline
from inc_graph.pattern import Any, P
from inc_graph.registry import PASSES
from inc_graph.rewrite import Rule, apply_rules
from inc_graph.spec import QSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class SwapTrig(Pass):
    """sin -> cos, with rules and therefore with fuel."""

    name = "test-swap"
    requires = ("float", "annotated")

    def run(self, gm: fx.GraphModule) -> PassResult:
        rule = Rule("sin", P(aten.sin, Any("x")), lambda gm, m: _replace(gm, m, aten.cos.default))
        report = apply_rules(gm, [rule])
        g.erase_dead(gm)
        missed = [(m.node, m.reason) for m in report.misses]
        return PassResult(gm, report.modified, PassReport(report.matched, missed, ["a note"]))


def call(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "call_function")


def _replace(gm: fx.GraphModule, m: Anything, target: Anything) -> None:
    g.replace_uses(m.root, g.insert_call(gm, target, (m["x"],), before=m.root))


@dataclass(frozen=True)
class Options(Pass):
    name = "test-options"
    ensures = "float"
    alpha: float = 0.5
    count: int = 3
    flag: bool = False
    backend: str = "auto"
    names: tuple[str, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)
    table: dict[str, int] = field(default_factory=dict)
    spec: QSpec | None = None
    maybe: str | None = "x"

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(gm, False)


@dataclass(frozen=True)
class Misbehave(Pass):
    name = "test-misbehave"
    how: str = "raise"

    @property
    def ensures(self) -> str | None:  # type: ignore[override]
        return "qdq" if self.how == "level" else None

    def run(self, gm: fx.GraphModule) -> Anything:
        node = call(gm)
        if self.how == "raise":
            raise ZeroDivisionError("one by none")
        if self.how == "inc":
            raise IncError("no good", node=node, module="a.b", hint="do better")
        if self.how == "nothing":
            return None
        if self.how == "lie":
            node.target = aten.tan.default
        if self.how == "break":
            del node.meta["val"]
        return PassResult(gm, self.how == "break")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("INC_FUEL", "INC_DUMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("INC_VERIFY", "1")
    for cls in (SwapTrig, Options, Misbehave):
        PASSES.add(cls.name, cls)
    yield
    for cls in (SwapTrig, Options, Misbehave):
        PASSES.remove(cls.name)


@pytest.fixture
def gm() -> fx.GraphModule:
    class Sines(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().sin().sin()

    return capture(Sines(), (torch.ones(2),))


def targets(gm: fx.GraphModule) -> list[str]:
    return [n.target._schema.name.partition("::")[2] for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.25, "count": 7, "flag": True},
        {"alpha": 1e-9, "count": -4, "maybe": None},
        {"backend": "inductor"},
        {"backend": "a, {b}=\"c\" 'd' ü\n"},
        {"backend": ""},
        {"backend": "true"},
        {"backend": "12", "maybe": "none"},
        {"backend": "1e3", "maybe": "-"},
        {"names": ("layers.0", r"layers\.\d+\.fc"), "limits": (0.5, 2.0)},
        {"table": {"b": 1, "a": 2}},
        {"spec": QSpec("int4", "asymmetric")},
    ],
)
def test_text_round_trip(options: dict) -> None:
    one = Options(**options)
    pipeline = Pipeline([one, SwapTrig(), one])
    text = str(pipeline)
    assert Pipeline.parse(text) == pipeline and str(Pipeline.parse(text)) == text


def test_text_is_plain() -> None:
    assert str(Pipeline([SwapTrig(), Options(alpha=0.25, backend="ipex", flag=True)])) == (
        "test-swap,test-options{alpha=0.25,flag=true,backend=ipex}"
    )
    spaced = ' test-swap , test-options { alpha = 1 , names = [ "a" ] } '
    assert Pipeline.parse(spaced).passes == (SwapTrig(), Options(alpha=1.0, names=("a",)))
    assert Pipeline.parse("") == Pipeline() and str(Pipeline()) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test-swap test-swap", "expected ','"),
        ("test-swap,,test-swap", "expected a pass name"),
        ("test-options{alpha}", "expected '='"),
        ("test-options{alpha=}", "expected a value"),
        ("test-options{alpha=1", "expected ',' or '}'"),
        ("test-options{alpha=1,alpha=2}", "given twice"),
        ("test-options{beta=1}", "no option 'beta' (it has: alpha, count"),
        ('test-options{names=["a}', "bad value"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        Pipeline.parse(text)
    assert message in str(caught.value) and ">>>" in str(caught.value)


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="test-swop"):
        Pipeline.parse("test-swop")


def test_options_without_a_text_form() -> None:
    with pytest.raises(PassError, match="has no text form"):
        str(Options(backend=torch.float32))  # type: ignore[arg-type]


def test_run(gm: fx.GraphModule) -> None:
    result = Pipeline([SwapTrig(), Options()]).run(gm)
    assert targets(result.graph) == ["cos", "cos", "cos"]
    assert [r.name for r in result.reports] == [n for n, _ in result.timings] == ["test-swap", "test-options"]
    assert len(result.reports[0].matched) == 3 and all(s >= 0 for _, s in result.timings)
    node = call(result.graph)
    assert g.peek_meta(node)["provenance"] == ["test-swap/sin"]
    text = str(result)
    assert "ms  test-swap: 3 matched, 0 missed" in text and "note: a note" in text


def test_code_is_generated_once_at_the_end(gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    times, recompile = [], fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda self: (times.append(self), recompile(self))[1])
    x = torch.tensor([0.3, 2.0])
    before = gm(x)
    out = Pipeline((SwapTrig(), SwapTrig())).run(gm).graph
    assert times == [out]
    assert not torch.equal(out(x), before)
    Pipeline((SwapTrig(), SwapTrig())).run(gm, recompile=False)
    assert times == [out]
    SwapTrig().run(gm)
    assert len(times) == 2


def test_report_text() -> None:
    report = PassReport(["a"], [("b", "has two users")], ["n"], "fold")
    assert str(report) == "fold: 1 matched, 1 missed\n  missed b: has two users\n  note: n"


def test_required_levels(gm: fx.GraphModule) -> None:
    g.set_level(gm, "qdq")
    with pytest.raises(PassError, match="needs a graph of level float or annotated, this one is 'qdq'"):
        Pipeline([SwapTrig()]).run(gm)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"ZeroDivisionError\('one by none'\)"),
        ("nothing", "must give a PassResult, not NoneType"),
        ("level", "declares level 'qdq' but left 'float'"),
        ("lie", "reports no change but changed the graph"),
        ("break", r"no meta\['val'\]"),
    ],
)
def test_failures_name_the_pass_and_those_before(gm: fx.GraphModule, how: str, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        Pipeline([Options(), SwapTrig(), Misbehave(how)]).run(gm)
    assert str(caught.value).startswith("pass 'test-misbehave' failed after [test-options, test-swap]: ")
    assert caught.value.__cause__ is not None


def test_failures_keep_node_module_and_hint(gm: fx.GraphModule) -> None:
    with pytest.raises(PassError) as caught:
        Pipeline([Misbehave("inc")]).run(gm)
    error = caught.value
    assert (error.node, error.module, error.hint) == ("sin", "a.b", "do better") and "no good" in str(error)


def test_verification_is_optional(gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    Pipeline([Misbehave("break")]).run(gm, verify_each=False)
    monkeypatch.setenv("INC_VERIFY", "0")
    Pipeline([Misbehave("lie")]).run(gm)


@pytest.mark.parametrize("fuel", range(5))
def test_fuel_is_shared_by_the_passes(gm: fx.GraphModule, fuel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_FUEL", str(fuel))
    result = Pipeline([SwapTrig(), SwapTrig()]).run(gm)
    assert targets(result.graph).count("cos") == min(fuel, 3)


def test_bad_fuel(gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_FUEL", "lots")
    with pytest.raises(PassError, match="INC_FUEL must be a number"):
        Pipeline([SwapTrig()]).run(gm)


def test_dump(gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INC_DUMP", str(tmp_path / "dump"))
    gm = Pipeline([SwapTrig(), Options()]).run(gm).graph
    Pipeline([Options()]).run(gm)
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert files == [
        "00-input.txt", "01-test-swap.diff", "01-test-swap.txt", "02-test-options.diff", "02-test-options.txt",
        "03-input.txt", "04-test-options.diff", "04-test-options.txt",
    ]  # fmt: skip
    change = (tmp_path / "dump" / "01-test-swap.diff").read_text()
    assert "-  %sin_1 = aten.sin(%x)" in change and "+  %cos_1 = aten.cos(%x)" in change
    assert (tmp_path / "dump" / "02-test-options.diff").read_text() == ""


def test_passes_are_values() -> None:
    assert SwapTrig() == SwapTrig() and hash(SwapTrig()) == hash(SwapTrig())
    with pytest.raises(AttributeError):
        Options().alpha = 1.0  # type: ignore[misc]
    with pytest.raises(NotImplementedError):
        Pass().run(None)  # type: ignore[arg-type]


def merged(*texts: str) -> str:
    return str(Pipeline.merged([Pipeline.parse(text) for text in texts]))


def test_a_merged_pipeline_has_each_pass_once_in_an_order_that_suits_all() -> None:
    assert merged("canonicalize,annotate", "canonicalize,annotate") == "canonicalize,annotate"
    assert merged("correct-bias,convert-qdq", "convert-qdq") == "correct-bias,convert-qdq"
    assert merged("convert-qdq", "correct-bias,convert-qdq") == "correct-bias,convert-qdq"
    assert merged("fold-constants,annotate", "canonicalize,fold-conv-bn,annotate") == (
        "fold-constants,canonicalize,fold-conv-bn,annotate"
    )


def test_pipelines_that_contradict_each_other_do_not_merge() -> None:
    with pytest.raises(PassError, match="opposite orders"):
        merged("canonicalize,annotate", "annotate,canonicalize")
    with pytest.raises(PassError, match="one pipeline asks for test-options, another for"):
        merged("test-options", "test-options{alpha=0.9}")
