"""A writer that is killed leaves the old model or the new one, and nothing between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, random, signal, sys, time
import torch
from torch import nn
from inc_graph.quantization import StaticQuantConfig, load, quantize
torch.set_num_threads(1)
folder, kills = sys.argv[1], int(sys.argv[2])
x = torch.ones(2, 64)

def model(value):
    net = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 1)).eval()
    for p in net.parameters():
        nn.init.constant_(p, value)
    return quantize(net, StaticQuantConfig(), lambda p: p(x), example_inputs=x)

models = [model(0.01), model(0.02)]
wanted = [m(x) for m in models]
assert not torch.equal(*wanted)
models[0].save(folder, max_shard_size=4000)

def saving(model):
    child = os.fork()
    if child == 0:
        model.save(folder, max_shard_size=4000)
        os._exit(0)
    return child

durations = []
for _ in range(5):  # how long a writer takes that is not killed
    start = time.perf_counter()
    os.waitpid(saving(models[0]), 0)
    durations.append(time.perf_counter() - start)
duration = max(durations)
now, seen, interrupted = 0, [0, 0], 0
for number in range(kills):
    other = 1 - now
    child = saving(models[other])
    time.sleep(random.Random(number).random() * duration)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    interrupted += os.WIFSIGNALED(status)
    got = load(folder)(x)
    which = [torch.equal(got, w) for w in wanted]
    assert sum(which) == 1, f"neither the old nor the new model after kill {number}"
    now = which.index(True)
    seen[now] += 1
models[0].save(folder)
assert len(os.listdir(folder)) == 3, os.listdir(folder)  # what the killed ones left is gone
print("interrupted", interrupted, "seen", *seen)
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(tmp_path: Path) -> None:
    assert signal.SIGKILL
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    assert int(words[1]) >= 5, done.stdout  # kills that came while it was writing
    assert int(words[3]) > 0 and int(words[4]) > 0, done.stdout
