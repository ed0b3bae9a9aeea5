"""See what quantization does to a model: the graph as text, the difference between two levels, and the report.

`python -m examples.inspect_the_graph`
"""

from __future__ import annotations

import json

import torch
from torch import nn

from inc_graph.export import export
from inc_graph.graph import get_level
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.text import diff, to_text
from inc_graph.verify import verify


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(32, 8)
    batch = torch.export.Dim("batch", min=1, max=1024)

    exported = export(model, (x,), dynamic_shapes=({0: batch},))
    print("1. What was captured. @ is an attribute, % a value, # the module it comes from.\n")
    print(to_text(exported))

    prepared = prepare(exported, StaticQuantConfig(), inplace=False)
    prepared(x)
    quantized = convert(prepared)

    print("2. What conversion changed, and with which numbers the result runs:\n")
    print(diff(exported, quantized.graph, ("float", "Q-DQ")))
    verify(quantized.graph)  # if the graph is not what its level promises: an error that names the node and the rule
    print(f"The graph is a legal {get_level(quantized.graph)!r} graph.\n")

    print(f"3. What runs instead, on backend {quantized.backend!r}:\n")
    print(to_text(quantized.lowered))

    print("4. The report, as a table and as data:\n")
    print(quantized.report)
    print(json.dumps(quantized.report.to_json()["kernels"], indent=1))

    error = (quantized(x) - quantized.graph(x)).abs().max()
    print(f"\nThe kernels agree with the graph's own meaning to {error:.1e}.")


if __name__ == "__main__":
    main()
