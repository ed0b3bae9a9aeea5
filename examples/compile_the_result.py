"""The converted model is fast as it is, and goes through torch.compile, with frozen weights or without.

`python -m examples.compile_the_result`

Compiled, what lies between the int8 layers is fused as well; the layers themselves are the same kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare


class Block(nn.Module):
    """Feed-forward block of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def least_ms(run: Callable[[Tensor], Tensor], x: Tensor, times: int = 20) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run(x)
        best = min(best, (time.perf_counter() - start) * 1e3)
    return best


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = nn.Sequential(*(Block(128) for _ in range(2))).eval()
    x = torch.randn(4, 32, 128)
    batch = torch.export.Dim("batch", min=1, max=64)

    prepared = prepare(export(model, (x,), dynamic_shapes=({0: batch},)), StaticQuantConfig())
    prepared(x)
    quantized = convert(prepared)
    with torch.no_grad():
        expected = quantized(x)
        print(f"float model          {least_ms(model, x):6.2f} ms")
        print(f"int8, called directly{least_ms(quantized, x):6.2f} ms")
        for freezing in (False, True):
            torch._dynamo.reset()
            torch._inductor.config.freezing = freezing
            compiled = torch.compile(quantized)
            error = (compiled(x) - expected).abs().max()
            print(f"int8, compiled       {least_ms(compiled, x):6.2f} ms, freezing={freezing}, differs by {error:.1e}")
    torch._inductor.config.freezing = False


if __name__ == "__main__":
    main()
