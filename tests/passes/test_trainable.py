"""inference-form, insert-fake-quant, keep-trained: a graph of training becomes one that is trained, and goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from inc_graph.capture import capture
from inc_graph.errors import ConfigError, PassError, VerifyError
from inc_graph.fake_quantizer import OwnScale, TrackedRange
from inc_graph.graph import get_attr, get_level, inc_meta
from inc_graph.learned_step import LearnedStep
from inc_graph.passmanager import Pipeline
from inc_graph.recipe import set_recipe
from inc_graph.trained_modules import FoldedNorm, FoldedWeight, Norm
from inc_graph.trained_scales import TRAINED, TrainedObserver
from inc_graph.verify import verify
from tests.golden_check import check_golden
from tests.passes.pipelines import recipe, text

X = torch.randn(4, 3, 5, 5)
FORM = "canonicalize{trainable=true},inference-form"


class Net(nn.Module):
    """A norm that folds, one that does not, dropout before a residual sum and before the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.norm, self.drop, self.head = nn.BatchNorm2d(3), nn.Dropout(0.25), nn.Linear(75, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)) + x)
        return self.head(self.drop(self.norm(y)).flatten(1))


def graph(model: nn.Module, passes: str, *inputs: Tensor) -> fx.GraphModule:
    gm = capture(model.train(), inputs or (X,), training=True)
    set_recipe(gm, recipe())
    return Pipeline.parse(passes).run(gm, verify_each=True).graph


def trainable(options: str = "") -> fx.GraphModule:
    return graph(Net(), f"{FORM},annotate,insert-fake-quant{options}")


def modules(gm: fx.GraphModule, kind: Any) -> list[Any]:
    return [m for n in gm.graph.find_nodes(op="call_module") if isinstance(m := get_attr(gm, str(n.target)), kind)]


def test_golden_inference_form() -> None:
    check_golden("inference-form/positive.txt", text(graph(Net(), FORM)))


def test_golden_inference_form_rejected() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bernoulli(x.sigmoid()) * x

    with pytest.raises(ConfigError) as error:
        graph(Noisy(), FORM)
    check_golden("inference-form/rejected.txt", f"{error.value}\n")


def test_golden_insert_fake_quant() -> None:
    check_golden("insert-fake-quant/positive.txt", text(trainable()))


def test_golden_insert_fake_quant_rejected() -> None:
    gm = graph(Net(), f"{FORM},annotate")
    for node in gm.graph.nodes:
        inc_meta(node)["reads"] = {}
    with pytest.raises(PassError) as error:
        Pipeline.parse("insert-fake-quant").run(gm, verify_each=False)
    check_golden("insert-fake-quant/rejected.txt", f"{error.value}\n")


class Stopped(nn.Module):
    """A value with and without its gradient, and a region without gradients that writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.no_grad():
            self.mean.add_(y.mean((0, 1, 2)))
            z = self.b(y) - self.mean
        return self.a(z) + y * y.detach()


def test_golden_stopped_gradients() -> None:
    gm = graph(Stopped(), FORM)
    check_golden("inference-form/detach.txt", text(gm))
    gm = Pipeline.parse("annotate,insert-fake-quant").run(gm, verify_each=True).graph
    check_golden("insert-fake-quant/detach.txt", text(gm))
    gm(X)
    observed = Pipeline.parse("keep-trained").run(gm, verify_each=True).graph
    check_golden("keep-trained/detach.txt", text(observed))


def test_golden_keep_trained() -> None:
    gm = trainable()
    gm(X)
    observed = Pipeline.parse("keep-trained").run(gm, verify_each=True).graph
    check_golden("keep-trained/positive.txt", text(observed))
    assert all(isinstance(m, TrainedObserver) for m in modules(observed, nn.Module))


def test_golden_keep_trained_rejected() -> None:
    gm = trainable()
    with pytest.raises(PassError) as error:
        Pipeline.parse("keep-trained,keep-trained").run(gm)
    check_golden("keep-trained/rejected.txt", f"{error.value}\n")


def test_what_is_put_in() -> None:
    gm = trainable()
    assert get_level(gm) == "trainable"
    assert len(modules(gm, TrackedRange)) == len({id(m) for m in modules(gm, TrackedRange)})
    kinds = [len(modules(gm, k)) for k in (OwnScale, FoldedNorm, FoldedWeight, Norm)]
    assert kinds == [2, 1, 1, 2]  # a folded norm is a norm
    gm = trainable("{learn_scales=true,freeze_after=3,check=false}")
    assert not modules(gm, TrackedRange) and not any(m.check for m in modules(gm, LearnedStep))
    gm(X)
    observed = Pipeline.parse("keep-trained").run(gm).graph
    assert set(observed.meta[TRAINED]) == {"conv2d", "linear"}


def test_parameters_are_not_copied() -> None:
    """A product with a matrix stays one: its transposed copy would not be trained."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model = Product()
    gm = graph(model, f"{FORM},annotate,insert-fake-quant", torch.randn(3, 4))
    gm(torch.randn(3, 4)).sum().backward()
    assert gm.get_parameter("w") is model.w and model.w.grad is not None


def test_trainable_graphs_hold_no_operator_of_the_dialect() -> None:
    gm = trainable()
    verify(gm)
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    inc_meta(node)["reads"] = {}
    with pytest.raises(VerifyError, match="no reader wants it"):
        verify(gm)
