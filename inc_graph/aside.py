"""Tensors put aside into a temporary file: they take no memory until they are asked for.

What calibration keeps may be more than the memory there is. The file has no name, so that it is gone when the process
ends, however that happens; it lies where `tempfile` puts such files (the environment variable TMPDIR says where).
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inc_graph.errors import IncError

__all__ = ["Aside", "Kept", "Waiting"]

_LEAST = 4096  # bytes; what is smaller stays in memory


class Aside:
    """The file. Room of what nobody waits for any more is used again.

    Attributes:
        size: Bytes of the file.
    """

    def __init__(self) -> None:
        self.size = 0
        self._file: Any = None
        self._free: dict[int, list[int]] = {}  # bytes -> places
        self._lock = threading.RLock()  # the file has one position

    def put(self, tree: Any) -> Waiting:
        """Write the tensors of a pytree. They may be changed afterwards.

        Raises:
            IncError: there is no room for them.
        """
        leaves, spec = pytree.tree_flatten(tree)
        with torch.inference_mode(False), torch.no_grad():
            kept = [x if not isinstance(x, Tensor) else self._written(x) if _fits(x) else _copy(x) for x in leaves]
        return Waiting(self, kept, spec)

    def _written(self, x: Tensor) -> _Place:
        kept = x.detach().cpu()
        kept = kept if _dense(kept) else kept.clone()
        at = -1
        with self._lock:
            try:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(buffering=0)
                if free := self._free.get(kept.nbytes):
                    at = free.pop()
                else:
                    at, self.size = self.size, self.size + kept.nbytes
                place = _Place(at, kept.shape, kept.stride(), kept.dtype, x.device, kept.nbytes)
                self._file.seek(at)
                _all(self._file.write, kept)
            except OSError as e:
                if at >= 0:
                    self._free.setdefault(kept.nbytes, []).append(at)
                hint = "set the environment variable TMPDIR to a folder with more room"
                raise IncError(f"{kept.nbytes} bytes cannot be put into a temporary file: {e}", hint=hint) from e
        return place

    def _read(self, place: _Place) -> Tensor:
        flat = torch.empty(place.nbytes // place.dtype.itemsize, dtype=place.dtype)
        with self._lock:
            self._file.seek(place.at)
            _all(self._file.readinto, flat)
        return flat.as_strided(place.shape, place.stride).to(place.device)

    def _leave(self, places: Iterable[_Place]) -> None:
        with self._lock:
            for place in places:
                self._free.setdefault(place.nbytes, []).append(place.at)

    def __deepcopy__(self, memo: dict[int, Any]) -> Aside:
        return self  # nothing that is written is changed while somebody waits for it


@dataclass(frozen=True)
class _Place:
    """Where in the file a tensor is, and what it was."""

    at: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int


@dataclass(eq=False)
class Waiting:
    """A pytree whose tensors are in the file. Copies share it."""

    aside: Aside
    leaves: list[Any] = field(repr=False)
    spec: Any = field(repr=False)

    def get(self) -> Any:
        """The tree, with tensors of its own."""
        with torch.inference_mode(False), torch.no_grad():
            leaves = [
                self.aside._read(x) if isinstance(x, _Place) else _copy(x) if isinstance(x, Tensor) else x
                for x in self.leaves
            ]
        return pytree.tree_unflatten(leaves, self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return self

    def __del__(self) -> None:
        self.aside._leave(x for x in self.leaves if isinstance(x, _Place))


class Kept:
    """A row of trees that can be read and replaced one by one; in the file, or in memory if there is none.

    Args:
        values: Trees, or such that wait in a file.
        aside: Where new ones are put; None: nowhere.
    """

    def __init__(self, values: Sequence[Any], aside: Aside | None) -> None:
        self._values, self._aside = list(values), aside

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, i: int) -> Any:
        value = self._values[i]
        return value.get() if isinstance(value, Waiting) else value

    def __setitem__(self, i: int, value: Any) -> None:
        self._values[i] = value if self._aside is None else self._aside.put(value)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def _fits(x: Any) -> bool:
    """Whether it is worth it, and bytes are all there is to the tensor."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_quantized
    return plain and not (x.is_meta or x.is_conj() or x.is_neg()) and x.nbytes >= _LEAST


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def _dense(x: Tensor) -> bool:
    """Whether its elements fill a piece of memory, in some order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def _all(move: Any, x: Tensor) -> None:
    """Write the memory of a dense tensor, or read into it; the system may do it in parts."""
    memory = memoryview((ctypes.c_char * x.nbytes).from_address(x.data_ptr())).cast("B")
    done = 0
    while done < len(memory):
        count = move(memory[done:])
        if not count:
            raise OSError("the file ends")
        done += count
