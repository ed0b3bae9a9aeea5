"""The layout of quantized linear layers in neural_compressor's `quantized_weight.pt`, to codes, scales and zero points.

Of K inputs and N outputs, with 32 // bits codes in an int32, low bits first (the bits that are left are unused):

    integers   qweight int32 [ceil(K / n), N]     codes without sign, along K
               qzeros  int32 [G, ceil(N / n)]     zero point - 1, along N; -1 is written as all ones
               scales  float16 [G, N]             for G groups along K
               g_idx   int32 [K]                  the group of each input; only where they are not in order (GPTQ)
    nf4, fp4   qweight int32 [N, ceil(K / n)]     codes with sign, along K
               scales  float [N, G]               no zero points

`bias` is there in any case for integers, zero where the layer had none. AWQ and TEQ multiply the input by `input_scale`
first; the layer itself is then called `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from inc_graph.errors import SavedModelError

__all__ = ["Layer", "read_layer"]

Tensor = torch.Tensor
_BITS = (2, 3, 4, 8)
_WORD = 32
_NF4_CODES = (7, 1, 2, 3, 4, 5, 6, 0, -8, -7, -6, -5, -4, -3, -2, -1)  # of the values in ascending order
# Name -> (our format, place of each 4-bit code in its codebook, factor: of ours, the largest value is 1)
_CODEBOOKS = {
    "nf4": ("nf4", tuple(_NF4_CODES.index(c if c < 8 else c - 16) for c in range(16)), 1.0),
    "fp4": ("fp4_bnb", tuple(range(16)), 12.0),
}
_CODEBOOKS["fp4_e2m1_bnb"] = _CODEBOOKS["fp4"]


@dataclass
class Layer:
    """One layer, unpacked.

    Attributes:
        path: Of the layer in the model.
        codes: [N, K], of the carrier dtype of `qtype`; in the order of `order`.
        scale: [N, G].
        zero_point: int32 [N, G], or None.
        qtype: Name of the number format.
        group: Inputs that share a scale; -1 for all of them.
        order: int64 [K]: input that each column of the codes is for; None if they are in order.
        bias: [N] or None.
        input_scale: [K], by which the input is multiplied; or None.
        remarks: What is to be known of it.
        guessed: That the file does not say how many inputs it has.
    """

    path: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    qtype: str
    group: int
    order: Tensor | None = None
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    remarks: list[str] = field(default_factory=list)
    guessed: bool = False

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.codes.shape[1])


def read_layer(path: str, tensors: dict[str, Tensor], config: dict[str, Any], in_features: int | None = None) -> Layer:
    """A layer from its tensors.

    Args:
        path: Of the layer in the model.
        tensors: qweight, scales, and qzeros, bias, g_idx, input_scale where there are such.
        config: Its entry in `qconfig.json`: dtype, bits, group_size.
        in_features: Where the file leaves it open.

    Raises:
        SavedModelError: they do not fit together, or are of a form that is not known; names the layer.
    """
    dtype = config.get("dtype") or "int"
    for name, kind in (("qweight", "int32"), ("qzeros", "int32")):
        if name in tensors and (str(tensors[name].dtype) != f"torch.{kind}" or tensors[name].ndim != 2):
            raise _error(
                path, f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, not {kind} of two dimensions"
            )
    scales = tensors.get("scales")
    if scales is None or scales.ndim != 2 or not scales.is_floating_point():
        raise _error(path, "it has no scales of two dimensions")
    if float(tensors.get("scale_bf16_to_fp8", torch.zeros(1)).abs().max()) > 0:
        raise _error(path, "its 4-bit weights stand for float8 ones (W4A8 on Gaudi)", "quantize the float model again")
    if "int" in str(dtype):
        layer = _integers(path, tensors, config, in_features)
    elif dtype in _CODEBOOKS:
        layer = _codebook(path, tensors, config, str(dtype), in_features)
    else:
        raise _error(path, f"its number format is {str(dtype)[:40]!r}", "int, nf4 and fp4 can be imported")
    return _finish(layer, tensors)


def _error(path: str, what: str, hint: str | None = None) -> SavedModelError:
    return SavedModelError(f"{what}", module=path, hint=hint)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., w] to [..., w * n], values of 0 to 2**bits - 1."""
    shifts = torch.arange(_WORD // bits, dtype=torch.int32) * bits
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _bits_of(path: str, config: dict[str, Any], outputs: int, zero_words: int) -> int:
    """From the config, if it says; from the number of words that the zero points take, if not."""
    fitting = [b for b in _BITS if _ceil(outputs, _WORD // b) == zero_words]
    asked = config.get("bits")
    if asked is None and len(fitting) == 1:
        return fitting[0]
    if asked not in _BITS:
        raise _error(path, f"bits is {asked!r}", "weights of 2, 3, 4 and 8 bits can be imported")
    if asked not in fitting:
        raise _error(path, f"{zero_words} words of zero points do not hold {outputs} of {asked} bits")
    return int(asked)


def _inputs(
    path: str, tensors: dict[str, Tensor], codes: Tensor, bits: int, group: Any, groups: int, told: int | None
) -> tuple[int, bool]:
    """(K, whether it is a guess). The last word may be filled up, and the file does not say how far.

    Args:
        codes: [N, K filled up].
        group: As in the config.
        groups: How many groups there are.
    """
    most = int(codes.shape[1])
    least = most - _WORD // bits + 1
    given = next((int(tensors[n].numel()) for n in ("g_idx", "input_scale") if n in tensors), told)
    if given is not None:
        if not least <= given <= most:
            raise _error(path, f"{given} inputs do not fit into {most // (_WORD // bits)} words of {bits} bits")
        return given, False
    if isinstance(group, int) and group > 0:
        fitting = [k for k in range(least, most + 1) if _ceil(k, group) == groups or (groups == 1 and k <= group)]
        if not fitting:
            raise _error(path, f"{groups} groups of {group} do not make {least} to {most} inputs")
        least, most = fitting[0], fitting[-1]
    used = codes.any(0).nonzero()
    last = int(used[-1]) + 1 if len(used) else 0
    if last > most:
        raise _error(path, f"{last} columns of qweight are in use, its groups have room for {most}")
    return max(last, least), last < most and least < most  # what is filled up is filled with zeros


def _group(path: str, config: dict[str, Any], inputs: int, groups: int) -> int:
    group = config.get("group_size")
    if groups == 1:
        return -1
    if group is None and inputs % groups == 0:
        group = inputs // groups
    if not isinstance(group, int) or group < 1 or _ceil(inputs, group) != groups:
        raise _error(path, f"group_size is {group!r}, and {inputs} inputs have {groups} scales each")
    return group


def _integers(path: str, tensors: dict[str, Tensor], config: dict[str, Any], told: int | None) -> Layer:
    if "qzeros" not in tensors:
        raise _error(path, "it has no qzeros", "it was not packed in the layout that neural_compressor saves")
    words, zeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, outputs = scales.shape
    if words.shape[1] != outputs or zeros.shape[0] != groups:
        shapes = ", ".join(f"{n} {list(tensors[n].shape)}" for n in ("qweight", "qzeros", "scales"))
        raise _error(path, f"{shapes} do not fit together")
    bits = _bits_of(path, config, outputs, zeros.shape[1])
    codes = _unpack(words.T, bits)
    zero_point = _unpack(zeros, bits)[:, :outputs].T + 1
    zero_point = torch.where(zero_point > 2**bits - 1, 0, zero_point).to(torch.int32)
    inputs, guessed = _inputs(path, tensors, codes, bits, config.get("group_size"), groups, told)
    codes = codes[:, :inputs]
    group = _group(path, config, inputs, groups)
    middle = 2 ** (bits - 1)
    if bool((zero_point == middle).all()):
        return Layer(path, (codes - middle).to(torch.int8), scales.T, None, f"int{bits}", group, guessed=guessed)
    return Layer(path, codes.to(torch.uint8), scales.T, zero_point, f"uint{bits}", group, guessed=guessed)


def _codebook(path: str, tensors: dict[str, Tensor], config: dict[str, Any], dtype: str, told: int | None) -> Layer:
    words, scales = tensors["qweight"], tensors["scales"]
    if words.shape[0] != scales.shape[0]:
        raise _error(path, f"qweight {list(words.shape)} and scales {list(scales.shape)} do not fit together")
    codes = _unpack(words, 4)
    inputs, guessed = _inputs(path, tensors, codes, 4, config.get("group_size"), scales.shape[1], told)
    group = _group(path, config, inputs, scales.shape[1])
    qtype, places, factor = _CODEBOOKS[dtype]
    codes = torch.tensor(places, dtype=torch.uint8)[codes[:, :inputs].long()]
    return Layer(path, codes, scales * factor, None, qtype, group, guessed=guessed)


def _finish(layer: Layer, tensors: dict[str, Tensor]) -> Layer:
    path, inputs = layer.path, layer.in_features
    layer.codes, layer.scale = layer.codes.contiguous(), layer.scale.contiguous()
    if (bias := tensors.get("bias")) is not None:
        if list(bias.shape) != [layer.out_features]:
            raise _error(path, f"bias has shape {list(bias.shape)}, there are {layer.out_features} outputs")
        layer.bias = bias if bool((bias != 0).any()) else None
    if (scale := tensors.get("input_scale")) is not None:
        layer.input_scale = scale.reshape(-1)
        layer.remarks.append("the input is scaled")
    if (groups := tensors.get("g_idx")) is not None:
        size = layer.group if layer.group > 0 else inputs
        in_order = torch.arange(inputs) // size
        if not torch.equal(groups.long().cpu(), in_order):
            order = torch.argsort(groups.long(), stable=True)
            if not torch.equal(groups.long()[order], in_order):
                raise _error(path, f"g_idx does not make groups of {size}")
            layer.order, layer.codes = order, layer.codes[:, order].contiguous()
            layer.remarks.append("inputs in another order (g_idx)")
    return layer
