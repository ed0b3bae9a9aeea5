"""Saved folders: names, shared memory, constants, and what a folder may be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.errors import CaptureError, ConfigError, SavedModelError
from inc_graph.quantization import StaticQuantConfig, load, quantize
from tests.saving.models import Net
from tests.saving.round_trip import call, converted, equal, exported, folder_of


# --------------------------------------------------------------------------------------------- names, memory, constants
def test_names_that_are_no_identifiers(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"layer-norm": nn.LayerNorm(4), "a b": nn.Linear(4, 4)})
            self.register_parameter("my-scale", nn.Parameter(torch.ones(4)))
            self.register_buffer("__private", torch.ones(4))

        def forward(self, x: torch.Tensor) -> Any:
            x = self.parts["a b"](self.parts["layer-norm"](x)) * getattr(self, "my-scale")
            return {(1, 2): x + getattr(self, "__private"), "y": x}

    x = torch.randn(2, 4)
    q = exported(Named(), x)
    q.save(tmp_path)
    equal(load(tmp_path)(x), q(x))


def test_a_name_that_cannot_be_saved_spoils_nothing(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    exported(nn.Sequential(nn.Linear(4, 4)), x).save(tmp_path)
    before = folder_of(tmp_path)
    bad = exported(nn.Sequential(nn.Linear(4, 4)), x)
    bad._qdq[0].register_buffer('a"b', torch.ones(4))
    node = next(iter(bad._qdq[0].graph.find_nodes(op="get_attr")))
    with bad._qdq[0].graph.inserting_before(node):
        bad._qdq[0].graph.get_attr('a"b').meta["val"] = None
    with pytest.raises(SavedModelError, match="has a name that cannot be saved"):
        bad.save(tmp_path)
    assert folder_of(tmp_path) == before and load(tmp_path)(x).shape == (2, 4)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Embedding(8, 4)], ids=lambda m: type(m).__name__
)
def test_a_layer_of_four_bits_alone(layer: nn.Module, tmp_path: Path) -> None:
    x = torch.arange(4) if isinstance(layer, nn.Embedding) else torch.randn(3, 4, 4)
    original = copy.deepcopy(layer)
    q = quantize(layer.eval(), StaticQuantConfig(w_dtype="int4"), lambda p: p(x))
    q.save(tmp_path)
    equal(load(tmp_path, original)(x), q(x))


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "layers"])
def test_views_of_one_memory(graph: bool, tmp_path: Path) -> None:
    """What several names share is written once, and shared again; what nobody reads of it is not written."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            base, big = torch.randn(1000, 4), torch.randn(2000, 2000)
            self.register_buffer("whole", base)
            self.register_buffer("turned", base[:4].t())
            self.register_buffer("every", base[::2])
            self.register_buffer("corner", big[5:9, 7:11])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) @ self.turned + self.every[:1] + self.whole[-1:] + self.corner[:1]

    x = torch.randn(2, 4)
    model = Views().eval()
    q = exported(model, x) if graph else quantize(copy.deepcopy(model), StaticQuantConfig(), lambda p: p(x))
    q.save(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.glob("model-*")) < 1000 * 4 * 4 + 3000
    loaded = load(tmp_path, Views())
    equal(loaded(x), q(x))
    if not graph:
        loaded.whole[0] = 7.0
        assert bool((loaded.turned[:, 0] == 7).all() and (loaded.every[0] == 7).all())


def test_infinite_constants_among_the_inputs(tmp_path: Path) -> None:
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, high: float = float("inf")) -> torch.Tensor:
            return self.fc(x).clamp(max=high)

    x = torch.randn(2, 4)
    q = exported(Clips(), x, float("inf"))
    q.save(tmp_path)
    equal(load(tmp_path)(x, float("inf")), q(x, float("inf")))
    with pytest.raises(CaptureError, match="was captured as the constant inf"):
        load(tmp_path)(x, 3.0)


def test_buffers_that_are_in_no_state_dict(tmp_path: Path) -> None:
    q, *_ = converted("odd constants")
    q.save(tmp_path)
    assert "lowered.scalar" not in q.state_dict() and set(load(tmp_path).state_dict()) == set(q.state_dict())


def test_other_settings_of_a_layer(tmp_path: Path) -> None:
    q, *_ = converted("net", exported=False)
    q.save(tmp_path)
    other = Net()
    other.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
    with pytest.raises(SavedModelError, match=r"stride of original_model is \(2, 2\), saved was \(1, 1\)"):
        load(tmp_path, other)


# ---------------------------------------------------------------------------------------------------------- the folder
@pytest.mark.parametrize("where", [b"mine", 123, ["a"], None, ""])
def test_what_is_no_folder(where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    q, *_ = converted("net")
    with pytest.raises(ConfigError, match="checkpoint_dir must be the path of a folder"):
        q.save(where)
    assert folder_of(tmp_path) == []


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    q, *_ = converted("net")
    for path in ("a\0b", "x" * 300):
        with pytest.raises(SavedModelError, match="cannot save to"):
            q.save(tmp_path / path)
        with pytest.raises(SavedModelError):
            load(tmp_path / path)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".saving-mine", ".saving-inc-mine", "model-mine.safetensors"):
        (tmp_path / name).mkdir()
    (tmp_path / "model-0123456789abcdef.safetensors").mkdir()  # cannot be deleted as a file: the new model is there
    q, (x, *_), _ = converted("net")
    q.save(tmp_path)
    equal(call(load(tmp_path), x), call(q, x))
    assert {".saving-mine", ".saving-inc-mine", "model-mine.safetensors"} <= set(folder_of(tmp_path))


def test_a_full_disk(tmp_path: Path) -> None:
    """The error is the library's, and what was there stays."""
    import resource
    import signal

    q, (x, *_), _ = converted("net")
    q.save(tmp_path)
    larger, *_ = converted("tied")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(SavedModelError, match="cannot save to"):
            larger.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    equal(call(load(tmp_path), x), call(q, x))
    assert len(folder_of(tmp_path)) == 3


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    """Each load gives the old model or the new one."""
    import threading

    x = torch.ones(2, 8)
    models = []
    for value in (0.01, 0.02):
        net = nn.Sequential(nn.Linear(8, 8)).eval()
        for p in net.parameters():
            nn.init.constant_(p, value)
        models.append(quantize(net, StaticQuantConfig(), lambda p: p(x), example_inputs=x))
    wanted = [m(x) for m in models]
    models[0].save(tmp_path)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            models[number % 2].save(tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(25):
            got = load(tmp_path)(x)
            assert any(torch.equal(got, w) for w in wanted)
    finally:
        stop.set()
        writer.join()
