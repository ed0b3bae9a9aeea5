"""Random small models for property tests, the same for the same seed.

They mix what breaks graph passes: tied weights, a layer called twice, in-place operators, views, several outputs,
grad-mode and autocast regions, written buffers, integer values, residual edges.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, CHANNELS, SIDE = 8, 4, 6


class RandomModel(nn.Module):
    """`forward(image, vector, *, scale=1.0-tensor)`: image [B, 4, 6, 6], vector [B, 8] -> {"vector", "image"}.

    Args:
        seed: Decides structure and weights.
        size: Number of steps.
        kinds: Names of steps to choose from; all by default.
    """

    def __init__(self, seed: int, size: int = 10, kinds: tuple[str, ...] | None = None) -> None:
        super().__init__()
        rng = random.Random(seed)
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.register_buffer("state", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.plan: list[tuple[str, int, int, int]] = []
        names = kinds or KINDS
        for _ in range(size):
            name = rng.choice(names)
            layer = self._layer_for(name, rng)
            self.plan.append((name, layer, rng.randrange(1 << 16), rng.randrange(1 << 16)))
        torch.random.set_rng_state(state)
        self.eval()

    def _layer_for(self, name: str, rng: random.Random) -> int:
        linears = [i for i, m in enumerate(self.layers) if isinstance(m, nn.Linear) and m.in_features == WIDTH]
        if name == "again" and linears:
            return rng.choice(linears)
        wide = name in ("cat_twice", "stack_twice")
        make: dict[str, Callable[[], nn.Module]] = {
            "cat": lambda: nn.Linear(2 * WIDTH, WIDTH),
            "pool": lambda: nn.Linear(CHANNELS, WIDTH),
            "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=rng.random() < 0.5),
            "conv_bn": lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)),
            "norm": lambda: nn.LayerNorm(WIDTH),
            "embed": lambda: nn.Embedding(WIDTH, WIDTH),
            **dict.fromkeys(
                TWICE, lambda: nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH * (1 + wide), WIDTH)])
            ),
        }
        layer = make.get(name, lambda: nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.7))()
        if name == "tied" and linears:
            layer.weight = self.layers[rng.choice(linears)].weight
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
        self.layers.append(layer)
        return len(self.layers) - 1

    def forward(self, image: torch.Tensor, vector: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        images, vectors = [image], [vector * scale]
        for name, layer, a, b in self.plan:
            x, y, pic = vectors[a % len(vectors)], vectors[b % len(vectors)], images[a % len(images)]
            module = self.layers[layer]
            if name in ("linear", "again", "tied", "norm"):
                vectors.append(module(x))
            elif name == "relu_":
                vectors.append(module(x).relu_())
            elif name == "inplace_view":
                z = x * 2
                z.view(-1).add_(1)
                vectors.append(z)
            elif name == "residual":
                vectors.append(F.gelu(module(x)) + y)
            elif name == "cat":
                vectors.append(module(torch.cat([x, y], 1)))
            elif name == "split":
                first, second = x.chunk(2, 1)
                vectors.append(torch.cat([second, first * 0.5], 1))
            elif name == "view":
                vectors.append(x.view(x.shape[0], 2, WIDTH // 2).transpose(1, 2).reshape(x.shape[0], WIDTH))
            elif name == "pool":
                vectors.append(module(pic.mean((2, 3))))
            elif name in ("conv", "conv_bn"):
                images.append(F.relu(module(pic)))
            elif name == "max_pool":
                images.append(F.max_pool2d(pic, 3, 1, 1) + pic)
            elif name == "no_grad":
                with torch.no_grad():
                    vectors.append(module(x))
            elif name == "enable_grad":
                with torch.enable_grad():
                    vectors.append(torch.sigmoid(module(x)))
            elif name == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    z = module(x)
                vectors.append(z.float() + y)
            elif name == "buffer":
                self.state.mul_(0.5).add_(x.mean(0))
                self.calls.add_(1)
                vectors.append(x + self.state)
            elif name == "embed":
                vectors.append(module(x.argmax(1)) + y)
            elif name in TWICE:
                z, last = module[0](x), module[1]
                if name == "cat_twice":
                    vectors.append(last(torch.cat([z, z], 1)))
                elif name == "stack_twice":
                    vectors.append(last(torch.stack([z, z], 2).flatten(1)))
                elif name == "add_twice":
                    vectors.append(last(torch.add(z, z, alpha=0.5)))
                elif name == "glu_twice":
                    vectors.append(last(F.glu(torch.cat([z, z], 1), 1)))
                elif name == "matmul_twice":
                    z = z[:, None].expand(-1, WIDTH, WIDTH)
                    vectors.append(last(z @ z).mean(1) + y)
                elif name == "attend_twice":
                    z = torch.stack([z, module[0](y)], 1)
                    vectors.append(last(F.scaled_dot_product_attention(z, z, z)).mean(1))
            elif name == "dropout":
                vectors.append(F.dropout(x, 0.5, self.training) + x.detach())
        return {"vector": vectors[-1], "image": images[-1]}

    def inputs(self, seed: int = 0, batch: int = 3) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """(args, kwargs) for forward."""
        g = torch.Generator().manual_seed(seed)
        image = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=g)
        return (image, torch.randn(batch, WIDTH, generator=g)), {"scale": torch.randn(WIDTH, generator=g)}


KINDS = (
    "linear", "again", "tied", "norm", "relu_", "inplace_view", "residual", "cat", "split", "view", "pool", "conv",
    "conv_bn", "max_pool", "no_grad", "enable_grad", "autocast", "buffer", "embed", "dropout",
)  # fmt: skip


TWICE = ("cat_twice", "stack_twice", "add_twice", "glu_twice", "matmul_twice", "attend_twice")
"""Steps, to be asked for by `kinds`, with an operator that reads one value in several places, between two layers."""
