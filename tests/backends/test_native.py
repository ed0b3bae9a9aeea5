"""Compiled code: one build for many processes, folders that cannot be written, compilers that do not work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inc_graph import lowering, native
from inc_graph.errors import IncWarning
from inc_graph.lowering import _weight_only as wo
from inc_graph.lowering._weight_only_native import Kernels, kernels

pytestmark = pytest.mark.slow

SOURCE = Path(lowering.__file__).with_name("_weight_only.c")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("cc", "gcc", "clang")), reason="there is no C compiler"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing loaded yet, and an empty cache folder."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INC_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    yield tmp_path / "inc_graph" / "native"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def linear() -> torch.Tensor:
    """The product of ones with a weight of ones, 64 wide."""
    codes, scale = torch.full((8, 32), 0x11, dtype=torch.uint8), torch.ones(8, 2)
    return wo.weight_only_linear(torch.ones(2, 64), codes, scale, None, None, [1, 32], "int4", torch.float32)


@needs_compiler
def test_compiled_once_and_found_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load(SOURCE)
    assert library is not None and native.load(SOURCE) is library
    (built,) = fresh.iterdir()
    stamp = built.stat().st_mtime_ns
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_compile", lambda *a: pytest.fail("compiled again"))
    assert native.load(SOURCE) is not None
    assert [f.stat().st_mtime_ns for f in fresh.iterdir()] == [stamp]


@needs_compiler
def test_another_source_or_compiler_is_another_file(fresh: Path, tmp_path: Path) -> None:
    changed = tmp_path / SOURCE.name
    changed.write_bytes(SOURCE.read_bytes() + b"\n")
    for header in SOURCE.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    compiler = native._compiler()
    keys = {native._key(SOURCE, compiler), native._key(changed, compiler), native._key(SOURCE, [*compiler, "-g"])}
    assert len(keys) == 3
    assert native._key(SOURCE, compiler) in keys


@needs_compiler
def test_another_included_file_is_another_file(tmp_path: Path) -> None:
    keys = []
    for text in ("int two(void) { return 2; }", "int two(void) { return 3; }"):
        (tmp_path / "part.h").write_text(text)
        source = tmp_path / "whole.c"
        source.write_text('#include <stdint.h>\n#include "part.h"\n')
        keys.append(native._key(source, native._compiler()))
    assert keys[0] != keys[1]
    (tmp_path / "part.h").unlink()
    with pytest.raises(native.Unavailable, match=r"part\.h"):
        native._key(source, native._compiler())


@needs_compiler
def test_processes_that_start_together_leave_one_library(fresh: Path) -> None:
    code = (
        f"from pathlib import Path; from inc_graph import native; assert native.load(Path({str(SOURCE)!r})) is not None"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    started = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment) for _ in range(3)]
    assert [p.wait(timeout=300) for p in started] == [0, 0, 0]
    assert [f.suffix for f in fresh.iterdir()] == [".so"]


@needs_compiler
def test_a_damaged_library_is_built_anew(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.mkdir(parents=True)
    name = f"weight_only-{native._key(SOURCE, native._compiler())}.so"
    (fresh / name).write_bytes(b"half of a file")
    library = native.load(SOURCE)
    assert library is not None and Kernels(library).max_rows > 0
    assert [f.name for f in fresh.iterdir()] == [name]


@needs_compiler
def test_a_folder_that_cannot_be_written_is_done_without(fresh: Path) -> None:
    fresh.parent.mkdir(parents=True)
    fresh.write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = native.load(SOURCE)
    assert library is not None and fresh.read_text() == "a file where the folder should be"


@pytest.mark.parametrize(
    "body, reason",
    [("echo 'no such option' >&2; exit 1", "no such option"), ("exit 0", "exit status 0"), (None, "there is no")],
)
def test_without_a_compiler_there_is_one_warning_and_the_same_result(
    body: str | None, reason: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "compiler", body) if body else str(tmp_path / "missing"))
    wo.taken.clear()
    with pytest.warns(IncWarning, match=reason) as caught:
        first = linear()
        second = linear()
    assert len([w for w in caught if issubclass(w.category, IncWarning)]) == 1
    assert wo.taken == {"torch": 2}
    assert torch.equal(first, torch.full((2, 8), 64.0)) and torch.equal(first, second)


@needs_compiler
def test_a_library_that_is_not_one_is_refused(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = 'while [ "$1" != "-o" ]; do shift; done; echo text > "$2"'
    monkeypatch.setenv("CC", script(tmp_path / "compiler", fake))
    with pytest.warns(IncWarning, match="cannot be kept or loaded"):
        assert native.load(SOURCE) is None


def test_switched_off_without_a_word(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_NATIVE", "0")
    wo.taken.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels() is None
        linear()
    assert wo.taken == {"torch": 1} and not fresh.exists()


@needs_compiler
def test_the_portable_code_gives_the_same(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without AVX-512: plain C, no instruction set asked for."""
    full = kernels()
    assert full is not None
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_CPU", ("",))
    plain = kernels()
    assert plain is not None and plain is not full and not plain.bf16_rows
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 160, generator=generator)
    for qtype, width in (("int2", 40), ("int3", 60), ("int4", 80), ("int5", 100), ("uint6", 120), ("nf4", 80)):
        codes = torch.randint(0, 256, (37, width), generator=generator, dtype=torch.uint8)
        scale = torch.rand(37, 5, generator=generator).half()
        args = (codes, scale, None, [1, 32], wo.get_qtype(qtype))
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.empty(37, 160, dtype=dtype), torch.empty(37, 160, dtype=dtype)
            full.unpack(a, *args)
            plain.unpack(b, *args)
            assert torch.equal(a, b)
        y = [torch.empty(5, 37), torch.empty(5, 37)]
        for k, out in zip((full, plain), y, strict=True):
            k.multiply(out, x, codes, scale, None, None, [1, 32], args[4])
        torch.testing.assert_close(*y, rtol=1e-5, atol=1e-4)
