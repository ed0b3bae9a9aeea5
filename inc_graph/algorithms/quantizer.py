"""Base class of own methods: what they do in each phase."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from inc_graph.common.mode import Mode

__all__ = ["Quantizer", "get_quantizer", "postprocess_model"]


class Quantizer(ABC):
    """A method. A subclass says how a model is prepared for calibration data, and converted afterwards.

    Args:
        quant_config: What to do, in whatever form the subclass wants it; kept in the attribute of that name.
    """

    def __init__(self, quant_config: Any = None) -> None:
        self.quant_config = quant_config

    @abstractmethod
    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, ready for calibration data."""

    @abstractmethod
    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The quantized model, of one that was prepared."""

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """`prepare`, then `run_fn(model, *run_args)` if there is a keyword argument `run_fn`, then `convert`."""
        model = self.prepare(model, *args, **kwargs)
        if (run_fn := kwargs.get("run_fn")) is not None:
            run_args = kwargs.get("run_args")
            many = isinstance(run_args, tuple | list)
            run_fn(model, *(() if run_args is None else run_args if many else (run_args,)))
        return self.convert(model, *args, **kwargs)

    def load(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model in the form that a saved one's tensors are loaded into. See `register_algo(load=True)`."""
        raise NotImplementedError(f"{type(self).__name__} has no `load`")

    def execute(self, model: nn.Module, mode: Mode | str, *args: Any, **kwargs: Any) -> nn.Module:
        """What the mode asks for: `prepare`, `convert`, `quantize` or `load`, with the other arguments.

        Raises:
            ValueError: there is no such mode.
        """
        return getattr(self, Mode(mode).value)(model, *args, **kwargs)


_KEPT = "_inc_quantizers"


def get_quantizer(model: nn.Module, quantizer_cls: Any, quant_config: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The quantizer of this class that `postprocess_model` left on a prepared model, else a new one."""
    kept = (q for q in model.__dict__.get(_KEPT, ()) if isinstance(q, quantizer_cls))
    return next(kept, None) or quantizer_cls(quant_config, *args, **kwargs)


def postprocess_model(model: nn.Module, mode: Mode | str, quantizer: Any) -> None:
    """Leave the quantizer on a prepared model, for `get_quantizer` in the next phase, and take it off a converted one.

    A model may go through several methods: each finds its own quantizer again. The attribute `quantizer` is the last.
    """
    kept = [q for q in model.__dict__.pop(_KEPT, ()) if q is not quantizer]
    if Mode(mode) is Mode.PREPARE:
        kept.append(quantizer)
    model.__dict__.pop("quantizer", None)
    if kept:  # past nn.Module, for which a quantizer that is a module would become a part of the model
        model.__dict__.update({_KEPT: kept, "quantizer": kept[-1]})
