"""Which backend: the argument, else INC_TARGET_DEVICE, else where the model is, else what the machine has."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from inc_graph import utils
from inc_graph.errors import ConfigError, IncWarning, LoweringError, UnknownNameError
from inc_graph.quantization import StaticQuantConfig, quantize
from inc_graph.registry import BACKENDS
from inc_graph.utils import choose_backend, detect_device, device_synchronize, get_accelerator, is_ipex_imported


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


def test_devices_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [detect_device(d) for d in ("auto", 0, "1", "cpu", torch.device("cuda:1"), "cuda")] == [
        "cpu", "cpu", "cpu", "cpu", "cuda:1", "cuda",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'tpu!' is not a device"):
        detect_device("tpu!")
    pretend(monkeypatch, "cuda")
    assert [detect_device(d) for d in (None, "auto", 0, "1", "cpu")] == ["cuda", "cuda", "cuda:0", "cuda:1", "cpu"]
    monkeypatch.setenv("INC_TARGET_DEVICE", "cpu")
    assert [detect_device(d) for d in (None, "auto", 0, "cuda:1")] == ["cpu", "cpu", "cpu", "cuda:1"]


def test_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = get_accelerator("CPU")
    assert (cpu.name(), cpu.device_name(3), cpu.current_device(), cpu.current_device_name()) == ("cpu", *3 * ("cpu",))
    with cpu.device(0):
        for call in (cpu.synchronize, cpu.empty_cache, cpu.mark_step):
            assert call() is None
    assert cpu.set_device(0) is None and cpu.is_available()
    for present, best in (((), "cpu"), (("cuda",), "cuda"), (("xpu", "cuda"), "xpu"), (("hpu", "xpu", "cuda"), "hpu")):
        pretend(monkeypatch, *present)
        assert get_accelerator().name() == utils.accelerator.name() == best and get_accelerator().is_available()
    pretend(monkeypatch, "cuda")
    for wrong, text in (("tpu", "'tpu' is not a device"), ("hpu", "no hpu device that torch can use")):
        with pytest.raises(ConfigError, match=text):
            get_accelerator(wrong)
    monkeypatch.setenv("INC_TARGET_DEVICE", "XPU")  # it need not be there: nothing is waited for then
    assert get_accelerator("cuda").name() == get_accelerator().name() == "xpu" and not get_accelerator().is_available()
    assert get_accelerator().synchronize() is None and get_accelerator().current_device() == "xpu"
    monkeypatch.setenv("INC_TARGET_DEVICE", "tpu")
    for name in ("auto", "cpu"):
        with pytest.raises(ConfigError, match="INC_TARGET_DEVICE='tpu'"):
            get_accelerator(name)


def test_calls_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cuda = types.SimpleNamespace(
        is_available=lambda: True, synchronize=lambda: said.append("wait"), empty_cache=lambda: said.append("free"),
        current_device=lambda: 1, set_device=lambda i: said.append(f"set {i}"), device=contextlib.nullcontext,
    )  # fmt: skip

    @device_synchronize
    def work(x: int, *, y: int = 1) -> int:
        """Adds."""
        said.append("work")
        return x + y

    assert work(1) == 2 and said == ["work"] and work.__doc__ == "Adds." and work.__name__ == "work"
    pretend(monkeypatch)
    monkeypatch.setattr(torch, "cuda", cuda)  # found when the function is called, not when it is made
    assert work(1, y=3) == 4 and said[1:] == ["wait", "work", "wait"]
    found = get_accelerator()
    assert (found.current_device(), found.current_device_name(), found.device_name(None)) == (1, "cuda:1", "cuda")
    found.empty_cache()
    found.set_device(2)
    with found.device(0) as current:
        assert current == 0 and said[4:] == ["free", "set 2"]


def test_processes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (utils.world_size, utils.local_rank) == (-1, -1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert (utils.world_size, utils.local_rank) == (4, 2)  # read now, not when the package was imported
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    assert (utils.world_size, utils.local_rank) == (8, 5)
    monkeypatch.undo()
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ConfigError, match="LOCAL_RANK='first' is not a whole number"):
        _ = utils.local_rank


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", "cpu") == ("inductor", "") and choose_backend("eager") == ("eager", "")
    for device in ("hpu", "mps"):
        name, note = choose_backend("auto", device)
        assert name == "eager" and note == f"no backend for {device} in this version; using 'eager'"
    monkeypatch.setattr(type(BACKENDS.get("cuda")), "available", lambda self: "no such GPU")
    assert choose_backend("auto", "cuda") == ("eager", "backend 'cuda' is not available: no such GPU; using 'eager'")
    with pytest.raises(UnknownNameError, match="unknown backend 'eagr'; did you mean 'eager'"):
        choose_backend("eagr")
    monkeypatch.setattr(type(BACKENDS.get("inductor")), "available", lambda self: "no such CPU")
    assert choose_backend("auto", "cpu") == ("eager", "backend 'inductor' is not available: no such CPU; using 'eager'")
    with pytest.raises(LoweringError, match="'inductor' is not available: no such CPU"):
        choose_backend("inductor")


@pytest.fixture
def pretend_ipex(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Import something as IPEX that says it is of a version; None takes it away, whether it is installed or not."""

    def pretend(version: str | None) -> None:
        monkeypatch.delitem(sys.modules, "intel_extension_for_pytorch", raising=False)
        if version is not None:
            module = types.ModuleType("intel_extension_for_pytorch")
            if version:
                module.__version__ = version  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", module)

    return pretend


ME = ".".join(torch.__version__.split(".")[:2])


