"""A damaged folder gives the library's own error, or the same model; a hostile one executes nothing.

Two kinds of damage, 1,100 random cases: to the bytes of a file, as a disk or a transfer does it; and to what the files
say, with all hashes made right again, as somebody does it who wants to be believed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import resource
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.errors import IncError, SavedModelError
from inc_graph.quantization import StaticQuantConfig, load, quantize
from inc_graph.saving.folder import MANIFEST
from tests.saving.models import Net

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Payload:
    """Unpickled, it leaves a trace."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@dataclass
class Saved:
    """A saved model, and what it gives on X; `count` mutations of each kind are tried (layers take longer to load)."""

    folder: Path
    want: torch.Tensor
    count: int


@pytest.fixture(scope="module", params=["graph", "layers"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    graph = request.param == "graph"
    given = {"example_inputs": X} if graph else {}
    q = quantize(Net().eval(), StaticQuantConfig(w_dtype="int4").set_local("head", StaticQuantConfig()),
                 lambda p: p(X), **given)  # fmt: skip
    folder = tmp_path_factory.mktemp("saved") / "model"
    q.save(folder)
    return Saved(folder, q(X)["logits"], 450 if graph else 100)


def outcome(folder: Path) -> torch.Tensor | IncError:
    """What the model in a folder gives on X, or the error of the library; any other error is a failure."""
    original = Net()
    layers = dict(original.named_modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = load(folder, original)
        except IncError as e:
            assert dict(original.named_modules()) == layers, "loaded by half"
            return e
        try:
            return model(X)["logits"]
        except Exception as e:  # loaded a model that cannot run: only what says so itself counts
            return IncError(str(e))


# ------------------------------------------------------------------------------------------------------------ to bytes
def damage(folder: Path, rng: random.Random, mark: Path) -> str:
    """Damage one file; what was done."""
    file = rng.choice(sorted(folder.iterdir()))
    data = file.read_bytes()
    kind = rng.choice(
        ["cut", "flip", "flip", "flips", "gone", "more", "empty", "zeros", "pickle", "swap", "folder", "insert"]
    )
    at = rng.randrange(len(data))
    if kind == "cut":
        file.write_bytes(data[:at])
    elif kind == "flip":
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    elif kind == "flips":
        changed = bytearray(data)
        for _ in range(rng.randrange(2, 50)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(bytes(changed))
    elif kind == "gone":
        file.unlink()
    elif kind == "more":
        file.write_bytes(data + rng.randbytes(rng.randrange(1, 100)))
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "zeros":
        file.write_bytes(data[:at] + bytes(len(data) - at))
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(mark)))
    elif kind == "swap":
        other = rng.choice(sorted(folder.iterdir()))
        both = other.read_bytes()
        other.write_bytes(data)
        file.write_bytes(both)
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:])
    return f"{kind} {file.name} at {at} of {len(data)}"


@pytest.mark.slow
def test_damaged_bytes(saved: Saved, tmp_path: Path) -> None:
    folder, want = saved.folder, saved.want
    mark = tmp_path / "executed"
    refused = 0
    for seed in range(saved.count):
        rng = random.Random(seed)
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        what = damage(copy, rng, mark)
        got = outcome(copy)
        if isinstance(got, IncError):
            refused += 1
            assert isinstance(got, SavedModelError) and str(copy) in str(got), f"{seed}: {what}: {got!r}"
        else:  # a byte of white space, or a file that was swapped with itself
            assert torch.equal(got, want), f"{seed}: {what}"
        shutil.rmtree(copy)
    assert not mark.exists() and refused > 0.85 * saved.count


# ---------------------------------------------------------------------------------------------------------- to meaning
def reseal(folder: Path, content: dict[str, Any], version: Any = 1) -> None:
    """Make every size and hash right."""
    files = content.get("files")
    for name in list(files) if isinstance(files, dict) else ():  # the damage may have hit the list itself
        file = folder / name
        if file.is_file():
            data = file.read_bytes()
            content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    whole = {"format": "inc_graph", "version": version, "sha256": digest, "content": content}
    (folder / MANIFEST).write_text(json.dumps(whole))


