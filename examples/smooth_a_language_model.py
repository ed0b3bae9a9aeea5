"""How much does SmoothQuant help, and who takes its scales in? A small Llama with outliers in its activations.

`python -m examples.smooth_a_language_model`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.quantization import SmoothQuantConfig, StaticQuantConfig, quantize


class Hidden(nn.Module):
    """The hidden states of a language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden


def llama() -> nn.Module:
    """Random weights; two channels behind each norm are forty times larger, and weights that read them smaller."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for layer in model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[:2] *= 40
                for reader in readers:
                    reader.weight[:, :2] /= 40
    return Hidden(model).eval()


@torch.no_grad()
def main() -> None:
    model = llama()
    data = [torch.randint(0, 100, (4, 32)) for _ in range(32)]  # with few, no alpha is known to be the best
    ids = torch.randint(0, 100, (8, 32))
    graph, want = export(model, (ids,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)), model(ids)

    def run(prepared: nn.Module) -> None:
        for batch in data:
            prepared(batch)

    configs: dict[str, Any] = {
        "static": StaticQuantConfig(),
        "alpha 0.5": SmoothQuantConfig(alpha=0.5),
        "auto": SmoothQuantConfig(alpha="auto"),
    }
    for name, config in configs.items():
        quantized: Any = quantize(graph, config, run)
        error = (quantized(ids) - want).norm() / want.norm()
        print(f"{name:10} relative error {error:.4f}")
    print(quantized.report.smoothing)


if __name__ == "__main__":
    main()
