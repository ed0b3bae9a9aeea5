"""Export to normal form: what it keeps, what it writes out, and what it says when it cannot."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from inc_graph.capture import capture
from inc_graph.errors import CaptureError
from inc_graph.graph import clone, get_level, is_float, module_path, mutated_attrs, val
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.verify import verify
from tests.graph_generator import KINDS, RandomModel

aten = torch.ops.aten


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(n.target).removesuffix(".default") for n in gm.graph.nodes if n.op == "call_function"]


def paths(gm: fx.GraphModule, target: Any) -> list[str]:
    return [module_path(n) for n in gm.graph.find_nodes(op="call_function", target=target)]


def same(gm: fx.GraphModule, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(gm(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)


def test_normal_form() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.drop = nn.Dropout()
            self.fc = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)
            self.offset = torch.ones(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.drop(self.bn(self.conv(x))).relu_().mean((2, 3)).to(torch.float32)
            q = self.norm(self.fc(x.detach()) + self.offset + torch.tensor([1.0, 2, 3, 4])).unsqueeze(1)
            return F.scaled_dot_product_attention(q, q, q)

    model = Model().eval()
    gm = capture(model, (torch.randn(2, 3, 5, 5),))
    verify(gm)
    assert get_level(gm) == "float"
    assert ops(gm) == [
        "aten.conv2d", "aten._native_batch_norm_legit_no_training", "<built-in function getitem>", "aten.relu",
        "aten.mean.dim", "aten.linear", "aten.add.Tensor", "aten.add.Tensor", "aten.layer_norm", "aten.unsqueeze",
        "aten.scaled_dot_product_attention",
    ]  # fmt: skip
    assert paths(gm, aten.linear.default) == ["fc"] and paths(gm, aten.layer_norm.default) == ["norm"]
    same(gm, model, torch.randn(2, 3, 5, 5))
    # constants are buffers: they are saved, and move with the module
    assert "offset" in gm.state_dict() and {id(t) for t in gm.parameters()} <= {id(t) for t in model.parameters()}
    assert type(gm).__mro__[1] is fx.GraphModule and not {"train", "eval"} & set(vars(gm))


@pytest.mark.parametrize("seed", range(8))
def test_random_models(seed: int) -> None:
    model = RandomModel(seed, 14)
    args, kwargs = model.inputs()
    before = copy.deepcopy(model)
    gm = capture(model, args, kwargs)
    verify(gm)
    for run in range(2):
        args, kwargs = model.inputs(run)
        same(gm, before, *args, **kwargs)
    for name, tensor in (mutated_attrs(gm) and before.named_buffers()) or ():
        if name in ("state", "calls"):
            torch.testing.assert_close(gm.get_buffer(name), tensor)
    for name, tensor in model.state_dict().items():  # running the captured graph wrote to nothing of the user's
        assert torch.equal(tensor, RandomModel(seed, 14).state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_each_construct_keeps_its_module_path(kind: str) -> None:
    model = RandomModel(1, 3, ("linear", kind))
    args, kwargs = model.inputs()
    gm = capture(model, args, kwargs)
    verify(gm)
    same(gm, copy.deepcopy(model), *args, **kwargs)
    inside = {n.target for n in gm.graph.nodes if n.op == "get_attr" and n.target.startswith("layers.")}
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert module_path(node).startswith("layers.")
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in inside and not is_tied(model, node.target):
            owner = node.target.rpartition(".")[0]
            assert {module_path(u) for u in node.users} == {owner}


def is_tied(model: RandomModel, name: str) -> bool:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return sum(t is tensors[name] for t in tensors.values()) > 1


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.blocks[0](x)
            y = torch.cat([y, x], 1)[:, :4]  # promotes
            with torch.no_grad():
                y = self.blocks[1](y)
            with torch.autocast("cpu", enabled=False):
                z = self.blocks[2](y.float())
            p = F.softmax(y, 1)
        with torch.enable_grad():
            with torch.no_grad():
                z = self.blocks[2](z)
        return y, z, p, x


def test_nested_regions_are_written_out() -> None:
    model = Regions().eval()
    gm = capture(model, (torch.randn(2, 4),))
    verify(gm)
    assert not [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    assert not list(gm.children())[1:]  # no bodies left behind
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [module_path(n) for n in linears] == ["blocks.0", "blocks.1", "blocks.2", "blocks.2"]
    assert [val(n).dtype for n in linears] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    casts = gm.graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert {module_path(n) for n in casts} >= {"blocks.0", "blocks.1"}
    assert all("linear.py" in n.meta["stack_trace"] for n in linears)
    same(gm, model, torch.randn(2, 4))


def test_region_that_changes_more_than_inputs_still_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from inc_graph import regions

    def refuse(*args: Any) -> Any:
        raise regions._CannotInline("test")

    monkeypatch.setattr(regions, "_autocast_call", refuse)
    model = Regions().eval()
    gm = capture(model, (torch.randn(2, 4),))
    verify(gm)
    assert paths(gm, aten.linear.default) == ["blocks.0", "blocks.1", "blocks.2", "blocks.2"]
    same(gm, model, torch.randn(2, 4))


def test_surrounding_modes_are_not_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        gm = capture(model, (torch.randn(2, 4),))
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert ops(gm) == ["aten.linear"] and val(gm.graph.find_nodes(op="output")[0].args[0][0]).dtype == torch.float32


def test_the_users_model_is_left_alone() -> None:
    class Guarded(nn.Dropout):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("called")

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.Dropout()))
    model[2] = Guarded()
    nn.Module.train(model[3], False)
    flags = [m.training for m in model.modules()]
    state = {k: (v.data_ptr(), v.clone(), v.requires_grad) for k, v in model.state_dict(keep_vars=True).items()}
    attributes = [sorted(vars(m)) for m in model.modules()]
    gm = capture(model, (torch.randn(2, 4),))
    assert "aten._native_batch_norm_legit_no_training" in ops(gm)  # as in inference
    gm(torch.randn(2, 4))
    assert [m.training for m in model.modules()] == flags
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    for name, tensor in model.state_dict(keep_vars=True).items():
        pointer, value, grad = state[name]
        assert tensor.data_ptr() == pointer and torch.equal(tensor, value) and tensor.requires_grad == grad
    with pytest.raises(CaptureError):
        capture(model, (torch.randn(2, 5),))
    assert [m.training for m in model.modules()] == flags


def test_training_keeps_flags_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    gm = capture(model, (torch.randn(3, 4),), training=True)
    verify(gm)
    assert mutated_attrs(gm) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    gm(torch.randn(3, 4)).sum().backward()
    assert model[0].weight.grad is not None and int(model[1].num_batches_tracked) == 0


def test_written_buffers_keep_their_aliases() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.zeros(4))
            self.register_buffer("other", torch.arange(4.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            old = self.whole.clone()
            self.whole.copy_(self.other)
            self.other.copy_(old + x)
            return old

    model, x = Cache(), torch.randn(4)
    gm = capture(model, (x,))
    verify(gm)
    twin = copy.deepcopy(model)
    for _ in range(3):
        assert torch.equal(gm(x), twin(x))
        assert torch.equal(gm.whole, twin.whole) and torch.equal(gm.other, twin.other)
    assert torch.equal(model.whole, torch.zeros(4))


def test_copies_that_a_caller_can_see_stay() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> Any:
            y = x + 1
            seen = self.b.clone()
            self.b.add_(1)
            return y, y.clone(), x.clone().view(2, 2), seen.view(2, 2), y.clone() * 2

    gm = capture(Copies(), (torch.randn(4),))
    assert ops(gm).count("aten.clone") == 3
    a, b, c, d, _ = gm(x := torch.randn(4))
    for t in (b, c, d):
        t.fill_(9)
    assert torch.equal(a, x + 1) and not (gm.b == 9).any() and not (x == 9).any()


def test_trees_and_keywords() -> None:
    class Tree(nn.Module):
        def forward(self, pair: tuple, *, extra: dict, flag: bool = True, none: Any = None) -> dict:
            return {"sum": pair[0] + pair[1] + extra["a"], "list": [extra["a"]] if flag else []}

    model, one = Tree(), torch.ones(2)
    gm = capture(model, ((one, one),), {"extra": {"a": one}, "flag": True, "none": None})
    same(gm, model, (one, one), extra={"a": one}, flag=True, none=None)
    with pytest.raises(CaptureError, match="captured as the constant True, got False"):
        gm((one, one), extra={"a": one}, flag=False, none=None)
    with pytest.raises(TypeError, match="extra"):
        gm((one, one))


def test_input_shapes_are_checked() -> None:
    batch = torch.export.Dim("batch", max=16)
    model = nn.Sequential(nn.Linear(4, 2))
    gm = capture(model, (torch.randn(3, 4),), dynamic_shapes=({0: batch},))
    same(gm, model, torch.randn(7, 4))
    with pytest.raises(CaptureError, match=r"has shape \[17, 4\]"):
        gm(torch.randn(17, 4))
    with pytest.raises(CaptureError, match=r"has shape \[3, 5\].*\n.*hint: capture it again"):
        gm(torch.randn(3, 5))
    with pytest.raises(CaptureError, match=r"has shape \[4\]"):
        gm(torch.randn(4))
    two = capture(Add(), (torch.ones(3), torch.ones(3)), dynamic_shapes=({0: batch}, {0: batch}))
    two(torch.ones(5), torch.ones(5))
    with pytest.raises(CaptureError, match="input 'y' has shape"):
        two(torch.ones(5), torch.ones(1))


class Add(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_a_single_tensor_is_a_tuple_of_one() -> None:
    assert ops(capture(nn.ReLU(), torch.randn(2))) == ["aten.relu"]
    assert ops(capture(Add(), [torch.randn(2), torch.randn(2)])) == ["aten.add.Tensor"]


def test_every_node_has_a_value_and_floats_are_told_from_the_rest() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.table(ids).masked_fill(mask[..., None], 0).sum(1) / ids.shape[0]

    n = torch.export.Dim("n")
    gm = capture(
        Ids(), (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.bool)),
        dynamic_shapes=({0: n}, {0: n}),
    )  # fmt: skip
    verify(gm)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")
    assert [is_float(p) for p in gm.graph.find_nodes(op="placeholder")] == [False, False]


def test_control_flow_bodies_are_normal_too() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def yes(t: torch.Tensor) -> torch.Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return self.a(t).float()

            return torch.cond(x.sum() > 0, yes, lambda t: self.b(t).relu(), (x,))

    model = Branch()
    gm = capture(model, (torch.ones(2, 4),))
    verify(gm)
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        same(gm, model, x)


class Stubborn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return x + 1


def test_errors_name_the_module_the_reason_and_a_way_out() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"inner": Stubborn()})["inner"])
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(3),))
    error = caught.value
    assert error.module == "1" and "data-dependent" in str(error) and "torch.cond" in (error.hint or "")
    assert "test_capture.py" in str(error) and error.__cause__ is not None


def test_errors_on_wrong_inputs() -> None:
    with pytest.raises(CaptureError, match="Module, got builtin"):
        capture(torch.relu, (torch.ones(1),))  # type: ignore[arg-type]
    with pytest.raises(CaptureError) as caught:
        capture(Add(), (torch.ones(1),))
    assert "what model.forward takes" in (caught.value.hint or "")
    with pytest.raises(CaptureError) as caught:
        capture(nn.Linear(4, 4), (torch.ones(3, 4),), dynamic_shapes=({1: torch.export.Dim("d")},))
    assert "dynamic_shapes" in (caught.value.hint or "")
    with pytest.raises(CaptureError, match="module '0'"):
        capture(nn.Sequential(nn.Linear(4, 4)), (torch.ones(3, 5),))


def test_unknown_result_types() -> None:
    class Boxed(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return Box(x)

    with pytest.raises(CaptureError) as caught:
        capture(Boxed(), (torch.ones(1),))
    assert "pytree" in (caught.value.hint or "")


class Box:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_the_result_can_be_compiled_copied_and_exported_again() -> None:
    model = RandomModel(3, 10)
    args, kwargs = model.inputs()
    gm = capture(model, args, kwargs)
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta.setdefault("custom", {})["inc"] = {"note": [1, "a"]}
    want = gm(*args, **kwargs)
    torch.testing.assert_close(copy.deepcopy(gm)(*args, **kwargs), want)
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args, **kwargs), want)
    again = capture(gm, args, kwargs)
    verify(again)
    torch.testing.assert_close(again(*args, **kwargs), want)
    assert any(n.meta.get("custom", {}).get("inc") == {"note": [1, "a"]} for n in again.graph.nodes)


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return x - 2 * y + 3 * z + self.weight


def test_example_inputs_that_are_one_tensor_stay_two_inputs() -> None:
    """torch.export takes one tensor given twice for one input, and the model's own tensor for the model's."""
    model, x = Difference(), torch.randn(3)
    for z in (x, model.weight, nn.Parameter(torch.ones(3))):
        gm = capture(model, (x, x), {"z": z})
        same(gm, model, torch.randn(3), torch.randn(3), z=torch.randn(3))


def test_a_copy_checks_its_inputs_too() -> None:
    gm = capture(nn.Linear(3, 2), (torch.randn(2, 3),))
    for twin in (copy.deepcopy(gm), copy.deepcopy(copy.deepcopy(gm)), clone(gm), copy.deepcopy(clone(gm))):
        assert len(twin._forward_pre_hooks) == 1
        with pytest.raises(CaptureError, match="was captured for"):
            twin(torch.randn(4, 3))


# ------------------------------------------------------------------------------------------ layouts that may change
class Attention(nn.Module):
    """Attention with a mask from outside, written as in many models: the layout of what sdpa gives decides."""

    def __init__(self, ends: str = "view") -> None:
        super().__init__()
        self.qkv, self.out, self.ends = nn.Linear(32, 96), nn.Linear(32, 32), ends

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        if self.ends == "returned":
            return y.transpose(1, 2).contiguous()
        if self.ends == "elementwise":
            y = y * 2 + q
        if self.ends == "reshape":
            return self.out(y.transpose(1, 2).reshape(b, t, 32))
        return self.out(y.transpose(1, 2).contiguous().view(b, t, 32))


@pytest.mark.parametrize("ends", ["view", "reshape", "elementwise", "returned"])
def test_any_attention_kernel_may_run(ends: str) -> None:
    model, x = Attention(ends).eval(), torch.randn(2, 7, 32)
    gm = capture(model, (x, torch.randn(7, 7)))
    verify(gm)
    for mask in (torch.randn(7, 7), torch.randn(7, 7, requires_grad=True)):
        torch.testing.assert_close(gm(x, mask), model(x, mask))
        assert gm(x, mask).is_contiguous()
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(gm(x, mask), model(x, mask))
            assert gm(x, mask).is_contiguous()


def test_only_views_below_attention_become_reshapes() -> None:
    gm = capture(Attention().eval(), (torch.randn(2, 7, 32), torch.randn(7, 7)))
    views = [(str(n.target), module_path(n)) for n in gm.graph.nodes if "view" in n.name]
    assert [target for target, _ in views] == ["aten.view.default"] * 3 + ["aten.reshape.default"]
    assert "aten.clone" not in ops(gm)


# --------------------------------------------------------------------------------------------- writes, absent inputs
class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        y = self.fc(x) if offset is None else self.fc(x) + offset
        self.mean.mul_(0.9).add_(y.detach().mean(0) * 0.1)
        return y - self.mean


def test_what_is_written_to_a_buffer_carries_no_history() -> None:
    model, x = Mean().eval(), torch.randn(3, 4)
    gm = capture(model, (x,))
    twin = copy.deepcopy(model)
    with torch.enable_grad():
        for _ in range(3):
            assert torch.equal(gm(x), twin(x))
    assert not gm.mean.requires_grad and torch.equal(gm.mean, twin.mean)
    assert torch.equal(copy.deepcopy(gm)(x), twin(x))


def test_an_argument_captured_as_its_default_none_may_be_left_out() -> None:
    model, x = Mean().eval(), torch.randn(3, 4)
    gm = capture(model, (x,), {"offset": None})
    for twin in (gm, clone(gm), copy.deepcopy(gm)):
        assert torch.equal(twin(x), twin(x, offset=None)) is False  # the mean goes on
    with pytest.raises(CaptureError, match=r"'offset' was captured as the constant None, got a tensor of shape \[4\]"):
        gm(x, offset=torch.ones(4))


def test_bounds_of_a_dimension_are_shown() -> None:
    n = torch.export.Dim("n", min=3, max=8)
    gm = capture(nn.Linear(4, 2), (torch.randn(4, 4),), dynamic_shapes=({0: n},))
    with pytest.raises(CaptureError, match=r"has shape \[9, 4\].* \(3\.\.8\), 4\](.|\n)*hint: give sizes within"):
        gm(torch.randn(9, 4))
    two = capture(Add(), (torch.ones(4), torch.ones(4)), dynamic_shapes=({0: n}, {0: n}))
    with pytest.raises(CaptureError, match=r"'y' has shape \[6\](.|\n)*must have one size.*\(3\.\.8\) is 5"):
        two(torch.ones(5), torch.ones(6))


def test_inputs_need_values() -> None:
    gm = capture(nn.Linear(4, 2), (torch.randn(4, 4),))
    with pytest.raises(CaptureError, match="input 'input_1' is on the meta device"):
        gm(torch.randn(4, 4, device="meta"))


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("of the model", file=sys.stderr)
        return x[: int(x.sum())] if x.sum() > 0 else x


def test_a_failing_export_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="data-dependent"):
        capture(nn.Sequential(nn.Linear(4, 4), Noisy()), (torch.randn(3, 4),))
    assert capfd.readouterr().err.split("\n") == ["of the model", ""]


def test_inputs_of_another_layout() -> None:
    """Captured on contiguous images, called with channels-last ones: the views below would not fit."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).flatten(1)

    model, x = Flat().eval(), torch.randn(2, 3, 6, 6)
    gm = capture(model, (x,))
    for twin in (gm, copy.deepcopy(gm)):
        same(twin, model, x.to(memory_format=torch.channels_last))
        same(twin, model, x.expand(2, 3, 6, 6).transpose(2, 3))
    prepared = prepare(gm, StaticQuantConfig())
    prepared(x.to(memory_format=torch.channels_last))
    q = convert(prepared)
    torch.testing.assert_close(q(x.to(memory_format=torch.channels_last)), q(x), rtol=0, atol=0)


def test_an_input_that_is_written_to_keeps_its_memory() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x * 2

    gm, x = capture(Writes(), (torch.zeros(2, 3),)), torch.zeros(3, 2).t()
    assert torch.equal(gm(x), torch.full((2, 3), 2.0)) and torch.equal(x, torch.ones(2, 3))


def test_a_region_that_gives_nothing() -> None:
    """torch's exporter leaves one whose results nobody reads, and does not note it with the values that it reads."""

    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            with torch.enable_grad():
                torch.sigmoid(self.first(y))
            with torch.autocast("cpu", torch.bfloat16):
                z = self.second(y)
            return z.float() + y

    random = RandomModel(586, 3, kinds=tuple(k for k in KINDS if k != "buffer"))
    args, kwargs = random.inputs()
    x = torch.randn(3, 4)
    for model, inputs, named in ((Unread(), (x,), {}), (random, args, kwargs)):
        with torch.no_grad():
            gm = capture(model.eval(), inputs, named)
        verify(gm, "float")
        assert not any("wrap_with" in str(n.target) for n in gm.graph.nodes)
