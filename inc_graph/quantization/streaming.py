"""Weights that stay in their checkpoint until a layer needs them.

A model from `load_empty_model` has shapes and no values. Its layers are prepared and quantized one at a time (block by
block where a method runs data through blocks): each is read from the safetensors files, used, and dropped again, so
that the float model is never in memory as a whole. What is in no quantized layer (tables, norms) is read once and kept.
The fields `use_layer_wise` and `use_block_wise` of configs ask for what is done with such a model in any case.
"""

from __future__ import annotations

import copy
import ctypes
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from inc_graph.errors import CaptureError, ConfigError, IncWarning
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.layers import tensors_of
from inc_graph.quantization.leaf import Leaf

__all__ = [
    "Checkpoint",
    "Source",
    "checkpoint_for",
    "fill_rest",
    "filled",
    "float_layer",
    "give_back",
    "held",
    "is_streamed",
    "source_of",
    "stream",
    "warn_unused",
]

_OF_FILES = ("model_path", "use_layer_wise", "use_block_wise")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass
class Checkpoint:
    """The tensors of a folder of safetensors files, by name; each is read when it is asked for.

    Args:
        folder: With `model.safetensors`, or shards and `model.safetensors.index.json`; or one file.

    Raises:
        ConfigError: there is no such file, or a file is damaged.
    """

    folder: Path
    files: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        try:
            self.files = dict(self._find())
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(f"model_path {str(self.folder)!r} cannot be read: {type(e).__name__}: {e}") from e

    def _find(self) -> Iterator[tuple[str, Path]]:
        index = self.folder / _INDEX
        if self.folder.is_file():
            files = {self.folder}
        elif index.is_file():
            files = {
                self.folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
        elif (self.folder / _SINGLE).is_file():
            files = {self.folder / _SINGLE}
        else:
            hint = "a folder that transformers' save_pretrained writes, or one file"
            raise ConfigError(f"model_path {str(self.folder)!r} has no {_SINGLE} and no {_INDEX}", hint=hint)
        for file in sorted(files):
            with _open(file) as tensors:
                yield from ((name, file) for name in tensors.keys())

    def name_of(self, names: list[str], prefix: str = "") -> str:
        """The first of a tensor's names that is in the files; with or without `prefix`, as base models are saved."""
        for name in names:
            for there in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if there in self.files:
                    return there
        raise ConfigError(
            f"model_path {str(self.folder)!r} has no tensor {names[0]!r}",
            module=names[0].rpartition(".")[0],
            hint="the checkpoint must be of this model",
        )

    def read(self, name: str, like: Tensor) -> Tensor:
        """The tensor, in the dtype of `like`. ConfigError if it has another shape."""
        try:
            with _open(self.files[name]) as tensors:
                found = tensors.get_tensor(name)
        except (OSError, ValueError) as e:
            raise ConfigError(f"{self.files[name]}: tensor {name!r} cannot be read: {e}") from e
        if found.shape != like.shape:
            shapes = f"{list(found.shape)} in {self.files[name].name}, and {list(like.shape)} in the model"
            raise ConfigError(f"tensor {name!r} has shape {shapes}", hint="the checkpoint must be of this model")
        return found.to(like.dtype)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as e:
        raise ConfigError(f"{file} is damaged, or no safetensors file: {e}") from e


@dataclass(frozen=True)
class Source:
    """Where the values of a model's empty parameters are."""

    checkpoint: Checkpoint
    names: Mapping[int, str]  # id of a parameter -> name in the checkpoint
    filled: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, compare=False, repr=False)
    """What was read for good, by `fill_rest` -> name in the checkpoint."""

    def name_of(self, parameter: Tensor) -> str | None:
        """Name in the checkpoint of a parameter, be it empty still or filled; None if it is not from there."""
        name: str | None = self.names.get(id(parameter)) if parameter.is_meta else self.filled.get(parameter)
        return name

    def value(self, empty: Tensor) -> Tensor:
        return self.checkpoint.read(self.names[id(empty)], empty)


def checkpoint_for(model: nn.Module, model_path: str) -> Source | None:
    """Where the values of a model's empty parameters come from; None if it has all its values.

    Args:
        model_path: From the config; "" for where `load_empty_model` found the model.

    Raises:
        CaptureError: there are empty parameters, and nothing says where their values are.
        ConfigError: the checkpoint does not have all of them.
    """
    empty: dict[int, list[str]] = {}
    for path, _, _, tensor in tensors_of(model, ()):
        if tensor.is_meta:
            empty.setdefault(id(tensor), []).append(path)
    if not empty:
        return None
    folder = model_path or getattr(model, "path", "")
    if not folder:
        names = next(iter(empty.values()))
        raise CaptureError(
            f"tensor {names[0]!r} is on the meta device and has no values",
            hint="load the weights first, or give the config model_path, the folder of a checkpoint",
        )
    checkpoint = Checkpoint(Path(folder))
    prefix = getattr(model, "base_model_prefix", "")
    return Source(checkpoint, {key: checkpoint.name_of(names, prefix) for key, names in empty.items()})


