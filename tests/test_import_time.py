"""`import inc_graph` and its parts cost little beside `import torch`, and do nothing: no detection, no logging."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

PARTS = ("inc_graph", "inc_graph.quantization", "inc_graph.utils", "inc_graph.common", "inc_graph.algorithms")
HEAVY = (
    "IPython", "accelerate", "huggingface_hub", "jinja2", "matplotlib", "networkx", "numba", "onnx", "pydot", "rich",
    "scipy", "sympy", "torch._dynamo", "torch._inductor", "torchao", "transformers",
)  # fmt: skip
BUDGET = 0.3  # seconds beside `import torch`
OF_TORCH = 0.25  # which is about this part of what torch takes; it counts where the machine is slower than most
RUNS = 5

_TIME = """
import time
start = time.process_time()
import torch
between = time.process_time()
import MODULE
print(between - start, time.process_time() - between)
"""


def run(program: str) -> str:
    command, elsewhere = [sys.executable, "-c", program], tempfile.gettempdir()  # not what lies in this folder
    env = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "",
    }  # an installed package has its bytecode; the first run writes it
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=elsewhere, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.alone
@pytest.mark.parametrize("module", PARTS[:2])  # the others are loaded by the second
def test_time(module: str) -> None:
    """The least of several runs, in processor time: what other programs do to it only makes it more."""
    runs = [run(_TIME.replace("MODULE", module)).split() for _ in range(RUNS)]
    torch, mine = (min(float(times[i]) for times in runs) for i in range(2))
    assert mine < max(BUDGET, OF_TORCH * torch)


@pytest.mark.parametrize("module", PARTS)
def test_nothing_heavy_comes_along(module: str) -> None:
    program = f"import sys, torch\nbefore = set(sys.modules)\nimport {module}\nprint(*set(sys.modules) - before)"
    new = set(run(program).split())
    assert module in new
    assert new & set(HEAVY) == set()


def test_the_package_itself_does_not_load_torch() -> None:
    program = "import sys, inc_graph; print('torch' in sys.modules, 'quantization' in dir(inc_graph))"
    assert run(program) == "False True\n"


_QUIET = """
import os, sys, torch
asked = []
class Watched(type(os.environ)):
    def __getitem__(self, key):
        asked.append(key)
        return super().__getitem__(key)
environment = os.environ
environment.__class__ = Watched
def detect(*args, **kwargs):
    asked.append("detection")
    return False
for name in ("cuda", "xpu", "hpu"):
    if hasattr(torch, name):
        getattr(torch, name).is_available = detect
import logging
logging.basicConfig(level=0, stream=sys.stdout, format="logged %(message)s")
import MODULE
mine = [a for a in asked if a == "detection" or a.startswith("INC_") or a in MINE]
print(mine)
"""


@pytest.mark.parametrize("module", PARTS)
def test_nothing_is_detected_logged_or_read(module: str) -> None:
    """neural_compressor looks for accelerators, logs what it finds and reads its variables when it is imported."""
    variables = ("LOGLEVEL", "LOCAL_RANK", "WORLD_SIZE")
    assert run(_QUIET.replace("MODULE", module).replace("MINE", repr(variables))) == "[]\n"


def test_what_is_looked_up_late_is_looked_up() -> None:
    """The watch above sees what it is there to see."""
    program = _QUIET.replace("MODULE", "inc_graph.utils as u; u.accelerator, u.world_size; u.logger.info('here')")
    assert run(program.replace("MINE", repr(("LOGLEVEL", "WORLD_SIZE")))) == (
        "logged here\n['INC_TARGET_DEVICE', 'detection', 'detection', 'WORLD_SIZE', 'LOGLEVEL']\n"
    )
