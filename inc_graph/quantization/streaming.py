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
from inc_graph.quantization.checkpoint_names import Made, made_by_transformers
from inc_graph.quantization.layers import tensors_of
from inc_graph.quantization.leaf import Leaf

__all__ = [
    "Checkpoint",
    "Filled",
    "Source",
    "checkpoint_for",
    "filled",
    "float_layer",
    "give_back",
    "held",
    "is_streamed",
    "read_rest",
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

    def made(self, names: list[str], prefix: str, table: Mapping[str, Made]) -> Made | None:
        """How the first of a tensor's names that is known is made: as the table says, or of that name in the files,
        with or without `prefix`, as base models are saved. None if nothing is there for any of them."""
        for name in names:
            if name in table:
                return table[name]
        for name in names:
            for there in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if there in self.files:
                    return Made(name, (("", there),))
        return None

    def read(self, made: Made, like: Tensor) -> Tensor:
        """The values, in the dtype of `like`. ConfigError if they have another shape, or are codes."""
        found = made.value(lambda name: self._tensor(name, like))
        if found.shape != like.shape:
            file = self.files[made.keys[0][1]].name
            shapes = f"{list(found.shape)} in {file}, and {list(like.shape)} in the model"
            raise ConfigError(f"tensor {made.name!r} has shape {shapes}", hint="the checkpoint must be of this model")
        return found

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        try:
            with _open(self.files[name]) as tensors:
                found: Tensor = tensors.get_tensor(name)
        except (OSError, ValueError) as e:
            raise ConfigError(f"{self.files[name]}: tensor {name!r} cannot be read: {e}") from e
        if like.is_floating_point() and not (found.is_floating_point() and found.itemsize > 1):
            text = (
                f"tensor {name!r} of {self.files[name].name} is of {found.dtype}: the checkpoint is quantized already"
            )
            raise ConfigError(text, hint="give one with float values")
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
    made: Mapping[int, Made]  # id of a parameter -> what it is made of
    filled: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, compare=False, repr=False)
    """What was read for good, by `read_rest` -> name in the checkpoint."""

    def name_of(self, parameter: Tensor) -> str | None:
        """Name in the checkpoint of a parameter, be it empty still or filled; None if it is not from there."""
        if not parameter.is_meta:
            name: str | None = self.filled.get(parameter)
            return name
        made = self.made.get(id(parameter))
        return None if made is None else made.name

    def value(self, empty: Tensor) -> Tensor:
        return self.checkpoint.read(self.made[id(empty)], empty)


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
    prefix, table = getattr(model, "base_model_prefix", ""), made_by_transformers(model, checkpoint.files)
    made = {key: checkpoint.made(names, prefix, table) for key, names in empty.items()}
    if missing := [empty[key][0] for key, how in made.items() if how is None]:
        raise _missing(checkpoint, missing, [how for how in made.values() if how is not None])
    return Source(checkpoint, {key: how for key, how in made.items() if how is not None})


def _missing(checkpoint: Checkpoint, missing: list[str], made: list[Made]) -> ConfigError:
    """The error of a checkpoint without some of the values; says what it has instead."""
    used = {key for how in made for _, key in how.keys}
    others = [name for name in checkpoint.files if name not in used]
    text = f"model_path {str(checkpoint.folder)!r} has no tensor {missing[0]!r}"
    if len(missing) > 1:
        text += f", and nothing for {len(missing) - 1} more of the model's parameters"
    if others:
        text += f"; it has {len(others)} that the model has no place for, such as {others[0]!r}"
    hint = "the checkpoint must be of this model; if it can be loaded in another way, load it, and quantize that"
    return ConfigError(text, module=missing[0].rpartition(".")[0], hint=hint)


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


@dataclass(frozen=True)
class Filled:
    """A tensor of a model outside of the layers that are streamed, and what takes its place."""

    owner: nn.Module
    name: str
    empty: Tensor
    value: Tensor

    def put(self, tensor: Tensor) -> None:
        """Put one of the two in its place."""
        table = self.owner._parameters if self.name in self.owner._parameters else self.owner._buffers
        table[self.name] = tensor  # type: ignore[assignment]


def read_rest(model: nn.Module, source: Source, inside: list[str]) -> list[Filled]:
    """Read every empty tensor that is in no layer at the paths `inside`; shared ones once. The model is not changed."""
    known: dict[int, Tensor] = {}
    found = []
    for _, owner, name, tensor in tensors_of(model, inside):
        if not tensor.is_meta:
            continue
        if id(tensor) not in known:
            value = source.value(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
            source.filled[known[id(tensor)]] = source.made[id(tensor)].name
        found.append(Filled(owner, name, tensor, known[id(tensor)]))
    return found


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
