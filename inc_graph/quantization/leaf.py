"""One layer in module scope: what it takes, its graph, and the module that stands in its place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from inc_graph.errors import CaptureError, IncError
from inc_graph.graph import get_tensor, val
from inc_graph.oppattern import argument, pattern_of
from inc_graph.quantization import branches
from inc_graph.quantization.branches import stays_float
from inc_graph.quantization.model import QuantizedModel
from inc_graph.quantization.read_only import ReadOnly
from inc_graph.quantization.recurrent_leaf import RECURRENT, OnRows, call_recurrent, example_of, unfit_recurrent

__all__ = ["Form", "Leaf", "bare", "form_of", "is_layer", "is_plain_linear", "is_recurrent", "unfit"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Embedding, *_CONVS)
_LAYERS = (*_PLAIN, *RECURRENT)


def _is_hf_conv1d(module: nn.Module) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_layer(module: nn.Module) -> bool:
    """Whether module scope looks at this module: Linear, Conv*, Embedding, and the Conv1D of HF transformers.

    A quantized layer is none, although it is an `nn.Linear` to `isinstance`.
    """
    return not isinstance(module, Leaf) and (isinstance(module, _PLAIN) or _is_hf_conv1d(module))


def is_recurrent(module: nn.Module) -> bool:
    """Whether this is an LSTM or GRU, which methods take that find ranges at run time."""
    return not isinstance(module, Leaf) and isinstance(module, RECURRENT)


def unfit(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a layer cannot be replaced by its graph, None if it can."""
    if isinstance(module, RECURRENT):
        return unfit_recurrent(module)
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight and never calls it"
    kind = next((c for c in _LAYERS if isinstance(module, c)), None)
    own = type(module).forward is not kind.forward if kind else type(module).__name__ != "Conv1D"
    if "forward" in vars(module) or (own and not is_plain_linear(module)):
        return f"its class {type(module).__name__} has a forward of its own"
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"its weight is {getattr(weight, 'dtype', type(weight).__name__)}, not floating point"
    if weight.layout != torch.strided:
        return f"its weight is {str(weight.layout).removeprefix('torch.')}: only dense weights are quantized"
    if not isinstance(module._parameters.get("weight"), Tensor):
        return "its weight is computed from other parameters at each call"
    if weight.numel() == 0:
        return "its weight is empty"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its weight at each call"
    return None


@torch.no_grad()
def is_plain_linear(module: nn.Module) -> bool:
    """Whether a class derived from `nn.Linear` writes its forward anew, and it is that of `nn.Linear`, as Falcon's is.

    It has nothing but a weight and a bias, takes one argument, and agrees on numbers that are tried.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    arguments = inspect.signature(type(module).forward).parameters.values()
    one = len(arguments) == 2 and all(a.kind == a.POSITIONAL_OR_KEYWORD for a in arguments)
    weight = module.weight
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta"
    if not (one and plain and tensors <= {"weight", "bias"}) or any(True for _ in module.children()):
        return False
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    want = nn.functional.linear(x, weight, module.bias)
    try:
        got = type(module).forward(module, x)
    except Exception:  # it may want anything
        return False
    slack = 16 * torch.finfo(weight.dtype).eps * float(want.abs().max())
    same = isinstance(got, Tensor) and got.shape == want.shape and got.dtype == want.dtype
    return same and bool(((got - want).abs() <= slack).all())


@dataclass(frozen=True)
class Form:
    """What a layer takes.

    Attributes:
        kind: "rows" (linear: every dimension but the last is a row), "index" (embedding), "space" (convolution),
            "steps" (LSTM, GRU; see `recurrent_leaf`).
        rank: Rank that its graph is captured at.
        size: Size of the last dimension ("rows"), number of channels ("space"), 0 ("index").
        dtype: Of the input.
    """

    kind: str
    rank: int
    size: int
    dtype: torch.dtype

    def fault(self, x: Any) -> str | None:
        """Why the layer does not take `x`, None if it does."""
        if not isinstance(x, Tensor):
            return f"its input is {type(x).__name__}, not a tensor"
        if x.device.type == "meta":
            return "its input is on the meta device and has no values"
        if x.layout != torch.strided:
            return f"its input is {str(x.layout).removeprefix('torch.')}: only dense tensors are taken"
        if self.kind == "index":
            return None if x.dtype in (torch.int64, torch.int32) else f"its indices are {x.dtype}"
        if x.dtype != self.dtype:
            return f"its input is {x.dtype}, its weight {self.dtype}"
        at = -1 if self.kind == "rows" else 1 - self.rank
        fits = x.ndim >= 1 if self.kind == "rows" else x.ndim in (self.rank, self.rank - 1)
        if not fits or x.shape[at] != self.size:
            where = (
                "in the last dimension"
                if self.kind == "rows"
                else f"channels, and {self.rank} or {self.rank - 1} dimensions"
            )
            return f"its input has shape {list(x.shape)}, it takes {self.size} {where}"
        return None


def bare(module: nn.Module) -> nn.Module:
    """What a layer's graph is captured from: without the user's hooks, which are no part of it; as `nn.Linear` if it is
    one. The parameters are the layer's own."""
    if isinstance(module, RECURRENT):
        return OnRows(module)
    alike = copy.copy(module)
    if is_plain_linear(module):
        alike.__class__ = nn.Linear
    for name, value in vars(module).items():
        if "_hooks" in name and isinstance(value, dict):
            alike.__dict__[name] = type(value)()
    return alike


