"""Quantization-aware training in several processes: what they learn is the same in each of them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKER = textwrap.dedent(
    """
    import os, sys
    import torch, torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from inc_graph.quantization import StaticQuantConfig, convert, prepare_qat

    rank, world, graph, learn = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "graph", sys.argv[4] == "learn"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[5]}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).train()
    inputs = {"example_inputs": (torch.randn(8, 16),)} if graph else {}
    config = StaticQuantConfig(w_dtype="int4", act_dtype="uint4")
    model = prepare_qat(model, config, learn_scales=learn, **inputs)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), 1e-2)
    torch.manual_seed(rank)
    x, y = torch.randn(8, 16), torch.randint(0, 4, (8,))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(parallel(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    for name, value in model.named_parameters():
        every = [torch.empty_like(value) for _ in range(world)]
        dist.all_gather(every, value.detach())
        assert all(torch.equal(e, value) for e in every), name
    parallel.eval()
    torch.manual_seed(9)
    x = torch.randn(8, 16)
    with torch.no_grad():
        want = parallel(x)
    got = convert(parallel, backend="eager")(x)
    assert torch.allclose(got, want, atol=1e-5)
    print("done")
    dist.destroy_process_group()
    """
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "learn", "scope"),
    [(1, "track", "layers"), (2, "track", "layers"), (2, "learn", "layers"), (2, "track", "graph")],
)
def test_data_parallel(world: int, learn: str, scope: str, tmp_path: Path) -> None:
    script, meeting = tmp_path / "worker.py", tmp_path / "meeting"
    script.write_text(WORKER)
    command = [sys.executable, str(script)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), scope, learn, str(meeting)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "done" in out, out
