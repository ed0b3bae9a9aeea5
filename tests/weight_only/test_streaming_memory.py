"""A model whose values stay in a checkpoint is quantized in memory that grows neither with the calibration data nor
with the number of blocks. Counted are the bytes of all tensors that are alive, after each operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from inc_graph.quantization import GPTQConfig, HQQConfig, RTNConfig, convert, layer_groups, prepare
from inc_graph.quantization.block_inputs import block_inputs_of

WIDTH, TOKENS = 96, 64
HIDDEN = 4 * WIDTH * TOKENS  # bytes of what flows from block to block, of one call
BLOCK = 4 * 4 * WIDTH * WIDTH  # of the weights of a block


class Alive(TorchDispatchMode):
    """The most bytes of tensors that operators have made and that were alive at once, in `peak`. What others made (the
    user's data, what is mapped from a file) does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}
        self._others: set[StorageWeakRef] = set()

    def now(self) -> int:
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._others |= {ref for ref in _storages((args, kwargs)) if ref not in self._sizes}
        found = func(*args, **(kwargs or {}))
        self._sizes |= {ref: size for ref, size in _storages(found).items() if ref not in self._others}
        self.peak = max(self.peak, self.now())
        return found


def _storages(tree: Any) -> dict[StorageWeakRef, int]:
    found = [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == "cpu"]
    plain = [x.untyped_storage() for x in found if type(x) in (Tensor, nn.Parameter)]
    return {StorageWeakRef(storage): storage.nbytes() for storage in plain}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        h = x + (self.q(h) * self.k(h)) @ mask
        return h + self.down(self.up(h).tanh())


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(WIDTH, WIDTH).tril() / WIDTH
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are multiplied together have a room of their own, of a fixed size: here that of two calls."""
    monkeypatch.setattr(layer_groups, "_ROWS", 2 * TOKENS)


def run(config: Any, blocks: int, calls: int, folder: Path) -> tuple[int, int, nn.Module]:
    """(most bytes alive in calibration and conversion; bytes of the quantized weights; the model)."""
    torch.manual_seed(0)
    save_file(Model(blocks).state_dict(), folder / "model.safetensors")
    with torch.device("meta"):
        empty = Model(blocks).eval()
    empty.path = folder  # as `load_empty_model` leaves it
    data = [torch.randn(1, TOKENS, WIDTH) for _ in range(calls)]
    prepared = prepare(empty, config)
    with Alive() as alive:
        for x in data if config.name == "gptq" else ():
            prepared(x)
        known = block_inputs_of(prepared)
        model = convert(prepared)
    assert config.name != "gptq" or (known is not None and len(known.calls) == calls)
    return alive.peak, model.report.bytes_after, model  # type: ignore[union-attr, return-value]


def test_more_data_takes_no_more_memory(tmp_path: Path) -> None:
    few, _, _ = run(GPTQConfig(group_size=32), 2, 4, tmp_path)
    many, _, _ = run(GPTQConfig(group_size=32), 2, 20, tmp_path)
    assert many - few < 2 * HIDDEN, f"{(many - few) / HIDDEN:.1f} calls' worth more for 16 more calls"


@pytest.mark.parametrize("config", [RTNConfig, HQQConfig, GPTQConfig])
def test_more_blocks_take_what_their_codes_take(config: Any, tmp_path: Path) -> None:
    few, small, _ = run(config(group_size=32), 2, 2, tmp_path)
    many, large, _ = run(config(group_size=32), 6, 2, tmp_path)
    codes = large - small
    assert codes < 0.25 * 4 * BLOCK
    assert many - few < 1.1 * codes + 0.5 * BLOCK, f"{(many - few) / BLOCK:.2f} blocks more for 4 more blocks"


def test_the_result_is_that_of_calls_in_memory(tmp_path: Path) -> None:
    _, _, model = run(GPTQConfig(group_size=32), 2, 4, tmp_path)
    torch.manual_seed(0)
    whole = Model(2).eval()
    data = [torch.randn(1, TOKENS, WIDTH) for _ in range(4)]
    prepared = prepare(whole, GPTQConfig(group_size=32))
    for x in data:
        prepared(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inc_graph.quantization.block_by_block.LOCKSTEP_BYTES", -1)  # as a streamed model does it
        want = convert(prepared)
    x = torch.randn(1, TOKENS, WIDTH)
    assert torch.equal(model(x), want(x))