def form_of(module: nn.Module) -> tuple[Form, tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """(form, example inputs, dynamic dimensions of them) of a layer."""
    if isinstance(module, RECURRENT):
        examples, dims = example_of(module)
        return Form("steps", 3, module.input_size, examples[0].dtype), examples, dims
    form, example, dynamic = _form_of(module)
    return form, (example,), (dynamic,)


def _form_of(module: nn.Module) -> tuple[Form, Tensor, dict[int, Any]]:
    dynamic = torch.export.Dim.DYNAMIC
    weight: Any = module.weight
    if isinstance(module, nn.Embedding):
        example = torch.zeros(6, dtype=torch.int64, device=weight.device)
        return Form("index", 1, 0, torch.int64), example, {0: dynamic}
    if isinstance(module, _CONVS):
        reach = [d * (k - 1) + 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        shape = [2, module.in_channels, *(max(16, r) for r in reach)]
        dims = dict.fromkeys([0, *range(2, len(shape))], dynamic)
        form = Form("space", len(shape), module.in_channels, weight.dtype)
        return form, torch.zeros(shape, dtype=weight.dtype, device=weight.device), dims
    size = weight.shape[0] if _is_hf_conv1d(module) else weight.shape[1]
    form = Form("rows", 2, size, weight.dtype)
    return form, torch.zeros(6, size, dtype=weight.dtype, device=weight.device), {0: dynamic}


def _constant(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The value of a node that depends on constants only."""
    if node.op == "get_attr":
        return get_tensor(gm, node)
    return node.target(*fx.map_arg(node.args, lambda n: _constant(gm, n)))  # type: ignore[operator]


_SELECT = torch.ops.aten.index_select.default


def _autocast_is_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # torch refuses to say it of meta


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating point tensors of tuples and packed sequences in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.to(dtype), *value[1:])
    return tuple(_cast(v, dtype) for v in value) if isinstance(value, list | tuple) else value


class Leaf(nn.Module):
    """Stands where a layer stood; `inner` is the layer's observed graph, its quantized model once it is converted.

    What the layer has and this has not (`weight`, `in_features`) still answers: `weight` of a converted leaf is
    unpacked and dequantized at each access.
    """

    quantized: ClassVar[bool] = True
    """Tells it from a float layer, which it is to `isinstance` as well."""

    def __init__(self, inner: nn.Module, form: Form, path: str, original: nn.Module) -> None:
        nn.Module.__init__(self)  # not what a subclass inherits from the float layer
        self.inner, self.form, self.path = inner, form, path
        if isinstance(inner, QuantizedModel):
            inner.within = "inner."  # whose tensors `state_dict` calls those of the layer
        self.reason: str | None = None  # why it has to stay float, from how it is called
        self.number = branches.enroll(self)
        self._original: tuple[nn.Module, ...] = (
            original,
        )  # a tuple: not a submodule, so its parameters are not counted twice
        self._facts: dict[str, Any] = {}
        self._take_hooks(original)
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__  # not what an LSTM makes of it

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self.number = branches.enroll(self)  # a copy is another leaf

    def _take_hooks(self, other: nn.Module) -> None:
        """The user's hooks on a layer go on working."""
        for name, value in vars(other).items():
            if name.startswith("_forward_") and isinstance(value, dict):
                self.__dict__[name] = value.copy()

    def converted(self, inner: QuantizedModel) -> Leaf:
        """The leaf that runs `inner`; it does not hold the float layer any more."""
        original = self._original[0]
        leaf = _class_for(type(original))(inner, self.form, self.path, self)
        leaf._facts = {
            k: v for k, v in vars(original).items() if not k.startswith("_") and not isinstance(v, Tensor | nn.Module)
        }
        if self.form.kind != "steps" and original._parameters.get("bias") is None and hasattr(original, "bias"):
            leaf._facts["bias"] = None  # what bias correction may have added is the kernel's own
        leaf._original = ()
        return leaf

    @classmethod
    def loaded(
        cls, inner: QuantizedModel, form: Form, path: str, original: nn.Module, attributes: dict[str, Any]
    ) -> Leaf:
        """A converted leaf from its parts; hooks are those of the float layer that it replaces."""
        leaf = _class_for(type(original))(inner, form, path, original)
        leaf._facts, leaf._original = attributes, ()
        return leaf

    @property
    def original(self) -> nn.Module | None:
        """The float layer, None once it is converted."""
        return self._original[0] if self._original else None

    def forward(self, x: Any = None, *args: Any, input: Any = None, **kwargs: Any) -> Any:
        x = input if x is None else x  # the name that layers of torch give it
        if x is None:
            raise TypeError(f"{type(self).__name__} {self.path!r} is called without an input")
        if self._original and torch.compiler.is_dynamo_compiling() and stays_float(self.number):
            return self._original[0](x, *args, **kwargs)
        if self.form.kind == "steps":
            return self._sequences(x, *args, **kwargs)
        if args or kwargs:
            return self._extra(x, *args, **kwargs)
        if isinstance(x, Tensor) and self.form.kind != "index" and _autocast_is_on(x.device.type):
            return self._autocast(x)
        if not torch.compiler.is_compiling() and (fault := self.form.fault(x)) is not None:
            raise CaptureError(fault, module=self.path, hint="call the model with inputs like those of the float model")
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.form.kind == "rows":
            y = self.inner(x.reshape(-1, self.form.size))
            return y.reshape(*x.shape[:-1], y.shape[-1])
        if self.form.kind == "index":
            y = self.inner(x.reshape(-1).long())
            return y.reshape(*x.shape, y.shape[-1])
        if x.ndim == self.form.rank - 1:  # an unbatched image
            return self.inner(x[None])[0]
        return self.inner(x)

    def _sequences(self, x: Any, hx: Any = None) -> Any:
        """An LSTM or GRU; what autocast would have made of the results is made of them here."""
        data = x[0] if isinstance(x, PackedSequence) else x
        dtype = self.form.dtype
        if not (isinstance(data, Tensor) and _autocast_is_on(data.device.type)):
            return call_recurrent(self, self.inner, dtype, x, hx)
        kind = data.device.type
        x, hx = _cast((x, hx), dtype)
        with torch.autocast(kind, enabled=False):
            return _cast(call_recurrent(self, self.inner, dtype, x, hx), torch.get_autocast_dtype(kind))

    def _autocast(self, x: Tensor) -> Tensor:
        """The graph has the layer's own dtypes; what autocast would have made of the result is made of it here."""
        kind, dtype = x.device.type, torch.get_autocast_dtype(x.device.type)
        with torch.autocast(kind, enabled=False):
            return self(x.to(self.form.dtype)).to(dtype)

    def _extra(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A call the graph was not captured for (`output_size` of a transposed convolution) is the float layer's."""
        if self.original is None:
            hint = "calibrate with such calls, so that the layer stays float"
            raise CaptureError("called with more than its input, unlike in calibration", module=self.path, hint=hint)
        self.reason = "it is called with more than its input"
        return self.original(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            state = self.__dict__
            if state.get("_original"):
                return getattr(state["_original"][0], name)
            if name in state.get("_facts", ()):
                return state["_facts"][name]
            without = {"weight": ("steps",), "bias": ("steps", "index")}.get(name)
            if without is not None and state.get("_facts") and self.form.kind not in without:
                return self._tensor(name)
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise IncError(f"the {name} of a quantized layer cannot be replaced", module=self.path)
        nn.Module.__setattr__(self, name, value)  # an LSTM's own keeps a list of its weights

    def _tensor(self, name: str) -> Tensor | None:
        """Weight or bias as the kernels see it, in the shape that the layer had it."""
        inner: Any = self.inner
        gm, packed = inner.parts()
        layer = next(n for n in gm.graph.nodes if (p := pattern_of(n)) is not None and p.weight is not None)
        position = pattern_of(layer).weight if name == "weight" else 2  # type: ignore[union-attr]
        read = argument(layer, position or 0)
        if read is None:
            return None
        source = argument(layer, 0)
        order = argument(source, 2) if name == "weight" and source.target is _SELECT else None
        transposed = name == "weight" and _is_hf_conv1d(self)

        def values() -> Tensor:
            full = inner.graph if packed else gm
            value: Tensor = _constant(full, read)
            if order is not None:  # the codes are those of the input channels in this order
                value = torch.empty_like(value).index_copy_(1, get_tensor(full, order), value)
            return value.t() if transposed else value

        return ReadOnly.of(val(read).t() if transposed else val(read), values)

    # ------------------------------------------------------------------------------- as other modules see it
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Leaf:
        """A converted leaf takes inputs of the dtype that it was moved to."""
        nn.Module._apply(self, fn, recurse)
        if isinstance(self.inner, QuantizedModel) and self.form.kind != "index":
            x = next(iter(self.inner.parts()[0].graph.find_nodes(op="placeholder")))
            self.form = replace(self.form, dtype=val(x).dtype)
        return self

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Of a converted leaf the tensors of its graph, under the name of the layer itself."""
        keep: dict[str, Any] = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
        if isinstance(self.inner, QuantizedModel) and not self.inner.fixed:
            return self.inner.state_dict(*args, **keep)
        return nn.Module.state_dict(self, *args, **keep)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if isinstance(self.inner, QuantizedModel) and not self.inner.fixed:
            for key in [k for k in state_dict if k.startswith(prefix)]:
                state_dict[f"{prefix}inner.{key[len(prefix) :]}"] = state_dict.pop(key)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)

    def flatten_parameters(self) -> None:
        """What an LSTM does to the memory of its weights: there is nothing to do."""

    def reset_parameters(self) -> None:
        """What a float layer has, and this cannot."""
        raise IncError("the weight of a quantized layer cannot be set anew", module=self.path)

    def extra_repr(self) -> str:
        return self.path


def _class_for(kind: type[nn.Module]) -> type[Leaf]:
    """The class of the converted leaf in the place of a `kind`: what looks for layers of that kind, such as LoRA
    adapters, finds it. Called with the arguments of a `kind`, it makes a float layer."""
    base = next(c for c in kind.__mro__ if c in _LAYERS or c.__name__ == "Conv1D")
    if base not in _CLASSES:

        def new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
            return base(*args, **kwargs) if args and not isinstance(args[0], nn.Module) else object.__new__(cls)

        name = f"Quantized{base.__name__}"
        facts = {"__module__": __name__, "__doc__": f"A converted {base.__name__}.", "__new__": new}
        _CLASSES[base] = globals()[name] = type(name, (Leaf, base), facts)  # pickle looks it up here, then is refused
    return _CLASSES[base]


_CLASSES: dict[type[nn.Module], type[Leaf]] = {}
