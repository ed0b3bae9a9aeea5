"""Which backend: the argument, else INC_TARGET_DEVICE, else where the model is, else what the machine has."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import nn

from inc_graph.errors import ConfigError, IncWarning, LoweringError, UnknownNameError
from inc_graph.quantization import StaticQuantConfig, quantize
from inc_graph.registry import BACKENDS
from inc_graph.utils import choose_backend, detect_device, is_ipex_imported


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INC_TARGET_DEVICE", raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    """A machine with these accelerators."""
    for name in ("hpu", "xpu", "cuda"):
        module = types.SimpleNamespace(is_available=lambda name=name: name in present)
        monkeypatch.setattr(torch, name, module, raising=False)


@pytest.mark.parametrize(
    ("present", "expected"), [((), "cpu"), (("cuda",), "cuda"), (("cuda", "hpu"), "hpu"), (("cuda", "xpu"), "xpu")]
)
def test_detection(present: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, *present)
    assert detect_device() == expected
    assert detect_device(nn.Linear(2, 2)) == "cpu"  # a model on the CPU runs on the CPU, whatever the machine has
    assert detect_device(nn.ReLU()) == expected
    assert detect_device(nn.Linear(2, 2, device="meta")) == "meta"


@pytest.mark.parametrize("value", ["cpu", " CUDA ", "hpu", "xpu"])
def test_the_environment_decides(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", value)
    assert detect_device() == detect_device(nn.Linear(2, 2)) == value.strip().lower()


def test_a_device_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", "tpu")
    with pytest.raises(
        ConfigError, match="INC_TARGET_DEVICE='tpu' is not a device\n  hint: one of hpu, xpu, cuda, cpu"
    ):
        detect_device()
    monkeypatch.setenv("INC_TARGET_DEVICE", "")
    assert detect_device(nn.Linear(2, 2)) == "cpu"


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", "cpu") == ("inductor", "") and choose_backend("eager") == ("eager", "")
    for device in ("cuda", "hpu", "mps"):
        name, note = choose_backend("auto", device)
        assert name == "eager" and note == f"no backend for {device} in this version; using 'eager'"
    with pytest.raises(UnknownNameError, match="unknown backend 'eagr'; did you mean 'eager'"):
        choose_backend("eagr")
    monkeypatch.setattr(type(BACKENDS.get("inductor")), "available", lambda self: "no such CPU")
    assert choose_backend("auto", "cpu") == ("eager", "backend 'inductor' is not available: no such CPU; using 'eager'")
    with pytest.raises(LoweringError, match="'inductor' is not available: no such CPU"):
        choose_backend("inductor")


def test_ipex_is_taken_if_the_program_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_ipex_imported()
    monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", types.ModuleType("ipex"))
    assert is_ipex_imported()
    if "ipex" in BACKENDS:
        pytest.skip("the real one is here")
    assert choose_backend("auto", "cpu") == ("inductor", "")
    BACKENDS.add("ipex", BACKENDS.get("eager"))
    try:
        assert choose_backend("auto", "cpu") == choose_backend("auto", "xpu") == ("ipex", "")
        assert choose_backend("auto", "cuda")[0] == "eager"
    finally:
        BACKENDS.remove("ipex")


def test_a_device_that_is_not_there_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """INC_TARGET_DEVICE=cuda on a machine without one: said once, and it works."""
    monkeypatch.setenv("INC_TARGET_DEVICE", "cuda")
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    for options in ({"example_inputs": x}, {}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, **options)
        (warning,) = [w for w in caught if issubclass(w.category, IncWarning)]
        assert "no backend for cuda in this version; using 'eager'" in str(warning.message)
        assert q.report.backend == "eager" and not q.report.kernels and len(q.report.reference) == 1
        assert (model(x) - q(x)).abs().max() < 0.1
    q = quantize(model, StaticQuantConfig(), lambda m: m(x), example_inputs=x, backend="inductor")  # the argument wins
    assert q.report.backend == "inductor" and q.report.count("linear") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_a_model_on_cuda(exported: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval().cuda()
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with pytest.warns(IncWarning, match="no backend for cuda"):
        q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, example_inputs=x if exported else None)
    want, got = model(x), q(x)
    assert got.is_cuda and q.report.backend == "eager" and len(q.report.reference) == 2
    assert 10 * torch.log10((want**2).sum() / ((want - got) ** 2).sum()) > 30