@pytest.mark.parametrize("backend", ["auto", "eager", "inductor", "ipex"])
@pytest.mark.parametrize("model", [None, "cpu"], ids=["no model", "model on the CPU"])
@pytest.mark.parametrize("variable", [None, "cpu", "xpu", "cuda", "hpu"])
@pytest.mark.parametrize("imported", [True, False])
def test_every_combination(
    imported: bool, variable: str | None, model: str | None, backend: str, monkeypatch: pytest.MonkeyPatch,
    pretend_ipex: Callable[[str | None], None],
) -> None:  # fmt: skip
    """IPEX imported -> ipex, else inductor; INC_TARGET_DEVICE overrides the device; an argument overrides both."""
    pretend(monkeypatch)  # a machine with a CPU only
    pretend_ipex(f"{ME}.0+cpu" if imported else None)
    monkeypatch.setattr(type(BACKENDS.get("cuda")), "available", lambda self: None)
    monkeypatch.setattr(type(BACKENDS.get("ipex")), "available", lambda self: None)
    if variable is not None:
        monkeypatch.setenv("INC_TARGET_DEVICE", variable)
    on_cpu = "ipex" if imported else "inductor"
    expected = {None: on_cpu, "cpu": on_cpu, "xpu": on_cpu, "cuda": "cuda", "hpu": "eager"}[variable]
    device = None if model is None else detect_device(nn.Linear(2, 2))
    name, note = choose_backend(backend, device)
    assert name == (expected if backend == "auto" else backend)
    assert bool(note) == (backend == "auto" and variable == "hpu")  # in this version the reference stands in


@pytest.mark.parametrize(
    ("version", "said"), [("2.3.1+cpu", "2.3.1+cpu was not made for torch"), ("", "does not tell its version")]
)
def test_an_ipex_for_another_torch(
    version: str, said: str, pretend_ipex: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions and what to do; "auto" goes on with inductor, a named backend is an error, nothing is half done."""
    pretend_ipex(version)
    assert is_ipex_imported()
    name, note = choose_backend("auto", "cpu")
    assert name == "inductor" and note.endswith("; using 'inductor'")
    for part in ("backend 'ipex' is not available", said, torch.__version__, "pip install 'torch==2.8.*'"):
        assert part in note
    with pytest.raises(LoweringError, match=r"torch==2\.8") as caught:
        choose_backend("ipex")
    assert said in str(caught.value) and torch.__version__ in str(caught.value)
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    with pytest.warns(IncWarning, match="was not made for torch"):
        q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, example_inputs=x)
    assert q.report.backend == "inductor" and q.report.count("linear") == 1
    with pytest.raises(LoweringError, match="'ipex' is not available"):
        quantize(model, StaticQuantConfig(), lambda m: m(x), example_inputs=x, backend="ipex")
    assert type(model[0]) is nn.Linear and model(x).shape == (2, 4)


def test_something_else_by_the_name_of_ipex(pretend_ipex: Callable[[str | None], None]) -> None:
    """The version fits, but nothing in it fuses: found when a graph is lowered, and said."""
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, example_inputs=x, backend="eager")
    pretend_ipex(f"{ME}.0")
    with pytest.raises(LoweringError, match="what is imported as intel_extension_for_pytorch is not IPEX"):
        BACKENDS.get("ipex").lower(q.graph)


def test_ipex_that_is_not_installed(
    pretend_ipex: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    pretend_ipex(None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert not is_ipex_imported() and choose_backend("auto", "cpu") == ("inductor", "")
    with pytest.raises(LoweringError, match="intel_extension_for_pytorch is not installed"):
        choose_backend("ipex")


def test_no_cpu_kernels_at_all(pretend_ipex: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step down is named."""
    pretend_ipex("1.0")
    monkeypatch.setattr(type(BACKENDS.get("inductor")), "available", lambda self: "no such CPU")
    name, note = choose_backend("auto", "cpu")
    assert name == "eager" and note.index("'ipex' is not") < note.index("'inductor' is not") < note.index(
        "using 'eager'"
    )


def test_a_device_that_is_not_there_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """INC_TARGET_DEVICE=cuda on a machine without one: said once, and it works."""
    monkeypatch.setenv("INC_TARGET_DEVICE", "cuda")
    monkeypatch.setattr(type(BACKENDS.get("cuda")), "available", lambda self: "no such GPU")
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    for options in ({"example_inputs": x}, {}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, **options)
        (warning,) = [w for w in caught if issubclass(w.category, IncWarning)]
        assert "backend 'cuda' is not available: no such GPU; using 'eager'" in str(warning.message)
        assert q.report.backend == "eager" and not q.report.kernels and len(q.report.reference) == 1
        assert (model(x) - q(x)).abs().max() < 0.1
    q = quantize(model, StaticQuantConfig(), lambda m: m(x), example_inputs=x, backend="inductor")  # the argument wins
    assert q.report.backend == "inductor" and q.report.count("linear") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_a_model_on_cuda(exported: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval().cuda()
    x = torch.randn(2, 3, 8, 8, device="cuda")
    q = quantize(model, StaticQuantConfig(), lambda m: m(x), inplace=False, example_inputs=x if exported else None)
    want, got = model(x), q(x)
    assert got.is_cuda and q.report.backend == "cuda" and len(q.report.reference) == 2
    assert 10 * torch.log10((want**2).sum() / ((want - got) ** 2).sum()) > 30


@pytest.mark.parametrize("device", [[], object(), 1.5])
def test_what_is_no_device(device: object) -> None:
    with pytest.raises(ConfigError, match="is not a device"):
        detect_device(device)  # type: ignore[arg-type]