def places(data: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON document."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found.append((data, key))
        places(data[key], found)
    return found


def poison(rng: random.Random, mark: Path, old: Any) -> Any:
    """A value that should not be there."""
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    if isinstance(old, int) and rng.random() < 0.5:
        return rng.choice([old + 1, -1, 0, 1 << 40, 1 << 62, 1 << 70, 1e300, True])
    choices: list[Any] = [
        None, True, -1, 1 << 62, 0.5, "", "x", code, f"x): {code} #", "../../../etc/passwd", "/dev/zero", "a\nb",
        "lambda",
        [], {}, [[]], {"node": "x"}, {"tuple": [old]}, {"dtype": "float99"}, {"device": "cuda:99"}, [old, old],
        {"name": "x", "op": "call_function", "target": "operator.add", "args": []}, "aten.from_file.default",
        "aten.add_.Tensor", "os.system", "prim.device.default", "inc.unpack.default", "s0**s0**s0", "9**9**9",
    ]  # fmt: skip
    return rng.choice(choices)


def mutate(data: Any, rng: random.Random, mark: Path) -> str:
    container, key = rng.choice(places(data, []))
    kind = rng.choice(["poison", "poison", "poison", "delete", "rename", "twice", "swap"])
    old = container[key]
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[rng.choice([str(key) + "x", "x", "__class__", "files", key[::-1]])] = container.pop(key)
    elif kind == "twice" and isinstance(container, list):
        container.insert(key, old)
    elif kind == "swap":
        other, at = rng.choice(places(data, []))
        if not isinstance(other[at], dict | list) and not isinstance(old, dict | list):
            container[key], other[at] = other[at], old
    else:
        container[key] = poison(rng, mark, old)
    return f"{kind} {key!r}: {str(old)[:60]!r}"


def edit_header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


@pytest.mark.slow
def test_damaged_meaning(saved: Saved, tmp_path: Path) -> None:
    folder, want = saved.folder, saved.want
    mark = tmp_path / "executed"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = same = 0
    for seed in range(saved.count):
        rng = random.Random(seed)
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        content = json.loads((copy / MANIFEST).read_text())["content"]
        part = rng.choice(["graph", "graph", "graph", "header", "manifest"])
        if part == "graph":
            file = next(copy.glob("graph-*.json"))
            data = json.loads(file.read_text())
            what = mutate(data, rng, mark)
            file.write_text(json.dumps(data))
        elif part == "header":
            what = ""

            def edit(header: dict[str, Any], rng: random.Random = rng) -> None:
                nonlocal what
                what = mutate(header, rng, mark)

            edit_header(next(copy.glob("model-*.safetensors")), edit)
        else:
            what = mutate(content, rng, mark)
        reseal(copy, content)
        got = outcome(copy)  # any error but the library's own fails here
        refused += isinstance(got, IncError)
        same += isinstance(got, torch.Tensor) and torch.equal(got, want)
        assert not mark.exists(), f"{seed}: {part}: {what}"
        shutil.rmtree(copy)
    assert (
        refused > 0.35 * saved.count and same > 0.05 * saved.count
    )  # provenance, timings and the like change no value
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def remade(saved: Saved, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    copy = tmp_path / "copy"
    shutil.copytree(saved.folder, copy)
    return copy, json.loads((copy / MANIFEST).read_text())["content"]


def test_named_attacks(saved: Saved, tmp_path: Path) -> None:
    """Each is refused in words that say what and where."""
    mark = tmp_path / "executed"

    def refused(match: str, change: Callable[[Path, dict[str, Any]], Any], version: Any = 1) -> None:
        copy, content = remade(saved, tmp_path)
        change(copy, content)
        reseal(copy, content, version)
        with pytest.raises(SavedModelError, match=match):
            load(copy, Net())
        shutil.rmtree(copy)

    def shard(copy: Path) -> Path:
        return next(copy.glob("model-*.safetensors"))

    def renamed(name: str) -> Callable[[Path, dict[str, Any]], Any]:
        return lambda copy, content: content["files"].update({name: content["files"].pop(shard(copy).name)})

    def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path, dict[str, Any]], Any]:
        return lambda copy, content: edit_header(shard(copy), edit)

    def first(header: dict[str, Any]) -> dict[str, Any]:
        return next(v for k, v in sorted(header.items()) if k.endswith("weight_q"))

    def pickled(copy: Path, content: dict[str, Any]) -> None:
        shard(copy).write_bytes(pickle.dumps(Payload(mark)))

    refused(
        "has format version 2, this version reads up to 1(.|\n)*install that version or a newer", lambda *_: None, 2
    )
    refused("field 'version' is '1.5'", lambda *_: None, 1.5)
    for name in ("../model-0123456789abcdef.safetensors", "/etc/passwd", "model.safetensors", "x.pt"):
        refused("field 'files' has a name that is not one of a saved model's", renamed(name))
    refused("is missing", renamed("model-0123456789abcdef.safetensors"))
    refused("is not a safetensors file", pickled)
    refused("is not a safetensors file", header(lambda h: first(h).update(shape=[1 << 40, 1 << 20])))
    refused("is not a safetensors file", header(lambda h: first(h).update(data_offsets=[0, 1 << 50])))
    refused("its file has shape", header(lambda h: first(h).update(shape=first(h)["shape"][::-1])))
    refused("its file has torch.int8", header(lambda h: first(h).update(dtype="I8")))
    refused("no file has an entry", header(lambda h: h.update({"x": h.pop(next(iter(sorted(h)[1:])))})))
    refused("is not a safetensors file", lambda copy, _: shard(copy).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"))
    assert not mark.exists()


@pytest.mark.slow
def test_names_that_would_be_code(tmp_path: Path) -> None:
    """FX writes Python from a graph: names, attributes and keywords of a file must never get there unchecked."""
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    q = quantize(nn.Sequential(nn.Linear(4, 4)).eval(), StaticQuantConfig(), lambda p: p(x), example_inputs=x)
    q.save(tmp_path / "model")
    mark = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    evil = [f"x={code}", f"x\n    {code}\n    y", f'x"), {code}, ("', "lambda", "__class__"]
    file = next((tmp_path / "model").glob("graph-*.json"))
    text = file.read_text()
    spots = [(c, k) for c, k in places(json.loads(text), []) if isinstance(c[k], str) or isinstance(k, str)]
    tried = 0
    for number in range(len(spots)):
        for bad in evil:
            data = json.loads(text)
            container, key = places(data, [])[number]
            if isinstance(container, dict) and number % 2:
                container[bad] = container.pop(key)
            elif isinstance(container[key], str):
                container[key] = bad
            else:
                continue
            tried += 1
            file.write_text(json.dumps(data))
            reseal(tmp_path / "model", json.loads((tmp_path / "model" / MANIFEST).read_text())["content"])
            try:
                load(tmp_path / "model")(x)
            except (IncError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
                pass
            assert not mark.exists(), f"{container} {key}: {bad}"
    assert tried > 200


# ------------------------------------------------------------------------------------------------- one attack at a time
def graph_of(tmp_path: Path) -> tuple[Path, Path]:
    """(folder of a small saved graph, its JSON file)."""
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    quantize(model, StaticQuantConfig(), lambda p: p(x), example_inputs=x, dynamic_shapes=dynamic).save(tmp_path / "m")
    return tmp_path / "m", next((tmp_path / "m").glob("graph-*.json"))


def refused(folder: Path, file: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    text = file.read_text()
    data = json.loads(text)
    change(data)
    file.write_text(json.dumps(data))
    reseal(folder, json.loads((folder / MANIFEST).read_text())["content"])
    with pytest.raises(SavedModelError, match=match):
        load(folder)
    file.write_text(text)


FAKE = {"dtype": "float32", "shape": [2, 4], "stride": [4, 1], "device": "cpu"}


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("aten.manual_seed.default", [1234]), ("aten._print.default", ["x"]), ("prim.rangelist.default", [1 << 28]),
        ("aten.center.default", ["a", 500000000, " "]), ("aten.save.default", [1, "x"]), ("prim.Print.default", []),
        ("profiler._record_function_enter.default", ["x"]), ("aten.from_file.default", ["/etc/passwd", False, 8]),
        ("inductor._reinterpret_tensor.default", [{"node": "x"}, [2, 4], [1 << 28, 1], 1 << 30]),
        ("c10d.barrier.default", []), ("aten.add_.Tensor", []), ("aten.set_grad_enabled.default", [False]),
    ],
)  # fmt: skip
def test_operators_that_do_more_than_compute(target: str, args: Any, tmp_path: Path, capfd: Any) -> None:
    folder, file = graph_of(tmp_path)
    evil = {"name": "evil", "op": "call_function", "target": target, "args": args, "value": FAKE}
    torch.manual_seed(7)
    found = (
        "(is not one that a model needs|is one of TorchScript|writes to its arguments|there is no operator|nothing to)"
    )
    refused(folder, file, lambda d: d["graph"]["nodes"].insert(1, evil), f"{found}(.|\n)*")
    assert torch.initial_seed() == 7 and torch.is_grad_enabled() and capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "text",
    ["((((9**64)**64)**64)**64)**64", "((s0+s0)**8)**8", "*".join(f"(s0+{i})" for i in range(100)),
     "(" * 150 + "s0*s0+7" + ")//(s0+3)" * 150, "9" * 400, "Max(" * 300 + "s0" + ",s0)" * 300],
    ids=range(6),
)  # fmt: skip
def test_sizes_that_would_take_for_ever(text: str, tmp_path: Path) -> None:
    folder, file = graph_of(tmp_path)

    def change(data: dict[str, Any]) -> None:
        (symbol,) = data["graph"]["symbols"]
        data["graph"]["nodes"][0]["value"]["shape"][0] = text.replace("s0", symbol)

    refused(folder, file, change, "size")


