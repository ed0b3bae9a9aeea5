"""How small is the model on disk, and what does loading need?

`python -m examples.save_and_load`

A graph is loaded in another process that has neither the model's class nor its package; a model that was quantized
layer by layer goes back into its own class.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from inc_graph.quantization import StaticQuantConfig, load, quantize, save


class Classifier(nn.Module):
    """A small classifier of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 32, 3, stride=2), nn.Conv2d(32, 64, 3, stride=2)
        self.hidden, self.head = nn.Linear(64, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


ELSEWHERE = """
import sys, torch
from inc_graph.quantization import load
model = load(sys.argv[1])
print(f"in another process: {type(model).__name__}, class {model(torch.ones(1, 3, 32, 32)).argmax().item()}")
"""


def megabytes(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.iterdir()) / 1e6


def main() -> None:
    torch.manual_seed(0)
    model, images = Classifier().eval(), torch.randn(16, 3, 32, 32)
    one = torch.ones(1, 3, 32, 32)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    config = StaticQuantConfig().set_local("hidden", StaticQuantConfig(w_dtype="int4"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(model.state_dict(), folder / "float.pt")
        print(f"float weights     {(folder / 'float.pt').stat().st_size / 1e6:.3f} MB")

        graph = quantize(
            model, config, lambda p: p(images), inplace=False, example_inputs=images, dynamic_shapes=dynamic
        )
        save(graph, folder / "graph")
        print(f"saved graph       {megabytes(folder / 'graph'):.3f} MB")
        print(f"in this process:    class {graph(one).argmax().item()}", flush=True)
        subprocess.run([sys.executable, "-c", ELSEWHERE, str(folder / "graph")], check=True)

        layers = quantize(model, config, lambda p: p(images), inplace=False)
        layers.save(folder / "layers")
        again = load(folder / "layers", original_model=Classifier())
        print(f"saved layers      {megabytes(folder / 'layers'):.3f} MB")
        print(f"still a {type(again).__name__}; equal: {torch.equal(again(images), layers(images))}")
        (folder / "graph" / "inc_graph.json").write_text("{}")
        try:
            load(folder / "graph")
        except ValueError as error:
            print(f"damaged: {str(error).split('/')[-1]}")


if __name__ == "__main__":
    main()
