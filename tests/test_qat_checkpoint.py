"""Checkpoints of training: learned scales are those of one format, and go into no other."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inc_graph.errors import ConfigError, IncWarning, TrainingError
from inc_graph.quantization import StaticQuantConfig, check_loss, convert, prepare_qat

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
SCOPES = pytest.mark.parametrize("example_inputs", [None, (X,)], ids=["layers", "graph"])


def trained(mapping: Any = "INT4", example_inputs: Any = None, learn_scales: bool = True, seed: int = 0) -> nn.Module:
    """A prepared model that has seen a batch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).train()
    mapping = {nn.Linear: mapping} if isinstance(mapping, str) else mapping
    model = prepare_qat(model, mapping, example_inputs=example_inputs, learn_scales=learn_scales)
    model(X)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def without_formats(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in given.items() if "_extra_state" not in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@SCOPES
def test_the_same_format_goes_on(example_inputs: Any, tmp_path: Path) -> None:
    one, two = trained(example_inputs=example_inputs), trained(example_inputs=example_inputs, seed=1)
    save_file(state(one), tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(two.load_state_dict(load_file(tmp_path / "model.safetensors"))) == "<All keys matched successfully>"
    assert same(state(one), state(two)) and torch.equal(two(X), one(X))
    steps = [k for k in state(one) if k.endswith(".step")]
    assert len(steps) == 4 and all(k.removesuffix("step") + "_extra_state" in state(one) for k in steps)


@SCOPES
@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("INT8", r"scale in the checkpoint was learned for u?int4.*here it is learned for u?int8.*3 other scales"),
        (
            StaticQuantConfig(w_dtype="int4", act_dtype="uint4", w_granularity="per_tensor"),
            "weight's scale .*learned for int4 symmetric per_channel.*learned for int4 symmetric per_tensor",
        ),
        (StaticQuantConfig(w_dtype="int4", act_dtype="uint8"), r"input's scale .* learned for uint4.*for uint8"),
    ],
    ids=["format", "granularity", "input"],
)
def test_another_format_is_refused_and_nothing_is_loaded(example_inputs: Any, mapping: Any, message: str) -> None:
    model = trained(mapping, example_inputs, seed=1)
    for other in (model, copy.deepcopy(model)):  # copies look, too
        before = state(other)
        with pytest.raises(ConfigError, match=message) as e:
            other.load_state_dict(state(trained(example_inputs=example_inputs)))
        assert e.value.module == "0" and "leave the keys" in str(e.value.hint)
        assert same(before, state(other))


def test_in_other_modules_and_layer_by_layer() -> None:
    model, given = trained("INT8", seed=1), state(trained())
    outer, before = nn.ModuleDict({"module": model}), state(model)
    with pytest.raises(ConfigError, match=r"int4.*int8"):
        outer.load_state_dict({f"module.{k}": v for k, v in given.items()})
    assert same(before, state(model))
    with pytest.raises(ConfigError, match=r"int4.*int8"):
        model[2].load_state_dict({k[2:]: v for k, v in given.items() if k.startswith("2.")})  # type: ignore[index]


def test_after_pickling_and_after_conversion() -> None:
    model, given = trained("INT8", seed=1), state(trained())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (model, torch.load(file, weights_only=False)):
        with pytest.raises(ConfigError, match=r"int4.*int8"):
            one.load_state_dict(given)
    assert model._load_state_dict_pre_hooks
    assert not convert(model)._load_state_dict_pre_hooks


@SCOPES
def test_a_checkpoint_of_before_is_loaded_with_a_warning(example_inputs: Any) -> None:
    one, two = trained(example_inputs=example_inputs), trained(example_inputs=example_inputs, seed=1)
    with pytest.warns(IncWarning, match=r"does not say for which format .*of 0: .*int4"):
        two.load_state_dict(without_formats(state(one)))
    assert same(state(one), state(two))


@SCOPES
def test_scales_may_begin_anew(example_inputs: Any) -> None:
    model, given = trained("INT8", example_inputs, seed=1), state(trained(example_inputs=example_inputs))
    steps = {k: v for k, v in state(model).items() if k.endswith("step")}
    model.load_state_dict({k: v for k, v in given.items() if "fake_quant" not in k})  # strict
    assert torch.equal(model.get_parameter("0.weight"), given["0.weight"])
    assert all(torch.equal(v, state(model)[k]) for k, v in steps.items())


def test_learned_scales_and_tracked_ranges_are_two_things() -> None:
    for ours, theirs, message in ((False, True, "learned for"), (True, False, "a range that training tracked")):
        model, given = trained("INT8", learn_scales=ours, seed=1), state(trained("INT8", learn_scales=theirs))
        before = state(model)
        with pytest.raises(ConfigError, match=message):
            model.load_state_dict(given)
        assert same(before, state(model))


def test_a_tracked_range_is_that_of_any_format() -> None:
    model = trained("INT8", learn_scales=False, seed=1)
    model.load_state_dict(state(trained("INT4", learn_scales=False)))
    assert same(state(model), state(trained("INT4", learn_scales=False)))


@pytest.mark.parametrize("bad", [b"{", b"[1]", b"\xff", b'{"qtype": "int4"}'])
def test_a_damaged_format_is_named(bad: bytes) -> None:
    model, given = trained(), state(trained())
    key = next(k for k in given if "_extra_state" in k)
    with pytest.raises(ConfigError, match=r"cannot be read.*\n.*damaged") as e:
        model.load_state_dict({**given, key: torch.tensor(list(bad), dtype=torch.uint8)})
    assert e.value.module == "0"


def test_a_loss_that_is_not_finite_while_its_gradients_are() -> None:
    model = trained("INT8", learn_scales=False)
    loss = model(X).square().mean()
    assert check_loss(loss) is loss
    for bad in (torch.inf, torch.nan):
        with pytest.raises(TrainingError, match=f"the loss is {bad}"):
            check_loss(loss + bad).backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TrainingError, match="not finite"):
        check_loss(torch.tensor([0.0, torch.nan]))