def test_notes_and_calls_that_would_fail_later(tmp_path: Path) -> None:
    folder, file = graph_of(tmp_path)
    for inputs in ({}, [], None, {"leaves": None, "ranges": {}, "optional": []},
                   {"leaves": [{"name": "x", "shape": 5}], "ranges": {}, "optional": []}):  # fmt: skip
        refused(folder, file, lambda d, i=inputs: d["graph"]["meta"].update(inputs=i), "description of the inputs")
    refused(folder, file, lambda d: d["graph"]["meta"].update(recipe={"rules": 3}), "Recipe")
    for key, value, match in (
        ("out", {"tuple": ["*", "*"]}, "structure of the outputs"), ("out", [], "structure of the outputs"),
        ("in", "*", "that of a call"), ("names", [], "does not agree"), ("names", ["self"], "cannot be one"),
        ("names", ["torch"], "cannot be one"), ("names", ["pytree"], "cannot be one"),
    ):  # fmt: skip
        refused(folder, file, lambda d, k=key, v=value: d["graph"]["call"].update({k: v}), match)
    refused(folder, file, lambda d: d["graph"]["symbols"].update({f"u{i}": {} for i in range(20000)}), "too many")


def test_what_json_allows_and_we_do_not(tmp_path: Path) -> None:
    folder, file = graph_of(tmp_path)
    manifest = (folder / MANIFEST).read_text()
    for text, match in (
        (
            manifest.replace('"version": 1', '"version": 2').replace('"producer": {', '"producer": 1, "p": {'),
            "version 2",
        ),
        (manifest.replace('"bytes_before": ', '"bytes_before": 1e999'), "is not JSON"),
        (manifest.replace('"format"', '"format": "x", "format"', 1), "there twice"),
        ("[" * 100000, "damaged"),
    ):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(SavedModelError, match=match):
            load(folder)
    (folder / MANIFEST).write_text(manifest)
    text = file.read_text()
    for bad in ("NaN", "1e999"):
        file.write_text(text.replace('"symbols":{', f'"x":{bad},"symbols":{{', 1))
        reseal(folder, json.loads((folder / MANIFEST).read_text())["content"])
        with pytest.raises(SavedModelError, match="is not JSON"):
            load(folder)


def test_paths_of_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = quantize(Net().eval(), StaticQuantConfig(), lambda p: p(X))
    q.save(tmp_path / "m")
    file = next((tmp_path / "m").glob("graph-*.json"))
    text = file.read_text()
    for change, match in (
        (lambda d: d["layers"][0].update(paths=["conv", "again"]), "two layers, saved was one"),
        (lambda d: d["layers"][0].update(paths=["conv", "conv"]), "is there twice"),
        (lambda d: d["layers"].append(d["layers"][0]), "is there twice"),
        (lambda d: d["layers"][0].update(paths=[".."]), "has no layer"),
        (lambda d: d["layers"][0].update(paths=["forward"]), "has no layer"),
        (lambda d: d["layers"][0].update(paths=[""]), "not a layer that is quantized"),
    ):
        data = json.loads(text)
        change(data)
        file.write_text(json.dumps(data))
        reseal(tmp_path / "m", json.loads((tmp_path / "m" / MANIFEST).read_text())["content"])
        original = Net()
        before = dict(original.named_modules())
        with pytest.raises(SavedModelError, match=match):
            load(tmp_path / "m", original)
        assert dict(original.named_modules()) == before
