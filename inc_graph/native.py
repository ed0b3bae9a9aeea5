"""C sources that come with the package, compiled on the machine that runs them, once.

The compiler is ``$CC``, or the first of cc, gcc and clang. What it makes lies in ``$XDG_CACHE_HOME/inc_graph/native``
(``~/.cache``), named after the source with what it includes, the compiler, its options and the processor; it gets there
by one rename, so that processes that start together do not see halves. Where that folder cannot be written, a folder of
this process serves. ``INC_NATIVE=0`` switches compiled code off. Whoever calls must be able to do without.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from inc_graph.errors import IncWarning

__all__ = ["Unavailable", "load", "memory", "parallel_region", "runner"]

_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared")
_CPU = ("-march=native", "-mcpu=native", "")  # the first that the compiler takes
_SECONDS = 120
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL | None] = {}


class Unavailable(Exception):
    """Why there is no compiled code here."""


def memory(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor for compiled code to write to: of this dtype and on the CPU, whatever the defaults of the program."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def load(source: Path) -> ctypes.CDLL | None:
    """The library compiled from a C file; None where there is none, which is said in one warning.

    The answer of the first call is kept.
    """
    if os.environ.get("INC_NATIVE") == "0":
        return None
    key = str(source)
    if key not in _loaded:
        with _lock:
            if key not in _loaded:
                _loaded[key] = _try(source)
    return _loaded[key]


def _try(source: Path) -> ctypes.CDLL | None:
    try:
        return _build(source)
    except Unavailable as e:
        if not any(library is None for library in _loaded.values()):  # said once for all sources
            text = f"torch operators do what compiled code would do several times faster: {e}"
            hint = "a C compiler (cc, gcc, clang or $CC) is all that is missing; INC_NATIVE=0 silences this"
            warnings.warn(f"{text}; {hint}", IncWarning, stacklevel=2)
        return None


def _build(source: Path) -> ctypes.CDLL:
    if os.name != "posix":
        raise Unavailable(f"not on {platform.system()}")
    compiler = _compiler()
    name = f"{source.stem.lstrip('_')}-{_key(source, compiler)}.so"
    for folder in (_cache(), None):
        if folder is not None:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(folder / name))
        try:
            return _compile(source, compiler, folder, name)
        except OSError as e:
            reason = e
    raise Unavailable(f"what {compiler[0]} made cannot be kept or loaded: {reason}")


def _compile(source: Path, compiler: list[str], folder: Path | None, name: str) -> ctypes.CDLL:
    """Compile in a folder of our own, then move into `folder`, if one is given. OSError if it cannot be written."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as own:
        made = Path(own) / name
        said = ""
        for cpu in _CPU:
            command = [*compiler, *_FLAGS, *([cpu] if cpu else []), "-o", str(made), str(source)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            except (OSError, subprocess.TimeoutExpired) as e:
                raise Unavailable(f"{shlex.join(command)}: {e}") from e
            if done.returncode == 0 and made.exists():
                break
            said = said or (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        else:
            raise Unavailable(f"{compiler[0]} failed: {said}")
        if folder is None:
            return ctypes.CDLL(str(made))  # loaded it stays, also when the file is gone
        os.replace(made, folder / name)
    return ctypes.CDLL(str(folder / name))


def _compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if (path := shutil.which(command[0])) is not None:
            return [path, *command[1:]]
    raise Unavailable(f"there is no {asked[0]} ($CC)" if asked else "there is no C compiler")


def _cache() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "inc_graph" / "native"
    except RuntimeError:  # a user without a home
        return None


def _key(source: Path, compiler: list[str]) -> str:
    found = Path(compiler[0]).resolve()
    try:
        stamp = (str(found), found.stat().st_size, found.stat().st_mtime_ns)
    except OSError:
        stamp = (str(found), 0, 0)
    facts = (_text(source), compiler[1:], stamp, _FLAGS, _CPU, _processor())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _text(source: Path) -> list[bytes]:
    """What the compiler reads: the file, and the files beside it that it includes."""
    try:
        text = source.read_bytes()
    except OSError as e:
        raise Unavailable(f"a part of the package is missing: {e}") from e
    named = re.findall(rb'^#include "([^"]+)"', text, re.MULTILINE)
    return [text, *(part for name in named for part in _text(source.parent / name.decode()))]


@functools.cache
def _processor() -> str:
    """What the compiler's "native" stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = ("flags", "features", "model name", "cpu part")
    found = {line for line in lines if line.partition(":")[0].strip().lower() in kinds}
    return "\n".join([platform.machine(), platform.processor(), *sorted(found)])


@functools.cache
def parallel_region() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the OpenMP runtime that torch has loaded, None if it has none.

    Its own pool of threads: a second one would fight with it for the processors.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        return None


def runner(library: ctypes.CDLL, job: type[ctypes.Structure]) -> Callable[[ctypes.Structure], int | None]:
    """What runs a job of a library on torch's threads: its `run(job, parallel, threads)`, and what that returns.

    Raises:
        AssertionError: `job_size()` of the library is not that of `job`.
    """
    library.job_size.restype = ctypes.c_int64
    if library.job_size() != ctypes.sizeof(job):
        raise AssertionError("the C structure is not the one that is declared here")
    run, parallel = library.run, parallel_region()
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]

    def go(work: ctypes.Structure) -> int | None:
        failed: int | None = run(ctypes.byref(work), parallel, torch.get_num_threads())
        return failed

    return go
