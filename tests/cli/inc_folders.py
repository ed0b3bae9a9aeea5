"""Folders as neural_compressor saves them, made after the layout alone: what the importer is compared with.

Nothing here is shared with the importer: codes are packed number by number, and weights are taken apart likewise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

NF4 = {  # code -> value
    7: -1.0, 1: -0.6961928009986877, 2: -0.5250730514526367, 3: -0.39491748809814453, 4: -0.28444138169288635,
    5: -0.18477343022823334, 6: -0.09105003625154495, 0: 0.0, -8: 0.07958029955625534, -7: 0.16093020141124725,
    -6: 0.24611230194568634, -5: 0.33791524171829224, -4: 0.44070982933044434, -3: 0.5626170039176941,
    -2: 0.7229568362236023, -1: 1.0,
}  # fmt: skip
FP4 = {
    -5: -12.0, -6: -8.0, -3: -6.0, -4: -4.0, -1: -3.0, -2: -2.0, -7: -0.0625, 0: 0.0, 1: 0.0625, 6: 2.0, 7: 3.0,
    4: 4.0, 5: 6.0, 2: 8.0, 3: 12.0,
}  # fmt: skip


@dataclass
class Packed:
    """One quantized layer: its entries in the state_dict, its settings, and the weight that these stand for."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    weight: torch.Tensor
    bias: torch.Tensor | None
    inner: str = ""  # "linear." where the layer stands in one that scales its input
    input_scale: torch.Tensor | None = None
    algorithm: str = "rtn"
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def dequantized(self) -> torch.Tensor:
        return self.weight if self.input_scale is None else self.weight * self.input_scale[None]


def words(rows: list[list[int]], bits: int) -> np.ndarray:
    """int32 words along each row, the first code in the lowest bits."""
    count = 32 // bits
    made = []
    for row in rows:
        line = []
        for start in range(0, len(row), count):
            word = 0
            for place, code in enumerate(row[start : start + count]):
                word |= (code & (2**bits - 1)) << (bits * place)
            line.append(word - 2**32 if word >= 2**31 else word)
        made.append(line)
    return np.array(made, dtype=np.int32)


def integers(
    inputs: int = 64,
    outputs: int = 24,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    shuffled: bool = False,
    bias: bool = True,
    scaled: bool = False,
    seed: int = 0,
    zero_points: int | None = None,
) -> Packed:
    """A layer of integers: codes along the inputs, zero points less one along the outputs, all of it transposed."""
    random = np.random.RandomState(seed)
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    codes = random.randint(0, 2**bits, (outputs, inputs))
    codes[:, -1] |= 1  # so that the last input is seen to be one
    scales = (random.rand(outputs, groups) * 0.05 + 0.01).astype(np.float16)
    zero = np.full((outputs, groups), 2 ** (bits - 1))
    if not symmetric:
        zero = random.randint(0, 2**bits, (outputs, groups))
        zero[0, 0] = 0  # less one: all bits set
    if zero_points is not None:
        zero[:] = zero_points
    place = np.arange(inputs) // size
    if shuffled:
        random.shuffle(place)
    weight = np.empty((outputs, inputs))
    for n in range(outputs):
        for k in range(inputs):
            g = place[k]
            weight[n, k] = (int(codes[n, k]) - int(zero[n, g])) * float(scales[n, g])
    tensors = {
        "qweight": torch.from_numpy(words(codes.tolist(), bits).T.copy()),
        "qzeros": torch.from_numpy(words((zero - 1).T.tolist(), bits)),
        "scales": torch.from_numpy(scales.T.copy()),
        "bias": torch.from_numpy((random.randn(outputs) * bias).astype(np.float16)),
    }
    if shuffled:
        tensors["g_idx"] = torch.from_numpy(place.astype(np.int32))
    return Packed(
        tensors,
        {"dtype": "int", "bits": bits, "group_size": group, "use_sym": symmetric},
        torch.from_numpy(weight).float(),
        tensors["bias"].float() if bias else None,
        inner="linear." if scaled else "",
        input_scale=torch.from_numpy(random.rand(inputs).astype(np.float32) + 0.5) if scaled else None,
        algorithm="gptq" if shuffled else "awq" if scaled else "rtn",
    )


def codebook(dtype: str, inputs: int = 64, outputs: int = 24, group: int = 32, seed: int = 0) -> Packed:
    """A layer of 4-bit floats: codes along the inputs, scales as they are, no zero points."""
    table = NF4 if dtype == "nf4" else FP4
    random = np.random.RandomState(seed)
    codes = random.choice(list(table), (outputs, inputs))
    scales = (random.rand(outputs, inputs // group) + 0.1).astype(np.float32)
    weight = [[table[int(codes[n, k])] * float(scales[n, k // group]) for k in range(inputs)] for n in range(outputs)]
    tensors = {"qweight": torch.from_numpy(words(codes.tolist(), 4)), "scales": torch.from_numpy(scales)}
    config = {"dtype": dtype, "bits": 4, "group_size": group, "use_sym": True}
    return Packed(tensors, config, torch.tensor(weight), None)


def write(folder: Path, layers: dict[str, Packed], others: dict[str, torch.Tensor]) -> Path:
    """`qconfig.json` and `quantized_weight.pt`."""
    folder.mkdir(parents=True, exist_ok=True)
    state, config = dict(others), {}
    for path, layer in layers.items():
        for name, tensor in layer.tensors.items():
            state[f"{path}.{layer.inner}{name}"] = tensor
        if layer.input_scale is not None:
            state[f"{path}.input_scale"] = layer.input_scale
        config[f"('{path}', 'Linear')"] = {layer.algorithm: layer.config}
    torch.save(state, folder / "quantized_weight.pt")
    (folder / "qconfig.json").write_text(json.dumps(config))
    return folder
