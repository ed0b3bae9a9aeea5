"""Run a quantized model in the int8 groups of Intel Extension for PyTorch, and see which operators are in one.

`python -m examples.run_on_ipex`, in an environment with torch 2.8 and IPEX (`make test-ipex` makes .venv-ipex)

Without IPEX the same lines run on the inductor backend, and the reason is printed.
"""

from __future__ import annotations

import torch
from torch import nn

from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.registry import BACKENDS


def main() -> None:
    reason = BACKENDS.get("ipex").available()
    if reason is None:
        import intel_extension_for_pytorch  # noqa: F401 - imported, it is what "auto" means on a CPU
    else:
        print(f"no IPEX here: {reason}\n")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU6(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(4608, 10))
    x = torch.randn(4, 3, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    prepared = prepare(export(model.eval(), (x,), dynamic_shapes=({0: batch},)), StaticQuantConfig())
    prepared(x)
    quantized, exact = convert(prepared), convert(prepared, backend="eager")
    print(quantized.report)
    for size in (4, 1, 32):  # one function for all batch sizes
        y = torch.randn(size, 3, 16, 16)
        error = (quantized(y) - exact(y)).norm() / exact(y).norm()
        print(f"batch {size:2}: {quantized.backend} differs from the reference by {error:.1e}")


if __name__ == "__main__":
    main()
