"""One observer for each scale, seen by those who read quantized and by nobody else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.calibrate import Observer
from inc_graph.errors import CalibrationError, PassError
from inc_graph.graph import get_attr, inc_meta
from inc_graph.input_mean import MeanObserver
from inc_graph.passes.insert_observers import RowObserver
from tests.golden_check import check_golden
from tests.passes.pipelines import (
    CORRECTED,
    INT8,
    S8,
    OpQuant,
    annotate,
    find,
    find_one,
    name,
    observe,
    recipe,
    run,
    text,
)

ROWS, OTHER = torch.randn(3, 4), torch.randn(3, 4)  # two: the exporter takes one tensor for one input


class Net(nn.Module):
    """Two branches that are concatenated, a residual sum, a value that is also read float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.b(F.relu(self.a(x))) + x
        return self.c(torch.cat([z, y], 1)), torch.softmax(y, 1)


def observers(gm: fx.GraphModule, kind: type = Observer) -> dict[str, list[fx.Node]]:
    """Module name -> its calls."""
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        if isinstance(get_attr(gm, node.target), kind):
            found.setdefault(node.target, []).append(node)
    return found


def test_golden() -> None:
    check_golden("insert-observers/positive.txt", text(observe(Net(), ROWS, OTHER, plan=recipe(everything=CORRECTED))))


def test_golden_rejected() -> None:
    """An annotation that no reader asked for is an error, not an observer that nobody needs."""
    gm = annotate(Net(), ROWS, OTHER).graph
    inc_meta(find_one(gm, "cat"))["reads"] = {}
    with pytest.raises(PassError) as error:
        run(gm, "insert-observers")
    check_golden("insert-observers/rejected.txt", f"{error.value}\n")


def test_one_observer_a_scale() -> None:
    gm = observe(Net(), ROWS, OTHER)
    calls = observers(gm)
    assert sorted(len(c) for c in calls.values()) == [1, 1, 2]
    shared = next(c for c in calls.values() if len(c) == 2)
    assert {c.args[0].name for c in shared} == {"add", "y"} == {n.args[0].name for n in find_one(gm, "cat").args[0]}


def test_float_readers_go_past_the_observer() -> None:
    gm = observe(Net(), ROWS, OTHER)
    assert find_one(gm, "softmax").args[0].op == "placeholder"
    assert find(gm, "linear")[0].args[0].op == "call_module"


def test_inputs_stay_in_front() -> None:
    gm = observe(Net(), ROWS, OTHER, plan=recipe(everything=CORRECTED))
    assert [n.op for n in gm.graph.nodes if n.op != "get_attr"][:2] == ["placeholder", "placeholder"]


def test_no_observer_between_a_layer_and_what_is_fused_into_it() -> None:
    gm = observe(Net(), ROWS, OTHER)
    a, b, _ = find(gm, "linear")
    assert all(u.op == "call_function" for n in (a, b) for u in n.users)


def test_carriers_are_not_observed() -> None:
    class Carries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.max_pool2d(self.conv(x), 2).flatten(1))

    gm = observe(Carries(), torch.randn(2, 3, 6, 6))
    assert [c[0].args[0].name for c in observers(gm).values()] == ["x", "conv2d"]


def test_values_of_several_ranks_share_a_scale() -> None:
    """A flat row and a matrix end in one concatenation; each is observed as a row, before the view."""

    class Ranks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(24, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x).flatten(), y])[None])

    gm = observe(Ranks(), ROWS, torch.randn(12))
    (shared,) = observers(gm, RowObserver).values()
    assert {c.args[0].name for c in shared} == {"linear", "y"}
    x, y = torch.randn(3, 4), torch.randn(12)
    with torch.no_grad():
        want = gm(x, y)
        assert torch.equal(want, gm(x, y))
    observer: Any = get_attr(gm, shared[0].target)
    assert observer.state["min"].shape == (1,) and observer.state["min"] <= y.min()


def test_two_formats_two_observers() -> None:
    plan = recipe(name("b", OpQuant(S8, INT8.weight)))
    gm = observe(Both(), ROWS, plan=plan)
    calls = [c for cs in observers(gm).values() for c in cs if c.args[0].name == "linear"]
    assert len({c.target for c in calls}) == 2 and len(calls) == 2
    specs = [str(get_attr(gm, n.args[0].target).qspec) for n in find(gm, "linear")[1:]]
    assert specs == ["int8 symmetric per_tensor", "uint8 asymmetric per_tensor"]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(y), self.c(y)


def test_means_are_collected_once_for_layers_that_read_one_value() -> None:
    gm = observe(Both(), ROWS, plan=recipe(everything=CORRECTED))
    means = observers(gm, MeanObserver)
    assert len(means) == 2 and all(len(c) == 1 for c in means.values())
    _, b, c = find(gm, "linear")
    assert b.args[0] is c.args[0] and b.args[0].args[0].op == "call_module"  # behind the observer


def test_the_observed_graph_computes_what_the_float_graph_does() -> None:
    model = Net().eval()
    gm = observe(model, ROWS, OTHER, plan=recipe(everything=CORRECTED))
    with torch.no_grad():
        for got, want in zip(gm(ROWS, OTHER), model(ROWS, OTHER), strict=True):
            torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------------- mean of inputs
def test_mean_of_channels() -> None:
    mean, parts = MeanObserver("channels"), [torch.randn(n, 5, 4).double() for n in (1, 3, 2)]
    for x in parts:
        assert mean(x) is x
    torch.testing.assert_close(mean.mean(), torch.cat(parts).reshape(-1, 4).mean(0).float())


def test_mean_of_maps() -> None:
    mean, parts = MeanObserver("map"), [torch.randn(n, 2, 3, 1) for n in (1, 3, 2)]
    for x in parts:
        mean(x)
    torch.testing.assert_close(mean.mean(), torch.cat(parts).mean(0))
    assert not mean.varied


def test_mean_of_maps_of_several_sizes() -> None:
    """Each row counts the same, whatever its size, and in whatever order the sizes come."""
    parts = [torch.randn(n, 2, s, s) for n, s in ((1, 3), (3, 5), (2, 1), (2, 1))]
    want = torch.cat([p.mean((2, 3), keepdim=True) for p in parts]).mean(0)
    for order in (parts, parts[::-1]):
        mean = MeanObserver("map")
        for x in order:
            mean(x)
        torch.testing.assert_close(mean.mean(), want)
        assert mean.varied


def test_mean_without_data() -> None:
    mean = MeanObserver("map", "conv2d", "stem")
    mean(torch.empty(0, 2, 3))
    with pytest.raises(CalibrationError, match=r"saw no data .*conv2d"):
        mean.mean()
