"""Tensors in safetensors files: written shard by shard, mapped when they are read.

A record in a graph says which entry it is, its dtype and shape. Equal tensors are written once. Where several different
ones lie in the same memory, the part of it that they cover is written, with a view for each: they share it again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from inc_graph.errors import SavedModelError
from inc_graph.graph import storage_key
from inc_graph.saving.values import dtype_of

__all__ = ["TensorReader", "TensorWriter", "file_hash"]

_PLAIN = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
})  # fmt: skip
_SMALL = 1 << 16  # bytes: below, a tensor is copied; a mapping for each would be more expensive


def file_hash(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclass
class _Entry:
    name: str
    nbytes: int
    get: Callable[[], torch.Tensor]


@dataclass
class TensorWriter:
    """Collects tensors, and writes them."""

    entries: list[_Entry] = field(default_factory=list)
    _known: dict[Any, dict[str, Any]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _alive: list[Any] = field(default_factory=list)  # a freed tensor's address would stand for another one
    _spans: dict[Any, dict[Any, tuple[int, int]]] = field(default_factory=dict)  # memory -> form -> first, last + 1

    def expect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tell of tensors that will be added, so that those which share memory are known before the first is."""
        for tensor in tensors:
            if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
                self._alive.append(tensor)
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                first = int(tensor.storage_offset())
                spans = self._spans.setdefault((storage_key(tensor), tensor.dtype), {})
                spans[first, _form(tensor)] = (first, first + int(last) + 1)

    def add(
        self, path: str, tensor: torch.Tensor, node: Any = None, lazy: Callable[[], torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """The record of a tensor.

        Args:
            path: A name for it; another one is made if it is taken.
            tensor: Any dense tensor with values.
            node: For messages; its value tells shape and dtype of a `lazy` one.
            lazy: Gives the tensor when it is written; `tensor` is a placeholder then.
        """
        if lazy is not None:
            value = node.meta["val"]
            count = value.numel() * value.element_size()
            return self._entry(path, ("lazy", id(lazy)), value.shape, value.dtype, count, lazy)
        _check(path, tensor, node)
        tensor = tensor.detach()
        self._alive.append(tensor)
        key = (storage_key(tensor), tensor.dtype)
        spans = self._spans.get(key, {})
        if len(spans) > 1 and tensor.numel():  # several, in one memory
            low, high = min(a for a, _ in spans.values()), max(b for _, b in spans.values())
            flat = tensor.as_strided((high - low,), (1,), low)
            base = self._entry(path, (key, "all"), flat.shape, flat.dtype, flat.nbytes, lambda: flat)
            return {**base, "view": [list(tensor.shape), list(tensor.stride()), tensor.storage_offset() - low]}
        if _dense(tensor):
            place = (key, tensor.storage_offset(), _form(tensor))
            record = self._entry(path, place, tensor.shape, tensor.dtype, tensor.nbytes, lambda: tensor)
            if not tensor.is_contiguous():
                return {**record, "stride": list(tensor.stride())}
            if record["shape"] != list(tensor.shape):  # the same numbers in another shape
                return {**record, "view": [list(tensor.shape), list(tensor.stride()), 0]}
            return record
        # what is repeated is written once; what lies between the elements is none of its values, and left out
        repeated = [d for d, (s, n) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)) if s == 0 and n > 1]
        once = tensor[tuple(slice(0, 1) if d in repeated else slice(None) for d in range(tensor.ndim))]
        place = (key, tensor.storage_offset(), _form(tensor))
        record = self._entry(path, place, once.shape, once.dtype, once.nbytes, lambda: once)
        stride = [0 if d in repeated else s for d, s in enumerate(once.contiguous().stride())]
        return {**record, "view": [list(tensor.shape), stride, 0]}

    def _entry(self, path: str, key: Any, shape: Any, dtype: torch.dtype, nbytes: int, get: Any) -> dict[str, Any]:
        if key not in self._known:
            name, number = path, 0
            while name in self._names:
                number += 1
                name = f"{path}~{number}"
            self._names.add(name)
            record = {"tensor": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(map(int, shape))}
            self._known[key] = record
            self.entries.append(_Entry(name, nbytes, get))
        return self._known[key]

    def write(self, folder: Path, limit: int) -> dict[Path, str]:
        """Write shards of at most `limit` bytes (or one tensor) into a folder: path -> sha256."""
        shards: list[list[_Entry]] = []
        size = limit
        for entry in self.entries:
            if size + entry.nbytes > limit or not shards:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += entry.nbytes
        files: dict[Path, str] = {}
        for number, shard in enumerate(shards, 1):
            part = folder / f"part-{number}"
            try:
                save_file({e.name: _as_stored(e.get()) for e in shard}, str(part), metadata={"format": "pt"})
            except SafetensorError as e:  # the disk is full, say
                raise OSError(str(e)) from e
            digest = file_hash(part)
            name = f"model-{digest[:16]}"
            name += f"-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else ".safetensors"
            files[part.rename(folder / name)] = digest
        return files


