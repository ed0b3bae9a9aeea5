"""Whether a kernel may be called past torch's dispatcher.

Compiled code is handed addresses, so that whoever watches operators go by (a tracer, fake tensors, a transform of
`torch.func`) would see only the memory that is made for its result. A call that is recorded goes through an operator of
ours; what is transformed is computed by torch's own operators, which have derivatives and batching rules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inc_graph.errors import LoweringError

__all__ = ["is_direct", "is_transformed", "is_watched", "packed_as_operator"]

_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state


def is_watched() -> bool:
    """Whether calls are recorded (torch.compile, make_fx, torch.jit.trace, any dispatch mode) or transformed."""
    return (
        _compiling() or _modes() > 0 or _trace() is not None or _transforms() is not None
        or forward_ad._current_level >= 0
    )  # fmt: skip


def is_transformed() -> bool:
    """Whether there is a transform of `torch.func`, or forward-mode differentiation. The compiler has its own ways."""
    return not _compiling() and (_transforms() is not None or forward_ad._current_level >= 0)


def is_direct(x: Tensor) -> bool:
    """Whether compiled code may take the address of `x`: plain memory on the CPU, and nobody watches."""
    return type(x) is Tensor and x.device.type == "cpu" and not is_watched()


def packed_as_operator(has_operator: bool) -> bool:
    """Whether a layer that is packed for oneDNN is called through its operator, where there is one.

    Raises:
        LoweringError: within `torch.jit.trace`, which can record neither the operator nor the packed weight.
    """
    if not is_watched():
        return False
    if not _compiling() and _trace() is not None:
        raise LoweringError(
            "torch.jit.trace cannot record a layer that is packed for oneDNN",
            hint="save the model with inc_graph.quantization.save, compile it with torch.compile, or convert it for "
            "backend='eager'",
        )
    return has_operator