def warn_unused(model: nn.Module, config: BaseConfig, stacklevel: int) -> None:
    """IncWarning for what a config says of reading weights from files, if the model has all its weights."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return
    members = [c for m in config._members() for c in (m, *m._local.values())]
    asked = [(c, name) for c in members for name in _OF_FILES if vars(c).get(name) and not c.fields[name].default]
    said = list(dict.fromkeys(f"{type(c).__name__}.{name}={getattr(c, name)!r}" for c, name in asked))
    if said:
        text = f"{', '.join(said)} not used: the model has its values already"
        hint = "inc_graph.utils.load_empty_model makes one whose layers are read when they are quantized"
        warnings.warn(f"{text}; {hint}", IncWarning, stacklevel=stacklevel + 1)


def filled(module: nn.Module, source: Source | None) -> nn.Module:
    """The module, or a copy of it with values in the place of empty parameters."""
    own = module._parameters
    if source is None or not any(p is not None and p.is_meta for p in own.values()):
        return module
    new = copy.copy(module)
    new._parameters = {
        name: nn.Parameter(source.value(p), requires_grad=False) if p is not None and p.is_meta else p
        for name, p in own.items()
    }
    return new


def fill_rest(model: nn.Module, source: Source, inside: list[str]) -> None:
    """Read every empty tensor that is in no layer at the paths `inside`; shared ones once."""
    known: dict[int, Tensor] = {}
    for _, owner, name, tensor in list(tensors_of(model, inside)):
        if not tensor.is_meta:
            continue
        if id(tensor) not in known:
            value = source.value(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
            source.filled[known[id(tensor)]] = source.names[id(tensor)]
        table = owner._parameters if name in owner._parameters else owner._buffers
        table[name] = known[id(tensor)]  # type: ignore[assignment]


@dataclass
class _Stream:
    """How the graph of one layer gets its values, and loses them again."""

    source: Source
    module: nn.Module  # empty
    uses: int = 0

    def load(self, gm: fx.GraphModule) -> None:
        self.uses += 1
        if self.uses > 1:
            return
        real = filled(self.module, self.source)
        for name, tensor in list(gm._parameters.items()):
            if tensor is not None and tensor.is_meta:
                value = real._parameters.get(name.removesuffix("_t"))
                assert value is not None
                turned = name.endswith("_t")
                gm._parameters[name] = nn.Parameter(value.t().contiguous(), requires_grad=False) if turned else value

    def __deepcopy__(self, memo: Any) -> _Stream:
        return _Stream(self.source, self.module)  # the names in the checkpoint are those of these parameters

    def drop(self, gm: fx.GraphModule) -> None:
        self.uses -= 1
        if self.uses == 0:
            _empty(gm, self.module)
            give_back()


def _empty(gm: fx.GraphModule, module: nn.Module) -> None:
    for name, tensor in list(gm._parameters.items()):
        if tensor is not None and name.removesuffix("_t") in module._parameters:
            gm._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)


def stream(leaf: Leaf, source: Source, module: nn.Module) -> None:
    """Empty the graph of a prepared layer, whose float layer is `module`, empty too; from now on its values are there
    while it runs, and within `held`."""
    gm: Any = leaf.inner
    found = leaf.__dict__["_stream"] = _Stream(source, module)
    leaf.__dict__["_original"] = (module,)
    for name in [n for n, b in gm._buffers.items() if n.removesuffix("_t") in module._parameters]:
        gm.register_parameter(name, nn.Parameter(gm._buffers.pop(name), requires_grad=False))
    _empty(gm, module)
    gm.register_forward_pre_hook(lambda module, args: found.load(module))
    gm.register_forward_hook(lambda module, args, result: found.drop(module), always_call=True)


def source_of(leaf: Leaf) -> Source | None:
    """Where the values of a layer are, if they are in a file."""
    found: _Stream | None = leaf.__dict__.get("_stream")
    return None if found is None else found.source


def is_streamed(leaf: Leaf) -> bool:
    """Whether the layer's values are in a file."""
    return "_stream" in leaf.__dict__


def float_layer(leaf: Leaf) -> nn.Module:
    """The float layer of a leaf, with its values."""
    found: _Stream | None = leaf.__dict__.get("_stream")
    assert leaf.original is not None
    return leaf.original if found is None else filled(found.module, found.source)


@contextmanager
def held(leaf: Leaf) -> Iterator[None]:
    """Within, the graph of the layer has its values."""
    found: _Stream | None = leaf.__dict__.get("_stream")
    if found is None:
        yield
        return
    gm: Any = leaf.inner
    found.load(gm)
    try:
        yield
    finally:
        found.drop(gm)


def give_back() -> None:
    """Have the C library return memory that is not in use: what a layer took is scattered among what stays."""
    with suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
