"""Which operators stand half precision: a table, with reasons.

    HALF      computes in half precision: products summed up in float32 inside of the kernel, and table lookups
    FOLLOW    as good in one as in the other: what moves values, and what rounds each value once; it goes where that
              saves casts
    FLOAT     stays float32, for the reason that the table gives; so does every operator that is not in it

The lists follow what autocast does (https://docs.pytorch.org/docs/stable/amp.html) with two differences: lookups are
HALF, since the table is the largest tensor of many encoders and nobody multiplies by it; elementwise operators do not
go to float32 because one of their inputs is.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from inc_graph.graph import get_tensor, is_float

__all__ = ["FLOAT", "FOLLOW", "HALF", "class_of", "is_mask", "limits", "tensor_limits"]

HALF, FOLLOW, FLOAT = "half", "follow", "float"

_HALF = """linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution matmul mm bmm
addmm baddbmm scaled_dot_product_attention embedding"""

_FOLLOW = """
relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu mish threshold glu prelu
add sub rsub mul div neg abs sign clamp clamp_min clamp_max maximum minimum where masked_fill dropout lerp
view reshape _unsafe_view view_as transpose permute t movedim swapaxes expand expand_as unsqueeze squeeze flatten
unflatten slice select narrow diagonal unfold cat stack concat split split_with_sizes chunk unbind tensor_split
contiguous clone alias detach pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d
replication_pad2d gather index index_select take_along_dim flip roll repeat repeat_interleave tile triu tril
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest1d upsample_nearest2d"""

_FLOAT = {
    "its sum over many values would be rounded at each step": """sum mean nansum nanmean cumsum prod cumprod norm
    linalg_vector_norm linalg_norm frobenius_norm trace logsumexp logcumsumexp dot vdot""",
    "a softmax divides by a sum of exponentials": "softmax _softmax log_softmax _log_softmax _safe_softmax",
    "its mean and variance are sums over many values": """layer_norm native_layer_norm group_norm native_group_norm
    rms_norm _fused_rms_norm batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    instance_norm var std var_mean std_mean local_response_norm""",
    "it turns a rounding error of its input into a larger one": """exp exp2 expm1 log log2 log10 log1p pow rsqrt sqrt
    reciprocal softplus logit erf erfc erfinv sinh cosh atanh acosh logaddexp""",
    "angles and positions need more than the 8 or 11 bits of half precision": """sin cos tan asin acos atan atan2 arange
    linspace remainder fmod floor ceil round trunc grid_sampler affine_grid_generator upsample_bilinear2d
    upsample_bicubic2d upsample_linear1d upsample_trilinear3d""",
    "a loss is a sum of small differences": """mse_loss l1_loss smooth_l1_loss huber_loss nll_loss nll_loss_forward
    cross_entropy_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div cosine_embedding_loss
    hinge_embedding_loss margin_ranking_loss triplet_margin_loss ctc_loss poisson_nll_loss""",
    "a distance is a difference of values that are close to each other": """cdist pdist dist cosine_similarity
    pairwise_distance _cdist_forward _euclidean_dist""",
    "it rounds its state at every step": "lstm gru rnn_tanh rnn_relu",
    "decompositions have no kernel in half precision": """linalg_qr linalg_svd linalg_eigh linalg_inv linalg_solve
    linalg_cholesky cholesky inverse pinverse linalg_det slogdet fft_fft fft_rfft fft_irfft stft istft""",
}
_CLASSES: dict[str, tuple[str, str]] = {
    **{name: (FLOAT, reason) for reason, names in _FLOAT.items() for name in names.split()},
    **dict.fromkeys(_FOLLOW.split(), (FOLLOW, "")),
    **dict.fromkeys(_HALF.split(), (HALF, "")),
}
_UNKNOWN = (FLOAT, "the table of mixed precision does not know it")


def class_of(node: fx.Node) -> tuple[str, str]:
    """(HALF, FOLLOW or FLOAT, the reason for FLOAT) of an operator call."""
    if node.target is operator.getitem:
        return FOLLOW, ""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.is_mutable:
        return _UNKNOWN
    namespace, _, name = str(schema.name).partition("::")
    found = _CLASSES.get(name, _UNKNOWN) if namespace == "aten" else _UNKNOWN
    if found[0] == HALF and name == "embedding" and any(node.args[3:5]):
        return FLOAT, "a lookup that scales gradients, or a sparse one"
    return found


def limits(node: fx.Node, dtype: torch.dtype) -> str | None:
    """Why the numbers among the arguments of a call do not fit half precision; None if they do."""
    high = torch.finfo(dtype).max
    found: list[Any] = [a for a in (*node.args, *node.kwargs.values()) if type(a) in (int, float)]
    beyond = next((a for a in found if abs(a) > high and abs(a) != float("inf")), None)
    return None if beyond is None else f"its constant {beyond:g} is beyond {str(dtype).removeprefix('torch.')}"


def tensor_limits(
    gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype, varying: Collection[fx.Node], written: Collection[str]
) -> str | None:
    """Why the stored tensors that a call reads, as they are or moved, do not fit half precision; None if they do.

    Infinities stay infinities, and an additive mask of attention saturates when it is cast: these fit.

    Args:
        varying: Nodes that depend on inputs of the model.
        written: Buffers that the model writes to: what they hold now says nothing.
    """
    high = torch.finfo(dtype).max
    for read in _constants(node, varying):
        if str(read.target) not in written and (found := _largest(get_tensor(gm, read).detach())) > high:
            return f"{read.target}, which it reads, holds {found:g}, beyond {str(dtype).removeprefix('torch.')}"
    return None


def is_mask(reader: fx.Node, value: fx.Node) -> bool:
    """Whether a value is the additive mask of an attention, and nothing else of it."""
    attention = reader.target is torch.ops.aten.scaled_dot_product_attention.default
    return attention and reader.args[3:4] == (value,) and value not in reader.args[:3]


def _constants(node: fx.Node, varying: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The float tensors of the graph module that the inputs of a call are made of."""
    open_ = [n for n in reversed(node.all_input_nodes) if is_float(n) and not is_mask(node, n)]
    seen = set(open_)
    while open_:
        source = open_.pop()
        if source.op == "get_attr":
            yield source
        elif source not in varying:
            new = [n for n in source.all_input_nodes if is_float(n) and n not in seen]
            seen.update(new)
            open_ += new


def _largest(tensor: torch.Tensor) -> float:
    """The largest finite absolute value."""
    if tensor.is_meta or not tensor.numel() or tensor.dtype.itemsize == 1:  # fp8 fits
        return 0.0
    found = max(abs(float(end)) for end in torch.aminmax(tensor))  # one pass over the memory, and NaN spreads
    if found < float("inf"):
        return found
    return float(torch.where(tensor.isfinite(), tensor, 0).abs().max())