def _check(path: str, tensor: torch.Tensor, node: Any) -> None:
    reason = None
    if tensor.layout != torch.strided:
        reason = f"has {str(tensor.layout).removeprefix('torch.')} values: only dense tensors are saved"
    elif tensor.is_meta:
        reason = "is on the meta device and has no values"
    elif tensor.is_quantized or type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        reason = f"is a {type(tensor).__name__}: only plain tensors are saved"
    if reason is not None:
        raise SavedModelError(f"tensor {path} {reason}", node=node)


def _form(tensor: torch.Tensor) -> Any:
    """Equal for two tensors at one place that hold the same elements in the same order."""
    return tensor.numel() if tensor.is_contiguous() else (tuple(tensor.shape), tensor.stride())


def _dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a piece of memory, each once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype not in _PLAIN:  # as bytes
        tensor = tensor.reshape(-1).view(torch.uint8)
    # safetensors refuses memory that two entries share
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class TensorReader:
    """Gives the tensors of a saved model, mapped from its files: memory is taken as they are read.

    Args:
        folder: Where the files are, checked before.
        files: Their names.
        device: Where the tensors go.

    Raises:
        SavedModelError: one of them is no safetensors file, or two hold a tensor of one name.
    """

    def __init__(self, folder: Path, files: list[str], device: torch.device) -> None:
        self.device = device
        self._seen: dict[str, torch.Tensor] = {}
        self._file: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(os.fspath(folder / file), framework="pt")
                names = list(opened.keys())
            except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as e:
                raise SavedModelError(f"{folder / file} is not a safetensors file: {e}") from e
            for name in names:
                if name in self._file:
                    raise SavedModelError(f"{folder / file}: tensor {name[:80]!r} is in another file, too")
                self._file[name] = opened

    def get(self, path: str, record: Any) -> torch.Tensor:
        """The tensor of a record. SavedModelError, which names `path`, if they do not agree."""
        try:
            return self._get(record)
        except SavedModelError as e:
            raise SavedModelError(f"tensor {path[:80]}: {e.message}", hint=e.hint) from e

    def _get(self, record: Any) -> torch.Tensor:
        if not isinstance(record, dict) or not {"tensor", "dtype", "shape"} <= set(record):
            raise SavedModelError("its record cannot be read")
        name, shape = record["tensor"], record["shape"]
        if not isinstance(name, str) or name not in self._file:
            raise SavedModelError(f"no file has an entry {str(name)[:80]!r}")
        if not _integers(shape):
            raise SavedModelError(f"{str(shape)[:60]} is no shape")
        tensor = self._seen.get(name)
        if tensor is None:
            tensor = self._seen[name] = self._load(name, dtype_of(record["dtype"]), shape)
        if list(tensor.shape) != shape:
            raise SavedModelError(f"its file has shape {list(tensor.shape)}, the graph {str(shape)[:60]}")
        if "view" in record:
            return _view(tensor, record["view"])
        return _restride(tensor, record["stride"]) if "stride" in record else tensor

    def _load(self, name: str, dtype: torch.dtype, shape: Any) -> torch.Tensor:
        try:
            tensor = self._file[name].get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as e:
            raise SavedModelError(f"its file does not give it: {e}") from e
        if dtype not in _PLAIN and tensor.dtype == torch.uint8:
            try:
                tensor = tensor.view(dtype).reshape(shape)
            except (RuntimeError, TypeError) as e:
                raise SavedModelError(f"its file has not the bytes of {dtype} {str(shape)[:60]}") from e
        if tensor.dtype != dtype:
            raise SavedModelError(f"its file has {tensor.dtype}, the graph {dtype}")
        if self.device.type != "cpu":
            return tensor.to(self.device)
        return tensor.clone() if tensor.nbytes < _SMALL else tensor


def _integers(data: Any) -> bool:
    return isinstance(data, list) and all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in data)


def _view(base: torch.Tensor, data: Any) -> torch.Tensor:
    if isinstance(data, list) and len(data) == 3 and _integers(data[0]) and _integers(data[1]) and _integers(data[2:]):
        try:
            return base.as_strided(*data)
        except RuntimeError as e:
            raise SavedModelError(f"its view reaches out of its memory: {str(e)[:80]}") from e
    raise SavedModelError("its view cannot be read")


def _restride(tensor: torch.Tensor, stride: Any) -> torch.Tensor:
    if not _integers(stride) or len(stride) != tensor.ndim:
        raise SavedModelError("its strides cannot be read")
    order = sorted(range(tensor.ndim), key=lambda d: (-stride[d], d))
    back = sorted(range(tensor.ndim), key=order.__getitem__)
    new = tensor.permute(order).contiguous().permute(back)
    wanted = [s for s, n in zip(stride, tensor.shape, strict=True) if n > 1]
    if [s for s, n in zip(new.stride(), tensor.shape, strict=True) if n > 1] != wanted:
        raise SavedModelError("its strides are not those of a dense tensor")
    return new
