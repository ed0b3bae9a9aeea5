"""One measurement a process: what ran before is not in its memory, in its caches or among its threads."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["Failed", "answer", "measure", "peak_bytes"]

_ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """The process ended without a result; the message is its last line."""


def measure(module: str, task: dict[str, Any], threads: int = 2) -> dict[str, Any]:
    """What ``python -m <module>`` answers to a task; both are JSON. `answer` is the other end.

    Raises:
        Failed: it did not.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", module, "--answer", json.dumps({**task, "threads": threads}), str(file)],
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "INC_TARGET_DEVICE": "cpu", "LOGLEVEL": "ERROR"},
            capture_output=True,
            text=True,
            check=False,
        )
        if not file.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            raise Failed(lines[-1].strip()[:160])
        return json.loads(file.read_text(encoding="utf-8"))


def answer(work: Callable[[dict[str, Any]], dict[str, Any]], arguments: list[str] | None = None) -> bool:
    """In the module that `measure` starts: do the task, if there is one. False: this is an ordinary start."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] != ["--answer"]:
        return False
    _, task, file = arguments
    read = json.loads(task)
    torch.set_num_threads(read.pop("threads"))
    Path(file).write_text(json.dumps(work(read)), encoding="utf-8")
    return True


def peak_bytes() -> int:
    """The most memory that this process has had resident so far (shared pages of files included).

    Of Linux's own account of the process: `ru_maxrss` begins with what the process had that started this one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
